"""Progress bars on stderr, for every command."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Bars:
    """A bar for each label until `close` or the end of the block; none if stderr is not a terminal.

    Call it with a label, how much is done and how much there is to do, and perhaps a status. A bar
    appears with the first call that leaves something to do. `amount` is the column that shows the
    numbers.
    """

    def __init__(self, amount: ProgressColumn | None = None):
        self._amount = amount or MofNCompleteColumn()
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}

    def __call__(self, label: str, done: int, total: int, status: str = "") -> None:
        if label not in self._bars:
            if done >= total or not sys.stderr.isatty():
                return
            self._bars[label] = self._shown().add_task(escape(label), total=total, status="")
        self._shown().update(self._bars[label], completed=done, total=total, status=status)

    def _shown(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                *(TextColumn("{task.description}"), BarColumn(), self._amount),
                *(TimeRemainingColumn(), TextColumn("{task.fields[status]}")),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,
            )
            self._progress.start()
        return self._progress

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        self._progress, self._bars = None, {}

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
