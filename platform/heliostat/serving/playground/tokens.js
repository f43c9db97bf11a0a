// An answer's text as tokens: spans tinted by probability, walked with the arrow keys. Knows nothing of requests.

import { make } from "./dom.js";

// Characters of text between two tokens that still belong to the second: blanks that a tokenizer drops.
const GAP = 8;
const TINT = 60;

/**
 * Text that grows, in an element. Text and tokens may come apart: an endpoint holds text back that may become a stop
 * string, and several tokens can be one character. So each token is looked for in the text; text without a token is
 * shown as it is.
 */
export class TokenText {
  /** Tokens by their elements, for whoever shows them. */
  static shown = new WeakMap();

  #element;
  #tail = new Text();
  #text = "";
  #placed = 0;
  #waiting = [];

  constructor(element) {
    this.#element = element;
    element.append(this.#tail);
    element.addEventListener("keydown", walk);
  }

  get text() {
    return this.#text;
  }

  add(text, tokens) {
    this.#text += text;
    this.#waiting.push(...tokens);
    while (this.#place(false));
    this.#tail.data = this.#text.slice(this.#placed);
  }

  /** The answer is over. A token that is left is the one that ended it. */
  end(finish) {
    while (this.#place(true));
    this.#tail.data = this.#text.slice(this.#placed);
    const [last, ...others] = this.#waiting;
    if (finish === "stop" && last && !others.length && this.#placed === this.#text.length) {
      this.#show(last, "end");
      this.#element.lastElementChild.classList.add("end");
    }
  }

  /** Put the first waiting token that is found behind those that have their place. `whole`: no more text comes. */
  #place(whole) {
    for (const [index, token] of this.#waiting.entries()) {
      const at = this.#text.indexOf(token.text, this.#placed);
      const reach = (index + 1) * GAP;
      if (token.text && at >= 0 && at - this.#placed <= (index ? reach : GAP)) {
        const skipped = this.#waiting.splice(0, index + 1).slice(0, -1);
        if (at > this.#placed && skipped.length) this.#take(together(skipped), at);
        this.#take(token, at + token.text.length);
        return true;
      }
      // The text that this token stands for may still be held back. A part of a character is in no text.
      if (!whole && !token.text.includes("\ufffd") && this.#text.length - this.#placed < reach) return false;
    }
    return false;
  }

  #take(token, end) {
    this.#show(token, this.#text.slice(this.#placed, end));
    this.#placed = end;
  }

  #show(token, text) {
    // A blank before a word is not tinted: where the line breaks, the tint would be left behind.
    const blank = text.length - text.trimStart().length;
    if (blank < text.length) this.#element.insertBefore(new Text(text.slice(0, blank)), this.#tail);
    const shown = blank < text.length ? text.slice(blank) : text;
    const span = make("span", { className: "token", textContent: shown, tabIndex: -1, aria: { describedby: "token" } });
    const probability = Math.exp(token.logprob);
    span.style.setProperty("--tint", `${((1 - probability) ** 2 * TINT).toFixed(1)}%`);
    TokenText.shown.set(span, token);
    // One stop for the Tab key; from there the arrow keys lead on.
    if (!this.#element.querySelector(".token")) span.tabIndex = 0;
    this.#element.insertBefore(span, this.#tail);
  }
}

/** Tokens that are one piece of text only together, such as the bytes of an emoji: as likely as all of them are. */
function together(tokens) {
  return { ...tokens[0], logprob: tokens.reduce((sum, token) => sum + token.logprob, 0) };
}

function walk(event) {
  const current = event.target;
  if (!current.classList.contains("token")) return;
  const all = [...event.currentTarget.querySelectorAll(".token")];
  const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -all.length, End: all.length };
  if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const index = Math.max(0, Math.min(all.length - 1, all.indexOf(current) + steps[event.key]));
  current.tabIndex = -1;
  all[index].tabIndex = 0;
  all[index].focus();
}
