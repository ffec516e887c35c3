"""mlx_poe.generate --prompts: a file of prompts in, a file of replies out.

- in: lines of JSON, one prompt each, with its own options
- out: one line of JSON per reply, as `--json` prints it, with the prompt's index and id; appended
  as soon as it is finished, in any order
- a killed run can be restarted: replies already in the output are not generated again
- every line is checked before any work begins; errors name the line number
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from cognica_mlx import strict_json
from cognica_mlx.costs import Costs
from cognica_mlx.decoding.modes import MODES, PACED_MODES, ModeOptions
from cognica_mlx.errors import CheckpointError, PoEError, RankError, RequestError
from cognica_mlx.model import PoEModel
from cognica_mlx.sampling import SamplingOptions
from mlx_poe.batch import BatchStats, plan, run_tasks, trunk_to_keep
from mlx_poe.commands.options import check_output, file_path, taken, taken_constraints
from mlx_poe.generate import Prompt
from mlx_poe.machine import known_costs
from mlx_poe.penalty import default_repetition_penalty
from mlx_poe.reply_form import CONSTRAINTS, FORM_OPTIONS
from mlx_poe.responses import GenerationResponse
from mlx_poe.scheduler import MAX_SEQUENCES, Scheduler, Task
from mlx_poe.specialists import Specialists
from mlx_poe.tokenizer import Tokenizer

# A line holds one of these, and options.
PROMPTS = ("prompt", "messages", "tokens")
OPTIONS = tuple(f.name for f in (*fields(SamplingOptions), *fields(ModeOptions)))
ABOUT = ("id", "mode", "max_tokens", "stop", "specialist", "weights")
NAMES = (*PROMPTS, *OPTIONS, *FORM_OPTIONS, *ABOUT)
# Every line that we write begins with this.
OURS = b'{"index": '
SHOWN = (
    *("finish_reason", "prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps"),
    *("peak_memory", "drafted_tokens", "drafts", "parked", "cached_tokens"),
)


@dataclass(frozen=True)
class Line:
    """A line of the input: `number` counts lines from 1, `index` prompts from 0."""

    number: int
    index: int
    prompt: Prompt
    fields: Mapping[str, Any]


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    """--prompts, --output, --batch."""
    group = parser.add_argument_group("many prompts")
    group.add_argument(
        "--prompts",
        type=file_path,
        metavar="FILE.jsonl",
        help='one prompt per line: a JSON string, or an object with "prompt", "messages" or '
        '"tokens" and optionally "id", "specialist" and options by their Python names',
    )
    group.add_argument(
        "--output",
        type=file_path,
        metavar="OUT.jsonl",
        help="append replies to this file; prompts already answered in it are skipped",
    )
    group.add_argument(
        "--batch",
        type=int,
        default=MAX_SEQUENCES,
        metavar="N",
        help="how many prompts to run together (default: %(default)s)",
    )


def check_file_flags(args: argparse.Namespace) -> None:
    """Raise RequestError for invalid flags of `generate_file`."""
    if not args.output:
        raise RequestError("--prompts needs --output, a file for the replies")
    if args.batch < 1:
        raise RequestError(f"--batch {args.batch} must be at least 1")
    check_output(args.output)


def generate_file(args: argparse.Namespace, tokenizer: Tokenizer, specialists: Specialists) -> int:
    """Reply to every line of `args.prompts` that has no reply in `args.output` yet."""
    lines, output = read_lines(args.prompts), args.output
    constraints = taken_constraints(args)
    done = finished_lines(output)
    models = _Models(args, specialists)
    tasks = [_task(args, tokenizer, models, line, constraints) for line in lines]
    scheduler = Scheduler(
        tokenizer,
        max_sequences=args.batch,
        keep_trunk=trunk_to_keep([task.model for task in tasks]),
    )
    for line, task in zip(lines, tasks, strict=True):
        with _named(line):
            scheduler.check(task)
    left = [
        (line, task)
        for line, task in zip(lines, tasks, strict=True)
        if done.get(line.index) != line.prompt
    ]
    if len(left) < len(lines):
        print(f"{len(lines) - len(left)} of {len(lines)} are already in {output}", file=sys.stderr)
    with open_output(output) as file, _bar(len(lines), len(lines) - len(left)) as progress:

        def finished(i: int, responses: list[GenerationResponse]) -> None:
            line, task = left[i]
            record = as_json(models.name_of(task.model), _mode(args, line), line.prompt, responses)
            about = {k: line.fields[k] for k in ("id", "specialist") if k in line.fields}
            whole = {"index": line.index, **about, **record}
            text = strict_json.dumps(whole, ensure_ascii=False)
            # Write each line whole and flush it, so that a kill loses none.
            file.write(text.encode("utf-8", errors="replace") + b"\n")
            file.flush()

        result = run_tasks(scheduler, [task for _, task in left], progress, finished)
    if args.verbose:
        _print_statistics(result.stats, len(left))
    return 0


def read_lines(path: Path) -> list[Line]:
    """The prompts in a file. RequestError names the first invalid line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from None
    lines: list[Line] = []
    # Not splitlines: JSON strings may contain other line separators.
    for number, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                lines.append(_line(number, len(lines), json.loads(content)))
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{path}, line {number}: {error}") from None
    if not lines:
        raise RequestError(f"{path} contains no prompts")
    return lines


