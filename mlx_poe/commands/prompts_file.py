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
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cognica_mlx.decoding.modes import MODES, PACED_MODES
from cognica_mlx.errors import PoEError, RankError, RequestError, deleted
from cognica_mlx.files.stored import dtype_name
from cognica_mlx.network.model import PoEModel
from mlx_poe.commands.flags import file_path, taken, taken_constraints
from mlx_poe.commands.replies_file import (
    finished_replies,
    has_reply,
    open_replies,
    recorded,
)
from mlx_poe.engine.batch_generate import run_requests, trunk_to_keep
from mlx_poe.engine.scheduler import MAX_SEQUENCES, Scheduler, Stats
from mlx_poe.evaluation.answers import fingerprint, key_of
from mlx_poe.generation.progress import Bars
from mlx_poe.generation.reply_form import CONSTRAINTS, FORM_OPTIONS, with_usual_penalty
from mlx_poe.generation.request import (
    EMPTY_PROMPT,
    MODE_OPTIONS,
    OPTIONS,
    GenerationRequest,
    Prompt,
    are_messages,
    read_request,
    read_specialist,
)
from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.loading.machine_costs import known_costs
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.rows import file_name, json_lines, named

# A line holds one of these, and options.
PROMPTS = ("prompt", "messages", "tokens")
NAMES = (*PROMPTS, *OPTIONS, "id", "specialist", "weights")
# The options that flags set, without constraints: see `taken_constraints`.
FLAG_OPTIONS = (*(name for name in OPTIONS if name not in FORM_OPTIONS), "no_fallback")
TOKEN = ("token", "text", "logprob", "stage", "from_draft", "drafter", "forced", "top_logprobs")
SHOWN = (
    *("finish_reason", "prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps"),
    *("peak_memory", "drafted_tokens", "drafts", "fell_back", "parked", "cached_tokens"),
)


@dataclass(frozen=True)
class Line:
    """A line of the input: `number` counts lines from 1, `index` prompts from 0."""

    number: int
    index: int
    prompt: Prompt
    fields: Mapping[str, Any]


def add_batch_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("many prompts").add_argument
    add(
        "--prompts",
        type=file_path,
        metavar="FILE.jsonl",
        help='one prompt per line: a JSON string, or an object with "prompt", "messages" or '
        '"tokens" and optionally "id", "specialist" and options by their Python names; - for stdin',
    )
    add(
        "--output",
        type=file_path,
        metavar="OUT.jsonl",
        help="append replies to this file, - for stdout; prompts that have a reply in it, with the "
        "same options, are skipped",
    )
    add(
        "--batch",
        type=int,
        default=MAX_SEQUENCES,
        metavar="N",
        help="how many prompts to run together (default: %(default)s)",
    )


def generate_file(args: argparse.Namespace, tokenizer: Tokenizer, specialists: Specialists) -> int:
    """Reply to every line of `args.prompts` that has no reply in `args.output` yet."""
    lines, output = read_lines(args.prompts), args.output
    requests = _Requests(args, tokenizer, specialists)
    done = finished_replies(output)
    made = [requests.of(line) for line in lines]
    keep_trunk = trunk_to_keep([request.model for request, *_ in made])
    scheduler = Scheduler(max_sequences=args.batch, keep_trunk=keep_trunk)
    left = []
    for line, (request, model, options) in zip(lines, made, strict=True):
        with _at(line):
            scheduler.check(request)
        if not has_reply(output, line.index, done.get(line.index), line.prompt, options):
            left.append((line, request, model, options))
    if len(left) < len(lines):
        print(f"{len(lines) - len(left)} of {len(lines)} are already in {output}", file=sys.stderr)
    with open_replies(output) as write, Bars() as bars:

        def finished(i: int, responses: list[GenerationResponse]) -> None:
            line, request, model, options = left[i]
            record = as_json(model, request.mode_name, line.prompt, responses)
            about = {k: line.fields[k] for k in ("id", "specialist") if k in line.fields}
            write(i, {"index": line.index, **about, "options": options, **record})

        def progress(count: int, _: int) -> None:
            bars("prompts", len(lines) - len(left) + count, len(lines))

        result = run_requests(scheduler, [one[1] for one in left], progress, finished)
    if args.verbose:
        stats = result.stats
        print_totals(f"Prompts: {len(left)}, {stats.prompt_tokens}", stats)
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
            raise RequestError(deleted(name) or f"there is no option {name}")
    given = [name for name in PROMPTS if name in content]
    if len(given) != 1:
        raise RequestError(f"expected exactly one of {', '.join(PROMPTS)}, not {len(given)}")
    prompt = content[given[0]]
    kind = str if given[0] == "prompt" else list
    if not isinstance(prompt, kind) or (kind is list and not prompt):
        raise RequestError(f"{given[0]} must be {'a string' if kind is str else 'a list'}")
    rest = {k: v for k, v in content.items() if k not in PROMPTS and v is not None}
    return Line(number, index, prompt, rest)


