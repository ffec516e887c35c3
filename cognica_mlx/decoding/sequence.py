"""One sequence being decoded: its prompt, its state, the tokens emitted, and its requests.

- in: a prompt, a mode, a sampler; optionally an earlier call's state, and advice on what pays
- out: requests for a driver, and tokens
- afterwards the state holds the prompt and the tokens emitted, nothing else
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Sequence
from typing import Any, Protocol

import mlx.core as mx

from cognica_mlx.decoding.advice import Advice
from cognica_mlx.decoding.choosing import Context, best_of, logprob_of
from cognica_mlx.decoding.constraint import Constraint
from cognica_mlx.decoding.requests import (
    DecodedToken,
    Read,
    Request,
    Resumable,
    Score,
    Steps,
    Submit,
    advance,
    through,
    top_of,
)
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.decoding.state import DecodingState, Progress
from cognica_mlx.decoding.targets import Target
from cognica_mlx.errors import RankLostError, RequestError, RollbackError
from cognica_mlx.network.model import PoEModel

# Prompt chunks are shorter by this factor if several machines run them.
PIPELINE = 2


class Mode(Protocol):
    """A way to generate tokens. `depth` is the deepest stage it may need, `prefill_stage` the stage
    that the prompt must have gone through before the first token; `target` is the target that it
    predicts with or approximates."""

    depth: int
    prefill_stage: int
    target: Target

    def steps(self, sequence: DecodingSequence) -> Steps:
        """Emit tokens until the budget is used up, or the mode no longer pays."""


class DecodingSequence:
    """A prompt being continued in a mode.

    `text` is the prompt and the tokens emitted, `drafts` counts each drafter's drafts, `cached` is
    how many of the prompt's positions the state held already. `special` tokens are never drafted by
    lookup. With `score_prompt`, `prompt_scores` has the log-probability and the best alternatives
    (as `DecodedToken.top`) of each prompt token but the first, once the first token is emitted.
    Raises RequestError for an empty prompt, a token id outside the vocabulary, or a state of
    another model.
    """

    def __init__(
        self,
        model: PoEModel,
        prompt: Sequence[int],
        mode: Mode,
        *,
        max_tokens: int,
        sampler: Sampler | None = None,
        state: DecodingState | None = None,
        prefill_step_size: int | None = None,
        progress: Progress | None = None,
        advice: Advice | None = None,
        fallback: Mode | None = None,
        last_resort: Mode | None = None,
        constraint: Constraint | None = None,
        score_prompt: bool = False,
        special: Collection[int] = (),
    ):
        """`fallback` takes over when `advice` ends the mode, `last_resort` when machines that hold
        part of the model are lost (RankLostError if None). `progress(done, total)` is called after
        every chunk of `prefill_step_size` prompt tokens. The output satisfies `constraint`, which
        must be at its beginning, and ends where it ends. With `score_prompt` the whole prompt is
        run, even if the state holds part of it."""
        self.sampler = sampler or Sampler()
        check_sequence(model, prompt, self.sampler.options, max_tokens, prefill_step_size)
        state = state or DecodingState(model)
        if state.model is not model:
            raise RequestError("the decoding state belongs to another model")
        self.model, self.mode, self.state = model, mode, state
        self.advice, self.fallback = advice or Advice(), fallback
        self.last_resort = last_resort
        self.constraint = constraint
        self.text, self.prompt_length = list(prompt), len(prompt)
        self.max_tokens = max_tokens
        self.drafts: Counter[str] = Counter()
        self.special, self.cached = special, 0
        self.score_prompt = score_prompt
        self.prompt_scores: list[tuple[float, tuple[tuple[int, float], ...]]] = []
        self.step_size, self.progress = prefill_step_size or step_size_for(model), progress
        self._begun, self._falls_back = False, False
        self._latest: Steps | None = None

    @property
    def drafted(self) -> int:
        """The number of drafts made so far."""
        return self.drafts.total()

    @property
    def budget(self) -> int:
        """How many more tokens to emit."""
        emitted = len(self.text) - self.prompt_length
        if emitted and self.constraint and self.text[-1] in self.constraint.ends:
            return 0
        return self.max_tokens - emitted

    def steps(self) -> Steps:
        """Everything from the prompt to the last token, as requests and tokens.

        If an interruption ends them, they go on after the last token emitted, as they do if this is
        called again, with any `state`. Raises RequestError at the first if another sequence is
        using the state.
        """
        if self._latest:
            self._latest.close()
        self._latest = Resumable(self._steps)
        return self._latest

    def _steps(self) -> Steps:
        if not self.budget:
            return
        with self.state.in_use():
            self.state.renew_traces()
            prompt = self.text[:-1]
            if self.constraint:
                self._rollback_constraint(self.constraint)
            if self.score_prompt and not self._scored:
                self.prompt_scores.clear()
                self.state.rollback(0)
            common = self._return_to_common_start(prompt)
            if not self._begun:
                # If a stage lacks something, the whole text is run again.
                lacking = any(self.state.lacks(stage) for stage in range(self.mode.depth + 1))
                self._begun, self.cached = True, 0 if lacking else common
                self.advice.begins(len(prompt))
            try:
                try:
                    yield from self._in_full()
                except RankLostError:
                    if self.last_resort is None or (self.score_prompt and not self._scored):
                        raise
                    yield from self._without_others(self.last_resort)
            finally:
                self.state.rollback(min(self.state.length, len(self.text)))

    def _in_full(self) -> Steps:
        """The prompt, then tokens in the requested mode and in its fallback."""
        prompt = self.text[:-1]
        yield from ready(self.state, self.mode.depth, self.step_size, self.progress)
        if self.score_prompt and not self._scored:
            yield from self._score_prompt()
        # The remainder after whole chunks runs with the prompt's last token.
        rest = prompt[self.state.length :]
        report, total = self.progress, len(rest)
        whole = total - total % self.step_size
        told = report and (lambda done, _: report(done, total))
        yield from read_prompt(
            self.state, rest[:whole], self.mode.prefill_stage, self.step_size, told
        )
        self.state.append(rest[whole:])
        if told and total > whole:
            told(total, whole)
        if not self._falls_back:
            yield from self._emitted(self.mode)
        if self.budget and self.fallback:
            self._falls_back = True
            yield from self._emitted(self.fallback)

    def _without_others(self, mode: Mode) -> Steps:
        """The remaining tokens, in a mode that needs no other machine's stages."""
        state, text, constraint = self.state, self.text[:-1], self.constraint
        state.rollback(min(state.length, len(text)))
        if constraint:
            self._rollback_constraint(constraint)
        yield from ready(state, mode.depth, self.step_size)
        yield from read_prompt(state, text[state.length :], mode.depth, self.step_size)
        if self.budget:
            yield from self._emitted(mode)

    def _rollback_constraint(self, constraint: Constraint) -> None:
        """Return a constraint, which may be ahead, to the tokens emitted."""
        constraint.rollback(constraint.length - (len(self.text) - self.prompt_length))

    @property
    def _scored(self) -> bool:
        """Whether all of the prompt has been scored."""
        return len(self.prompt_scores) == self.prompt_length - 1

    def _emitted(self, mode: Mode) -> Steps:
        """The mode's requests and tokens, with answers passed on, until the budget is used up."""
        steps, answer = mode.steps(self), None
        try:
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration:
                    return
                if not isinstance(step, DecodedToken):
                    answer = yield step
                    continue
                answer = None
                if mode is self.mode:
                    self.advice.emitted()
                # Last, so that an interruption finds it either emitted or not.
                self.text.append(step.token)
                yield step
                if not self.budget:
                    return
        finally:
            steps.close()

    def _score_prompt(self) -> Generator[Request, Any, None]:
        """Run all of the prompt but its last token, and score the token after each position.

        Scores are the mode's own target's, without penalties. No chunk is longer than the slack,
        because only that many activations are kept.
        """
        state, target, last = self.state, self.mode.target, self.prompt_length - 1
        size = min(self.step_size, state.slack)
        for start in range(0, last, size):
            stop = min(start + size, last)
            state.append(self.text[start:stop])
            yield from through(state, target.depth)
            scores = yield Score(state, target, stop - start)
            follow = mx.array(self.text[start + 1 : stop + 1], dtype=mx.int32)
            arrays = logprob_of(scores, follow), *best_of(scores, self.sampler.options.top_logprobs)
            logprobs, *best = yield Read(state, arrays)
            self.prompt_scores += [(lp, top_of(best, row)) for row, lp in enumerate(logprobs)]
            if self.progress:
                self.progress(stop, last)

    def context(self) -> Context:
        """The current context for the sampler's penalties."""
        size, most = self.model.config.vocab_size, self.prompt_length + self.max_tokens
        return self.sampler.context(self.text, self.prompt_length, size, most)

    def forced(self) -> Generator[DecodedToken, None, None]:
        """Emit the tokens that the constraint forces, until the budget is used up.

        The stages run them in one pass when they next have to predict a token.
        """
        while self.constraint and self.budget and (tokens := self.constraint.forced()):
            for token in tokens:
                self.constraint.commit([token])
                yield DecodedToken(token, 0.0, 0, forced=True)

    def mask(self) -> mx.array | None:
        """The constraint's mask for the next token, (1, W) uint32, or None."""
        return self.constraint.mask()[None] if self.constraint else None

    def commit(self, token: int) -> None:
        """Commit a token to the constraint, if there is one."""
        if self.constraint:
            self.constraint.commit([token])

    def _return_to_common_start(self, wanted: list[int]) -> int:
        """Roll the state back to the prefix that it shares with `wanted`; returns its length."""
        held = self.state.tokens
        common = min(len(held), len(wanted))
        if held[:common] != wanted[:common]:  # usually the prompt continues the state's text
            common = next(
                i for i, pair in enumerate(zip(held, wanted, strict=False)) if len({*pair}) > 1
            )
        try:
            self.state.rollback(common)
        except RollbackError:
            self.state.rollback(0)
        return self.state.length


