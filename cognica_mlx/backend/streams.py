"""MLX's streams end with the thread that made them.

A stream that outlives its thread can abort the process at exit. Whatever computes in a thread,
which may be the user's own, calls `end_with_thread` there first.
"""

from __future__ import annotations

import threading

import mlx.core as mx


class _End:
    """Clears the streams of the thread that drops it."""

    def __del__(self) -> None:
        mx.clear_streams()


_ends = threading.local()


def end_with_thread() -> None:
    """Clear this thread's streams when it ends. May be called again and again."""
    # The main thread's streams live as long as the process.
    if not hasattr(_ends, "end") and threading.current_thread() is not threading.main_thread():
        _ends.end = _End()
