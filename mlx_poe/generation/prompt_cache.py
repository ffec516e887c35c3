"""States of texts already read, kept for prompts with the same beginning.

- in: states, each with its text; a limit in bytes
- out: for a prompt, a state that holds as much of its beginning as possible
- bounded: the least recently used state is dropped first
- keyed by tokens and by the stages themselves, so every specialist can use what the base has read
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

import mlx.core as mx

from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.shared_base import shared_stages
from mlx_poe.loading.tokenizer import Tokenizer

# Reading fewer positions again is faster than copying a state.
LEAST = 8


class PromptCache:
    """States by the texts they hold, up to `limit` bytes.

    `hits` and `misses` count prompts; `cached_tokens` counts the positions saved by hits.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self.hits = self.misses = self.cached_tokens = 0
        # Least recently used first. States share arrays, and each array is counted once.
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
    ) -> DecodingState | None:
        """A new state that saves the most work in reading `prompt` up to stage `depth`.

        It is a copy of one in the cache or still `running`, and `suits` accepts it. It never
        includes the last token, which the first prediction is made from.
        """
        wanted = list(prompt[:-1])
        candidates = []
        kept = ((key, state) for key, (state, _) in self._entries.items())
        for key, state in [*kept, *((None, state) for state in running)]:
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
                return found
        self.misses += 1
        return None

    def put(self, state: DecodingState, room: int | None = None) -> None:
        """Keep a state, which must not be used afterwards, within the limit and `room` bytes.

        A state covered by a kept one is not stored; a state that covers kept ones replaces them.
        """
        if state.length < LEAST:
            return
        # Copy it to its own arrays, or it would keep those of other sequences, and empty buffers,
        # in memory. Start computing them, or the entry would still owe the work in its graph.
        state.compact()
        state.trim(self._users)
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
        """Drop states, least recently used first, until at most `limit` bytes are left."""
        while self._entries and self.nbytes > limit:
            self._remove(next(iter(self._entries)))

    def drop(self, models: Iterable[PoEModel]) -> None:
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
    """Positions up to which other prompts are likely to share this one, where its state should be
    kept: the end of a chat's system text, and the start of the last user turn."""
    marks = set()
    start = tokenizer.special_tokens.get("<|user_start|>")
    if start in tokens:
        marks.add(len(tokens) - 1 - list(reversed(tokens)).index(start))  # type: ignore[arg-type]
    first = prompt[0] if isinstance(prompt, Sequence) and prompt else None
    if isinstance(first, Mapping) and first.get("role") == "system":
        # The part that does not depend on the user's message.
        said = ({"role": "user", "content": word} for word in ("a", "I"))
        one, other = (tokenizer.apply_chat_template([first, turn]) for turn in said)
        marks.add(common_start(one, other))
    return tuple(sorted(mark for mark in marks if mark >= LEAST))


def common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix of two texts, in tokens."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _saved(state: DecodingState, model: PoEModel, text: Sequence[int], common: int) -> int:
    """How many runs of a position through a layer are saved if `model` continues from `state`."""
    count = shared_stages(state.model, model, text[:common])
    pairs = zip(model.stages[:count], state.caches, strict=False)
    return sum(len(stage.layers) * min(common, cache.offset) for stage, cache in pairs)


def _taken_up(
    state: DecodingState, model: PoEModel, common: int, depth: int
) -> DecodingState | None:
    """A copy of the state with `common` positions under `model`; None if a stage up to `depth`
    would need activations that are no longer held."""
    found = state.fork()
    found.rollback(common)
    found.compact()
    if model is not state.model:
        found = found.switch(model)
    return None if any(found.lacks(stage) for stage in range(depth + 1)) else found


def _covers(state: DecodingState, other: DecodingState) -> bool:
    """Whether `state` can be turned into `other`."""
    length = other.length
    return (
        state.model is other.model
        and length <= state.length
        # The texts usually differ, and comparing one token first makes this check cheap.
        and state.tokens[length - 1] == other.tokens[-1]
        and state.tokens[:length] == other.tokens
        and state.earliest_rollback <= length
        and all(a >= b for a, b in zip(state.filled, other.filled, strict=True))
    )