def check_sequence(
    model: PoEModel,
    prompt: Sequence[int],
    sampling: SamplingOptions,
    max_tokens: int,
    prefill_step_size: int | None = None,
) -> None:
    """Raise RequestError for an empty prompt, a token id outside the model's vocabulary, or a limit
    below 1."""
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token")
    if max_tokens < 1:
        raise RequestError(f"max_tokens {max_tokens} must be at least 1")
    if prefill_step_size is not None and prefill_step_size < 1:
        raise RequestError(f"prefill_step_size {prefill_step_size} must be at least 1")
    model.check_ids(prompt)
    model.check_ids([*(sampling.logit_bias or ())])


def prefill_step_size_here() -> int:
    """Prompt tokens to run at once. On the CPU more are no faster, and attention stores their
    scores. On a GPU it does not, and more rows use it better."""
    return 256 if mx.default_device() == mx.cpu else 1024


def step_size_for(model: PoEModel) -> int:
    """Like `prefill_step_size_here`, but smaller if several machines share the work: each must wait
    for the one before it to finish a chunk."""
    size = prefill_step_size_here()
    return size // PIPELINE if any(stage.rank for stage in model.stages) else size


def read_prompt(
    state: DecodingState,
    tokens: Sequence[int],
    depth: int,
    step_size: int | None = None,
    progress: Progress | None = None,
) -> Generator[Request, Any, None]:
    """Append tokens in chunks and run them through the stages up to `depth`."""
    step_size = step_size or prefill_step_size_here()
    for start in range(0, len(tokens), step_size):
        state.append(tokens[start : start + step_size])
        yield from through(state, depth)
        yield Submit(state)
        if progress:
            progress(min(start + step_size, len(tokens)), len(tokens))


def ready(
    state: DecodingState, depth: int, step_size: int | None = None, progress: Progress | None = None
) -> Generator[Request, Any, None]:
    """Make `depth` the deepest stage that is kept ready.

    Exact whatever ran before: if pending positions of a stage have been dropped, the whole text is
    run again.
    """
    state.model.check_stage(depth, "depth")
    state.depth = depth
    if any(state.lacks(stage) for stage in range(depth + 1)):
        tokens = list(state.tokens)
        state.clear()
        yield from read_prompt(state, tokens, depth, step_size, progress)
    while (late := state.overdue()) is not None:
        # Only `keep_trunk` can hold this many positions: run them in chunks, like a prompt.
        yield from advance(state, late, step_size or prefill_step_size_here())
        yield Submit(state)
