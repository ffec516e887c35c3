// The server's API for the page: the models, and a completion as a stream of events.
// Chat and text completions differ on the wire; the rest of the page sees a single format.

const KEY = "mlx-poe-key";

// Browsers can disable storage; the key then lasts as long as the page.
let keptKey = "";

export function useKey(key) {
  keptKey = key;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Keep it in memory only.
  }
}

function key() {
  try {
    return sessionStorage.getItem(KEY) ?? keptKey;
  } catch {
    return keptKey;
  }
}

/** An error with a message for the user. `status` is 0 if the server did not answer at all. */
export class ServerError extends Error {
  constructor(message, { status = 0, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);

async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server could not be reached. Is mlx_poe.server still running?");
  }
  if (response.ok) return response;
  let reason = "";
  try {
    reason = (await response.json()).error.message;
  } catch {
    reason = `status ${response.status}`;
  }
  throw refusal(response.status, reason, Number(response.headers.get("Retry-After")) || 0, headers);
}

function refusal(status, reason, retryAfter, headers) {
  let message = `The server refused the request: ${sentence(reason)}`;
  if (status === 401) {
    message = headers.Authorization
      ? "The server did not accept the key."
      : "The server requires a key.";
  } else if (status === 429) {
    message = `The server is busy: ${sentence(reason)}`;
    if (retryAfter) message += ` Try again in ${retryAfter} s.`;
  } else if (status >= 500) {
    message = `The server failed: ${sentence(reason)}`;
  }
  return new ServerError(message, { status, retryAfter });
}

export async function listModels() {
  const response = await send("/v1/models");
  return (await response.json()).data.filter((model) => model.poe);
}

/**
 * Streams a completion. `request` has `messages` for a chat or `prompt` for a text, and the fields
 * that both share. Yields {waiting}, {tokens, text}, {finish} and {usage} as they come. A token is
 * {id, stage, fromDraft, forced, bytes, text, logprob, alternatives: [{text, logprob}]}.
 */
export async function* complete(request, signal) {
  const chat = "messages" in request;
  const response = await send(chat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      ...request,
      ...(chat ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 }),
      stream: true,
      stream_options: { include_usage: true },
      token_stages: true,
    }),
  });
  let finished = false;
  for await (const line of lines(response.body)) {
    if (line.startsWith(":")) yield { waiting: true };
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    // The stream ends right after this; reading to its end keeps the connection usable.
    if (data === "[DONE]") continue;
    const chunk = JSON.parse(data);
    if (chunk.error) {
      throw new ServerError(`The server failed: ${sentence(chunk.error.message)}`, { status: 500 });
    }
    const choice = chunk.choices?.[0];
    if (choice) {
      const text = (chat ? choice.delta?.content : choice.text) ?? "";
      yield { tokens: chat ? chatTokens(choice) : textTokens(choice), text };
      if (choice.finish_reason) {
        finished = true;
        yield { finish: choice.finish_reason };
      }
    }
    if (chunk.usage) yield { usage: chunk.usage };
  }
  if (!finished) throw new ServerError("The connection ended before the reply was complete.");
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split(/\r?\n/);
      rest = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection broke before the reply was complete.");
  } finally {
    // If we stop early, the server's slot must be freed at once.
    reader.cancel().catch(() => {});
  }
}

function token(stage, text, logprob, bytes, alternatives) {
  return {
    id: stage?.id ?? null,
    stage: stage?.stage ?? null,
    fromDraft: Boolean(stage?.from_draft),
    drafter: stage?.drafter ?? null,
    forced: Boolean(stage?.forced),
    bytes: Uint8Array.from(stage?.bytes ?? bytes ?? new TextEncoder().encode(text)),
    text,
    logprob: logprob ?? null,
    alternatives,
  };
}

function chatTokens(choice) {
  const content = choice.logprobs?.content ?? [];
  return content.map((entry, i) =>
    token(
      choice.token_stages?.[i],
      entry.token,
      entry.logprob,
      entry.bytes,
      (entry.top_logprobs ?? []).map(({ token: text, logprob }) => ({ text, logprob })),
    ),
  );
}

function textTokens(choice) {
  const { tokens = [], token_logprobs: own = [], top_logprobs: top = [] } = choice.logprobs ?? {};
  return tokens.map((text, i) => {
    const alternatives = Object.entries(top?.[i] ?? {}).map(([other, logprob]) => ({
      text: other,
      logprob,
    }));
    alternatives.sort((a, b) => b.logprob - a.logprob);
    return token(choice.token_stages?.[i], text, own[i], null, alternatives);
  });
}