def _line(number: int, index: int, content: Any) -> Line:
    if isinstance(content, str):
        content = {"prompt": content}
    if not isinstance(content, dict):
        raise RequestError(f"expected an object or a string, not {type(content).__name__}")
    for name in content:
        if name not in NAMES:
            raise RequestError(f"there is no option {name}")
    given = [name for name in PROMPTS if name in content]
    if len(given) != 1:
        raise RequestError(f"expected exactly one of {', '.join(PROMPTS)}, not {len(given)}")
    prompt = content[given[0]]
    kind = str if given[0] == "prompt" else list
    if not isinstance(prompt, kind) or (kind is list and not prompt):
        raise RequestError(f"{given[0]} must be {'a string' if kind is str else 'a list'}")
    rest = {k: v for k, v in content.items() if k not in PROMPTS and v is not None}
    return Line(number, index, prompt, rest)


def finished_lines(path: Path) -> dict[int, Any]:
    """The prompts already answered in a file of replies, by index. Cuts off a torn last line.

    Raises RequestError, changing nothing, if the file contains anything else.
    """
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole, newline, torn = data.rpartition(b"\n")
    done = {}
    for number, content in enumerate(whole.split(b"\n") if newline else [], 1):
        try:
            record = json.loads(content)
            done[record["index"]] = record["prompt"]
        except (ValueError, KeyError, TypeError):
            raise RequestError(
                f"{path}, line {number} was not written by this command; give another --output"
            ) from None
    if torn:
        if not torn.startswith(OURS[: len(torn)]):
            raise RequestError(
                f"the end of {path} was not written by this command; give another --output"
            )
        os.truncate(path, len(data) - len(torn))
    return done


class _Models:
    """The models that lines may ask for, each loaded once."""

    def __init__(self, args: argparse.Namespace, specialists: Specialists):
        self._args, self._specialists = args, specialists
        self._names = {id(specialists.base): args.model}
        self._composed: dict[Any, PoEModel] = {}
        self._costs: dict[int, Costs] = {}
        names = args.specialists or None
        if args.weights and len(names or ()) < 2:
            raise RequestError("--weights needs several --specialists")
        self._default = names if names is None or len(names) > 1 else names[0]

    def of(self, fields: Mapping[str, Any]) -> PoEModel:
        """The model for a line. RequestError if it names an unknown specialist."""
        wanted = fields.get("specialist", self._default)
        weights = fields.get("weights")
        if "specialist" not in fields and weights is None:
            weights = self._args.weights
        names: list[Any] = [wanted] if isinstance(wanted, str | None) else list(wanted)
        try:
            for name in names:
                if name is not None and name not in self._specialists.names:
                    self._specialists.attach(name, name, quantize=self._args.quantize)
        except PoEError as error:
            raise RequestError(str(error)) from None
        if len(names) == 1:
            if weights is not None:
                raise RequestError("weights need several specialists")
            model = self._specialists.use(names[0])
        else:
            key = tuple(names), None if weights is None else tuple(weights)
            if key not in self._composed:
                self._composed[key] = self._specialists.compose(names, weights)
            model = self._composed[key]
        if names != [None]:
            self._names.setdefault(id(model), "+".join(map(str, names)))
        return model

    def name_of(self, model: PoEModel) -> str:
        """A model's name in the output."""
        return self._names[id(model)]


