// The small window that shows what else a model considered in a token's place.

import { byId, make, rounded } from "./dom.js";
import { TokenText } from "./tokens.js";

const HIDE_AFTER = 150;
const window_ = byId("token");
let hiding;

/** Show it for tokens inside `root` that are pointed at, tapped or focused. */
export function watch(root) {
  root.addEventListener("pointerover", ({ target }) => (TokenText.shown.has(target) ? show(target) : hideSoon()));
  root.addEventListener("pointerleave", hideSoon);
  root.addEventListener("focusin", ({ target }) => TokenText.shown.has(target) && show(target));
  root.addEventListener("focusout", hideSoon);
  root.addEventListener("scroll", hide, { capture: true, passive: true });
}

// What appears on hover must stay while it is pointed at: https://www.w3.org/TR/WCAG22/#content-on-hover-or-focus
window_.addEventListener("pointerenter", () => clearTimeout(hiding));
window_.addEventListener("pointerleave", hideSoon);

/** Hide it; says whether it was shown. */
export function hide() {
  clearTimeout(hiding);
  const shown = !window_.hidden;
  window_.hidden = true;
  document.querySelector(".token.active")?.classList.remove("active");
  return shown;
}

function hideSoon() {
  clearTimeout(hiding);
  hiding = setTimeout(hide, HIDE_AFTER);
}

function show(span) {
  hide();
  const token = TokenText.shown.get(span);
  span.classList.add("active");
  window_.replaceChildren(heading(token), list(token));
  window_.hidden = false;
  place(span);
}

function heading(token) {
  return make("p", {}, make("b", { textContent: visible(token.text) }), ` ${percent(token.logprob)}`,
    make("small", { textContent: `log-probability ${rounded(token.logprob, 3)}` }));
}

function list(token) {
  const rows = token.top.toSorted((a, b) => b.logprob - a.logprob).map((other) => {
    const bar = make("i");
    bar.style.setProperty("--share", `${(Math.exp(other.logprob) * 100).toFixed(1)}%`);
    const className = other.text === token.text ? "chosen" : "";
    return make("li", { className }, make("code", { textContent: visible(other.text) }),
      make("span", { textContent: percent(other.logprob) }), bar);
  });
  return make("ol", {}, ...rows);
}

function place(span) {
  const [anchor] = span.getClientRects();
  const { width, height } = window_.getBoundingClientRect();
  const left = Math.max(8, Math.min(anchor.left, document.documentElement.clientWidth - width - 8));
  const above = anchor.top - height - 4;
  window_.style.left = `${left}px`;
  window_.style.top = `${above >= 8 ? above : anchor.bottom + 4}px`;
}

function percent(logprob) {
  const value = Math.exp(logprob) * 100;
  return value >= 0.01 ? `${value.toFixed(value >= 10 ? 1 : 2)}%` : "< 0.01%";
}

/** A token with its blanks made visible. */
function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(nothing)";
}