class _Requests:
    """Makes requests of lines. The models that they ask for are each loaded once."""

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer, specialists: Specialists):
        self._args, self._tokenizer, self._specialists = args, tokenizer, specialists
        self._constraints = taken_constraints(args)
        self._known: dict[Any, tuple[PoEModel, str, dict[str, Any]]] = {}

    def of(self, line: Line) -> tuple[GenerationRequest, str, dict[str, Any]]:
        """A line's request, its model's name in the output, and all options that decide the reply.
        RequestError names the line."""
        args = self._args
        own = {name: value for name, value in line.fields.items() if name in OPTIONS}
        options, mode = taken(args, FLAG_OPTIONS), str(own.get("mode", args.mode))
        if mode != args.mode:
            # Mode options on the command line apply to the command line's mode only.
            others = {*MODE_OPTIONS} - {*MODES.get(mode, MODE_OPTIONS)}
            options = {name: value for name, value in options.items() if name not in others}
        if not any(name in own for name in CONSTRAINTS):
            options |= self._constraints
        options = {**options, **own, "costs": known_costs}
        with _at(line):
            (model, name, about), prompt = self._model(line), line.prompt
            if isinstance(prompt, str):
                chats = bool(model.config.specialist_layers) and not args.ignore_chat_template
                prompt = user_prompt(args, prompt, chats)
            elif args.system_prompt:
                raise RequestError(
                    "--system-prompt goes with lines that have a prompt: begin messages with the "
                    "system's own"
                )
            specialist = bool(model.config.specialist_layers) and are_messages(prompt)
            options = with_usual_penalty(options, specialist)
            request = read_request(self._tokenizer, prompt, options).on(model)
        facts = {
            # In the order in which differences are named: these three change the weights too.
            "dtype": dtype_name(model.resid_lambdas.dtype),
            **{flag: getattr(args, flag) for flag in ("quantize", "split", "degrade")},
            **about,
            "mode": request.mode_name,
            **asdict(request.mode_options),
            "max_tokens": request.max_tokens,
            "stop": request.stop or None,
            **asdict(request.sampling),
            **{name: options.get(name) for name in FORM_OPTIONS},
        }
        if request.mode_name in PACED_MODES:
            facts["no_fallback"] = args.no_fallback
            facts["calibration"] = model.calibration and key_of(model.calibration.to_json())
        if isinstance(line.prompt, str):
            facts["system_prompt"] = args.system_prompt or None
            facts["ignore_chat_template"] = args.ignore_chat_template
        return request, name, recorded(facts)

    def _model(self, line: Line) -> tuple[PoEModel, str, dict[str, Any]]:
        """A line's model, its name, and what distinguishes its replies from another's."""
        wanted = named_specialists(self._args.specialists), self._args.weights
        if "specialist" in line.fields or "weights" in line.fields:
            wanted = line.fields.get("specialist", wanted[0]), line.fields.get("weights")
        specialist, weights = wanted = read_specialist(*wanted)
        names = specialist if isinstance(specialist, tuple) else (specialist,)
        for name in names:
            if name is not None and name not in self._specialists.names:
                self._specialists.attach(name, name, quantize=self._args.quantize)
        if wanted not in self._known:
            model, base = self._specialists.choose(specialist, weights), self._specialists.base
            own = fingerprint(model, base) if model is not base else None
            shown = "+".join(map(str, names)) if own else self._args.model
            facts = {"model": key_of(self._base, own), "weights": weights}
            self._known[wanted] = model, shown, facts
        return self._known[wanted]

    @cached_property
    def _base(self) -> str:
        return fingerprint(self._specialists.base)


def named_specialists(names: Sequence[str] | None) -> str | Sequence[str] | None:
    """The value of --specialists as an option: one name, or several to mix."""
    return names[0] if names and len(names) == 1 else names or None


def user_prompt(args: argparse.Namespace, text: str, chats: bool) -> Prompt:
    """A user's turn, after the system text, for a model that chats; bare text for another."""
    if not text.strip():
        raise RequestError(EMPTY_PROMPT)
    if chats:
        system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
        return [*system, {"role": "user", "content": text}]
    if args.system_prompt:
        raise RequestError("--system-prompt needs a specialist and its chat template")
    return text


@contextmanager
def _at(line: Line) -> Iterator[None]:
    try:
        yield
    except RankError:
        raise  # not the line's fault
    except PoEError as error:
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
            {name: getattr(r, name) for name in TOKEN if name != "top_logprobs" or r.top_logprobs}
            for r in responses
        ],
    }
    if responses:
        result |= {name: getattr(responses[-1], name) for name in SHOWN}
    return result


def print_totals(prompts: str, totals: Stats | GenerationResponse, *more: str) -> None:
    """Print statistics on stderr; `prompts` names what was read, and counts its tokens."""
    lines = [
        "=" * 10,
        f"{prompts} tokens, {totals.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {totals.generation_tokens} tokens, "
        f"{totals.generation_tps:.3f} tokens-per-sec",
        f"Peak memory: {totals.peak_memory:.3f} GB",
        *more,
    ]
    print("\n".join(lines), file=sys.stderr)
