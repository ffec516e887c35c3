// Ties the page together: the composer, the current view, the theme.

import { listModels, useKey } from "./api.js";
import { followTokens } from "./card.js";
import { Chat } from "./chat.js";
import { button, find, make } from "./dom.js";
import { Race } from "./race.js";
import { Settings } from "./settings.js";

const EXAMPLES = {
  chat: ["What is the capital of Italy?", "Tell me a story about a fox."],
  text: ["Once upon a time", "The capital of France is"],
};

const ABOUT = {
  chat:
    "Every stage of this model can predict the next token. The line under a token shows which " +
    "stage emitted it: the deeper the stage, the thicker the line.",
  race: "One prompt in two modes, side by side. Neither falls back to full depth, even if it is slower.",
};

const prompt = find("prompt");
let running = false;

const settings = new Settings((model) => {
  race.setModel(model);
  showWords();
});
const hooks = { settings, onRunning, onKeyNeeded };
const chat = new Chat({ ...hooks, onEdit: putBack });
const race = new Race(hooks);

const racing = () => document.body.dataset.view === "race";

function onRunning(now) {
  running = now;
  find("stop").hidden = !now;
  find("send").hidden = now;
  // Do not switch views during a race: nobody could stop the running reply.
  for (const id of ["view-chat", "view-race", "clear"]) find(id).disabled = now;
  // Hiding the focused button loses the focus. On a phone, focusing would open the keyboard.
  const lost = document.activeElement === document.body || document.activeElement === find("stop");
  if (!now && lost && matchMedia("(pointer: fine)").matches) prompt.focus();
}

function onKeyNeeded(message) {
  find("key-form").hidden = false;
  find("key-hint").textContent =
    message === "The server did not accept the key." ? message : "It is kept until you close this tab.";
  find("key").focus();
}

function putBack(text) {
  prompt.value = prompt.value ? `${text}\n${prompt.value}` : text;
  fit();
  prompt.focus();
}

/** The composer grows with its text; the style sheet limits it. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

function submit() {
  const text = prompt.value;
  if (running || !text.trim()) return;
  if (!settings.model) {
    start(); // The models are not loaded yet; keep the text.
    return;
  }
  find("examples")?.remove();
  if (racing()) {
    race.start(text); // Keep the prompt: the next race often uses the same one.
    return;
  }
  prompt.value = "";
  fit();
  chat.send(text);
}

function stop() {
  chat.stop();
  race.stop();
}

function showView(view) {
  document.body.dataset.view = view;
  for (const name of ["chat", "race"]) {
    find(name).hidden = name !== view;
    find(`view-${name}`).setAttribute("aria-pressed", name === view);
  }
  showWords();
  prompt.focus();
}

/** Sets the texts that depend on the model and the view. */
function showWords() {
  const { model } = settings;
  const talks = model?.poe.chat ?? true;
  find("send").textContent = racing() ? "Start race" : talks ? "Send" : "Complete";
  find("prompt-label").textContent = talks ? "Message" : "Beginning of the text";
  prompt.placeholder = talks ? "Write a message" : "Write the beginning of a text";
  find("keys").textContent = `Enter ${racing() ? "starts the race" : "sends"}, Shift+Enter starts a new line, Escape stops.`;
  find("base-note").hidden = talks;
  if (!talks) find("base-note").textContent = `${model.id} is a base model. It does not chat; it continues a text.`;
  find("examples")?.remove();
  if (!model || !(racing() ? race : chat).empty) return;
  find(racing() ? "race" : "chat").prepend(
    make(
      "div.examples",
      { id: "examples" },
      make("p", {}, racing() ? ABOUT.race : ABOUT.chat),
      "Try ",
      ...EXAMPLES[talks ? "chat" : "text"].map((text) =>
        button(text, () => {
          prompt.value = text;
          fit();
          prompt.focus();
        }),
      ),
    ),
  );
}

async function start() {
  find("start-error")?.remove();
  try {
    const models = await listModels();
    if (!models.length) throw new Error("The server has no model that this page can use.");
    settings.setModels(models);
    find("key-form").hidden = true;
    return true;
  } catch (error) {
    if (error.status === 401) {
      onKeyNeeded(error.message);
    } else {
      const again = button("Try again", start, false);
      find("chat").before(
        make("div.error", { id: "start-error", role: "alert" }, make("p", {}, error.message), again),
      );
    }
    return false;
  }
}

const THEME = "mlx-poe-theme";

function theme(chosen) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const set = (name) => {
    if (name) document.documentElement.dataset.theme = name;
    const now = name ?? (dark.matches ? "dark" : "light");
    find("theme").textContent = now === "dark" ? "Light" : "Dark";
    find("theme").setAttribute("aria-label", `Switch to ${now === "dark" ? "light" : "dark"} colors`);
  };
  set(chosen);
  dark.addEventListener("change", () => set(document.documentElement.dataset.theme));
  find("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
    const next = now === "dark" ? "light" : "dark";
    set(next);
    try {
      localStorage.setItem(THEME, next);
    } catch {
      // Lasts until the page is reloaded.
    }
  });
}

function storedTheme() {
  try {
    return localStorage.getItem(THEME) ?? undefined;
  } catch {
    return undefined;
  }
}

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter belongs to it.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
find("stop").addEventListener("click", stop);
find("clear").addEventListener("click", () => {
  (racing() ? race : chat).clear();
  showWords();
  prompt.focus();
});
find("view-chat").addEventListener("click", () => showView("chat"));
find("view-race").addEventListener("click", () => showView("race"));
find("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey(find("key").value.trim());
  find("key").value = "";
  if (await start()) {
    prompt.focus();
    chat.retryRefused();
  }
});

theme(storedTheme());
followTokens();
fit();
start();
