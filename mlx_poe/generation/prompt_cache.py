"""States of texts already read, kept for prompts with the same beginning.

- in: states, each with its text; a limit in bytes
- out: for a prompt, a state that holds as much of its beginning as possible
- bounded: the least recently used state is dropped first
- keyed by tokens and by the stages themselves, so every specialist can use what the base has read
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import mlx.core as mx

from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.shared_base import shared_stages
from mlx_poe.generation.prefix_tree import PrefixTree, common_start
from mlx_poe.loading.tokenizer import Tokenizer

# Reading fewer positions again is faster than copying a state.
LEAST = 8

# How many positions of a text a state can begin with, its key if it is kept, and the state.
_Candidate = tuple[int, int | None, DecodingState]


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
        # Their keys by text; what each needs is how far back its state can go, which stays.
        self._tree: PrefixTree[int] = PrefixTree()
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
        for common, key, state in self._candidates(model, wanted, running):
            found = _taken_up(state, model, common, depth)
            if found and suits(found):
                if key is not None:
                    self._entries.move_to_end(key)
                self.hits += 1
                self.cached_tokens += common
                return found
        self.misses += 1
        return None

    def _candidates(
        self, model: PoEModel, wanted: Sequence[int], running: Iterable[DecodingState]
    ) -> Iterator[_Candidate]:
        """States that save anything for `wanted`, those that save the most first."""
        live: list[_Candidate] = [(common_start(s.tokens, wanted), None, s) for s in running]
        live.sort(key=_common, reverse=True)
        kept = ((common, key, self._entries[key][0]) for common, key in self._tree.alike(wanted))
        layers = sum(len(stage.layers) for stage in model.stages)
        best: list[tuple[int, int, int, _Candidate]] = []
        both = heapq.merge(kept, live, key=_common, reverse=True)
        for order, (common, key, state) in enumerate(both):
            if common < LEAST:
                break
            # No state that shares less saves more.
            while best and -best[0][0] >= layers * common:
                yield heapq.heappop(best)[-1]
            if key is None and common < state.earliest_rollback:
                continue
            if saved := _saved(state, model, wanted, common):
                heapq.heappush(best, (-saved, -common, order, (common, key, state)))
        while best:
            yield heapq.heappop(best)[-1]

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
        text, least = state.tokens, state.earliest_rollback
        for common, key in self._tree.alike(text):
            if common < state.length:
                break
            if _covers(self._entries[key][0], state):
                self._entries.move_to_end(key)
                return
        for key in self._tree.within(text, least):
            if _covers(state, self._entries[key][0]):
                self._remove(key)
        self._tree.add(text, least, self._next)
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
        state, arrays = self._entries.pop(key)
        self._tree.remove(state.tokens, key)
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


def _common(candidate: _Candidate) -> int:
    return candidate[0]


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
    """Whether `state`, which can go back to the text of `other`, can be turned into `other`."""
    filled = zip(state.filled, other.filled, strict=True)
    return state.model is other.model and all(a >= b for a, b in filled)
