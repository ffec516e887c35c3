"""Run lm-eval's tasks for every predictor of a model, and write lm-eval's result files.

- in: predictors with their shared state, names of tasks, and settings for lm-eval
- out: lm-eval's results and a folder of result files for each predictor
- needs the extra `eval`
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from cognica_mlx.errors import PoEError, RequestError, one_line
from mlx_poe.evaluation.harness import PredictorLM, Shared


@dataclass(frozen=True)
class Run:
    """Settings for lm-eval: `tasks` by name, possibly from YAML files under `include_path`;
    `limit` documents of each task (below 1: a share of them); `num_fewshot` examples (default: the
    task's own number); with `chat`, contexts in the chat layout."""

    tasks: list[str]
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: Path | None = None
    chat: bool = False


class _Loaded(TaskManager):
    """Loads tasks once, and builds their requests once, for all predictors."""

    _found: Any = None

    def load(self, task_list: Any) -> Any:
        """See `TaskManager`."""
        if self._found is None:
            self._found = super().load(task_list)
        else:
            for task in self._found["tasks"].values():
                task.build_all_requests = partial(_ask_again, task)
        return self._found


def _ask_again(task: Any, **_: Any) -> None:
    """Reset a task's requests instead of building them again."""
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [], {}


def run_tasks(
    shared: Shared, run: Run, model: str, output: Path | None = None, log_samples: bool = False
) -> dict[str, dict[str, Any]]:
    """lm-eval's results by predictor name, also written under `output` if given.

    `model` is its name in the files. Raises RequestError for tasks that do not exist, and for any
    error from lm-eval.
    """
    logging.getLogger("lm_eval").setLevel(os.environ.get("LMEVAL_LOG_LEVEL", "ERROR").upper())
    manager = _manager(run)
    found = {}
    for row, name in enumerate(shared.predictors.names):
        tracker = None
        arguments = {"pretrained": model, "predictor": name}
        with tempfile.TemporaryDirectory(dir=output) as aside:
            if output:
                tracker = EvaluationTracker(output_path=aside)
            try:
                # lm-eval and tasks print; stdout is for the result alone.
                with redirect_stdout(sys.stderr):
                    results = simple_evaluate(
                        PredictorLM(shared, row),
                        model_args=arguments,
                        tasks=manager.match_tasks(run.tasks),
                        num_fewshot=run.num_fewshot,
                        limit=run.limit,
                        batch_size=shared.batch,
                        log_samples=log_samples,
                        evaluation_tracker=tracker,
                        apply_chat_template=run.chat,
                        task_manager=manager,
                    )
            except (PoEError, OSError):
                raise
            except Exception as error:  # a task's own code may raise anything
                raise RequestError(f"lm-eval: {type(error).__name__}: {one_line(error)}") from error
            assert results is not None, "there is one process"
            samples = results.pop("samples", None)
            if tracker and output:
                tracker.save_results_aggregated(results, samples)
                for task, rows in (samples or {}).items():
                    tracker.save_results_samples(task, rows)
                _move(Path(aside), output / name.replace(" ", "-"))
        found[name] = results
    return found


def _manager(run: Run) -> _Loaded:
    """A manager that knows the tasks. Reading lm-eval's own ten thousand takes seconds, so skip
    them if the folder has all tasks."""
    include = str(run.include_path) if run.include_path else None
    if include:
        own = _Loaded(include_path=include, include_defaults=False)
        if set(run.tasks) <= set(own.all_subtasks):
            return own
    manager = _Loaded(include_path=include)
    if unknown := [name for name in run.tasks if not manager.match_tasks([name])]:
        raise RequestError(
            f"tasks: lm-eval has no {', '.join(unknown)} (lm-eval ls tasks lists them; "
            "--include-path names a folder of your own)"
        )
    return manager


def _move(aside: Path, folder: Path) -> None:
    """Move lm-eval's complete files to `folder`. OSError if it has written none."""
    files = [file for file in aside.rglob("*") if file.is_file()]
    if not any(file.name.startswith("results") for file in files):
        raise OSError(f"lm-eval could not write its results for {folder}")
    for file in files:
        target = folder / file.relative_to(aside)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
