"""poe-chat: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mlx_poe.chat.conversation import Chat
from mlx_poe.chat.repl import Repl
from mlx_poe.chat.slash_commands import COMMANDS
from mlx_poe.commands import flags
from mlx_poe.commands.entry import make_parser, run
from mlx_poe.generation.request import MODE_OPTIONS, SAMPLING
from mlx_poe.loading.load import DEFAULT_MODEL, load

EXAMPLES = """\
  poe-chat
  poe-chat --model path/to/base --specialist chat=path/to/stage-chat --specialist math=owner/name
  poe-chat --model path/to/specialist --mode speculative --temp 0.7
  echo "What is the capital of France?" | poe-chat"""


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "poe-chat",
        "Chat with a Cognica PoE language model. In the chat, /help lists commands.",
        EXAMPLES,
    )
    add = parser.add_argument
    flags.add_model_flags(parser)
    flags.add_specialist_flag(parser, "attach a specialist to the base model under a name")
    add("--system-prompt", default="", help="system text of the conversation")
    add("--color", action="store_true", help="paint tokens by their stage")
    add(
        "--debug",
        action="store_true",
        help="show the traceback of an unexpected error (without it, /debug shows the last one)",
    )
    flags.add_sampling_flags(parser)
    flags.add_mode_flags(parser)
    parser.set_defaults(max_tokens=512)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(build_parser(), _chat, argv)


def _chat(args: argparse.Namespace) -> int:
    repl = Repl(_make_chat(args), COMMANDS, color=args.color, debug=args.debug)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return repl.run_piped()
    if args.model == DEFAULT_MODEL:
        repl.note(
            "poe-tiny, a built-in toy model; for a real one: poe-chat --model FOLDER-OR-HUB-ID"
        )
    if not repl.chat.can_chat:
        repl.note("this base model was not trained to chat; it continues text")
    repl.note("/help for commands, Esc Enter for a new line, Ctrl-D to leave")
    repl.run()
    return 0


def _make_chat(args: argparse.Namespace) -> Chat:
    name = args.model
    attached = args.specialist or [(one.rpartition("-")[2], one) for one in flags.starters(name)]
    model, tokenizer = load(name, **flags.taken(args, flags.LOADING))
    chat = Chat(model, tokenizer, name, falls_back=not args.no_fallback)
    for one, source in attached:
        chat.specialists.attach(one, source, quantize=args.quantize)
    if attached:
        chat.use(attached[0][0])
    chat.change(
        mode=args.mode,
        options=flags.taken(args, (*SAMPLING, *MODE_OPTIONS)),
        system=args.system_prompt,
        max_tokens=args.max_tokens,
        stop=args.stop or [],
    )
    return chat
