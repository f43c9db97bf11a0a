// The endpoint: requests, server-sent events, errors, and the API key. Knows no page.

const KEY = "heliostat-api-key";
// Relative, so that the page also works behind a proxy that puts it under a prefix.
export const base = new URL("v1/", document.baseURI).href;
let key = sessionStorage.getItem(KEY) ?? "";

export const hasKey = () => key !== "";

/** Keep the key for this tab; an empty one forgets it. */
export function setKey(value) {
  key = value;
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** An error of the endpoint. `status` 0: it could not be reached; 200: it came in the middle of a stream. */
export class ApiError extends Error {
  constructor(status, { message, code, param, retryAfter, requestId } = {}) {
    super(message || `the endpoint answered with status ${status}`);
    Object.assign(this, { status, code, param, retryAfter, requestId });
  }
}

/** The models the endpoint serves. */
export const listModels = async () => (await (await call("models")).json()).data;

/** The decoding settings in force for a model, and where they come from. */
export const decodingOf = async (id) => (await call(`decoding?model=${encodeURIComponent(id)}`)).json();

/** The chunks of a streamed answer. Ends without an error only after the endpoint said that it is done. */
export async function* stream(path, body, signal) {
  const response = await call(path, { method: "POST", body: JSON.stringify(body), signal });
  let done = false;
  // Read to the very end: to the endpoint, a connection that is closed before is a client that went away.
  for await (const data of events(response.body)) {
    done ||= data === "[DONE]";
    if (done) continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(200, { ...chunk.error, requestId: response.headers.get("x-request-id") });
    yield chunk;
  }
  if (!done) throw new ApiError(200, { message: "the connection ended before the answer did" });
}

async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(base + path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "the endpoint cannot be reached" });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  return new ApiError(response.status, {
    ...body.error,
    retryAfter: response.headers.get("retry-after"),
    requestId: response.headers.get("x-request-id"),
  });
}

/** The data of each server-sent event: https://html.spec.whatwg.org/multipage/server-sent-events.html */
async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.replace(/^data: ?/, "")).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
