// The page: what the buttons do, and how its parts hang together.

import { base, decodingOf, hasKey, listModels, setKey } from "./api.js";
import { showCard } from "./card.js";
import { announce, byId, chosen } from "./dom.js";
import { Pane } from "./pane.js";
import { Panel } from "./panel.js";
import { hide } from "./popover.js";
import { asCurl, asPython } from "./request.js";

const THEMES = ["system", "light", "dark"];
const NAMES = ["A", "B"];
const prompt = byId("prompt");
const panes = [];
const decoding = new Map();
let models = [];
let current = 0;

const panel = new Panel(byId("settings"), () => panes[current].showStrategy());

const question = () => ({
  prompt: prompt.value,
  chat: chosen("mode") === "chat",
  system: byId("system").value,
  probabilities: byId("probabilities").checked,
});

// ---- models ----------------------------------------------------------------------------------------------------

/** Ask what is served; each side keeps its model where that is still there. */
async function refresh() {
  try {
    models = await listModels();
    decoding.clear();
    for (const pane of panes) pane.setModels(models);
    await Promise.all(panes.map((pane) => useModel(pane, pane.card?.id)));
    notice("");
  } catch (error) {
    if (error.status === 401) askForKey(hasKey() ? error.message : "");
    else notice(`${error.message}; reload the page to try again.`);
  }
}

async function useModel(pane, id) {
  const card = models.find((one) => one.id === id) ?? models[0];
  if (!card) throw new Error("the endpoint has no model yet");
  if (!decoding.has(card.id)) decoding.set(card.id, await decodingOf(card.id));
  pane.use(card, decoding.get(card.id));
  showSide();
  checkChat();
}

/** Chat needs a chat template, on both sides. */
function checkChat() {
  const [chat, complete] = document.querySelectorAll('input[name="mode"]');
  chat.disabled = panes.some(({ card }) => card && !card.heliostat.chat);
  chat.parentElement.title = chat.disabled ? "The model has no chat template" : "";
  if (chat.disabled) complete.checked = true;
  showMode();
}

function showMode() {
  const chat = chosen("mode") === "chat";
  byId("prompt-label").textContent = chat ? "Message" : "Text to complete";
  byId("system-row").hidden = !chat;
}

// ---- the two sides ---------------------------------------------------------------------------------------------

function addPane() {
  const pane = new Pane({
    name: NAMES[panes.length],
    probabilities: () => byId("probabilities").checked,
    onModel: (side, id) => useModel(side, id).catch((error) => notice(error.message)),
    onSettings: (side) => openSide(panes.indexOf(side)),
    onRefused: (side, param) => side === panes[current] && panel.mark(param),
    onKeyNeeded: (error) => askForKey(error.message),
    onState: showState,
  });
  panes.push(pane);
  byId("panes").append(pane.element);
  return pane;
}

async function compare() {
  if (panes.length === 2) {
    panes[1].clear();
    panes.pop().element.remove();
    choose(0);
  } else {
    const pane = addPane();
    pane.setModels(models);
    pane.copyFrom(panes[0]);
    pane.use(panes[0].card, decoding.get(panes[0].card.id));
    choose(1);
  }
  const both = panes.length === 2;
  byId("compare").ariaPressed = String(both);
  byId("panes").classList.toggle("both", both);
  for (const id of ["which", "code-which"]) byId(id).hidden = !both;
  checkChat();
  showState();
  announce(both ? "Two answers side by side" : "One answer");
}

/** Show the settings of a side. */
function choose(index) {
  current = index;
  document.querySelector(`input[name="which"][value="${index}"]`).checked = true;
  showSide();
}

function showSide() {
  const { card, settings } = panes[current];
  if (!card) return;
  panel.show(settings, card.heliostat.max_length);
  showCard(byId("card"), card);
}

// ---- asking ----------------------------------------------------------------------------------------------------

const running = () => panes.some((pane) => pane.running);

function send() {
  if (running() || !prompt.value || !panes.every(({ card }) => card)) return;
  panel.mark();
  const asked = question();
  for (const pane of panes) pane.send(asked);
  if (asked.chat) prompt.value = "";
  prompt.focus();
}

