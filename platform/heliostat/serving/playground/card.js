// What the registry knows of a model's version. Knows the model card alone.

import { make, rounded } from "./dom.js";

/** Fill `element` with the card of a model. */
export function showCard(element, card) {
  const { reference, root, version, status, task, labels, max_length: length, metrics, tags, canary, loading, rejected } = card.heliostat;
  const parts = [
    make("h2", {}, root, " ", make("span", { className: "muted", textContent: version ? `version ${version}` : "" })),
    facts([["Follows", reference], ["Status", status], ["Context", `${length} tokens`]]),
  ];
  if (task === "classification") {
    parts.push(make("p", { className: "callout", textContent: `A classifier (${labels.join(", ")}): it writes no text; POST texts to /classify.` }));
  }
  if (canary) {
    parts.push(make("p", { className: "callout", textContent: `Version ${canary.version} gets ${canary.percent}% of the requests.` }));
  }
  if (loading) parts.push(make("p", { className: "callout", textContent: `Version ${loading} is being loaded.` }));
  for (const { version: other, reason } of rejected) {
    parts.push(make("p", { className: "callout problem", textContent: `Version ${other} was rejected: ${reason}` }));
  }
  parts.push(...table("Metrics", metrics, (value) => rounded(value)), ...table("Tags", tags, String));
  element.replaceChildren(...parts);
}

function facts(rows) {
  return make("dl", {}, ...rows.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
}

function table(title, values, format) {
  const rows = Object.entries(values).map(([name, value]) => [name, format(value)]);
  return rows.length ? [make("h3", { textContent: title }), facts(rows)] : [];
}

/** The name of a model in a list. */
export function optionText(card) {
  const { version, reference, status } = card.heliostat;
  const [, alias] = reference.match(/^models:\/[^@]+@(.+)$/) ?? [];
  const follows = alias && !card.id.includes("@") ? ` · ${alias}, now version ${version}` : "";
  return card.id + follows + (status === "canary" ? " (canary)" : "");
}
