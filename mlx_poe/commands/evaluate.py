"""mlx_poe.evaluate: score every stage, mixture and the full model on a text or lm-eval tasks."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from cognica_mlx.calibration_file import published_bounds
from cognica_mlx.errors import RequestError
from cognica_mlx.files import strict_json, whole_file
from cognica_mlx.network.model import PoEModel
from mlx_poe.commands.entry import interruptible, make_parser, run
from mlx_poe.commands.flags import (
    LOADING,
    add_model_flags,
    check_output,
    file_path,
    folder_path,
    names,
    numbers,
    taken,
    whole,
)
from mlx_poe.commands.measured_texts import read_texts, replies, segments
from mlx_poe.evaluation.answers import Answers, fingerprint
from mlx_poe.evaluation.on_text import Measured, measure_text
from mlx_poe.evaluation.predictors import Predictors, chosen
from mlx_poe.evaluation.scoring import BATCH
from mlx_poe.generation.progress import Bars
from mlx_poe.loading.load import load
from mlx_poe.loading.tokenizer import Tokenizer

SAFETIES = (0.5, 0.75, 1.0)
ONLY_WITH = {
    "data": ("num_tokens", "mask_prompt"),
    "tasks": (
        *("num_fewshot", "limit", "apply_chat_template", "include_path", "use_cache"),
        *("output", "log_samples"),
    ),
}

EXAMPLES = """\
  mlx_poe.evaluate --data notes.txt                    # bits per byte, accuracy, agreement
  mlx_poe.evaluate --data chats.jsonl --mask-prompt --model path/to/specialist
  mlx_poe.evaluate --data notes.txt --stages full --safety 0.25,0.5,1,2
  mlx_poe.evaluate --tasks arc_easy,hellaswag --limit 100 --output results
  mlx_poe.evaluate --tasks gsm8k --model path/to/specialist --apply-chat-template
  mlx_poe.evaluate --tasks mmlu --num-fewshot 5 --use-cache mmlu.db   # resumes after Ctrl-C

--tasks needs lm-eval: pip install "cognica-mlx[eval]"."""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        "mlx_poe.evaluate",
        "Evaluate a model's stages, mixtures of its first stages, WAND and the full model, all "
        "from one pass over the text.",
        EXAMPLES,
    )
    on = parser.add_argument_group("what to evaluate on (one of these)")
    on.add_argument(
        "--data",
        type=file_path,
        metavar="FILE",
        help="a text file, - for stdin, or a .jsonl file with a text or a chat on each line",
    )
    on.add_argument("--tasks", type=names, metavar="TASK,…", help="lm-eval tasks, by name")
    add_model_flags(parser)
    who = parser.add_argument_group("predictors")
    who.add_argument(
        "--stages",
        type=names,
        metavar="P,…",
        help="stages (0), mixtures of the first stages (0-2), full, or all (default: all)",
    )
    who.add_argument(
        "--safety",
        type=numbers(float),
        metavar="S,…",
        help="WAND with these factors on its bounds (default: "
        f"{','.join(f'{s:g}' for s in SAFETIES)} with --stages all, if the model has bounds)",
    )
    data = parser.add_argument_group("with --data")
    data.add_argument("--num-tokens", type=whole(1), help="most tokens to read (default: all)")
    data.add_argument(
        "--mask-prompt", action="store_true", help="in chats, score only what the assistant says"
    )
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument("--num-fewshot", type=whole(0), help="examples before each question")
    tasks.add_argument("--limit", type=float, help="documents per task; below 1, a share of them")
    tasks.add_argument(
        "--apply-chat-template", action="store_true", help="turn contexts into chat turns"
    )
    tasks.add_argument(
        "--include-path", type=file_path, metavar="FOLDER", help="a folder of your own task files"
    )
    tasks.add_argument(
        "--use-cache",
        type=file_path,
        metavar="FILE",
        help="keep answers in this file; an interrupted run resumes from it",
    )
    tasks.add_argument(
        "--output",
        type=folder_path,
        metavar="FOLDER",
        help="write lm-eval's result files, a folder for each predictor",
    )
    tasks.add_argument(
        "--log-samples", action="store_true", help="with --output: also write every answer"
    )
    how = parser.add_argument_group("running and output")
    how.add_argument(
        "--batch-size",
        type=whole(1),
        default=BATCH,
        help=f"texts to run together (default: {BATCH})",
    )
    how.add_argument(
        "--max-length",
        type=whole(2),
        help="most tokens in one text (default: the model's sequence length)",
    )
    how.add_argument(
        "--json",
        type=file_path,
        metavar="FILE",
        help="write the result as JSON; - prints it instead of the table",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    with interruptible():
        return run(build_parser(), _evaluate, argv)


def _evaluate(args: argparse.Namespace) -> int:
    _check(args)
    data = [] if args.tasks else read_texts(args.data, args.mask_prompt)
    model, tokenizer = load(args.model, **taken(args, LOADING))
    longest = args.max_length or model.config.sequence_len
    predictors = Predictors(model, chosen(model, args.stages or ["all"]), _safeties(args, model))
    if args.tasks:
        result, table = _on_tasks(args, tokenizer, predictors, longest)
    else:
        limit, counted = args.num_tokens or sys.maxsize, None
        if args.mask_prompt:
            texts, counted = replies(data, tokenizer, limit, longest)
        else:
            texts = segments(data, tokenizer, limit, longest)
        sizes = tokenizer.token_byte_lengths(model.config.vocab_size)
        with Bars() as progress:
            measured = measure_text(
                predictors, texts, sizes, counted=counted, batch=args.batch_size, progress=progress
            )
        result, table = {"model": args.model, **asdict(measured)}, _text_table(measured)
    text = strict_json.dumps(result, indent=1) + "\n"
    if str(args.json) == "-":
        print(text, end="")
        return 0
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if args.json:
        whole_file.write_text(args.json, text)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Reject invalid flags before any work."""
    if (args.data is None) == (args.tasks is None):
        raise RequestError("give a text with --data, or lm-eval tasks with --tasks")
    if args.limit is not None and not 0 < args.limit < math.inf:
        raise RequestError("--limit must be a number above 0")
    belongs = "data" if args.tasks else "tasks"
    for flag in ONLY_WITH[belongs]:
        if getattr(args, flag) not in (None, False):
            raise RequestError(f"--{flag.replace('_', '-')} needs --{belongs}")
    if args.log_samples and not args.output:
        raise RequestError("--log-samples needs --output, the folder to write them to")
    if str(args.json) != "-":
        check_output(args.json)
    check_output(args.use_cache)
    if args.output and args.output.exists() and not args.output.is_dir():
        raise RequestError(f"{args.output} is a file: name a folder for the results")
    if args.include_path and not args.include_path.is_dir():
        raise RequestError(f"{args.include_path} is not a folder of task files")
    if args.tasks and not find_spec("lm_eval"):
        raise RequestError('--tasks needs lm-eval: pip install "cognica-mlx[eval]"')


