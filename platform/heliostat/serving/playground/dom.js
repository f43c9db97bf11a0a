// Making elements. Text is only ever set as text: nothing here or elsewhere parses HTML.

export const byId = (id) => document.getElementById(id);

/** A new element. `properties` are set on it; `data` and `aria` hold attributes of these kinds. */
export function make(tag, { data = {}, aria = {}, ...properties } = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  Object.assign(node.dataset, data);
  for (const [name, value] of Object.entries(aria)) node.setAttribute(`aria-${name}`, value);
  node.append(...children);
  return node;
}

/** The value of the checked radio button of a group. */
export const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;

/** Tell screen readers. */
export function announce(text) {
  byId("status").textContent = text;
}

/** A number for people: at most `digits` significant ones. */
export const rounded = (value, digits = 4) => String(Number(value.toPrecision(digits)));
