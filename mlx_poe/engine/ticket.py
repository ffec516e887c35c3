"""A request submitted to the engine, in its caller's hands.

- in: responses from the engine's thread
- out: the same, in the caller's thread; wishes to cancel, pause and resume
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Literal

from cognica_mlx.errors import RequestError
from mlx_poe.generation.responses import GenerationResponse


class EngineClosedError(RequestError):
    """The engine is closed, or was closed before a request was complete."""


# What a caller may want of a request under way.
Wish = Literal["cancel", "pause", "resume"]

# Told each response, then the error that ended the request, or None.
Listener = Callable[[GenerationResponse | Exception | None], None]


class EngineRequest:
    """A submitted prompt. Iterate over it for the responses, from one thread at a time.

    Responses are queued until they are taken, so the engine never waits for a slow consumer. With
    a `listener`, everything goes there instead.
    """

    def __init__(self, tell: Callable[[Wish], None], listener: Listener | None = None):
        """`tell` passes a wish on to the engine."""
        self._tell = tell
        self._queue: SimpleQueue[GenerationResponse | Exception | None] = SimpleQueue()
        self.deliver: Listener = listener or self._queue.put
        self._over = False

    def __iter__(self) -> Iterator[GenerationResponse]:
        """The responses not taken yet. Stops after the last one, or when canceled.

        Raises the error that ended the request, if there was one.
        """
        while not self._over:
            item = self._queue.get()
            if isinstance(item, GenerationResponse):
                yield item
                continue
            self._over = True
            if item:
                raise item

    def cancel(self) -> None:
        """End the request and drop the responses not taken yet. May be called from any thread."""
        self._over = True
        self._queue.put(None)  # wake up a waiting consumer
        self._tell("cancel")

    def pause(self) -> None:
        """Let others have the request's slot and memory until `resume`. What it has read stays
        cached as long as there is room, and its responses go on where they were."""
        self._tell("pause")

    def resume(self) -> None:
        """Go on after `pause`, before all that wait. Both may be called from any thread."""
        self._tell("resume")

    @property
    def text(self) -> str:
        """The text of all responses not taken yet. Waits for the last one."""
        return "".join(response.text for response in self)
