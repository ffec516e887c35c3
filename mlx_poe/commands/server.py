"""mlx_poe.server: serve models over OpenAI's HTTP API, with a web page to chat with them."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cognica_mlx.errors import RequestError
from mlx_poe.commands import flags
from mlx_poe.commands.entry import make_parser, run
from mlx_poe.commands.split import add_split_flags, check_split, with_models
from mlx_poe.engine import Engine
from mlx_poe.engine.scheduler import MAX_SEQUENCES
from mlx_poe.loading.machine_costs import known_costs
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.tokenizer import Tokenizer

if TYPE_CHECKING:
    from starlette.applications import Starlette

KEY_VARIABLE = "MLX_POE_API_KEY"
# How long requests may continue once the server is told to stop.
GRACE_SECONDS = 10.0

EXAMPLES = f"""\
  mlx_poe.server
  mlx_poe.server --model my-base --specialist chat=my-chat --specialist math=my-math
  mlx_poe.server --composition both=poe-tiny-chat:2,poe-tiny-math:1
  {KEY_VARIABLE}=secret mlx_poe.server --host 0.0.0.0 --port 8000 --memory 8GB

  curl http://127.0.0.1:8080/v1/chat/completions -H "Content-Type: application/json" -d '
    {{"model": "poe-tiny-chat", "mode": "wand", "messages":
     [{{"role": "user", "content": "What is the capital of Japan?"}}]}}'"""


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "mlx_poe.server", "Serve models over OpenAI's HTTP API, with a web page at /.", EXAMPLES
    )
    add = parser.add_argument
    flags.add_model_flags(parser)
    flags.add_specialist_flag(
        parser, "serve a specialist of the model under this name (default: poe-tiny's own)"
    )
    add(
        "--composition",
        action="append",
        default=[],
        type=_composition,
        metavar="NAME=A:W,B:W,…",
        help="serve a mixture of specialists with weights W (default: 1); may be repeated",
    )
    add = parser.add_argument_group("address and access").add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=_port, default=8080, help="port; 0 picks a free one (%(default)s)")
    add(
        "--api-key",
        metavar="KEY",
        help=f"key that clients must send; better set as {KEY_VARIABLE} in the environment",
    )
    add(
        "--no-api-key",
        action="store_true",
        help="allow an address that others can reach without a key",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="allow requests from pages of this origin, such as https://example.org; * is any; may "
        "be repeated",
    )
    add = parser.add_argument_group("limits").add_argument
    for flag, default, text in (
        ("--max-sequences", MAX_SEQUENCES, "most sequences to run together, if memory allows"),
        ("--max-queue", 128, "most sequences that may wait; further requests get status 429"),
        ("--max-context", 16384, "most tokens in a prompt and its reply together"),
    ):
        add(flag, type=flags.whole(0), default=default, metavar="N", help=f"{text} (%(default)s)")
    for flag, most, text in (
        ("--max-body", 1_000_000, "most bytes in a request, such as 2MB (default: 1MB)"),
        (
            "--memory",
            None,
            "most memory for sequences and cached prompts, such as 8GB (default: half of the "
            "machine's)",
        ),
        ("--prompt-cache-bytes", None, "most of it for cached prompts (default: a quarter)"),
    ):
        add(flag, type=flags.size, default=most, metavar="SIZE", help=text)
    add_split_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(build_parser(), _serve, argv)


