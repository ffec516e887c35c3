"""States of texts that have been read, kept for prompts that begin alike.

- in: states, each with the text that it holds; a limit in bytes
- out: for a prompt, a state that holds as much of its beginning as can be found
- bounded: the state that was of no use for longest goes first
- keyed by tokens and by the stages themselves: what the base has read serves every specialist
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from cognica_mlx.model import PoEModel
from cognica_mlx.shared_base import shared_stages
from cognica_mlx.state import DecodingState
from mlx_poe.tokenizer import Tokenizer

# Fewer positions are read again sooner than a state is copied.
LEAST = 8


@dataclass(frozen=True)
class Found:
    """A state of its own that holds the first `length` tokens of a prompt."""

    state: DecodingState
    length: int


class PromptCache:
    """States by the texts they hold, `limit` bytes at most.

    `hits` and `misses` count prompts, `cached_tokens` the positions that hits have saved.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self.hits = self.misses = self.cached_tokens = 0
        # Oldest use first. States share arrays: each is counted once.
        self._entries: OrderedDict[int, tuple[DecodingState, list[mx.array]]] = OrderedDict()
        self._users: dict[int, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(
        self,
        model: PoEModel,
        prompt: Sequence[int],
        depth: int,
        running: Iterable[DecodingState] = (),
        suits: Callable[[DecodingState], bool] = lambda _: True,
    ) -> Found | None:
        """The state that saves most of the work of reading `prompt` up to stage `depth`.

        It may come from what is kept, or from a state that is still `running`, and is one that
        `suits`. The last token is never part of it, as something has to be predicted from it.
        """
        wanted = list(prompt[:-1])
        candidates = []
        for key, state in [
            *((key, state) for key, (state, _) in self._entries.items()),
            *((None, state) for state in running),
        ]:
            common = common_start(state.tokens, wanted)
            if common >= LEAST and common >= state.earliest_rollback:
                saved = _saved(state, model, wanted, common)
                candidates.append((saved, common, key, state))
        candidates.sort(key=lambda candidate: candidate[:2], reverse=True)
        for saved, common, key, state in candidates:
            found = _taken_up(state, model, common, depth) if saved else None
            if found and suits(found):
                if key is not None:
                    self._entries.move_to_end(key)
                self.hits += 1
                self.cached_tokens += common
                return Found(found, common)
        self.misses += 1
        return None

    def put(self, state: DecodingState, room: int | None = None) -> None:
        """Keep a state, which must not go on afterwards, within the limit and `room` bytes.

        One that adds nothing to what is kept is left out; one that can do all that another can
        takes its place.
        """
        if state.length < LEAST:
            return
        # In arrays of its own, or it would keep other sequences' in memory; and computed, or an
        # entry would be worth the work that its graph still needs.
        state.compact()
        state.leave_shelves()
        arrays = state.arrays()
        mx.async_eval(arrays)
        limit = self.limit if room is None else min(self.limit, room)
        if sum(array.nbytes for array in arrays) > limit:
            return
        for key, (other, _) in list(self._entries.items()):
            if _covers(other, state):
                self._entries.move_to_end(key)
                return
            if _covers(state, other):
                self._remove(key)
        self._entries[self._next] = (state, arrays)
        self._next += 1
        for array in arrays:
            count = self._users.get(id(array), 0)
            self._users[id(array)] = count + 1
            self.nbytes += 0 if count else array.nbytes
        self.shrink(limit)

    def shrink(self, limit: int) -> None:
        """Let states go, those unused for longest first, until `limit` bytes are left."""
        while self._entries and self.nbytes > limit:
            self._remove(next(iter(self._entries)))

    def drop(self, models: Iterable[PoEModel]) -> None:
        """Let all states of these models go."""
        gone = {id(model) for model in models}
        for key, (state, _) in list(self._entries.items()):
            if id(state.model) in gone:
                self._remove(key)

    def _remove(self, key: int) -> None:
        _, arrays = self._entries.pop(key)
        for array in arrays:
            count = self._users.pop(id(array)) - 1
            if count:
                self._users[id(array)] = count
            else:
                self.nbytes -= array.nbytes


def chat_marks(tokenizer: Tokenizer, prompt: object, tokens: Sequence[int]) -> tuple[int, ...]:
    """Positions in a prompt that other prompts are likely to share, where its state should be kept:
    the end of a chat's system text, and where the last user's turn begins."""
    marks = set()
    start = tokenizer.special_tokens.get("<|user_start|>")
    if start in tokens:
        marks.add(len(tokens) - 1 - list(reversed(tokens)).index(start))  # type: ignore[arg-type]
    first = prompt[0] if isinstance(prompt, Sequence) and prompt else None
    if isinstance(first, Mapping) and first.get("role") == "system":
        # What is the same whatever the user says.
        said = ({"role": "user", "content": word} for word in ("a", "I"))
        one, other = (tokenizer.apply_chat_template([first, turn]) for turn in said)
        marks.add(common_start(one, other))
    return tuple(sorted(mark for mark in marks if mark >= LEAST))


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning on."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _saved(state: DecodingState, model: PoEModel, text: Sequence[int], common: int) -> int:
    """How many times a position need not be run through a layer if `model` goes on from `state`."""
    count = shared_stages(state.model, model, text[:common])
    pairs = zip(model.stages[:count], state.caches, strict=False)
    return sum(len(stage.layers) * min(common, cache.offset) for stage, cache in pairs)


def _taken_up(
    state: DecodingState, model: PoEModel, common: int, depth: int
) -> DecodingState | None:
    """A copy of the state with `common` positions under `model`; None where a stage up to `depth`
    would need what is no longer held."""
    found = state.fork()
    found.rollback(common)
    if model is not state.model:
        found = found.switch(model)
    return None if any(found.lacks(stage) for stage in range(depth + 1)) else found


def _covers(state: DecodingState, other: DecodingState) -> bool:
    """Whether `state` can become all that `other` is."""
    length = other.length
    return (
        state.model is other.model
        and length <= state.length
        # Mostly it is another text: that one token shows it makes this check a short one.
        and state.tokens[length - 1] == other.tokens[-1]
        and state.tokens[:length] == other.tokens
        and state.earliest_rollback <= length
        and all(a >= b for a, b in zip(state.filled, other.filled, strict=True))
    )
