"""`POST /v1/completions`.

- in: a request's fields
- out: prompts, of text or token ids, with their options, and the answer's choices
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.server.catalog import Served
from mlx_poe.server.choice import Piece
from mlx_poe.server.error_bodies import refused
from mlx_poe.server.fields import Fields
from mlx_poe.server.logprobs import ARRAYS, TextLogprobs, stages_of
from mlx_poe.server.response_frame import Answer
from mlx_poe.server.shared_fields import Options, read_options

# OpenAI's defaults and limits.
DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 5


@dataclass(frozen=True)
class CompletionRequest:
    """A parsed request: prompts, and how to answer each."""

    prompts: list[str | list[int]]
    options: Options
    echo: bool

    def answer(self, tokenizer: Tokenizer, tokens: Sequence[Sequence[int]]) -> CompletionAnswer:
        """An empty answer; `tokens` are those of each prompt."""
        return CompletionAnswer(self, tokenizer, tokens)


def read_completion(body: Fields, served: Served) -> CompletionRequest:
    """Parse a request. ApiError for anything that cannot be honored."""
    options = read_options(body, served, default_max_tokens=DEFAULT_MAX_TOKENS)
    prompts = _read_prompts(body)
    echo = body.flag("echo")
    options.top_logprobs = body.whole("logprobs", 0, MAX_LOGPROBS)
    if options.max_tokens == 0 and not echo:
        raise refused("max_tokens", "0 is allowed only with echo: true, which returns the prompt")
    # Accept only the values that change nothing.
    body.only("best_of", 1)
    body.only("suffix", "")
    body.only("response_format", {"type": "text"})
    body.done()
    if echo and options.top_logprobs is not None:
        options.decoding["prompt_logprobs"] = True
    return CompletionRequest(prompts, options, echo)


def _read_prompts(body: Fields) -> list[str | list[int]]:
    """A text, texts, token ids, or lists of them, as a list of prompts."""
    given = body.required("prompt", body.take)
    if isinstance(given, str) or _are_ids(given):
        prompts: list[Any] = [given]
    elif isinstance(given, list):
        prompts = given
    else:
        prompts = []
    for i, prompt in enumerate(prompts):
        place = "prompt" if prompts[0] is given else f"prompt[{i}]"
        if not isinstance(prompt, str) and not _are_ids(prompt):
            raise refused(place, "expected text, or an array of token ids")
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise refused(place, "it is empty")
    if not prompts:
        raise refused("prompt", "expected text, an array of texts, or of token ids")
    return prompts


def _are_ids(value: Any) -> bool:
    """A list of whole numbers, at least one."""
    numbers = isinstance(value, list) and bool(value)
    return numbers and all(isinstance(n, int) and not isinstance(n, bool) for n in value)


class CompletionAnswer(Answer):
    """Text completions, each after its prompt with `echo`."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, request: CompletionRequest, tokenizer: Tokenizer, tokens: Sequence[Sequence[int]]
    ):
        options = request.options
        super().__init__(options, tokenizer, options.n * len(request.prompts))
        self._prompts, self._tokens, self._echo = request.prompts, tokens, request.echo
        self._texts = [p if isinstance(p, str) else tokenizer.decode(p) for p in request.prompts]

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def deltas(self, index: int, piece: Piece, first: bool) -> list[dict[str, Any]]:
        """The prompt, if it is echoed, then text as it comes."""
        found = self._parts(index, piece, first)
        chunks = [self._choice(index, *part) for part in found if any(part)]
        if piece.finish_reason:
            reason = "length" if self.options.max_tokens == 0 else piece.finish_reason
            chunks.append({**self._choice(index, "", None, []), "finish_reason": reason})
        return chunks

    def choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        """The text with its details."""
        parts = [part for i, p in enumerate(pieces) for part in self._parts(index, p, i == 0)]
        text = "".join(part[0] for part in parts)
        logprobs: dict[str, list] | None = None
        if self.options.top_logprobs is not None:
            found = [part[1] for part in parts if part[1] is not None]
            logprobs = {name: [v for one in found for v in one[name]] for name in ARRAYS}
        tokens = [token for part in parts for token in part[2]]
        choice = self._choice(index, text, logprobs, tokens)
        reason = "length" if self.options.max_tokens == 0 else pieces[-1].finish_reason
        return {**choice, "finish_reason": reason}

    def _parts(
        self, index: int, piece: Piece, first: bool
    ) -> list[tuple[str, dict[str, list] | None, list]]:
        """The text, log-probabilities and tokens of a piece, after the prompt's if echoed."""
        asked, before = self.options.top_logprobs, 0
        parts: list[tuple[str, dict[str, list] | None, list]] = []
        if self._echo:
            prompt = self._texts[index // self.options.n]
            before = len(prompt)
            if first:
                parts.append((prompt, self._echoed(index, asked), []))
        if self.options.max_tokens != 0:
            found = TextLogprobs(self.tokenizer, asked or 0)
            for token in piece.tokens:
                offset = before + token.text_offset
                found.add(token.token, token.logprob, token.top_logprobs, offset)
            parts.append((piece.text, None if asked is None else found.take(), piece.tokens))
        return parts

    def _echoed(self, index: int, asked: int | None) -> dict[str, list] | None:
        """The log-probabilities of a prompt's tokens."""
        prompt = self._prompts[index // self.options.n]
        tokens = self._tokens[index // self.options.n]
        first = self.choices[index].first
        if asked is None or first is None:
            return None
        scores = [(None, ()), *(first.prompt_logprobs or ())]
        found, offset = TextLogprobs(self.tokenizer, asked), 0
        detokenizer = self.tokenizer.detokenizer()
        for i, (token, (logprob, top)) in enumerate(zip(tokens, scores, strict=True)):
            found.add(token, logprob, top, offset)
            # The BOS prepended to a text is not part of the text.
            if i or not isinstance(prompt, str) or token != self.tokenizer.bos_token_id:
                offset += len(detokenizer.add_token(token))
        return found.take()

    def _choice(
        self, index: int, text: str, logprobs: dict[str, list] | None, tokens: list
    ) -> dict[str, Any]:
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": None}
        if self.options.token_stages:
            choice["token_stages"] = stages_of(self.tokenizer, tokens)
        return choice
