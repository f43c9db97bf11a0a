// The controls of the sampling settings: what is in force, how it differs from greedy, what was changed.

import { make } from "./dom.js";
import { SETTINGS } from "./settings.js";

/** The controls, for one side at a time. */
export class Panel {
  #rows = new Map();
  #root;
  #settings;
  #own = make("p", { className: "note" });
  #others = make("p", { className: "note" });
  #onChange;

  /** `onChange` is called after each change. */
  constructor(root, onChange) {
    this.#root = root;
    this.#onChange = onChange;
    root.append(this.#own);
    for (const [title, group] of Map.groupBy(SETTINGS, (one) => one.group)) {
      root.append(make("fieldset", { className: "group" }, make("legend", { textContent: title }), ...group.map((one) => this.#row(one))));
    }
    root.append(this.#others);
  }

  /** Show the settings of a side; `length` is the model's, in tokens. */
  show(settings, length) {
    this.#settings = settings;
    this.#rows.get("max_tokens").input.max = length;
    this.#refresh();
    this.#root.hidden = false;
  }

  /** Point at the setting that the endpoint refused; no name clears it. */
  mark(name) {
    for (const [one, { input }] of this.#rows) input.ariaInvalid = String(one === name);
  }

  #row(one) {
    const id = `setting-${one.name}`;
    const input = one.name === "stop"
      ? make("textarea", { id, rows: 1, spellcheck: false, placeholder: one.empty })
      : make("input", { id, type: "number", step: one.slider?.[2] ?? 1, placeholder: one.empty ?? "", inputMode: "decimal" });
    input.setAttribute("aria-describedby", `${id}-note ${id}-help`);
    const undo = make("button", { type: "button", className: "badge edited", textContent: "changed ↺", title: "Back to the model's own", aria: { label: `${one.label} is changed: back to the model's own` } });
    const tuned = make("span", { className: "badge tuned", textContent: "≠ greedy" });
    const note = make("p", { id: `${id}-note`, className: "note" });
    const help = make("p", { id: `${id}-help`, className: "note help", textContent: one.help });
    const slider = one.slider ? make("input", { type: "range", min: one.slider[0], max: one.slider[1], step: one.slider[2], tabIndex: -1, aria: { hidden: "true" } }) : null;
    const row = make("div", { className: "row" },
      make("label", { htmlFor: id, textContent: one.label, title: one.help }), make("span", { className: "badges" }, tuned, undo), input, ...(slider ? [slider] : []), note, help);
    // The number field does for the keyboard what the slider does for the pointer.
    slider?.addEventListener("input", () => this.#set(one, Number(slider.value)));
    input.addEventListener("input", () => this.#set(one, read(one, input), input));
    input.addEventListener("change", () => this.#refresh());
    undo.addEventListener("click", () => {
      this.#set(one, null);
      input.focus();
    });
    this.#rows.set(one.name, { one, row, input, slider, undo, tuned, note });
    return row;
  }

  #set(one, value, typing) {
    this.#settings.set(one.name, value);
    this.mark();
    this.#refresh(typing);
    this.#onChange();
  }

  /** Write all values. The field that is being typed in keeps its text. */
  #refresh(typing) {
    for (const { one, row, input, slider, undo, tuned, note } of this.#rows.values()) {
      const value = this.#settings.value(one.name);
      const changed = this.#settings.isChanged(one.name);
      if (input !== typing) input.value = write(one, value);
      if (slider) slider.value = value;
      row.classList.toggle("changed", changed);
      row.classList.toggle("idle", this.#settings.isIdle(one));
      undo.hidden = !changed;
      tuned.hidden = !this.#settings.differsFromGreedy(one) || this.#settings.isIdle(one);
      tuned.title = `Greedy decoding has ${one.greedy}`;
      note.textContent = noteOf(one, this.#settings);
    }
    this.#own.textContent = `The model's own: ${this.#settings.own}`;
    const others = this.#settings.others.map(([name, value]) => `${name} ${JSON.stringify(value)}`);
    this.#others.textContent = others.length ? `Also in force: ${others.join(", ")}` : "";
  }
}

function read(one, input) {
  if (one.name === "stop") return input.value.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
  return input.value === "" || !Number.isFinite(input.valueAsNumber) ? null : input.valueAsNumber;
}

function write(one, value) {
  if (one.name === "stop") return value.map((text) => text.replaceAll("\n", "\\n").replaceAll("\t", "\\t")).join("\n");
  return value ?? "";
}

function noteOf(one, settings) {
  const own = settings.default(one.name);
  const parts = [];
  if (settings.isChanged(one.name)) parts.push(`model's own: ${String(write(one, own)) || one.empty}`);
  if (settings.isIdle(one)) parts.push("no effect at temperature 0");
  return parts.join(" · ");
}
