"""Small training runs for the tests: a random base, made-up chats, a reporter that watches."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import write_base

from cognica_mlx.training.trainer import Evaluation
from mlx_poe.training import Result, TrainingSettings, train

WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog", "bird", "sun", "moon", "star"]


def chat(*texts: str) -> dict[str, Any]:
    """A row of messages: the user's and the assistant's by turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


def some_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions and answers of several lengths."""
    choose = random.Random(seed)
    rows = []
    for _ in range(count):
        words = choose.sample(WORDS, choose.randint(1, 4))
        asked = " ".join(words)
        turns = [asked, " ".join(reversed(words))]
        rows.append(chat(*turns * choose.choice((1, 1, 2))))
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_data(folder: Path, train_rows: int = 20, valid_rows: int = 6) -> Path:
    write_rows(folder / "train.jsonl", some_rows(train_rows))
    write_rows(folder / "valid.jsonl", some_rows(valid_rows, seed=1))
    return folder


def write_all(folder: Path, **changes: Any) -> None:
    """A base, data and a place for stores below `folder`."""
    write_base(folder / "base", **changes)
    write_data(folder / "data")


class Watcher:
    """A reporter that keeps what it is told, and does as `at` says when an iteration is done."""

    def __init__(self, at: Callable[[int], None] = lambda _: None):
        self.notes: list[str] = []
        self.evaluations: list[Evaluation] = []
        self.phases: dict[str, int] = {}
        self.at = at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, name: str, done: int, total: int, status: str = "") -> None:
        self.phases[name] = done
        if name == "training":
            self.at(done)

    def evaluated(self, evaluation: Evaluation, rate: float) -> None:
        self.evaluations.append(evaluation)


SMALL_RUN: dict[str, Any] = {
    "layers": 1,
    "iters": 6,
    "batch_size": 4,
    "steps_per_eval": 3,
    "save_every": 2,
    "dtype": "float32",
}


def small_settings(folder: Path, **changes: Any) -> TrainingSettings:
    paths = {"model": str(folder / "base"), "data": str(folder / "data")}
    return TrainingSettings(**(paths | SMALL_RUN | changes))


def small_run(
    folder: Path, output: str = "mine", watcher: Watcher | None = None, **changes: Any
) -> Result:
    """Train below `folder`, with what `write_all` put there."""
    options = {k: changes.pop(k) for k in ("resume", "overwrite") if k in changes}
    return train(
        small_settings(folder, **changes),
        folder / output,
        watcher or Watcher(),
        store_path=folder / "stores",
        **options,
    )