def _composition(text: str) -> tuple[str, list[str], list[float]]:
    name, _, rest = text.partition("=")
    parts = [part.rpartition(":") if ":" in part else (part, "", "1") for part in rest.split(",")]
    try:
        names, weights = [part[0] for part in parts], [float(part[2]) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a weight must be a number") from None
    if not name or not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=A:W,B:W")
    return name, names, weights


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _serve(args: argparse.Namespace) -> int:
    try:
        import uvicorn  # noqa: F401

        from mlx_poe.server import app as _  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith(("mlx_poe", "cognica_mlx")):
            raise
        raise RequestError(
            f'the server needs {error.name}: pip install "cognica-mlx[server]"'
        ) from None
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    _check_access(args, key)
    specialists = args.specialist or [(one, one) for one in flags.starters(args.model)]
    named = [_base_name(args.model), *(one[0] for one in (*specialists, *args.composition))]
    for name in named:
        if named.count(name) > 1:
            raise RequestError(f"two models are named {name}: give each its own name")
    check_split(args)

    if args.split:  # only rank 0, known once all have loaded, listens
        return with_models(args, specialists, partial(_listened, args, key, None))
    with _listen(args.host, args.port) as listening:
        print("loading …", file=sys.stderr)
        return with_models(args, specialists, partial(_listened, args, key, listening))


def _listened(
    args: argparse.Namespace,
    key: str | None,
    listening: socket.socket | None,
    tokenizer: Tokenizer,
    specialists: Specialists,
) -> int:
    """Serve the loaded models until told to stop. Returns the exit status."""
    import uvicorn

    from mlx_poe.server.app import make_app
    from mlx_poe.server.catalog import make_catalog
    from mlx_poe.server.shared_fields import Limits

    limits = Limits(args.max_body, args.max_context, args.max_sequences, args.max_queue)
    sizes = (args.max_sequences, args.memory, args.prompt_cache_bytes)
    about: dict[str, Any] = {"costs": known_costs, "specialists": specialists}
    with (
        listening or _listen(args.host, args.port) as heard,
        Engine(specialists.base, tokenizer, *sizes, **about) as engine,
    ):
        base = _base_name(args.model)
        catalog = make_catalog(engine, base, specialists.names, args.composition)
        access = {"host": args.host, "api_key": key, "allow_origins": args.allow_origin}
        app = make_app(engine, catalog, limits, **access)
        _announce(app, heard)
        config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none")
        return _run(uvicorn.Server(config), app, heard)


def _check_access(args: argparse.Namespace, key: str | None) -> None:
    from mlx_poe.server.guard import is_loopback

    if key and args.no_api_key:
        raise RequestError("give either --no-api-key or a key, not both")
    if not key and not args.no_api_key and not is_loopback(args.host):
        raise RequestError(
            f"others can reach {args.host}: set a key with --api-key or {KEY_VARIABLE}, or give "
            "--no-api-key"
        )


def _base_name(model: str) -> str:
    """The base's name: the folder's name, or the hub id or built-in name."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before anything is loaded. RequestError if that fails."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise RequestError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; "
            "choose another with --port"
        ) from None
    return listening


def _announce(app: Starlette, listening: socket.socket) -> None:
    listening.listen(1024)  # clients may connect as soon as they read the address
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    print(f"serving {', '.join(app.state.server.catalog)}", file=sys.stderr)
    print(
        f"page  http://{host}:{port}/\nAPI   http://{host}:{port}/v1", file=sys.stderr, flush=True
    )


def _run(server: Any, app: Starlette, listening: socket.socket) -> int:
    """Serve until a signal arrives; then give requests some time to finish."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn's own handlers run first; afterwards it raises the signal again.
        signal.signal(number, signal.SIG_IGN)
    service = app.state.server.service

    async def end() -> None:
        await asyncio.sleep(GRACE_SECONDS)
        if service.taken:
            print(f"ending {service.taken} unfinished sequences", file=sys.stderr)
        await asyncio.to_thread(service.engine.close)

    stop = server.shutdown

    async def shutdown(sockets: Any = None) -> None:
        service.closing = True
        print(f"stopping: {service.taken} sequences to finish", file=sys.stderr, flush=True)
        ending = asyncio.ensure_future(end())
        await stop(sockets)
        ending.cancel()

    server.shutdown = shutdown
    server.run(sockets=[listening])
    print("stopped", file=sys.stderr)
    return 0
