// The race: one prompt in two modes, and the result in one sentence.

import { announce, find, make, seconds } from "./dom.js";
import { Reply, tokensOf } from "./reply.js";
import { interesting, ModePicker } from "./settings.js";

export class Race {
  #running = null;
  #lanes;

  constructor({ settings, onRunning, onKeyNeeded }) {
    Object.assign(this, { settings, onRunning, onKeyNeeded });
    this.empty = true;
    find("order").addEventListener("change", showOrder);
    showOrder();
    this.#lanes = [
      ["left", "First mode", () => "full"],
      ["right", "Second mode", interesting],
    ].map(([name, label, wanted]) => {
      const picker = new ModePicker(name, label, wanted);
      const body = make("div.lane-body");
      find("lanes").append(make("div.lane", { id: `lane-${name}` }, picker.element, body));
      return { picker, body };
    });
  }

  setModel(model) {
    for (const { picker } of this.#lanes) picker.setModel(model);
  }

  stop() {
    this.#running?.abort();
  }

  clear() {
    this.stop();
    find("race-prompt").hidden = true;
    find("verdict").textContent = "";
    for (const { body } of this.#lanes) body.replaceChildren();
    this.empty = true;
  }

  async start(prompt) {
    const running = (this.#running = new AbortController());
    const { model, system } = this.settings;
    find("race-prompt").textContent = prompt;
    find("race-prompt").hidden = !model.poe.chat;
    find("verdict").textContent = "";
    this.empty = false;
    this.onRunning(true);
    announce("Race started");
    const messages = [
      ...(system ? [{ role: "system", content: system }] : []),
      { role: "user", content: prompt },
    ];
    const asked = {
      ...this.settings.shared,
      ...(model.poe.chat ? { messages } : { prompt }),
      no_fallback: true, // If a mode fell back, the race would compare full depth with itself.
    };
    // Fix both requests now: the pickers may change before the second lane's turn.
    const runs = this.#lanes.map(({ picker, body }) => {
      const { mode, request } = picker;
      const label = `${model.id} · ${mode}`;
      const reply = { stages: model.poe.stages, label, given: model.poe.chat ? "" : prompt };
      body.replaceChildren();
      return () => this.#run({ reply, body, mode, request: { ...asked, ...request } }, running.signal);
    });
    const together = find("order").value === "together";
    const results = together
      ? await Promise.all(runs.map((run) => run()))
      : [await runs[0](), await runs[1]()];
    find("verdict").textContent = verdict(...results, together);
    this.#running = null;
    this.onRunning(false);
  }

  async #run({ reply: options, body, mode, request }, signal) {
    const reply = new Reply(options);
    const result = { reply, mode, request: JSON.stringify(request), whole: false, failed: false };
    body.replaceChildren(reply.element);
    try {
      result.whole = await reply.run(request, signal);
    } catch (error) {
      if (!("status" in error)) console.error(error);
      body.append(make("div.error", { role: "alert" }, make("p", {}, error.message)));
      if (!reply.text) reply.element.remove();
      result.failed = true;
      if (error.status === 401) this.onKeyNeeded(error.message);
    }
    return result;
  }
}

function showOrder() {
  find("order-hint").textContent =
    find("order").value === "together"
      ? "The engine packs both into the same passes, so they slow each other down. Modes that emit one token per pass stay in step."
      : "Each has the engine to itself. The second may find the prompt in the cache.";
}

function verdict(left, right, together) {
  if (left.failed || right.failed) return "No result: a reply failed. Your prompt is still below.";
  if (!left.whole || !right.whole) return "Stopped before both had finished.";
  const names = left.mode === right.mode && left.request !== right.request
    ? ["the first", "the second"]
    : [left.mode, right.mode];
  const speed = together ? finish(left, right, names) : pace(left, right, names);
  return `${speed}; ${comparison(left, right)}.`;
}

// Smaller differences are noise.
const close = (a, b) => Math.abs(a - b) < 0.02 * Math.max(a, b);

/** Started together: who finished first. */
function finish(left, right, names) {
  const times = [left, right].map(({ reply }) => reply.meters.duration);
  if (close(...times)) return `Both finished together, after ${seconds(Math.max(...times))}`;
  const first = times[0] < times[1] ? 0 : 1;
  const ratio = rateRatio(left, right, first);
  const speeds = ratio
    ? `${ratio} ${names[1 - first]}`
    : `${seconds(times[first])} against ${seconds(times[1 - first])}`;
  return `${names[first]} finished first: ${speeds}`;
}

/** One after the other: the second may find the prompt in the cache, so compare only tokens/s. */
function pace(left, right, names) {
  const [a, b] = [left, right].map(({ reply }) => reply.meters.tokensPerSecond ?? 0);
  const faster = a > b ? 0 : 1;
  const ratio = rateRatio(left, right, faster);
  if (!ratio) return "Too few tokens to compare speeds";
  return close(a, b)
    ? `${names[0]} had ${ratio} ${names[1]}`
    : `${names[faster]} was faster: ${ratio} ${names[1 - faster]}`;
}

function rateRatio(left, right, first) {
  const rates = [left, right].map(({ reply }) => reply.meters.tokensPerSecond);
  if (!rates.every(Boolean)) return null;
  if (close(...rates)) return "the same tokens/s as";
  const ratio = rates[first] / rates[1 - first];
  return `${ratio.toFixed(ratio > 1.1 ? 1 : 2)}× the tokens/s of`;
}

function comparison(left, right) {
  if (left.reply.text === right.reply.text) return "same text";
  const [a, b] = [left.reply.ids, right.reply.ids];
  let at = 0;
  while (at < a.length && at < b.length && a[at] === b[at]) at += 1;
  for (const { reply } of [left, right]) mark(reply, at);
  return `texts differ from token ${at + 1} on`;
}

/** Marks where the texts begin to differ. */
function mark(reply, at) {
  let count = 0;
  for (const span of reply.spans) {
    count += tokensOf.get(span)?.tokens.length ?? 1;
    if (count > at) {
      span.classList.add("differs");
      return;
    }
  }
}
