// Small helpers for building the page. Text from models only ever goes through textContent.

export const find = (id) => document.getElementById(id);

/** make("button.quiet", {type: "button"}, "Copy", …): an element with properties and children. */
export function make(what, properties = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  const element = document.createElement(tag);
  element.classList.add(...classes);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function button(label, action, quiet = true) {
  const element = make(quiet ? "button.quiet" : "button", { type: "button" }, label);
  element.addEventListener("click", () => action(element));
  return element;
}

/** Tells screen readers what has just happened. */
export function announce(text) {
  find("status").textContent = text;
}

export async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // The clipboard API needs HTTPS or localhost; this works on any address.
    const area = make("textarea.unseen", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    from.focus();
  }
  const label = from.textContent;
  from.textContent = "Copied";
  announce("Copied");
  setTimeout(() => (from.textContent = label), 1200);
}

/** Stages count from 0, as everywhere else. */
export const stageName = (stage, stages) => `stage ${stage} (0 to ${stages - 1})`;

/** A stage's position from the first (0) to the last (1); the style sheet turns it into a color. */
export const depth = (stage, stages) => (stages > 1 ? stage / (stages - 1) : 1);

export const rate = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));

export function seconds(milliseconds) {
  return milliseconds < 1000 ? `${milliseconds.toFixed(0)} ms` : `${(milliseconds / 1000).toFixed(2)} s`;
}
