"""mlx_poe.generate --prompts: a file of prompts in, a file of replies out.

- in: lines of JSON, one prompt each, with its own options
- out: one line of JSON per reply, as `--json` prints it, with the prompt's index and id and the
  options that decide the reply
- a killed run can be restarted: see `replies_file`
- every line is checked before any work begins; errors name the line number
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from cognica_mlx.decoding.modes import MODES, PACED_MODES, ModeOptions
from cognica_mlx.decoding.sampling import SamplingOptions
from cognica_mlx.errors import PoEError, RankError, RequestError
from cognica_mlx.files.stored import dtype_name
from cognica_mlx.network.model import PoEModel
from mlx_poe.commands.flags import file_path, taken, taken_constraints
from mlx_poe.commands.progress import Bars
from mlx_poe.commands.replies_file import (
    check_replies_file,
    finished_replies,
    is_answered,
    open_replies,
    recorded,
)
from mlx_poe.engine.batch_generate import BatchStats, plan, run_tasks, trunk_to_keep
from mlx_poe.engine.scheduler import MAX_SEQUENCES, Scheduler
from mlx_poe.evaluation.answers import fingerprint, key_of
from mlx_poe.generation.penalty import default_repetition_penalty
from mlx_poe.generation.reply_form import CONSTRAINTS, FORM_OPTIONS
from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.generation.task import Task
from mlx_poe.generation.text import Prompt
from mlx_poe.loading.machine_costs import known_costs
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.rows import file_name, json_lines, named

# A line holds one of these, and options.
PROMPTS = ("prompt", "messages", "tokens")
OPTIONS = tuple(f.name for f in (*fields(SamplingOptions), *fields(ModeOptions)))
ABOUT = ("id", "mode", "max_tokens", "stop", "specialist", "weights")
NAMES = (*PROMPTS, *OPTIONS, *FORM_OPTIONS, *ABOUT)
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
        '"tokens" and optionally "id", "specialist" and options by their Python names; - for stdin',
    )
    group.add_argument(
        "--output",
        type=file_path,
        metavar="OUT.jsonl",
        help="append replies to this file, - for stdout; prompts already answered in it with the "
        "same options are skipped",
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
    check_replies_file(args.output)


def generate_file(args: argparse.Namespace, tokenizer: Tokenizer, specialists: Specialists) -> int:
    """Reply to every line of `args.prompts` that has no reply in `args.output` yet."""
    lines, output = read_lines(args.prompts), args.output
    constraints = taken_constraints(args)
    done = finished_replies(output)
    models = _Models(args, specialists)
    tasks = [_task(args, tokenizer, models, line, constraints) for line in lines]
    scheduler = Scheduler(
        tokenizer,
        max_sequences=args.batch,
        keep_trunk=trunk_to_keep([task.model for task, _ in tasks]),
    )
    for line, (task, _) in zip(lines, tasks, strict=True):
        with _at(line):
            scheduler.check(task)
    left = [
        (line, task, options)
        for line, (task, options) in zip(lines, tasks, strict=True)
        if not is_answered(output, line.index, done.get(line.index), line.prompt, options)
    ]
    if len(left) < len(lines):
        print(f"{len(lines) - len(left)} of {len(lines)} are already in {output}", file=sys.stderr)
    with open_replies(output) as write, Bars() as bars:

        def finished(i: int, responses: list[GenerationResponse]) -> None:
            line, task, options = left[i]
            record = as_json(models.name_of(task.model), _mode(args, line), line.prompt, responses)
            about = {k: line.fields[k] for k in ("id", "specialist") if k in line.fields}
            write(i, {"index": line.index, **about, "options": options, **record})

        def progress(count: int, _: int) -> None:
            bars("prompts", len(lines) - len(left) + count, len(lines))

        result = run_tasks(scheduler, [task for _, task, _ in left], progress, finished)
    if args.verbose:
        _print_statistics(result.stats, len(left))
    return 0


def read_lines(path: Path) -> list[Line]:
    """The prompts in a file. RequestError names the first invalid line."""
    lines: list[Line] = []
    for number, content in json_lines(path):
        with named(f"{file_name(path)}, line {number}"):
            lines.append(_line(number, len(lines), content))
    if not lines:
        raise RequestError(f"{file_name(path)} contains no prompts")
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


class _Models:
    """The models that lines may ask for, each loaded once."""

    def __init__(self, args: argparse.Namespace, specialists: Specialists):
        self._args, self._specialists = args, specialists
        self._names = {id(specialists.base): args.model}
        self._composed: dict[Any, PoEModel] = {}
        self._facts: dict[int, dict[str, Any]] = {}
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
        if id(model) not in self._facts:
            base = self._specialists.base
            own = fingerprint(model, base) if model is not base else None
            self._facts[id(model)] = {"model": key_of(self._base, own), "weights": weights}
        return model

    @cached_property
    def _base(self) -> str:
        return fingerprint(self._specialists.base)

    def facts_of(self, model: PoEModel) -> Mapping[str, Any]:
        """What distinguishes a model's replies from another's, as options."""
        return self._facts[id(model)]

    def name_of(self, model: PoEModel) -> str:
        """A model's name in the output."""
        return self._names[id(model)]


def _task(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    models: _Models,
    line: Line,
    constraints: Mapping[str, Any],
) -> tuple[Task, dict[str, Any]]:
    """The task for a line, and every option that decides its reply, for the record."""
    own = {k: v for k, v in line.fields.items() if k not in ("id", "specialist", "weights")}
    mode, common = _mode(args, line), taken(args, OPTIONS)
    with _at(line):
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
        task = plan(tokenizer, prompt, model=model, **options)
    forms = {name: options.get(name) for name in FORM_OPTIONS}
    stop = [task.stop] if isinstance(task.stop, str) else task.stop
    facts = {
        # In the order in which differences are named: these three change the weights too.
        "dtype": dtype_name(model.resid_lambdas.dtype),
        **{name: getattr(args, name) for name in ("quantize", "split", "degrade")},
        **models.facts_of(model),
        "mode": mode,
        **asdict(task.asked.mode_options),
        "max_tokens": task.max_tokens,
        "stop": stop or None,
        **asdict(task.asked.sampling),
        **forms,
    }
    if mode in PACED_MODES:
        facts["no_park"] = args.no_park
        facts["calibration"] = model.calibration and key_of(model.calibration.to_json())
    if isinstance(line.prompt, str):
        facts["system_prompt"] = args.system_prompt or None
        facts["ignore_chat_template"] = args.ignore_chat_template
    return task, recorded(facts)


def _mode(args: argparse.Namespace, line: Line) -> str:
    return line.fields.get("mode", args.mode)


def _prompt(args: argparse.Namespace, model: PoEModel, prompt: Prompt) -> Prompt:
    """Turn text into a user's message for a specialist; leave everything else as it is."""
    if not isinstance(prompt, str):
        if args.system_prompt:
            raise RequestError(
                "--system-prompt goes with lines that have a prompt: begin messages with the "
                "system's own"
            )
        return prompt
    if args.ignore_chat_template or not model.config.specialist_layers:
        if args.system_prompt:
            raise RequestError("--system-prompt needs a specialist and its chat template")
        return prompt
    if not prompt.strip():
        raise RequestError("the prompt is empty")
    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    return [*system, {"role": "user", "content": prompt}]


@contextmanager
def _at(line: Line) -> Iterator[None]:
    """Add the line number to errors raised inside."""
    try:
        yield
    except RankError:
        raise  # not the line's fault
    except (PoEError, TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"line {line.number}: {error}") from None


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
