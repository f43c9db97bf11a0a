// One prompt and its answer on the page: text as it comes, how it ended, what it cost. Knows no requests.

import { make, rounded } from "./dom.js";
import { TokenText } from "./tokens.js";

const ENDINGS = { stop: "complete", length: "cut off at max tokens" };

/** One turn. `again` runs it once more. */
export class Turn {
  #answer = make("div", { className: "answer" });
  #footer = make("p", { className: "meta" });
  #text = new TokenText(this.#answer);
  #started = performance.now();
  #first;
  #last;
  #tokens = 0;

  constructor(prompt, chat, again) {
    this.again = make("button", { type: "button", className: "quiet", textContent: "Run again" });
    this.again.addEventListener("click", again);
    this.#answer.setAttribute("aria-label", "Answer");
    this.#answer.role = "group";
    const shown = make(chat ? "div" : "span", { className: "prompt", textContent: prompt });
    this.element = make("article", { className: `turn running ${chat ? "chat" : "complete"}` }, shown, this.#answer, this.#footer);
    this.#footer.textContent = "waiting for the first token";
  }

  get text() {
    return this.#text.text;
  }

  get empty() {
    return this.#text.text === "";
  }

  add({ text, tokens }) {
    if (!text && !tokens.length) return;
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#tokens += tokens.length || 1;
    this.#footer.textContent = "generating";
    this.#text.add(text, tokens);
  }

  /** The answer is whole. Returns its facts in words. */
  finish(finish, usage, remark) {
    this.#text.end(finish);
    this.#tokens = usage.completion_tokens;
    return this.#close([ENDINGS[finish] ?? finish, `${usage.prompt_tokens} prompt tokens`, ...this.#speed(), remark]);
  }

  /** It was stopped by hand. */
  stop() {
    return this.#close(["stopped", ...this.#speed()]);
  }

  /** It failed; what came so far stays. */
  fail(error) {
    const details = [
      error.status > 200 ? `status ${error.status}` : "",
      error.code ?? "",
      error.retryAfter ? `try again in ${error.retryAfter} s` : "",
      error.requestId ? `request ${error.requestId}` : "",
    ].filter(Boolean).join(" · ");
    const problem = make("div", { className: "problem", role: "alert" }, make("p", { textContent: error.message }));
    if (details) problem.append(make("p", { className: "details", textContent: details }));
    this.#footer.before(problem);
    return this.#close(this.#first ? ["broken off", ...this.#speed()] : []);
  }

  #speed() {
    if (!this.#first) return [];
    const speed = this.#tokens > 1 && this.#last > this.#first ? `${rounded((this.#tokens - 1) * 1000 / (this.#last - this.#first), 3)} tokens/s` : "";
    return [`${this.#tokens} tokens`, speed, `first after ${rounded((this.#first - this.#started) / 1000, 2)} s`];
  }

  #close(facts) {
    const words = facts.filter(Boolean).join(" · ");
    this.element.classList.remove("running");
    this.#footer.replaceChildren(...(words ? [make("span", { textContent: words })] : []), this.again);
    return words;
  }
}

/** A turn of another side, as text: when a comparison begins, both sides have the same conversation. */
export function pastTurn(prompt, answer) {
  return make("article", { className: "turn chat" }, make("div", { className: "prompt", textContent: prompt }), make("div", { className: "answer", textContent: answer }));
}
