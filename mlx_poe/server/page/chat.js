// The conversation: turns of prompt and reply, kept in memory only.

import { announce, button, copy, find, make } from "./dom.js";
import { Reply } from "./reply.js";

export class Chat {
  #turns = [];
  #running = null;
  #cleared = null;
  #atEnd = true;

  /** `onEdit(text)` puts a turn's text back into the composer. */
  constructor({ settings, onRunning, onKeyNeeded, onEdit }) {
    Object.assign(this, { settings, onRunning, onKeyNeeded, onEdit });
    this.element = find("chat");
    find("scroll").addEventListener("scroll", ({ target }) => {
      this.#atEnd = target.scrollHeight - target.scrollTop - target.clientHeight < 48;
    });
  }

  get empty() {
    return !this.#turns.length;
  }

  send(text) {
    this.#cleared?.remove();
    const turn = { prompt: text, kind: this.settings.model.poe.chat ? "chat" : "text", answered: false };
    turn.element = make("article.turn");
    if (turn.kind === "chat") turn.element.append(make("p.prompt", {}, text));
    turn.body = make("div");
    turn.element.append(turn.body);
    this.#turns.push(turn);
    this.element.append(turn.element);
    return this.#answer(turn);
  }

  stop() {
    this.#running?.abort();
  }

  /** Retries the last turn if it failed for lack of a key. */
  retryRefused() {
    const turn = this.#turns.at(-1);
    if (turn?.refusedKey) this.#answer(turn);
  }

  clear() {
    this.stop();
    const turns = this.#turns;
    this.#turns = [];
    this.#cleared?.remove();
    const nodes = [...this.element.children];
    this.#cleared = make(
      "p.notice.cleared",
      {},
      "Conversation cleared. ",
      button("Undo", () => {
        this.#cleared.remove();
        this.#turns = turns;
        this.element.replaceChildren(...nodes);
        find("prompt").focus();
      }),
    );
    this.element.replaceChildren(...(turns.length ? [this.#cleared] : []));
    announce("Conversation cleared");
  }

  async #answer(turn) {
    if (this.#running) return;
    const { model, modePicker, shared } = this.settings;
    // A retry uses the current settings, but keeps the kind of request unless the model cannot chat.
    const kind = turn.kind === "chat" && !model.poe.chat ? "text" : turn.kind;
    const running = (this.#running = new AbortController());
    turn.answered = turn.refusedKey = false;
    const reply = (turn.reply = new Reply({
      stages: model.poe.stages,
      label: `${model.id} · ${modePicker.mode}`,
      given: kind === "text" ? turn.prompt : "",
    }));
    turn.element.classList.remove("unanswered");
    turn.body.replaceChildren(reply.element);
    this.onRunning(true);
    this.#atEnd = true;
    this.#follow();
    announce("Reply started");
    try {
      const asked = kind === "text" ? { prompt: turn.prompt } : { messages: this.#messages(turn) };
      const request = { ...shared, ...modePicker.request, ...asked };
      const complete = await reply.run(request, running.signal, () => this.#follow());
      turn.answered = complete || reply.text !== "";
      turn.body.append(this.#actions(turn, kind));
      announce(`${complete ? "Reply finished" : "Stopped"}: ${reply.meters.summary}`);
    } catch (error) {
      this.#failed(turn, error);
    }
    turn.element.classList.toggle("unanswered", !turn.answered);
    this.#running = null;
    this.onRunning(false);
    this.#follow();
  }

  /** All earlier answered turns, then this turn's prompt. */
  #messages(turn) {
    const messages = [];
    if (this.settings.system) messages.push({ role: "system", content: this.settings.system });
    for (const { prompt, reply, answered, kind } of this.#turns.slice(0, this.#turns.indexOf(turn))) {
      if (!answered || kind !== "chat") continue;
      messages.push({ role: "user", content: prompt }, { role: "assistant", content: reply.text });
    }
    return [...messages, { role: "user", content: turn.prompt }];
  }

  #actions(turn, kind) {
    const whole = turn.reply.given + turn.reply.text;
    const actions = make(
      "div.actions",
      {},
      button("Copy", (from) => copy(whole, from)),
      make("span.last-only", {}, button("Retry", () => this.#answer(turn))),
    );
    if (kind === "text") {
      actions.lastChild.append(button("Continue", () => this.send(whole)));
    }
    if (!turn.answered) actions.lastChild.append(this.#edit(turn));
    return actions;
  }

  #edit(turn) {
    return button("Edit", () => {
      this.#turns = this.#turns.filter((other) => other !== turn);
      turn.element.remove();
      this.onEdit(turn.prompt);
    });
  }

  #failed(turn, error) {
    if (!("status" in error)) console.error(error);
    const message = "status" in error ? error.message : `This page failed: ${error.message}`;
    const again = button("Try again", () => this.#answer(turn), false);
    turn.body.append(
      make(
        "div.error",
        { role: "alert" },
        make("p", {}, message),
        make("div.actions", {}, again, this.#edit(turn)),
      ),
    );
    if (!turn.reply.text) turn.reply.element.remove();
    if (error.status === 401) {
      turn.refusedKey = true;
      this.onKeyNeeded(message);
    }
    if (error.retryAfter) countDown(again, error.retryAfter);
  }

  /** Keeps the end in view, unless the reader has scrolled up. */
  #follow() {
    const scroll = find("scroll");
    if (this.#atEnd) scroll.scrollTop = scroll.scrollHeight;
  }
}

function countDown(again, wait) {
  again.disabled = wait > 0;
  again.textContent = wait > 0 ? `Try again in ${wait} s` : "Try again";
  if (wait > 0 && document.contains(again)) setTimeout(() => countDown(again, wait - 1), 1000);
}
