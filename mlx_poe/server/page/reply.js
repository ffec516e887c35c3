// One reply: its tokens as they come, colored by stage, its meters and its notes.

import { complete } from "./api.js";
import { depth, make } from "./dom.js";
import { Meters } from "./meters.js";

/** Maps a token's span to its tokens, and to how many stages their model has. */
export const tokensOf = new WeakMap();

export class Reply {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  // Tokens whose bytes do not complete a character yet.
  #pending = [];
  // Tokens waiting for the next frame.
  #arrived = [];
  #frame = 0;
  #onPaint;
  #body;
  #waiting;
  #notes;

  /** `given`: the beginning of the text, if this reply continues one. */
  constructor({ stages, label, given = "" }) {
    this.stages = stages;
    this.given = given;
    this.text = "";
    this.ids = [];
    this.finish = null;
    this.meters = new Meters(stages);
    this.#body = make("div.text", { role: "group", "aria-label": "Reply. Arrow keys move between tokens." });
    if (given) this.#body.append(make("span.given", {}, given));
    this.#waiting = make("p.waiting", {}, "Waiting for the first token");
    this.#notes = make("div.notes");
    this.element = make(
      "div.reply.running",
      {},
      make("p.by", {}, label),
      this.#body,
      this.#waiting,
      this.meters.element,
      this.#notes,
    );
  }

  /** Streams the answer into this reply. Returns false if stopped; throws ServerError. */
  async run(request, signal, onPaint = () => {}) {
    this.#onPaint = onPaint;
    let content = "";
    let usage = null;
    try {
      for await (const event of complete(request, signal)) {
        if (event.waiting) this.#waiting.textContent = "Reading the prompt";
        if (event.tokens) {
          content += event.text;
          this.#add(event.tokens);
        }
        this.finish = event.finish ?? this.finish;
        usage = event.usage ?? usage;
      }
      this.#paint();
      this.#settle(content);
      if (this.finish === "length") this.note("Stopped at the token limit.");
      const reason = usage?.poe?.fell_back;
      if (reason) this.note(`Fell back to full depth: ${reason}`);
      return true;
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      this.note("Stopped.");
      return false;
    } finally {
      this.#paint();
      this.meters.finish(usage);
      this.element.classList.remove("running");
      this.#waiting.remove();
      this.#reachable();
    }
  }

  note(...content) {
    this.#notes.append(make("p", {}, ...content));
  }

  get spans() {
    return [...this.#body.querySelectorAll(".token")];
  }

  /** Collects tokens for the next frame, since each change makes the browser lay out the text again. */
  #add(tokens) {
    if (!tokens.length) return;
    this.ids.push(...tokens.map((token) => token.id));
    this.meters.add(tokens);
    this.#arrived.push(...tokens);
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  #paint() {
    this.#frame = 0;
    if (!this.#arrived.length) return;
    this.#waiting.remove();
    const added = document.createDocumentFragment();
    for (const token of this.#arrived) {
      this.#pending.push(token);
      const text = this.#decoder.decode(token.bytes, { stream: true });
      if (text) added.append(this.#span(text));
      this.text += text;
    }
    this.#arrived = [];
    this.#body.append(added);
    this.#onPaint();
  }

  /** A span for the pending tokens: several if only together they form a character. */
  #span(text) {
    const tokens = this.#pending;
    this.#pending = [];
    const span = make("span.token", { tabIndex: -1 }, text);
    const stages = tokens.map((token) => token.stage).filter((stage) => stage !== null);
    if (stages.length) {
      span.style.setProperty("--depth", depth(Math.max(...stages), this.stages));
      span.dataset.stage = Math.max(...stages);
    }
    if (tokens.every((token) => token.fromDraft)) span.classList.add("drafted");
    if (tokens.every((token) => token.forced)) span.classList.add("forced");
    if (text && !text.trim() && text.includes("\n")) span.classList.add("newline");
    tokensOf.set(span, { tokens, stages: this.stages });
    return span;
  }

  /**
   * Makes the shown text equal to the text that the server sent. They can differ at the end: the
   * tokens of a stop string, or a special token, are not part of the text.
   */
  #settle(content) {
    const ends = [];
    let rest = content;
    for (const span of this.spans) {
      const text = span.textContent;
      if (!ends.length && rest.startsWith(text)) {
        rest = rest.slice(text.length);
        continue;
      }
      let same = 0;
      while (!ends.length && same < text.length && text[same] === rest[same]) same += 1;
      rest = rest.slice(same);
      span.textContent = text.slice(0, same);
      if (same === 0) span.remove();
      ends.push(...tokensOf.get(span).tokens);
    }
    if (rest) this.#body.append(make("span.token", { tabIndex: -1 }, rest));
    // The token that ended the reply has alternatives too, so give it a mark to point at.
    this.#pending.unshift(...ends);
    if (this.#pending.length && this.finish === "stop") {
      const mark = this.#span("");
      mark.classList.add("end");
      this.#body.append(mark);
    }
    this.text = content;
  }

  /** Makes the reply a single tab stop; arrow keys move within it. */
  #reachable() {
    const [first] = this.spans;
    if (first && !this.#body.querySelector('[tabindex="0"]')) first.tabIndex = 0;
  }
}