function stop() {
  for (const pane of panes) pane.stop();
}

function showState() {
  const button = byId("send");
  button.textContent = running() ? "Stop" : "Send";
  button.classList.toggle("stop", running());
}

// ---- windows ---------------------------------------------------------------------------------------------------

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

function openSide(index = current) {
  choose(index);
  setSide(true);
}

/** On a small screen the settings lie over the page. */
function setSide(open) {
  if (getComputedStyle(byId("hide-side")).display === "none") {
    byId("setting-temperature").focus();
    return;
  }
  document.body.classList.toggle("side-open", open);
  byId("show-side").ariaExpanded = String(open);
  document.querySelector("main").inert = open;
  (open ? byId("hide-side") : byId("show-side")).focus();
}

function askForKey(problem) {
  byId("key-problem").textContent = problem;
  byId("key-problem").hidden = !problem;
  byId("key").value = "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function useKey(value) {
  setKey(value);
  byId("key-dialog").close();
  refresh();
}

function showCode() {
  const side = panes[byId("code-which").hidden ? 0 : Number(chosen("code-which"))];
  const write = chosen("language") === "python" ? asPython : asCurl;
  byId("code").textContent = write(chosen("language") === "python" ? base.replace(/\/$/, "") : base, side.request(question()), hasKey());
  byId("copy").textContent = "Copy";
}

async function copyCode() {
  try {
    await navigator.clipboard.writeText(byId("code").textContent);
  } catch {
    // Pages that come over plain HTTP from another machine have no clipboard: mark the text, to be copied by hand.
    getSelection().selectAllChildren(byId("code"));
    byId("copy").textContent = "Selected: copy it";
    return;
  }
  byId("copy").textContent = "Copied";
  announce("Copied");
}

function showTint() {
  document.body.classList.toggle("tinted", byId("probabilities").checked);
}

function setTheme(choice) {
  if (choice === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
  byId("theme").ariaLabel = `Colours: ${choice === "system" ? "as the system" : choice}`;
  byId("theme").title = byId("theme").ariaLabel;
  byId("theme").textContent = { system: "◐", light: "☀", dark: "☾" }[choice];
}

function nextTheme() {
  const now = THEMES.indexOf(document.documentElement.dataset.theme ?? "system");
  const choice = THEMES[(now + 1) % THEMES.length];
  setTheme(choice);
  try {
    localStorage.setItem("heliostat-theme", choice);
  } catch {
    // Storage is blocked: the choice holds until the page is closed.
  }
}

// ---- events ----------------------------------------------------------------------------------------------------

const on = (id, event, act) => byId(id).addEventListener(event, act);

on("composer", "submit", (event) => {
  event.preventDefault();
  if (running()) stop();
  else send();
});
on("clear", "click", () => {
  for (const pane of panes) pane.clear();
  prompt.focus();
});
on("compare", "click", compare);
on("mode", "change", showMode);
on("which", "change", () => choose(Number(chosen("which"))));
on("reset", "click", () => {
  panes[current].settings.reset();
  panes[current].showStrategy();
  showSide();
  announce("All settings are the model's own");
});
on("show-side", "click", () => setSide(true));
on("hide-side", "click", () => setSide(false));
on("theme", "click", nextTheme);
on("show-key", "click", () => askForKey(""));
on("forget-key", "click", () => useKey(""));
on("key-form", "submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
});
on("show-code", "click", () => {
  showCode();
  byId("code-dialog").showModal();
});
on("probabilities", "change", showTint);
on("language", "change", showCode);
on("code-which", "change", showCode);
on("copy", "click", copyCode);
for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send();
  } else if (event.key === "Escape" && !hide()) {
    if (document.body.classList.contains("side-open")) setSide(false);
    else stop();
  }
});
// A rollout may have changed what is served while the page was out of sight.
document.addEventListener("visibilitychange", () => document.hidden || running() || refresh());

setTheme(document.documentElement.dataset.theme ?? "system");
showTint();
addPane();
refresh();
