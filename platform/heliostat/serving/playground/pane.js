// One side of the page: a model, its settings, and a conversation with it.

import { ApiError, stream } from "./api.js";
import { optionText } from "./card.js";
import { announce, byId, make } from "./dom.js";
import { watch } from "./popover.js";
import { pathOf, readChoice, requestBody, withoutProbabilities } from "./request.js";
import { Settings } from "./settings.js";
import { pastTurn, Turn } from "./turn.js";

/** One side. `options`: its name, `probabilities()`, and what to call: onModel, onSettings, onState, onKeyNeeded, onRefused. */
export class Pane {
  settings = new Settings();
  card = null;
  #options;
  #history = [];
  #last = null;
  #abort = null;
  #log;
  #select;

  constructor(options) {
    this.#options = options;
    this.element = byId("pane-template").content.cloneNode(true).firstElementChild;
    this.element.setAttribute("aria-label", `Answer ${options.name}`);
    this.element.querySelector(".pane-name").textContent = options.name;
    this.#log = this.element.querySelector(".log");
    this.#log.setAttribute("aria-label", `Conversation ${options.name}`);
    this.#select = this.element.querySelector(".model");
    this.#select.addEventListener("change", () => options.onModel(this, this.#select.value));
    this.element.querySelector(".pane-strategy").addEventListener("click", () => options.onSettings(this));
    watch(this.#log);
    this.#showEmpty();
  }

  get running() {
    return this.#abort !== null;
  }

  /** What the endpoint serves now. */
  setModels(cards) {
    const groups = Map.groupBy(cards, (card) => card.heliostat.root);
    this.#select.replaceChildren(...[...groups].map(([name, group]) => make("optgroup", { label: name },
      ...group.map((card) => make("option", { value: card.id, textContent: optionText(card) })))));
  }

  /** Use a model, with its defaults as /v1/decoding gives them. */
  use(card, decoding) {
    this.card = card;
    this.#select.value = card.id;
    this.settings.start(decoding);
    this.showStrategy();
  }

  showStrategy() {
    const count = Object.keys(this.settings.changed).length;
    const edited = count ? `${count} changed · ` : "";
    const button = this.element.querySelector(".pane-strategy");
    button.textContent = edited + this.settings.summary;
    button.title = `${button.textContent}: show all settings`;
  }

  /** Begin with the model, the settings and the conversation of another side. */
  copyFrom(other) {
    this.settings = other.settings.copy();
    this.#history = [...other.#history];
    this.#last = null;
    this.#log.replaceChildren();
    for (let index = 0; index < this.#history.length; index += 2) {
      this.#log.append(pastTurn(this.#history[index].content, this.#history[index + 1].content));
    }
    if (!this.#history.length) this.#showEmpty();
  }

  clear() {
    this.stop();
    this.#history = [];
    this.#last = null;
    this.#showEmpty();
  }

  stop() {
    this.#abort?.abort();
  }

  /** The request that `question`, {prompt, chat, system, probabilities}, makes; without a prompt, the last one's. */
  request(question) {
    const { prompt, chat, system, probabilities } = question.prompt || !this.#last ? question : this.#last.question;
    const history = question.prompt || !this.#last ? this.#history : this.#last.before;
    const opening = system ? [{ role: "system", content: system }] : [];
    const input = chat ? { messages: [...opening, ...history, { role: "user", content: prompt }] } : { prompt };
    return requestBody(this.card.id, input, this.settings.changed, probabilities && this.settings.givesProbabilities);
  }

  /** Ask the model, and show the answer as it comes. */
  async send(question) {
    if (!this.#log.querySelector(".turn")) this.#log.replaceChildren();
    const body = this.request(question);
    const turn = new Turn(question.prompt, question.chat, () => this.#again(question));
    if (this.#last) this.#last.turn.again.hidden = true;
    this.#last = { question, turn, before: this.#history };
    this.#log.append(turn.element);
    this.#log.scrollTop = this.#log.scrollHeight;
    this.#abort = new AbortController();
    this.#busy(true);
    const outcome = await this.#answer(turn, body);
    this.#abort = null;
    this.#busy(false);
    announce(`Answer ${this.#options.name}: ${outcome}`);
    if (question.chat && !turn.empty && this.#last?.turn === turn) this.#remember(question.prompt, turn.text);
  }

  /** Answer a prompt once more, under the settings of now. */
  #again(question) {
    if (this.running) return;
    this.#history = this.#last.before;
    this.#last.turn.element.remove();
    this.#last = null;
    this.#log.focus();
    this.send({ ...question, probabilities: this.#options.probabilities() });
  }

  #remember(prompt, answer) {
    this.#history = [...this.#history, { role: "user", content: prompt }, { role: "assistant", content: answer }];
  }

  /** Run a request into a turn; returns how it went, in words. */
  async #answer(turn, body) {
    try {
      return await this.#run(turn, body);
    } catch (error) {
      if (error.name === "AbortError") return this.#follow(() => turn.stop());
      if (!(error instanceof ApiError)) console.error(error);
      if (error.status === 401) this.#options.onKeyNeeded(error);
      this.#options.onRefused(this, error.param);
      this.#follow(() => turn.fail(error));
      return error.message;
    }
  }

  async #run(turn, body, remark) {
    let usage = null;
    let finish = null;
    try {
      for await (const chunk of stream(pathOf(body), body, this.#abort.signal)) {
        usage = chunk.usage ?? usage;
        for (const choice of chunk.choices) {
          const piece = readChoice(choice);
          finish = piece.finish ?? finish;
          this.#follow(() => turn.add(piece));
        }
      }
    } catch (error) {
      if (error.status !== 400 || !["logprobs", "top_logprobs"].includes(error.param)) throw error;
      // These settings cannot give token probabilities; the answer matters more.
      return this.#run(turn, withoutProbabilities(body), "no token probabilities with these settings");
    }
    return this.#follow(() => turn.finish(finish, usage, remark));
  }

  /** Change the log; keep its end in view if it was. Returns what `change` returns. */
  #follow(change) {
    const log = this.#log;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    const result = change();
    if (atEnd) log.scrollTop = log.scrollHeight;
    return result;
  }

  #busy(busy) {
    this.#log.ariaBusy = String(busy);
    this.#options.onState();
  }

  #showEmpty() {
    this.#log.replaceChildren(make("p", { className: "empty", textContent: "Answers appear here, token by token." }));
  }
}
