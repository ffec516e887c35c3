"""Our server and mlx-lm's under the same load, and what a second specialist's turn costs.

- in: a model and its specialists by name; trials, tokens and lengths of a setup
- out: tokens per second and time to first token at so many clients, streamed and whole, with and
  without a shared system prompt, each with its ratio to mlx-lm's server in the same trials
- both serve the same converted folder, with their default flags, and get the same requests, greedy
  and without penalties. Each server counts its own tokens (`usage`); `agreement` is the share of
  replies with identical text
- mlx-lm's server may die or hang: such trials are counted, not waited for

`mlx_poe.bench --only serving --model poe-tiny-chat --context 40 -m 64 --clients 1,16 --trials 2`
measures prompts of 55 tokens and replies of 64, under 8 loads.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from cognica_mlx.bench.sections.stage_speeds import Figure, Setup, figure
from cognica_mlx.bench.servers import Outcome, Reply, ServerFailed, ServerProcess, closed_loop
from cognica_mlx.bench.timing import Samples
from cognica_mlx.convert.checkpoint import read_checkpoint
from cognica_mlx.convert.conversion import prepare
from cognica_mlx.convert.quantization import scheme
from cognica_mlx.convert.sources import Source
from cognica_mlx.errors import RequestError

CLIENTS = (1, 4, 8, 16, 32)
GOAL = ">= 1.00x"  # of mlx-lm's tokens per second, under every load
# Requests per client in a trial, and the fewest in all.
ROUNDS, LEAST = 2, 4
# How long a reply may take: a multiple of ours under the heaviest loads, at least 30 s.
PATIENCE, LEAST_PATIENCE = 10, 30.0
# After this many failures under a load, the peer is not tried under it again.
GIVE_UP = 2
FIRST_PATIENCE = 600.0  # a server may load its model at the first request

OURS, THEIRS = "mlx_poe.server", "mlx_lm.server"
SENTENCE = "The little dog ran to the old bridge and looked for a friend. "
REQUEST = "Once upon a time"  # poe-tiny's specialists go on for as long as they may


@dataclass(frozen=True)
class Served:
    """What is served. `load` is the model that both servers run under load, as a whole model.

    `model` and `flags` are mlx_poe.server's arguments; of `specialists`, by name, the second reuses
    what the first has read.
    """

    load: Source
    dtype: str
    bits: int | None
    model: str
    flags: Sequence[str] = ()
    specialists: Sequence[tuple[str, Source]] = ()


def check_installed() -> None:
    """Raise RequestError if a server is not installed."""
    missing = [m for m in ("starlette", "uvicorn", "prometheus_client") if find_spec(m) is None]
    if missing:
        raise RequestError(
            f"the section serving needs {missing[0]}: pip install 'cognica-mlx[server]'"
        )
    if find_spec("mlx_lm.server") is None:
        raise RequestError("the section serving needs mlx_lm.server: pip install -U mlx-lm")


@dataclass(frozen=True)
class Load:
    """So many clients at once, and how they ask: all prompts begin with `system`, if given; replies
    are streamed or whole."""

    clients: int
    system: str | None
    streamed: bool

    @property
    def name(self) -> str:
        """For example "4 clients, system prompt, whole"."""
        name = f"{self.clients} client{'s' * (self.clients > 1)}"
        return name + ", system prompt" * bool(self.system) + ", whole" * (not self.streamed)


def serving(
    setup: Setup, served: Served, prompt_tokens: int, clients: Sequence[int] = CLIENTS
) -> list[Figure]:
    """All figures of the section; `clients` are the loads' numbers of clients."""
    found = _loads(setup, served, prompt_tokens, clients)
    if len(served.specialists) > 1:
        found += _second_turn(setup, served, prompt_tokens)
    return found


def our_command(model: str, *flags: str) -> list[str]:
    """Our server's command line."""
    return [sys.executable, "-m", "mlx_poe", "server", "--model", model, *flags]


# Importing cognica_mlx gives mlx-lm's server the same BLAS as ours.
_THEIRS = "import cognica_mlx, runpy; runpy.run_module('mlx_lm', run_name='__main__')"


def their_command(folder: str) -> list[str]:
    """The command line of mlx-lm's server, without a log line for every request."""
    command = [sys.executable, "-c", _THEIRS, "server", "--model", folder]
    return [*command, "--trust-remote-code", "--log-level", "WARNING"]


