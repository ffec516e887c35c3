"""Log-probabilities of tokens in both endpoints' layouts, and the stages that emitted them.

- in: the engine's responses
- out: `logprobs.content` of a chat completion, the four arrays of a completion, `token_stages`
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.loading.tokenizer import Tokenizer

# A token, its log-probability, the best tokens and theirs, and its offset in the text.
Entry = tuple[int, float | None, Sequence[tuple[int, float]], int]


def shown(tokenizer: Tokenizer, token: int) -> str:
    """A token's text. Bytes that are not valid UTF-8 by themselves are spelled out, as OpenAI does,
    so that no two tokens look alike."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Iterable[GenerationResponse], count: int
) -> dict[str, Any]:
    """The `logprobs` of a chat completion, `count` alternatives for each token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = list(tokenizer.token_bytes(token))
        return {"token": shown(tokenizer, token), "logprob": logprob, "bytes": data}

    content = []
    for response in tokens:
        top = [entry(*pair) for pair in response.top_logprobs[:count]]
        content.append({**entry(response.token, response.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def stages_of(tokenizer: Tokenizer, tokens: Iterable[GenerationResponse]) -> list[dict[str, Any]]:
    """Our own `token_stages`: where each token came from."""
    return [
        {"id": r.token, "bytes": list(tokenizer.token_bytes(r.token))}
        | {name: getattr(r, name) for name in ("stage", "from_draft", "drafter", "forced")}
        for r in tokens
    ]


def text_logprobs(
    tokenizer: Tokenizer, entries: Iterable[Entry], count: int
) -> dict[str, list[Any]]:
    """The `logprobs` of a completion, with `count` alternatives.

    The first token of a prompt cannot be predicted: its log-probability is None.
    """
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    arrays: dict[str, list[Any]] = {name: [] for name in names}
    for token, logprob, top, offset in entries:
        best: dict[str, float] | None = None
        if logprob is not None:
            # Always include the token itself, even if it is not among the best.
            pairs = [*top[:count], (token, logprob)]
            best = {shown(tokenizer, other): value for other, value in pairs}
        values = shown(tokenizer, token), logprob, best, offset
        for array, value in zip(arrays.values(), values, strict=True):
            array.append(value)
    return arrays