def _safeties(args: argparse.Namespace, model: PoEModel) -> Sequence[float]:
    """The factors given; else the default ones, if WAND has bounds."""
    if args.safety:
        return args.safety
    if args.stages and "all" not in args.stages:
        return ()
    if model.poe_n_stages > 1 and (model.calibration or published_bounds(model.config)):
        return SAFETIES
    print(
        "mlx_poe.evaluate: note: no rows for WAND, because this model has no calibration; "
        "mlx_poe.calibrate makes one",
        file=sys.stderr,
    )
    return ()


def _on_tasks(
    args: argparse.Namespace, tokenizer: Tokenizer, predictors: Predictors, longest: int
) -> tuple[dict[str, Any], Table]:
    from mlx_poe.evaluation.harness import Shared
    from mlx_poe.evaluation.tasks import Run, run_tasks

    model = predictors.model
    if model.config.specialist_layers and not args.apply_chat_template:
        print(
            "mlx_poe.evaluate: note: specialists expect chat turns; --apply-chat-template turns "
            "contexts into chat turns",
            file=sys.stderr,
        )
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    answers = Answers(args.use_cache)
    try:
        with Bars() as progress:
            chat, named = args.apply_chat_template, fingerprint(model) if args.use_cache else ""
            kept = (answers, named, args.batch_size, chat, progress)
            shared = Shared(model, tokenizer, predictors, longest, *kept)
            wanted = Run(args.tasks, args.num_fewshot, args.limit, args.include_path, chat)
            results = run_tasks(shared, wanted, args.model, args.output, args.log_samples)
    finally:
        answers.close()
    if shared.cut:
        print(
            f"mlx_poe.evaluate: note: {len(shared.cut)} contexts did not fit into {longest} "
            "tokens; their beginnings were cut off",
            file=sys.stderr,
        )
    metrics = {name: _metrics(found, args.tasks) for name, found in results.items()}
    return {"model": args.model, "results": metrics}, _task_table(metrics)


def _metrics(found: dict[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """The metrics of each task named, or of all tasks that a pattern or a tag matches. A group
    without metrics of its own stands for its members."""
    everything, members = found["results"], found.get("group_subtasks", {})
    waiting = [name for name in tasks if name in everything] or list(everything)
    shown: dict[str, Any] = {}
    while waiting:
        name, *waiting = waiting
        if members.get(name) and not any(_is_metric(*item) for item in everything[name].items()):
            waiting = [*members[name], *waiting]
        else:
            shown[name] = everything[name]
    return shown


def _is_metric(key: str, value: Any) -> bool:
    """Whether an entry of lm-eval's results is a metric, rather than its error or other facts."""
    metric, comma, _ = key.partition(",")
    return bool(comma) and not metric.endswith("_stderr") and isinstance(value, (int, float))


def _task_table(metrics: dict[str, dict[str, Any]]) -> Table:
    table, columns = Table("predictor"), []
    for task, values in next(iter(metrics.values())).items():
        for key in (key for key, value in values.items() if _is_metric(key, value)):
            metric, _, chosen_filter = key.partition(",")
            label = metric if chosen_filter in ("", "none") else f"{metric} ({chosen_filter})"
            columns.append((task, key, f"{metric}_stderr,{chosen_filter}"))
            table.add_column(f"{task}\n{label}", justify="right", overflow="fold")
    for name, found in metrics.items():
        cells = []
        for task, key, error in columns:
            spread = found[task].get(error)
            give = f" ± {_short(spread)}" if isinstance(spread, float) else ""
            cells.append(f"{_short(found[task][key])}{give}")
        table.add_row(name, *cells)
    return table


def _short(number: float) -> str:
    """Four decimals, or as a power of ten if it is large, as a perplexity may be."""
    return f"{number:.4f}" if abs(number) < 1e6 else f"{number:.4g}"


def _text_table(measured: Measured) -> Table:
    forms = {"bits per byte": ".6f", "accuracy": ".2%", "agreement": ".2%"}
    forms |= {"mean depth": ".2f", "weights read": ".1%"}
    columns = (Column(name, justify="right") for name in forms)
    title = f"{measured.tokens} tokens, {measured.bytes} bytes"
    table = Table("predictor", *columns, title=title)
    for one in measured.worths:
        numbers = ((getattr(one, name.replace(" ", "_")), form) for name, form in forms.items())
        table.add_row(one.name, *(f"{number:{form}}" for number, form in numbers))
    return table
