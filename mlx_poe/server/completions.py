"""`POST /v1/completions`.

- in: a request's fields
- out: prompts, of text or token ids, with their options, and the response's choices
"""

from __future__ import annotations

from typing import Any

from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.server.catalog import Served
from mlx_poe.server.error_bodies import refused
from mlx_poe.server.fields import Fields
from mlx_poe.server.logprobs import Entry, stages_of, text_logprobs
from mlx_poe.server.response_frame import ResponseFrame
from mlx_poe.server.shared_fields import Options, read_options

# OpenAI's defaults and limits.
DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 5


def read_completion(body: Fields, served: Served, tokenizer: Tokenizer) -> CompletionResponse:
    """Parse a request. ApiError for anything that cannot be honored."""
    options = read_options(body, served, default_max_tokens=DEFAULT_MAX_TOKENS)
    options.prompts = _read_prompts(body)
    echo = body.flag("echo")
    options.top_logprobs = body.whole("logprobs", 0, MAX_LOGPROBS)
    if options.max_tokens == 0 and not echo:
        raise refused("max_tokens", "0 is allowed only with echo: true, which returns the prompt")
    # Accept only the values that change nothing.
    body.only("best_of", 1)
    body.only("suffix", "")
    body.only("response_format", {"type": "text"})
    body.done()
    options.decoding["prompt_logprobs"] = echo and options.top_logprobs is not None
    return CompletionResponse(options, tokenizer, echo)


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


class CompletionResponse(ResponseFrame):
    """Text completions, each after its prompt with `echo`."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, options: Options, tokenizer: Tokenizer, echo: bool):
        super().__init__(options, tokenizer)
        self._echo = echo

    def deltas(
        self, index: int, response: GenerationResponse, tokens: list[GenerationResponse]
    ) -> list[dict[str, Any]]:
        """The prompt, if it is echoed, then text as it comes."""
        chunks = []
        if self._echo and len(self.choices[index].responses) == 1:
            chunks.append(self._choice(index, self._prompt(index), [], self._echoed(index)))
        if self.options.max_tokens != 0 and (response.text or tokens):
            entries = self._entries(index, tokens)
            chunks.append(self._choice(index, response.text, tokens, entries))
        if response.finish_reason:
            chunks.append(self._choice(index, "", [], None, self._reason(response)))
        return chunks

    def choice(self, index: int) -> dict[str, Any]:
        choice, text, tokens = self.choices[index], "", []
        if self.options.max_tokens != 0:
            text, tokens = choice.text, choice.tokens
        entries = self._entries(index, tokens)
        if self._echo:
            text, entries = self._prompt(index) + text, [*self._echoed(index), *entries]
        return self._choice(index, text, tokens, entries, self._reason(choice.responses[-1]))

    def _reason(self, last: GenerationResponse) -> str | None:
        return "length" if self.options.max_tokens == 0 else last.finish_reason

    def _prompt(self, index: int) -> str:
        prompt = self.options.prompts[index // self.options.n]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def _entries(self, index: int, tokens: list[GenerationResponse]) -> list[Entry]:
        """What `text_logprobs` takes of a reply's tokens."""
        before = len(self._prompt(index)) if self._echo else 0
        return [(t.token, t.logprob, t.top_logprobs, before + t.text_offset) for t in tokens]

    def _echoed(self, index: int) -> list[Entry]:
        """What `text_logprobs` takes of a prompt's tokens, if it was scored."""
        if self.options.top_logprobs is None:
            return []
        prompt = self.options.prompts[index // self.options.n]
        tokens = self.tokens[index // self.options.n]
        scores = [(None, ()), *(self.choices[index].responses[0].prompt_logprobs or ())]
        entries: list[Entry] = []
        offset = 0
        detokenizer = self.tokenizer.detokenizer()
        for i, (token, (logprob, top)) in enumerate(zip(tokens, scores, strict=True)):
            entries.append((token, logprob, top, offset))
            # The BOS prepended to a text is not part of the text.
            if i or not isinstance(prompt, str) or token != self.tokenizer.bos_token_id:
                offset += len(detokenizer.add_token(token))
        return entries

    def _choice(
        self,
        index: int,
        text: str,
        tokens: list[GenerationResponse],
        entries: list[Entry] | None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        asked, logprobs = self.options.top_logprobs, None
        if asked is not None and entries is not None:
            logprobs = text_logprobs(self.tokenizer, entries, asked)
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}
        if self.options.token_stages:
            choice["token_stages"] = stages_of(self.tokenizer, tokens)
        return choice
