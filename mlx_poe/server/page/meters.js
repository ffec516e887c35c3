// A reply's measurements: figures, and a trace with a bar for each token, whose height is the stage
// that emitted it.

import { depth, make, rate, seconds } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const FIGURES = {
  rate: "tokens/s",
  depth: "mean depth",
  accepted: "drafts accepted",
  cached: "prompt cached",
  first: "first token",
  count: "tokens",
};

export class Meters {
  #started = performance.now();
  #firstAt = null;
  #firstCount = 0;
  #lastAt = null;
  #decided = 0;
  #depths = 0;
  #accepted = 0;
  #values = {};
  #paths;
  #svg;
  #frame = 0;

  constructor(stages) {
    this.stages = stages;
    this.count = 0;
    this.usage = null;
    const list = make("dl.figures");
    for (const [name, label] of Object.entries(FIGURES)) {
      this.#values[name] = make("dd", { "data-figure": name }, "–");
      list.append(make("div", {}, make("dt", {}, label), this.#values[name]));
    }
    this.#svg = document.createElementNS(SVG, "svg");
    this.#svg.setAttribute("class", "trace");
    this.#svg.setAttribute("preserveAspectRatio", "none");
    this.#svg.setAttribute("aria-hidden", "true");
    this.#paths = Array.from({ length: stages }, (_, stage) => {
      const path = document.createElementNS(SVG, "path");
      path.style.setProperty("--depth", depth(stage, stages));
      this.#svg.append(path);
      return { path, bars: "" };
    });
    this.element = make("div.meters", {}, this.#svg, list);
  }

  add(tokens) {
    if (!tokens.length) return;
    this.#lastAt = performance.now();
    for (const token of tokens) {
      const lane = this.#paths[token.stage];
      if (lane && !token.forced) {
        lane.bars += `M${this.count} ${this.stages}h.7v-${token.stage + 1}h-.7z`;
        this.#decided += 1;
        this.#depths += token.stage + 1;
      }
      this.#accepted += token.fromDraft;
      this.count += 1;
    }
    if (this.#firstAt === null) {
      this.#firstAt = this.#lastAt;
      this.#firstCount = this.count;
    }
    // Tokens can come faster than frames.
    this.#frame ||= requestAnimationFrame(() => this.#show());
  }

  finish(usage) {
    this.usage = usage;
    this.#show();
  }

  /** Tokens per second after the first ones, or null while there are none. */
  get tokensPerSecond() {
    const more = this.count - this.#firstCount;
    return more > 0 && this.#lastAt > this.#firstAt
      ? (1000 * more) / (this.#lastAt - this.#firstAt)
      : null;
  }

  /** Milliseconds from the request to the last token. */
  get duration() {
    return (this.#lastAt ?? performance.now()) - this.#started;
  }

  get summary() {
    const speed = this.tokensPerSecond;
    return `${this.usage?.completion_tokens ?? this.count} tokens` + (speed ? `, ${rate(speed)} tokens per second` : "");
  }

  #show() {
    this.#frame = 0;
    this.#svg.setAttribute("viewBox", `0 0 ${Math.max(this.count, 1)} ${this.stages}`);
    // SVG attributes are not inline styles, so a strict content policy allows them.
    this.#svg.setAttribute("width", `${this.count * 5}`);
    for (const { path, bars } of this.#paths) path.setAttribute("d", bars);
    for (const [name, text] of Object.entries(this.#figures())) {
      this.#values[name].textContent = text ?? "–";
    }
  }

  #figures() {
    const speed = this.tokensPerSecond;
    const { prompt_tokens: prompt, prompt_tokens_details: read, poe } = this.usage ?? {};
    const mean = poe?.mean_depth ?? (this.#decided ? this.#depths / this.#decided : null);
    return {
      rate: speed && rate(speed),
      depth: mean === null ? null : `${mean.toFixed(2)} of ${this.stages}`,
      accepted: this.#acceptance(),
      cached: read ? `${read.cached_tokens ?? 0} of ${prompt}` : null,
      first: this.#firstAt && seconds(this.#firstAt - this.#started),
      // The token that ends a reply is counted in the usage, but is not streamed.
      count: `${this.usage?.completion_tokens ?? this.count}`,
    };
  }

  /** Until the reply ends, only the number of accepted drafts is known. */
  #acceptance() {
    const details = this.usage?.completion_tokens_details;
    if (!details) return this.#accepted ? `${this.#accepted} of …` : null;
    const { accepted_prediction_tokens: kept = 0, rejected_prediction_tokens: refused = 0 } = details;
    return kept + refused ? `${kept} of ${kept + refused}` : null;
  }
}
