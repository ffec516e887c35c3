"""A request to the engine: as it is handed in, and on its way.

- in: what the engine's thread has to tell
- out: responses, in whatever thread asks for them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from cognica_mlx.errors import RequestError
from mlx_poe.generate import Asked
from mlx_poe.responses import GenerationResponse


@dataclass(frozen=True)
class Prepared:
    """A request that has been read: `asked.tokens` is its prompt. See `Engine.prepare`."""

    asked: Asked
    specialist: str | Sequence[str] | None
    weights: Sequence[float] | None
    mode: str
    max_tokens: int
    stop: str | Sequence[str] | None
    parks: bool
    listener: Callable[[Item], None] | None


class EngineClosedError(RequestError):
    """The engine takes no more requests, or was closed before one was complete."""


# What comes of a request: responses, then the error that ended it, or None.
Item = GenerationResponse | Exception | None


class EngineRequest:
    """A prompt on its way: iterate over it for the responses, from one thread at a time.

    What comes is kept until it is asked for, so a consumer may be slow, or stop: the engine never
    waits for one. With a `listener` everything goes to that instead.
    """

    def __init__(
        self,
        cancel: Callable[[], None],
        listener: Callable[[Item], None] | None = None,
    ):
        """`cancel` tells the engine."""
        self._cancel = cancel
        self._queue: SimpleQueue[Item] = SimpleQueue()
        self.deliver = listener or self._queue.put
        self._over = False

    def __iter__(self) -> Iterator[GenerationResponse]:
        """The responses that have not been taken yet; ends with the last, or when cancelled.

        Raises what ended the request, if anything went wrong.
        """
        while not self._over:
            item = self._queue.get()
            if item is None or isinstance(item, Exception):
                self._over = True
                if item:
                    raise item
                return
            yield item

    def cancel(self) -> None:
        """End the request, and drop what has not been taken of it. From any thread."""
        self._over = True
        self._queue.put(None)  # for whoever is waiting
        self._cancel()

    @property
    def text(self) -> str:
        """The text of all responses not taken yet. Waits for the last."""
        return "".join(response.text for response in self)
