"""The decoding state: one token sequence, filled to a different depth in every stage.

    stage 0  ■■■■■■■■■■■■■■■■      filled to 16
    stage 1  ■■■■■■■■■■■··         filled to 11, 5 pending
    stage 2  ■■■■■■■■              filled to 8

- `append` adds tokens, `advance` runs a stage over all that is pending before it, `rollback`
  returns every stage to a position; on these stands every decoding mode
- bounded: each layer keeps its window and a slack, each boundary what is pending and a slack
- `filled[0] >= filled[1] >= ...`, and a position runs through a stage once, rollbacks aside
- it knows nothing about sampling, modes or text; one sequence (B = 1)

A state can pass to another model over the same base (`switch`): what both compute alike is kept.
For that the activations where the base ends are held back as far as `keep_trunk` says.

Stages deeper than `depth` are not kept ready: when more than `max_pending` positions wait before
such a stage they are forgotten, and `set_depth` fills the stage by running the text again from
its tokens, which costs one prefill. Up to `max_pending` positions a deeper stage catches up from
the kept activations, in one batch. Stages within `depth` catch up by themselves at that limit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from cognica_mlx.cache import SlidingCache
from cognica_mlx.errors import RequestError, RollbackError
from cognica_mlx.model import Hidden, PoEModel
from cognica_mlx.stacking import shared_stages

SLACK = 128
MAX_PENDING = 256
HIDDEN_PARTS = ("x", "x0", "backout")
UNREAD = 128

Progress = Callable[[int, int], None]


def prefill_step_size() -> int:
    """Tokens to run at once: more are no quicker on the CPU, whose attention keeps their scores.

    A GPU's keeps none, and more rows fill it better.
    """
    return 256 if mx.default_device() == mx.cpu else 512


class Boundary:
    """Activations at one stage boundary, in runs of consecutive positions; old runs are dropped."""

    def __init__(self) -> None:
        self._runs: deque[tuple[int, Hidden]] = deque()
        self.stop = 0

    @property
    def start(self) -> int:
        """The first position held; equals `stop` when none is."""
        return self._runs[0][0] if self._runs else self.stop

    def append(self, hidden: Hidden) -> None:
        """Add the positions that follow the last."""
        self._runs.append((self.stop, hidden))
        self.stop += len(hidden)

    def read(self, start: int, stop: int) -> Hidden:
        """The positions start .. stop - 1, which must be held."""
        parts: list[Hidden] = []
        # From the end: what is asked for is recent, and old runs may be many.
        for first, hidden in reversed(self._runs):
            if first + len(hidden) <= start:
                break
            if first < stop:
                whole = start <= first and first + len(hidden) <= stop
                parts.append(hidden if whole else hidden[max(start - first, 0) : stop - first])
        return Hidden.concatenate(parts[::-1])

    def forget_before(self, position: int) -> None:
        """Drop the runs that lie wholly before `position`."""
        while self._runs and self._runs[0][0] + len(self._runs[0][1]) <= position:
            self._runs.popleft()

    def truncate(self, position: int) -> None:
        """Drop `position` and all after it."""
        while self._runs and self._runs[-1][0] >= position:
            self._runs.pop()
        if self._runs and self.stop > position:
            first, hidden = self._runs[-1]
            if first + len(hidden) > position:
                self._runs[-1] = (first, hidden[: position - first])
        self.stop = min(self.stop, position)

    @property
    def consistent(self) -> bool:
        """Whether the runs follow each other up to `stop`."""
        ends = [first + len(hidden) for first, hidden in self._runs]
        starts = [first for first, _ in self._runs]
        return [*starts[1:], self.stop] == ends if ends else True

    def fork(self) -> Boundary:
        """An independent copy that shares the arrays."""
        other = Boundary()
        other._runs, other.stop = self._runs.copy(), self.stop
        return other

    def arrays(self) -> list[mx.array]:
        """The arrays held, for evaluation and for counting bytes."""
        return [a for _, hidden in self._runs for a in hidden.arrays()]


class DecodingState:
    """Keys, values, pending activations and tokens of one sequence under one model.

    `slack` positions can always be rolled back, counted from the furthest one reached;
    `max_pending` positions may wait before a stage. What the base gives out for the last
    `keep_trunk` positions stays at hand, for other specialists than this model's.
    `positions_run[k]` counts the positions that have gone through stage k, those later rolled back
    included.
    """

    def __init__(
        self,
        model: PoEModel,
        *,
        slack: int = SLACK,
        max_pending: int = MAX_PENDING,
        keep_trunk: int = 0,
    ):
        if slack < 1 or max_pending < 1:
            raise RequestError(f"slack {slack} and max_pending {max_pending} must be at least 1")
        self.model = model
        self.slack, self.max_pending, self.keep_trunk = slack, max_pending, keep_trunk
        self._depth = model.poe_n_stages - 1
        self.positions_run = [0] * model.poe_n_stages
        self._clear()

    def _clear(self) -> None:
        self.filled = [0] * self.model.poe_n_stages
        self._caches = [SlidingCache(w, self.slack) for w in self.model.config.windows]
        # The first is the embedded text, _boundaries[k + 1] what stage k gives out.
        self._boundaries = [Boundary() for _ in range(self.model.poe_n_stages + 1)]
        self._tokens: list[int] = []
        self._unread: list[mx.array] = []

    @property
    def length(self) -> int:
        """Positions appended so far."""
        return self._boundaries[0].stop

    @property
    def depth(self) -> int:
        """The deepest stage that is kept ready; `set_depth` changes it."""
        return self._depth

    @property
    def tokens(self) -> list[int]:
        """The token ids appended so far. Waits for those still being computed."""
        self._read(len(self._unread))
        return self._tokens

    def _read(self, count: int) -> None:
        """Turn the oldest `count` arrays of token ids into numbers; waits for them."""
        for tokens in self._unread[:count]:
            self._tokens += tokens.reshape(-1).tolist()  # type: ignore[arg-type]
        del self._unread[:count]

    def append(self, tokens: Sequence[int] | mx.array) -> None:
        """Add tokens to the text: ids, or a (1, T) int array, which may still be unevaluated.

        Raises RequestError for ids outside the vocabulary.
        """
        if not isinstance(tokens, mx.array):
            self.check_ids(tokens)
            tokens = mx.array([list(tokens)], dtype=mx.int32)
        if not tokens.size:
            return
        self._boundaries[0].append(self.model.embed(tokens, self._previous_token()))
        self._forget(0)
        self._unread.append(tokens)
        if len(self._unread) > 2 * UNREAD:
            # Long since computed: without this a long text would keep an array for every token.
            self._read(UNREAD)

    def check_ids(self, tokens: Sequence[int]) -> None:
        """Raise RequestError for a token id outside the vocabulary."""
        size = self.model.config.vocab_size
        if not tokens or (min(tokens) >= 0 and max(tokens) < size):
            return
        token = next(token for token in tokens if not 0 <= token < size)
        raise RequestError(f"token id {token} is outside the vocabulary of {size}")

    def _previous_token(self) -> mx.array | None:
        if not self.length:
            return None
        if self._boundaries[0].start < self.length:
            return self._boundaries[0].read(self.length - 1, self.length).tokens
        return mx.array([[self.tokens[-1]]], dtype=mx.int32)

    def _input(self, stage: int) -> Boundary:
        """What `stage` takes in."""
        return self._boundaries[self.model.stage_inputs[stage]]

    def pending(self, stage: int) -> int:
        """How many positions wait to be run through `stage`."""
        return self._input(stage).stop - self.filled[stage]

    def _forgotten(self, stage: int) -> bool:
        """Whether positions that `stage` has not run are no longer held before it."""
        return self.pending(stage) > 0 and self._input(stage).start > self.filled[stage]

    def advance(self, stage: int) -> Hidden | None:
        """Run all that is pending before `stage` through it, in one batch.

        Returns the boundary activations of the positions it ran, None where none was pending.
        An interruption (Ctrl-C) half-way leaves the state empty, never inconsistent. Raises
        RequestError for a stage beyond `depth`.
        """
        self.model.check_stage(stage)
        if stage > self.depth:
            raise RequestError(
                f"stage {stage} is beyond the depth kept ready; call set_depth first"
            )
        if not self.pending(stage):
            return None
        return self._run(stage, self._input(stage).stop)

    def _run(self, stage: int, stop: int) -> Hidden:
        """Run the positions from where `stage` is filled to, up to `stop`, through it."""
        start = self.filled[stage]
        layers = self.model.config.stage_range(stage)
        try:
            hidden = self._input(stage).read(start, stop)
            hidden = self.model.run_layers(hidden, layers, self._caches)
            self.filled[stage] = stop
            self.positions_run[stage] += stop - start
            self._boundaries[stage + 1].append(hidden)
            self._tidy(stage)
        except BaseException:
            # Interrupted between two layers, they stand at different positions: start afresh.
            self._clear()
            raise
        return hidden

    def _tidy(self, stage: int) -> None:
        """Keep the boundaries around `stage` bounded after it has advanced."""
        self._forget(self.model.stage_inputs[stage])
        self._forget(stage + 1)
        for deeper in self._readers(stage + 1):
            if deeper <= self.depth and self.pending(deeper) > self.max_pending:
                self.advance(deeper)

    def _readers(self, boundary: int) -> list[int]:
        """The stages that take in a boundary."""
        inputs = self.model.stage_inputs
        return [stage for stage, source in enumerate(inputs) if source == boundary]

    def _forget(self, boundary: int) -> None:
        """Drop what no stage needs that is kept ready, or can still catch up, and is not recent."""
        held, kept = self._boundaries[boundary], self.slack
        if boundary == len(self.model.config.stage_layers):
            kept = max(kept, self.keep_trunk)
        needed = held.stop
        for stage in self._readers(boundary):
            if stage <= self.depth or self.pending(stage) <= self.max_pending:
                needed = min(needed, self.filled[stage])
        held.forget_before(min(needed, self.length - kept))

    def boundary(self, stage: int, start: int, stop: int) -> Hidden:
        """Activations that `stage` gave out for positions start .. stop - 1, (1, T, D) each.

        Held are those that the next stage still needs and the last `slack` positions.
        Raises RequestError for others.
        """
        held = self._boundaries[stage + 1]
        if not held.start <= start < stop <= held.stop:
            raise RequestError(
                f"positions {start} to {stop - 1} at stage {stage}: "
                f"held are {held.start} to {held.stop - 1}"
            )
        return held.read(start, stop)

    def prefill(
        self,
        tokens: Sequence[int],
        through: int,
        *,
        step_size: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Append tokens in chunks and run them through the stages up to `through`.

        `step_size` is `prefill_step_size()` unless told. `progress(done, total)` is called after
        every chunk.
        """
        self.check_ids(tokens)
        step_size = step_size or prefill_step_size()
        for start in range(0, len(tokens), step_size):
            self.append(tokens[start : start + step_size])
            for stage in range(through + 1):
                self.advance(stage)
            mx.eval(self.arrays())
            if progress:
                progress(min(start + step_size, len(tokens)), len(tokens))
        mx.clear_cache()

    def set_depth(self, depth: int, progress: Progress | None = None) -> None:
        """Say which stage is the deepest that will be asked for.

        Exact whatever ran before: a stage whose pending positions have been forgotten is filled
        by running the whole text again, one prefill.
        """
        self.model.check_stage(depth, "depth")
        self._depth = depth
        if any(self._forgotten(stage) for stage in range(depth + 1)):
            tokens = list(self.tokens)
            self._clear()
            self.prefill(tokens, depth, progress=progress)
        for stage in range(depth + 1):
            # Only what `keep_trunk` has held can be so much: in chunks, as a prompt.
            while self.pending(stage) > self.max_pending:
                last = self._input(stage).stop
                self._run(stage, min(self.filled[stage] + prefill_step_size(), last))
                mx.eval(self.arrays())

    @property
    def earliest_rollback(self) -> int:
        """The earliest position, 0 aside, that `rollback` can return to."""
        return max(cache.earliest for cache in self._caches)

    def rollback(self, position: int) -> None:
        """Return to the state after the first `position` tokens, in every stage and in full.

        Raises RollbackError, changing nothing, where a layer no longer holds what that needs;
        position 0 is always possible.
        """
        if not 0 <= position <= self.length:
            raise RollbackError(f"cannot return to position {position} of {self.length}")
        if position == 0:
            self._clear()
            return
        if position < self.earliest_rollback:
            raise RollbackError(
                f"cannot return to position {position} of {self.length}: "
                f"the windows have slid on, {self.earliest_rollback} is the earliest"
            )
        for cache in self._caches:
            cache.rollback(min(position, cache.offset))
        for boundary in self._boundaries:
            boundary.truncate(position)
        self.filled = [min(filled, position) for filled in self.filled]
        self._tokens = self.tokens[:position]

    def switch(self, model: PoEModel) -> DecodingState:
        """The same text under another model over the same base; this state stays as it is.

        The stages that compute alike in both (`shared_stages`) keep what they have. The next one
        takes up what they have given out, as far as `keep_trunk` has held it back; beyond that,
        `set_depth` runs the text again. Where no stage is alike, the new state is empty.
        """
        count = shared_stages(self.model, model, self.tokens)
        other = DecodingState(
            model, slack=self.slack, max_pending=self.max_pending, keep_trunk=self.keep_trunk
        )
        if not count:
            return other
        other.filled[:count] = self.filled[:count]
        other._tokens = list(self.tokens)
        last = model.config.stage_range(count - 1)[-1]
        other._caches[: last + 1] = [cache.fork() for cache in self._caches[: last + 1]]
        other._boundaries[: count + 1] = [b.fork() for b in self._boundaries[: count + 1]]
        return other

    def fork(self) -> DecodingState:
        """An independent copy: either may go on without the other noticing. Shares arrays."""
        other = self.switch(self.model)
        other._depth = self._depth
        other.positions_run = list(self.positions_run)
        return other

    def to_arrays(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """All that `from_arrays` needs to go on from here: arrays, and what JSON can hold."""
        arrays: dict[str, mx.array] = {}
        for i, cache in enumerate(self._caches):
            if content := cache.content():
                arrays[f"cache.{i}.keys"], arrays[f"cache.{i}.values"] = content
        for i, boundary in enumerate(self._boundaries):
            if boundary.start < boundary.stop:
                hidden = boundary.read(boundary.start, boundary.stop)
                for name in HIDDEN_PARTS:
                    if (part := getattr(hidden, name)) is not None:
                        arrays[f"boundary.{i}.{name}"] = part
        fields = {
            "tokens": self.tokens,
            "filled": self.filled,
            "offsets": [cache.offset for cache in self._caches],
            "starts": [boundary.start for boundary in self._boundaries],
            "stops": [boundary.stop for boundary in self._boundaries],
            "slack": self.slack,
            "max_pending": self.max_pending,
            "keep_trunk": self.keep_trunk,
        }
        return arrays, fields

    @classmethod
    def from_arrays(
        cls, model: PoEModel, arrays: Mapping[str, mx.array], fields: Mapping[str, Any]
    ) -> DecodingState:
        """The state that `to_arrays` gave out, under the same model.

        Raises RequestError where they do not fit the model or each other.
        """
        options = {name: fields.get(name) for name in ("slack", "max_pending", "keep_trunk")}
        numbers = [*options.values()]
        for name in ("tokens", "filled", "offsets", "starts", "stops"):
            listed = fields.get(name)
            numbers += listed if isinstance(listed, list) else [None]
        if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
            raise RequestError("the saved state is damaged: a number in it is missing or not valid")
        state = cls(model, **options)  # type: ignore[arg-type]
        state.check_ids(fields["tokens"])
        try:
            state._restore(arrays, fields)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise RequestError(f"the saved state does not fit this model ({error})") from None
        return state

    def _restore(self, arrays: Mapping[str, mx.array], fields: Mapping[str, Any]) -> None:
        config, width = self.model.config, self.model.config.n_embd
        made = self._arrays_of_one_token()

        def alike(name: str, array: mx.array | None, shape: tuple[int, ...]) -> bool:
            if array is None or name not in made:
                return array is None and name not in made
            return array.shape == shape and array.dtype == made[name].dtype

        for i, (cache, offset) in enumerate(zip(self._caches, fields["offsets"], strict=True)):
            content = None
            if offset:
                keys, values = f"cache.{i}.keys", f"cache.{i}.values"
                content = arrays[keys], arrays[values]
                rows = content[0].shape[2]
                shape = (1, config.n_kv_head, rows, config.head_dim)
                enough = min(offset, cache.window) <= rows <= min(offset, cache.limit)
                if not (
                    enough and alike(keys, content[0], shape) and alike(values, content[1], shape)
                ):
                    raise ValueError(f"layer {i}")
            cache.restore(content, offset)
        text = mx.array([fields["tokens"]], dtype=mx.int32)
        spans = zip(self._boundaries, fields["starts"], fields["stops"], strict=True)
        for i, (boundary, start, stop) in enumerate(spans):
            boundary.stop = start
            if start < stop:
                names = [f"boundary.{i}.{name}" for name in HIDDEN_PARTS]
                parts = [arrays.get(name) for name in names]
                span = (1, stop - start, width)
                if not all(alike(name, p, span) for name, p in zip(names, parts, strict=True)):
                    raise ValueError(f"boundary {i}")
                boundary.append(Hidden(text[:, start:stop], *parts))  # type: ignore[arg-type]
            if boundary.stop != stop:
                raise ValueError(f"boundary {i}")
        self.filled, self._tokens = list(fields["filled"]), list(fields["tokens"])
        if not self.consistent:
            raise ValueError("its lengths disagree")

    def _arrays_of_one_token(self) -> dict[str, mx.array]:
        """The arrays of a one-token state, unevaluated: the names and types this model makes."""
        state = DecodingState(self.model)
        state.append([0])
        for stage in range(self.model.poe_n_stages):
            state.advance(stage)
        return state.to_arrays()[0]

    @property
    def consistent(self) -> bool:
        """Whether all parts agree on how far they are filled; an interruption may prevent that."""
        if len(self.tokens) != self.length or len(self.filled) != self.model.poe_n_stages:
            return False
        if not all(boundary.consistent for boundary in self._boundaries):
            return False
        return all(
            cache.offset == count == self._boundaries[stage + 1].stop <= self._input(stage).stop
            for stage, count in enumerate(self.filled)
            for cache in (self._caches[i] for i in self.model.config.stage_range(stage))
        )

    def arrays(self) -> list[mx.array]:
        cached = [a for cache in self._caches for a in cache.arrays()]
        return cached + [a for boundary in self._boundaries for a in boundary.arrays()]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and activations held. Token ids, on the host, not counted."""
        return sum(a.nbytes for a in self.arrays())
