// The pickers: the model, a mode with its options, and the settings that all modes share.

import { depth, find, make } from "./dom.js";

const MODES = {
  full: "Runs every stage for each token.",
  stage: "Stops at one stage and takes its prediction.",
  prefix: "Runs the first stages only and combines what they predict.",
  compose: "Combines the predictions of all stages.",
  wand: "Stops at the first stage that is sure enough. Agrees with full on about 99 of 100 tokens.",
  speculative: "The first stage drafts, all stages verify. Same output as full. Lookup also drafts what followed the same words before.",
};

const OPTIONS = {
  stage: ["stage"],
  prefix: ["max_stages"],
  wand: ["safety"],
  speculative: ["num_draft_tokens", "draft_lookup"],
};

/** A mode and its options, in the settings and in each lane of a race. */
export class ModePicker {
  #select;
  #hint = make("p.hint");
  #options = make("div.pair");
  #model = null;

  /** `wanted` says which mode to start with, given the model. */
  constructor(name, label, wanted) {
    this.name = name;
    this.wanted = wanted;
    this.#select = make("select", { id: `${name}-mode` });
    this.#select.addEventListener("change", () => this.#showOptions());
    this.element = make(
      "div.mode-picker",
      {},
      make(
        "div.field",
        {},
        make("label", { htmlFor: this.#select.id }, label),
        this.#select,
      ),
      this.#hint,
      this.#options,
    );
  }

  get mode() {
    return this.#select.value;
  }

  /** The fields for the request. Empty options are left to the server. */
  get request() {
    const fields = { mode: this.mode };
    for (const input of this.#options.querySelectorAll("input, select")) {
      if (input.value !== "") fields[input.name] = input.value === "true" || Number(input.value);
    }
    return fields;
  }

  setModel(model) {
    const { modes } = model.poe;
    // Keep a chosen mode if the new model has it.
    const chosen = this.#model && this.mode !== this.wanted(this.#model) ? this.mode : null;
    const mode = [chosen, this.wanted(model), "full"].find((name) => modes.includes(name));
    this.#model = model;
    this.#select.replaceChildren(...modes.map((name) => make("option", { value: name }, name)));
    this.#select.value = mode ?? modes[0];
    this.#showOptions();
  }

  #showOptions() {
    this.#hint.textContent = MODES[this.mode] ?? "";
    const fields = (OPTIONS[this.mode] ?? []).map((option) => this.#field(option));
    this.#options.replaceChildren(...fields);
  }

  #field(option) {
    const id = `${this.name}-${option}`;
    const { stages } = this.#model.poe;
    const number = { type: "number", id, name: option, placeholder: "default" };
    const choices = (from, text, chosen) =>
      make(
        "select",
        { id, name: option },
        ...Array.from({ length: stages }, (_, i) =>
          make("option", { value: i + from, selected: i + from === chosen }, text(i)),
        ),
      );
    const [label, input] = {
      stage: () => ["Stage", choices(0, (i) => `${i} (0 to ${stages - 1})`, 0)],
      max_stages: () => ["Stages", choices(1, (i) => `first ${i + 1} of ${stages}`, Math.min(2, stages))],
      safety: () => ["Safety factor", make("input", { ...number, min: 0, step: 0.1 })],
      num_draft_tokens: () => ["Draft tokens", make("input", { ...number, min: 1, step: 1 })],
      draft_lookup: () => [
        "Lookup",
        make(
          "select",
          { id, name: option },
          make("option", { value: "" }, "off"),
          make("option", { value: "true" }, "on"),
        ),
      ],
    }[option]();
    return make("div.field", {}, make("label", { htmlFor: id }, label), input);
  }
}

/** Specialists rarely exit early but draft well; base models do exit early. */
export const interesting = (model) => (model.poe.kind === "base" ? "wand" : "speculative");

export class Settings {
  #models = [];

  constructor(onModel) {
    this.onModel = onModel;
    this.modePicker = new ModePicker("chat", "Mode", interesting);
    find("mode-picker").append(this.modePicker.element);
    find("model").addEventListener("change", () => this.#chosen());
    find("settings").addEventListener("submit", (event) => event.preventDefault());
    find("settings-toggle").addEventListener("click", ({ currentTarget: toggle }) => {
      const open = toggle.getAttribute("aria-expanded") !== "true";
      toggle.setAttribute("aria-expanded", open);
    });
  }

  setModels(models) {
    this.#models = models;
    const before = find("model").value;
    find("model").replaceChildren(
      ...models.map(({ id }) => make("option", { value: id }, id)),
    );
    const first = models.find(({ id }) => id === before) ?? models.find(({ poe }) => poe.chat) ?? models[0];
    find("model").value = first.id;
    this.#chosen();
  }

  get model() {
    return this.#models.find(({ id }) => id === find("model").value) ?? null;
  }

  get system() {
    return find("system").value.trim();
  }

  /** The fields that all modes share. */
  get shared() {
    const fields = { model: this.model.id };
    for (const [name, id] of [["temperature", "temperature"], ["max_tokens", "max-tokens"]]) {
      if (find(id).value !== "") fields[name] = Number(find(id).value);
    }
    return fields;
  }

  #chosen() {
    const { poe } = this.model;
    find("model-hint").textContent = `${poe.kind === "base" ? "base model" : poe.kind}, ${poe.stages} stages`;
    this.modePicker.setModel(this.model);
    find("system-field").hidden = !poe.chat;
    showLegend(poe.stages);
    this.onModel(this.model);
  }
}

function showLegend(stages) {
  const sample = (text, stage, kind) => {
    const span = make("span.sample", {}, text);
    span.style.setProperty("--depth", depth(stage, stages));
    if (kind) span.classList.add(kind);
    return span;
  };
  find("legend").replaceChildren(
    make("span", {}, "Emitted by stage"),
    ...Array.from({ length: stages }, (_, stage) => sample(`${stage}`, stage)),
    sample("drafted", 0, "drafted"),
  );
}
