// The sampling settings of one side: the model's defaults, and what was changed. Knows no page.

/**
 * What can be set. `greedy` is the value greedy decoding has: where it is given, the setting decides which token is
 * chosen. `slider` is the range of the slider; the endpoint's own limits may be wider.
 */
export const SETTINGS = [
  { name: "temperature", label: "Temperature", group: "Choosing tokens", greedy: 0, slider: [0, 2, 0.05],
    help: "How far the choice may stray from the likeliest token. 0 always takes the likeliest." },
  { name: "top_p", label: "Top p", group: "Choosing tokens", greedy: 1, slider: [0.05, 1, 0.01], sampled: true,
    help: "Choose among the fewest tokens that together have this probability. 1: among all." },
  { name: "top_k", label: "Top k", group: "Choosing tokens", greedy: 0, slider: [0, 200, 1], sampled: true,
    help: "Choose among this many of the likeliest tokens. 0: among all." },
  { name: "min_p", label: "Min p", group: "Choosing tokens", greedy: 0, slider: [0, 1, 0.01], sampled: true,
    help: "Leave out tokens less likely than this share of the likeliest one. 0: none." },
  { name: "num_beams", label: "Beams", group: "Choosing tokens", greedy: 1, slider: [1, 8, 1],
    help: "Follow this many answers at once and give the likeliest whole one. 1: off." },
  { name: "repetition_penalty", label: "Repetition", group: "Penalties", greedy: 1, slider: [1, 2, 0.05],
    help: "Makes tokens of the prompt and the answer less likely to come again. 1: off." },
  { name: "presence_penalty", label: "Presence", group: "Penalties", greedy: 0, slider: [-2, 2, 0.1],
    help: "Subtracted once from tokens that are in the answer already. 0: off." },
  { name: "frequency_penalty", label: "Frequency", group: "Penalties", greedy: 0, slider: [-2, 2, 0.1],
    help: "Subtracted from tokens for each time they are in the answer already. 0: off." },
  { name: "max_tokens", label: "Max tokens", group: "Output", whole: true, empty: "endpoint's own",
    help: "The answer ends after this many tokens at the latest." },
  { name: "stop", label: "Stop strings", group: "Output", empty: "none",
    help: "One on each line; the answer ends before any of them. \\n stands for a line break." },
  { name: "seed", label: "Seed", group: "Output", whole: true, empty: "random",
    help: "The same seed and settings give the same answer again." },
];
const NEUTRAL = { max_tokens: null, stop: [], seed: null };

/** The settings of one side. */
export class Settings {
  #defaults = {};
  #origin = {};
  #changed = {};

  /** Another model's defaults, as /v1/decoding gives them. What was changed stays so, unless it is a default now. */
  start({ defaults, origin }) {
    this.#defaults = defaults;
    this.#origin = origin;
    for (const [name, value] of Object.entries(this.#changed)) this.set(name, value);
  }

  copy() {
    const other = new Settings();
    [other.#defaults, other.#origin, other.#changed] = [this.#defaults, this.#origin, { ...this.#changed }];
    return other;
  }

  /** The model's own value. */
  default(name) {
    return this.#defaults[name] ?? NEUTRAL[name] ?? SETTINGS.find((one) => one.name === name)?.greedy ?? null;
  }

  /** Where the model's own value comes from. */
  origin(name) {
    return this.#origin[name] ?? "built-in";
  }

  /** The value in force. */
  value(name) {
    if (name in this.#changed) return this.#changed[name];
    // A model tuned for beams has none where it is asked to sample: beams look for the likeliest text.
    if (name === "num_beams" && this.default("temperature") === 0 && this.value("temperature") > 0) return 1;
    return this.default(name);
  }

  /** Change a setting; null, or the model's own value, takes the change back. */
  set(name, value) {
    if (value === null || same(value, this.default(name))) delete this.#changed[name];
    else this.#changed[name] = value;
  }

  reset() {
    this.#changed = {};
  }

  /** What was changed, for a request. */
  get changed() {
    return { ...this.#changed };
  }

  isChanged(name) {
    return name in this.#changed;
  }

  /** Whether a setting makes the choice of tokens other than greedy. */
  differsFromGreedy({ name, greedy }) {
    return greedy !== undefined && this.value(name) !== greedy;
  }

  /** Whether it has no effect, since nothing is sampled. */
  isIdle({ sampled }) {
    return sampled === true && this.value("temperature") === 0;
  }

  /** Token probabilities come with single tokens, not with beams. */
  get givesProbabilities() {
    return this.value("num_beams") === 1;
  }

  /** What the model sets itself and cannot be changed here: [name, value]. */
  get others() {
    const known = new Set(SETTINGS.map(({ name }) => name));
    return Object.keys(this.#defaults).filter((name) => !known.has(name) && this.origin(name) !== "built-in").map((name) => [name, this.#defaults[name]]);
  }

  /** The model's own way of decoding, in a few words, and where it comes from. */
  get own() {
    const bare = this.copy();
    bare.reset();
    const tuned = SETTINGS.filter((one) => bare.differsFromGreedy(one)).map(({ name }) => this.origin(name));
    const sources = [...new Set(tuned)].join(", ");
    return bare.summary + (sources ? ` (${sources})` : "");
  }

  /** The way of decoding in a few words. */
  get summary() {
    const beams = this.value("num_beams");
    const heat = this.value("temperature");
    const way = beams > 1 ? `${beams} beams` : heat === 0 ? "Greedy" : `Sampling, temperature ${heat}`;
    const more = SETTINGS.filter((one) => !["temperature", "num_beams"].includes(one.name))
      .filter((one) => this.differsFromGreedy(one) && !this.isIdle(one))
      .map(({ name }) => `${name.replaceAll("_", " ")} ${this.value(name)}`);
    return [way, ...more].join(", ");
  }
}

function same(one, other) {
  return JSON.stringify(one) === JSON.stringify(other);
}