def _task(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    models: _Models,
    line: Line,
    constraints: Mapping[str, Any],
) -> Task:
    own = {k: v for k, v in line.fields.items() if k not in ("id", "specialist", "weights")}
    mode, common = _mode(args, line), taken(args, OPTIONS)
    with _named(line):
        if mode != args.mode and mode in MODES:
            # Mode options on the command line apply to the command line's mode only.
            others = {f.name for f in fields(ModeOptions)} - set(MODES[mode])
            common = {k: v for k, v in common.items() if k not in others}
        if not any(name in own for name in CONSTRAINTS):
            common |= constraints
        options = {"max_tokens": args.max_tokens, "stop": args.stop, **common, **own, "mode": mode}
        model = models.of(line.fields)
        if mode in PACED_MODES and not args.no_park:
            options["costs"] = known_costs
        prompt = _prompt(args, model, line.prompt)
        if not isinstance(prompt, str) and isinstance(prompt[0], Mapping):
            # A chat: the same default penalty as `--prompt`.
            formal = any(name in options for name in CONSTRAINTS)
            options.setdefault("repetition_penalty", default_repetition_penalty(model, formal))
        return plan(tokenizer, prompt, model=model, **options)


def _mode(args: argparse.Namespace, line: Line) -> str:
    return line.fields.get("mode", args.mode)


def _prompt(args: argparse.Namespace, model: PoEModel, prompt: Prompt) -> Prompt:
    """Turn text into a user's message for a specialist; leave everything else as it is."""
    if not isinstance(prompt, str) or args.ignore_chat_template:
        return prompt
    if not model.config.specialist_layers:
        if args.system_prompt:
            raise RequestError("--system-prompt needs a specialist and its chat template")
        return prompt
    if not prompt.strip():
        raise RequestError("the prompt is empty")
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    return [*system, {"role": "user", "content": prompt}]


@contextmanager
def _named(line: Line) -> Iterator[None]:
    """Add the line number to errors raised inside."""
    try:
        yield
    except RankError:
        raise  # not the line's fault
    except (PoEError, TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"line {line.number}: {error}") from None


@contextmanager
def open_output(path: Path) -> Iterator[Any]:
    """Open the file of replies to append bytes."""
    try:
        file = path.open("ab")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from None
    with file:
        yield file


@contextmanager
def _bar(total: int, done: int) -> Iterator[Any]:
    """A progress bar on stderr if it is a terminal. Yields a callback, or None."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("prompts", total=total, completed=done)
        yield lambda count, _: bar.update(task, completed=done + count)


def as_json(
    model: str, mode: str, prompt: object, responses: Sequence[GenerationResponse]
) -> dict[str, object]:
    """A reply as one JSON object, as `--json` prints it."""
    result: dict[str, object] = {
        "model": model,
        "mode": mode,
        "prompt": prompt,
        "text": "".join(r.text for r in responses),
        "tokens": [
            {
                "token": r.token,
                "text": r.text,
                "logprob": r.logprob,
                "stage": r.stage,
                "from_draft": r.from_draft,
                "drafter": r.drafter,
                "forced": r.forced,
                **({"top_logprobs": r.top_logprobs} if r.top_logprobs else {}),
            }
            for r in responses
        ],
    }
    if responses:
        result |= {name: getattr(responses[-1], name) for name in SHOWN}
    return result


def _print_statistics(stats: BatchStats, count: int) -> None:
    lines = [
        "=" * 10,
        f"Prompts: {count}, {stats.prompt_tokens} tokens, {stats.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {stats.generation_tokens} tokens, {stats.generation_tps:.3f} tokens-per-sec",
        f"Peak memory: {stats.peak_memory:.3f} GB",
    ]
    print("\n".join(lines), file=sys.stderr)
