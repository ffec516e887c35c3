// A token's card: its probability and the alternatives. It follows the pointer and the keyboard
// focus.

import { find, make, stageName } from "./dom.js";
import { tokensOf } from "./reply.js";

const card = () => find("card");

export function followTokens() {
  document.addEventListener("pointerover", (event) => {
    if (event.pointerType === "touch") return; // A tap focuses the token instead.
    const span = event.target.closest?.(".token");
    if (span && tokensOf.has(span)) show(span);
    else hide();
  });
  document.addEventListener("focusin", (event) => {
    if (tokensOf.has(event.target)) show(event.target);
  });
  document.addEventListener("focusout", hide);
  find("scroll").addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    else if (event.target.classList?.contains("token")) walk(event);
  });
}

function hide() {
  card().hidden = true;
  document.querySelector('[aria-describedby="card"]')?.removeAttribute("aria-describedby");
}

function show(span) {
  hide();
  const { tokens, stages } = tokensOf.get(span);
  card().replaceChildren(...tokens.flatMap((token) => describe(token, stages)));
  card().hidden = false;
  span.setAttribute("aria-describedby", "card");
  // A token's space may end one line and its word begin the next.
  const [widest = span.getBoundingClientRect()] = [...span.getClientRects()].sort(
    (a, b) => b.width - a.width,
  );
  place(widest);
}

function place(rect) {
  const { offsetWidth: width, offsetHeight: height } = card();
  const left = Math.min(rect.left, document.documentElement.clientWidth - width - 8);
  const below = rect.bottom + 6;
  const fits = below + height + 8 < window.innerHeight;
  card().style.left = `${Math.max(8, left)}px`;
  card().style.top = `${fits ? below : Math.max(8, rect.top - height - 6)}px`;
}

function describe(token, stages) {
  const parts = [
    make("p.what", {}, make("b", {}, visible(token.text)), token.id === null ? "" : ` token ${token.id}`),
    make("p.how", {}, origin(token, stages)),
  ];
  if (token.logprob !== null) {
    parts.push(make("p.logprob", {}, `log-probability ${token.logprob.toFixed(4).replace("-", "−")}`));
  }
  const rows = [...token.alternatives];
  const own = rows.find((row) => row.text === token.text);
  if (!own && token.logprob !== null) rows.push(token);
  if (token.alternatives.length) {
    const body = make("tbody");
    for (const row of rows) body.append(line(row, row === own || row === token));
    parts.push(make("table", { "aria-label": "Alternatives" }, body));
  }
  return parts;
}

const DRAFTED_BY = { rounded: "drafted by its quantized copy", lookup: "looked up in the text" };

function origin({ stage, fromDraft, drafter, forced }, stages) {
  if (forced) return "forced: the required form allowed no other token";
  return [stage === null ? "" : stageName(stage, stages), fromDraft ? DRAFTED_BY[drafter] ?? "drafted" : ""]
    .filter(Boolean)
    .join(", ");
}

function line({ text, logprob }, chosen) {
  const probability = Math.exp(logprob);
  const bar = make("span.bar");
  bar.style.setProperty("--share", probability);
  return make(
    chosen ? "tr.chosen" : "tr",
    {},
    make("td", {}, visible(text), chosen ? make("span.unseen", {}, " (chosen)") : ""),
    make("td", { "aria-hidden": "true" }, bar),
    make("td", {}, percent(probability)),
  );
}

function percent(probability) {
  if (probability > 0 && probability < 0.0005) return "< 0.1 %";
  return `${(100 * probability).toFixed(1)} %`;
}

/** Makes white space visible, since it often distinguishes tokens. */
function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "(end)";
}

/** Handles arrow keys, Home and End in a reply. The focused token is its only tab stop. */
function walk(event) {
  const spans = [...event.target.parentElement.querySelectorAll(".token")];
  const at = spans.indexOf(event.target);
  const steps = {
    ArrowRight: () => at + 1,
    ArrowLeft: () => at - 1,
    ArrowDown: () => nextLine(spans, at, 1),
    ArrowUp: () => nextLine(spans, at, -1),
    Home: () => 0,
    End: () => spans.length - 1,
  };
  const step = steps[event.key];
  if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const to = spans[step()];
  if (!to) return;
  for (const span of spans) if (span.tabIndex === 0) span.tabIndex = -1;
  to.tabIndex = 0;
  // Scroll first: scrolling hides the card that focus shows.
  to.scrollIntoView({ block: "nearest" });
  to.focus({ preventScroll: true });
}

function nextLine(spans, at, direction) {
  const from = spans[at].getBoundingClientRect();
  const center = (from.left + from.right) / 2;
  let best = -1;
  let line = null;
  let distance = Infinity;
  for (let i = at + direction; spans[i]; i += direction) {
    const rect = spans[i].getBoundingClientRect();
    if (Math.abs(rect.top - from.top) < rect.height / 2) continue;
    line ??= rect.top;
    if (Math.abs(rect.top - line) > rect.height / 2) break;
    const away = Math.abs((rect.left + rect.right) / 2 - center);
    if (away < distance) [best, distance] = [i, away];
  }
  return best;
}