class _Client:
    """Makes requests to one server; `fields` are added to every request."""

    def __init__(self, server: ServerProcess, tokens: int, chat: bool, **fields: Any):
        self.server, self._chat = server, chat
        self._fields = {"max_tokens": tokens, "temperature": 0, **fields}
        self.path = "/v1/chat/completions" if chat else "/v1/completions"

    def request(self, prompt: str, system: str | None = None, streamed: bool = True) -> bytes:
        """A request for `prompt`, after the shared `system` text if there is one."""
        if self._chat:
            turns = [{"role": "system", "content": system}] if system else []
            asked: Any = {"messages": [*turns, {"role": "user", "content": prompt}]}
        else:
            asked = {"prompt": f"{system}\n{prompt}" if system else prompt}
        if streamed:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps({**self._fields, **asked}).encode()

    def ask(self, prompt: str) -> Reply:
        """One reply, as the first that a server gives; RequestError if it fails."""
        with _named(self.server):
            reply = self.server.ask(self.path, self.request(prompt), FIRST_PATIENCE)
            _ = reply.usage
        return reply


def _sentences(server: ServerProcess) -> Callable[[int], str]:
    """A function that makes a text of about so many of the server's tokens."""
    count = server.get("/tokenize", {"content": SENTENCE * 10})["count"]
    return lambda tokens: SENTENCE * max(round(10 * tokens / count), 1)


def _loads(
    setup: Setup, served: Served, prompt_tokens: int, clients: Sequence[int]
) -> list[Figure]:
    """Both servers on one folder under every load, alternating."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        target = Path(folder) / "model"
        bits = scheme(served.bits) if served.bits else None
        prepare(served.load, dtype=served.dtype, quantization=bits).write(target)
        ours = _start(stack, OURS, our_command(str(target), "--dtype", served.dtype))
        theirs = _start(stack, THEIRS, their_command(str(target)))
        about = _models(ours)[0]
        chat = about["poe"]["chat"]
        # 1 turns the penalty off, which specialists' replies have by default.
        own = {"model": about["id"], "repetition_penalty": 1}
        asking = {
            OURS: _Client(ours, setup.tokens, chat, **own),
            THEIRS: _Client(theirs, setup.tokens, chat),
        }
        return _compare(setup, asking, _sentences(ours), prompt_tokens, clients)


def _compare(
    setup: Setup,
    asking: dict[str, _Client],
    text_of: Callable[[int], str],
    prompt_tokens: int,
    clients: Sequence[int],
) -> list[Figure]:
    system = text_of(prompt_tokens)
    kinds = [(start, streamed) for streamed in (True, False) for start in (None, system)]
    loads = [Load(together, *kind) for kind in kinds for together in clients]
    for client in asking.values():
        client.ask(REQUEST)
    # The same requests for both servers, new ones in every trial, no two with the same beginning.
    prompts: dict[Load, list[str]] = {}
    numbers, own = count(1), text_of(len(setup.texts[0])) + REQUEST

    def draw() -> None:
        for load in loads:
            requests = range(max(ROUNDS * load.clients, LEAST))
            prompts[load] = [f"{next(numbers)}. {own}" for _ in requests]

    def run(name: str, load: Load, patience: float) -> Outcome:
        client = asking[name]
        if not client.server.running:
            client.server.start()
            client.server.ask(client.path, client.request(REQUEST, system), FIRST_PATIENCE)
        requests = [client.request(prompt, load.system, load.streamed) for prompt in prompts[load]]
        return closed_loop(client.server, client.path, requests, load.clients, patience)

    # Trial by trial, None where the peer failed.
    our_outcomes: defaultdict[Load, list[Outcome]] = defaultdict(list)
    their_outcomes: defaultdict[Load, list[Outcome | None]] = defaultdict(list)
    failures: defaultdict[Load, list[str]] = defaultdict(list)

    def ours(load: Load, patience: float) -> float:
        with _named(asking[OURS].server):
            our_outcomes[load].append(run(OURS, load, patience))
        return our_outcomes[load][-1].rate

    def theirs(load: Load, patience: float) -> float:
        outcome = None
        if len(failures[load]) < GIVE_UP:
            try:
                outcome = run(THEIRS, load, patience)
            except ServerFailed as failure:
                asking[THEIRS].server.stop()
                failures[load].append(str(failure))
        their_outcomes[load].append(outcome)
        return outcome.rate if outcome else math.nan

    draw()
    started = time.perf_counter()
    for load in loads:
        if load.clients == max(clients) and not load.streamed:
            ours(load, FIRST_PATIENCE)
    longest = time.perf_counter() - started
    our_outcomes.clear()
    patience = max(PATIENCE * longest, LEAST_PATIENCE)
    cases: dict[str, Callable[[], float]] = {}
    for load in loads:
        cases[f"{load.name}, ours"] = partial(ours, load, patience)
        cases[f"{load.name}, peer"] = partial(theirs, load, patience)
    setup.interleaved(cases, "serving", draw)
    return [
        one
        for load in loads
        for one in _figures(load, our_outcomes[load], their_outcomes[load], failures[load])
    ]


def _figures(
    load: Load, ours: Sequence[Outcome], theirs: Sequence[Outcome | None], failures: Sequence[str]
) -> list[Figure]:
    # The first round was a warm-up for both.
    ours, theirs = ours[1:], theirs[1:]
    made = [reply.usage["completion_tokens"] for one in ours for reply in one.replies]
    notes: dict[str, float | str] = {
        "prompt_tokens": ours[0].replies[0].usage["prompt_tokens"],
        "reply_tokens": sum(made) / len(made),
    }
    same = [
        a.text.strip() == b.text.strip()
        for one, other in zip(ours, theirs, strict=True)
        if other
        for a, b in zip(one.replies, other.replies, strict=True)
    ]
    measures: dict[str, tuple[str, Callable[[Outcome], float]]] = {
        load.name: ("tokens/s", lambda outcome: outcome.rate)
    }
    if load.streamed:
        measures |= {
            f"{load.name}, first token": ("ms", lambda outcome: median(_firsts(outcome))),
            f"{load.name}, slowest first token": (
                "ms",
                lambda outcome: max(_firsts(outcome)),
            ),
        }
    found = []
    for name, (unit, measure) in measures.items():
        both = [(measure(a), measure(b)) for a, b in zip(ours, theirs, strict=True) if b]
        about, speedup = dict(notes), None
        if both:
            mine, peer = (Samples(values) for values in zip(*both, strict=True))
            speedup = mine.over(peer) if unit == "tokens/s" else peer.over(mine)
            about["peer"] = peer.median
        if unit == "tokens/s":
            about["goal"] = GOAL
            if same:
                about["agreement"] = sum(same) / len(same)
            if resets := sum(reply.resets for one in theirs if one for reply in one.replies):
                about["peer_resets"] = resets
            if failures:
                left_out = ", then left out" * (len(failures) >= GIVE_UP)
                about["peer_failed"] = f"{len(failures)} x{left_out}: {failures[-1]}"
        samples = Samples(tuple(map(measure, ours)))
        found.append(figure("serving", name, unit, samples, speedup=speedup, notes=about))
    return found


def _firsts(outcome: Outcome) -> list[float]:
    """Milliseconds to each reply's first token."""
    return [1e3 * reply.first for reply in outcome.replies]


