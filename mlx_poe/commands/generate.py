"""mlx_poe.generate: text from a prompt, streamed to stdout."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from cognica_mlx.errors import RequestError
from cognica_mlx.files import strict_json
from cognica_mlx.network.model import PoEModel
from mlx_poe.commands import flags, prompts_file
from mlx_poe.commands.entry import INTERRUPTED, make_parser, read_stdin, run
from mlx_poe.commands.replies_file import is_stdout
from mlx_poe.commands.split import add_split_flags, check_split, with_models
from mlx_poe.generation.display import paint, paints, print_legend
from mlx_poe.generation.progress import Bars
from mlx_poe.generation.reply_form import with_usual_penalty
from mlx_poe.generation.responses import drafts_in_words, fallback_note
from mlx_poe.generation.text import GenerationResponse, stream_generate
from mlx_poe.loading.machine_costs import known_costs
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.tokenizer import Tokenizer

EXAMPLES = """\
  mlx_poe.generate --prompt "The capital of France is"
  mlx_poe.generate --model poe-tiny-chat --prompt "What is the capital of Japan?"
  mlx_poe.generate --prompt "Once there was a" --mode speculative --num-draft-tokens 4 --verbose
  mlx_poe.generate --prompt "Once there was a" --mode wand --color-stages
  mlx_poe.generate --specialists poe-tiny-math,poe-tiny-chat --weights 1,0.5 --prompt "Hello!"
  mlx_poe.generate --prompts questions.jsonl --output replies.jsonl --batch 16
  echo "Once there was a" | mlx_poe.generate --prompt - --temp 0.8 --seed 7 --json"""


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "mlx_poe.generate", "Generate text with a Cognica PoE language model.", EXAMPLES
    )
    add = parser.add_argument
    add("--prompt", "-p", help="the prompt; - reads it from stdin")
    add("--system-prompt", help="system text of the chat template")
    add(
        "--ignore-chat-template",
        action="store_true",
        help="give a specialist the bare prompt instead of a user's turn",
    )
    add("--verbose", action="store_true", help="statistics, on stderr")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add(
        "--top-logprobs",
        type=int,
        metavar="N",
        help="with --json or --prompts: also give the N best tokens at each position",
    )
    add("--color-stages", action="store_true", help="color each token by the stage that emitted it")
    flags.add_model_flags(parser)
    add = parser.add_argument_group("specialists on top of the model").add_argument
    add(
        "--specialists",
        type=flags.names,
        metavar="MODEL,…",
        help="attach these (folders, hub ids, built-in names) to the base; several are mixed",
    )
    add(
        "--weights", type=flags.numbers(float), metavar="W,…", help="their weights (default: equal)"
    )
    flags.add_sampling_flags(parser)
    flags.add_constraint_flags(parser)
    flags.add_mode_flags(parser)
    prompts_file.add_batch_flags(parser)
    add_split_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(build_parser(), _generate, argv)


def _generate(args: argparse.Namespace) -> int:
    if (args.prompt is None) == (args.prompts is None):
        raise RequestError("give a prompt with --prompt, or a file of prompts with --prompts")
    check_split(args)
    if args.prompts is not None:
        if not args.output:
            raise RequestError("--prompts needs --output, a file for the replies")
        if args.batch < 1:
            raise RequestError(f"--batch {args.batch} must be at least 1")
        if not is_stdout(args.output):
            flags.check_output(args.output)
        work = prompts_file.generate_file
    else:
        if args.output is not None:
            raise RequestError("--output needs --prompts")
        if args.top_logprobs and not args.json:
            raise RequestError("--top-logprobs needs --json or --prompts")
        if args.prompt != "-":
            prompts_file.user_prompt(args, args.prompt, chats=True)
        work = _reply
    return with_models(args, [(name, name) for name in args.specialists or ()], partial(work, args))


def _reply(args: argparse.Namespace, tokenizer: Tokenizer, specialists: Specialists) -> int:
    """Reply to `args.prompt`, print the reply, return the exit status."""
    text = read_stdin() if args.prompt == "-" else args.prompt
    model = specialists.choose(prompts_file.named_specialists(args.specialists), args.weights)
    chats = bool(model.config.specialist_layers) and not args.ignore_chat_template
    options = {**flags.taken(args, prompts_file.FLAG_OPTIONS), **flags.taken_constraints(args)}
    options = {**with_usual_penalty(options, chats), "costs": known_costs}
    prompt = prompts_file.user_prompt(args, text, chats)
    painted, status = args.color_stages and paints(Console()), 0
    responses: list[GenerationResponse] = []
    with Bars() as bars:
        show = partial(bars, "prompt")
        stream = stream_generate(model, tokenizer, prompt, prompt_progress_callback=show, **options)
        try:
            for response in stream:
                bars.close()
                responses.append(response)
                if not args.json:
                    print(paint(response) if painted else response.text, end="", flush=True)
        except KeyboardInterrupt:  # keeps what has come
            status = INTERRUPTED
    if not args.json:
        print(flush=True)
        if painted:
            print_legend(responses)
    if note := fallback_note(args.mode, responses):
        print(note, file=sys.stderr)
    if args.json:
        record = prompts_file.as_json(args.model, args.mode, text, responses)
        sys.stdout.buffer.write(strict_json.line(record))
    if args.verbose and responses:
        _print_statistics(model, responses)
    return status


def _print_statistics(model: PoEModel, responses: Sequence[GenerationResponse]) -> None:
    last, asked = responses[-1], [r for r in responses if not r.forced]
    stages = Counter(r.stage for r in asked)
    lines = []
    if asked:
        lines.append(
            "Stages: "
            + ", ".join(f"{k}: {stages[k]}" for k in range(model.poe_n_stages) if stages[k])
            + f" (mean depth {sum(r.stage + 1 for r in asked) / len(asked):.2f}"
            + f" of {model.poe_n_stages})"
        )
    if len(asked) < len(responses):
        lines.append(f"Forced by the constraint: {len(responses) - len(asked)} tokens")
    if last.drafted_tokens:
        kept = sum(r.from_draft for r in responses)
        lines.append(
            f"Acceptance: {kept} of {last.drafted_tokens} draft tokens"
            f" ({kept / last.drafted_tokens:.1%}): {drafts_in_words(responses)}"
        )
    prompts_file.print_totals(f"Prompt: {last.prompt_tokens}", last, *lines)
