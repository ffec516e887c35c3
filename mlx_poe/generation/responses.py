"""From tokens to what a caller sees: text, finish reasons, and speeds.

- in: a request, and the tokens of its sequence, one by one
- out: a `GenerationResponse` for each, which is what every consumer reads
- shared by `stream_generate`, which decodes one sequence, and `Scheduler`, which decodes many
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from cognica_mlx.decoding.drafters import LOOKED_UP, OWN, ROUNDED
from cognica_mlx.decoding.requests import DecodedToken
from cognica_mlx.decoding.state import DecodingState, Progress
from cognica_mlx.pricing.pace import Pace
from mlx_poe.generation.request import GenerationRequest

_DECODED = ("token", "logprob", "stage", "from_draft", "forced", "drafter")
_MAKERS = {OWN: "own stages", ROUNDED: "quantized stages", LOOKED_UP: "looked up"}


@dataclass(frozen=True)
class GenerationResponse:
    """One token, and the statistics so far.

    text: the text that this token completed, possibly empty; the pieces joined are the reply.
    token, logprob, stage, from_draft: as in `DecodedToken`, with stages counted from 0.
    prompt_tps and generation_tps: tokens per second so far. peak_memory: the whole process's, in
    GB. drafter: what drafted the token, or None: "stages" (the model's own), "rounded" (a quantized
    copy) or "lookup" (the text itself). drafted_tokens: drafts made so far, kept or not; drafts:
    the same by drafter.
    fell_back: None, or why decoding fell back to full depth: see `costs` in `stream_generate`.
    finish_reason: "stop" or "length" for the last token, otherwise None.
    cached_tokens: how many of the prompt's positions came from a state and were not run.
    forced: a constraint allowed no other token, so no stage was run for it and `stage` is 0.
    top_logprobs: the best tokens at this position and their log-probabilities, best first, as many
    as requested. text_offset: where the token's own text begins in the reply's text, before stop
    strings are removed. prompt_logprobs: in the first response, if requested, the log-probability
    of each prompt token but the first, and the best tokens at its position; otherwise None.
    """

    text: str
    token: int
    logprob: float
    stage: int
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    drafted_tokens: int = 0
    fell_back: str | None = None
    finish_reason: str | None = None
    cached_tokens: int = 0
    forced: bool = False
    top_logprobs: tuple[tuple[int, float], ...] = ()
    text_offset: int = 0
    prompt_logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] | None = None
    drafter: str | None = None
    drafts: Mapping[str, int] = field(default_factory=dict)

    @property
    def parked(self) -> str | None:
        """`fell_back`, as version 0.2 called it."""
        return self.fell_back


def is_last(news: GenerationResponse | Exception) -> bool:
    """Whether a reply ends with this response, or error."""
    return isinstance(news, Exception) or news.finish_reason is not None


def fallback_note(mode: str, responses: Sequence[GenerationResponse]) -> str | None:
    """The note of a command whose reply fell back to full depth."""
    reason = responses[-1].fell_back if responses else None
    return f"{mode} fell back to full depth: {reason} (--no-fallback keeps it)" if reason else None


def drafts_by_maker(responses: Sequence[GenerationResponse]) -> dict[str, tuple[int, int]]:
    """For each drafter of a reply: how many of its tokens were kept, and how many it made."""
    made = responses[-1].drafts if responses else {}
    kept = Counter(response.drafter for response in responses)
    return {maker: (kept[maker], count) for maker, count in made.items()}


def drafts_in_words(responses: Sequence[GenerationResponse]) -> str:
    """`drafts_by_maker` in words; empty without drafts."""
    drafts = drafts_by_maker(responses).items()
    return ", ".join(f"{_MAKERS[maker]} {kept} of {made}" for maker, (kept, made) in drafts)


class Reply:
    """A request's reply as it is made: its sequence, and a response to each token.

    Its clock starts here. `cached` is reported as `cached_tokens`, by default the sequence's own
    count. `count` tokens have been added; the reply is `over` at the last one.
    """

    def __init__(
        self,
        request: GenerationRequest,
        state: DecodingState | None = None,
        progress: Progress | None = None,
        cached: int | None = None,
    ):
        self.request, self._cached = request, cached
        self.sequence = request.sequence(state, progress)
        advice = self.sequence.advice
        self.pace = advice if isinstance(advice, Pace) else None
        self._detokenizer = request.tokenizer.detokenizer()
        self._stops = StopStrings(request.stop)
        self._begun = self._started = time.perf_counter()
        self._prompt_seconds = 0.0
        self._reading = True
        # Tokens since the prompt was read.
        self._generated = 0
        # Characters so far, including those held back.
        self._length = 0
        self.count = 0
        self.over = False

    def add(self, decoded: DecodedToken) -> GenerationResponse | None:
        """The response to the sequence's next token; the last one has a `finish_reason`. None for a
        token after that."""
        if self.over:
            return None
        sequence, stops, now = self.sequence, self._stops, time.perf_counter()
        self.count += 1
        if not self._reading:
            self._generated += 1
        else:
            # The first token that needs the prompt belongs to the prompt's time.
            self._prompt_seconds = now - self._begun
            self._started, self._reading = now, decoded.forced
        finish_reason = "length" if self.count == sequence.max_tokens else None
        text, offset = "", self._length
        if decoded.token in self.request.tokenizer.eos_token_ids:
            finish_reason = "stop"
        else:
            piece = self._detokenizer.add_token(decoded.token)
            self._length += len(piece)
            text = stops.add(piece)
        if finish_reason and not stops.found:
            text += stops.add(self._detokenizer.finalize()) + stops.rest()
        if stops.found:
            finish_reason = "stop"
        self.over = finish_reason is not None
        certain = decoded.forced and self.request.sampling.top_logprobs
        scored = self.count == 1 and sequence.score_prompt
        return GenerationResponse(
            text=text,
            **{name: getattr(decoded, name) for name in _DECODED},
            prompt_tokens=sequence.prompt_length,
            prompt_tps=sequence.prompt_length / self._prompt_seconds,
            generation_tokens=self.count,
            generation_tps=self._generated / (now - self._started) if self._generated else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            drafted_tokens=sequence.drafted,
            fell_back=self.pace.fell_back if self.pace else None,
            finish_reason=finish_reason,
            cached_tokens=sequence.cached if self._cached is None else self._cached,
            top_logprobs=((decoded.token, 0.0),) if certain else decoded.top,
            text_offset=offset,
            prompt_logprobs=tuple(sequence.prompt_scores) if scored else None,
            drafts=dict(sequence.drafts),
        )


class StopStrings:
    """Passes text on until a stop string appears; holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str] = ()):
        self.stops = stops
        self.held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        text = self.held + text
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self.held = True, ""
            return text[: min(ends)]
        keep = max(
            (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """The text held back, once no more text will come."""
        text, self.held = self.held, ""
        return text