def _second_turn(setup: Setup, served: Served, prompt_tokens: int) -> list[Figure]:
    """Time to the first token after a long prompt that is new, that another specialist over the
    same base has read, or that the same specialist has read. The second's ceiling is the time for
    the specialist's own layers alone."""
    first, second = (name for name, _ in served.specialists[:2])
    config = read_checkpoint(served.specialists[1][1]).config
    share = sum(config.specialist_layers) / config.n_layer
    command = our_command(served.model, *served.flags)
    for name, source in served.specialists[:2]:
        command += ["--specialist", f"{name}={source.name}"]
    replies: dict[str, list[Reply]] = defaultdict(list)
    with ExitStack() as stack:
        server = _start(stack, OURS, command)
        chat = {about["id"]: about["poe"]["chat"] for about in _models(server)}
        numbers, text = count(1), _sentences(server)(prompt_tokens) + REQUEST
        one, other = (
            _Client(server, 1, chat[name], model=name, repetition_penalty=1)
            for name in (first, second)
        )

        def run(name: str, before: _Client | None) -> float:
            prompt = f"{next(numbers)}. {text}"
            if before:
                before.ask(prompt)
            replies[name].append(other.ask(prompt))
            return 1e3 * replies[name][-1].first

        readers = {"nobody": None, "another": one, "itself": other}
        cases = {name: partial(run, name, before) for name, before in readers.items()}
        taken = setup.interleaved(cases, "a second specialist's turn")
    cold, again = taken["nobody"], taken["itself"]
    parts = zip(cold.values, again.values, strict=True)
    own = Samples(tuple(b + share * (a - b) for a, b in parts))
    found = []
    for name, samples in taken.items():
        usage = replies[name][-1].usage
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        length = usage["prompt_tokens"]
        more: dict[str, Any] = {"notes": {"prompt_tokens": length, "cached": cached / length}}
        if name == "another":
            more["predicted"] = cold.over(own)
        label = f"{second}, first token, prompt read before by {name}"
        found.append(figure("serving", label, "ms", samples, baseline=cold, **more))
    return found


def _start(stack: ExitStack, name: str, command: Sequence[str]) -> ServerProcess:
    server = ServerProcess(name, command)
    with _named(server):
        return stack.enter_context(server)


def _models(server: ServerProcess) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = server.get("/v1/models")["data"]
    return models


@contextmanager
def _named(server: ServerProcess) -> Iterator[None]:
    """A failure of the server ends the benchmark, with its name."""
    try:
        yield
    except ServerFailed as failure:
        raise RequestError(f"{server.name} {failure}") from None
