// Requests in OpenAI's forms, and as code. Knows neither the page nor the network.

/** How many alternatives of each token to ask for. */
const ALTERNATIVES = 5;
// What OpenAI's client has no argument for goes into its `extra_body`.
const EXTENSIONS = new Set(["top_k", "min_p", "repetition_penalty", "num_beams"]);

export const pathOf = (body) => (body.messages ? "chat/completions" : "completions");

/** The body of a request. `input` is {messages} or {prompt}; `settings` are those that differ from the defaults. */
export function requestBody(model, input, settings, probabilities) {
  const chat = "messages" in input;
  const asked = chat ? { logprobs: true, top_logprobs: ALTERNATIVES } : { logprobs: ALTERNATIVES };
  return {
    model,
    ...input,
    ...settings,
    stream: true,
    stream_options: { include_usage: true },
    ...(probabilities ? asked : {}),
  };
}

/** The same request without token probabilities. */
export function withoutProbabilities({ logprobs, top_logprobs, ...body }) {
  return body;
}

/** What a chunk adds to the answer: {text, tokens, finish}. A token is {text, logprob, top: [{text, logprob}]}. */
export function readChoice(choice) {
  const text = (choice.delta ? choice.delta.content : choice.text) ?? "";
  return { text, tokens: readTokens(choice.logprobs), finish: choice.finish_reason };
}

function readTokens(logprobs) {
  if (logprobs?.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs: top }) => ({
      text: token,
      logprob,
      top: top.map((other) => ({ text: other.token, logprob: other.logprob })),
    }));
  }
  return (logprobs?.tokens ?? []).map((text, index) => ({
    text,
    logprob: logprobs.token_logprobs[index],
    top: Object.entries(logprobs.top_logprobs[index]).map(([other, logprob]) => ({ text: other, logprob })),
  }));
}

/** The request as a shell command. */
export function asCurl(base, body, withKey) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $HELIOSTAT_API_KEY"` : "";
  return `curl -N ${base}${pathOf(body)} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${quoted}'\n`;
}

/** The request as a Python program that uses OpenAI's client. */
export function asPython(base, body, withKey) {
  const entries = Object.entries(body);
  const known = entries.filter(([name]) => !EXTENSIONS.has(name));
  const extra = entries.filter(([name]) => EXTENSIONS.has(name));
  const lines = known.map(([name, value]) => `    ${name}=${python(value, "    ")},\n`);
  if (extra.length) lines.push(`    extra_body=${python(Object.fromEntries(extra), "    ")},\n`);
  const [method, text] = body.messages
    ? ["chat.completions", "chunk.choices[0].delta.content or \"\""]
    : ["completions", "chunk.choices[0].text"];
  return `${withKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${base}", api_key=${withKey ? 'os.environ["HELIOSTAT_API_KEY"]' : '"none"'})
stream = client.${method}.create(
${lines.join("")})
for chunk in stream:
    if chunk.choices:
        print(${text}, end="", flush=True)
print()
`;
}

/** A JSON value as a Python literal; JSON's strings and numbers are Python's too. */
function python(value, indent) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const inner = indent + "    ";
  const items = Array.isArray(value)
    ? value.map((item) => python(item, inner))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item, inner)}`);
  const short = open + items.join(", ") + close;
  return short.length <= 80 && !short.includes("\n") ? short : `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}
