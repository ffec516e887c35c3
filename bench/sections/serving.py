"""Our server and mlx-lm's under the same load, and what a second specialist's turn costs.

- in: a model and its specialists by name; trials, tokens and lengths of a setup
- out: tokens per second and time to first token at 1 to 16 clients, with and without a shared
  system prompt, each with its ratio to mlx-lm's server in the same trials
- both serve the same converted folder and get the same requests, greedy and without penalties. Each
  server counts its own tokens (`usage`); `agreement` is the share of replies with identical text
- mlx-lm's server may die or hang: such trials are counted, not waited for
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
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

CLIENTS = (1, 4, 8, 16)
# Requests per client in a trial, and the fewest in all.
ROUNDS, LEAST = 2, 4
# How long a reply may take: a multiple of our longest under the heaviest load, at least 30 s.
PATIENCE, LEAST_PATIENCE = 10, 30.0
# After this many failures under a load, the peer is not tried under it again.
GIVE_UP = 2
FIRST_PATIENCE = 600.0  # a server may load its model at the first request

OURS, THEIRS = "mlx_poe.server", "mlx_lm.server"
SENTENCE = "The little dog ran to the old bridge and looked for a friend. "
REQUEST = "Tell me a story."


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


@dataclass(frozen=True)
class Load:
    """A number of clients; if `shared`, their prompts begin with the same long system prompt."""

    clients: int
    shared: bool

    @property
    def name(self) -> str:
        """The load's name in figures."""
        clients = f"{self.clients} client{'s' * (self.clients > 1)}"
        return f"{clients}, system prompt" if self.shared else clients


def check_installed() -> None:
    """Raise RequestError if a server is not installed."""
    missing = [m for m in ("starlette", "uvicorn", "prometheus_client") if find_spec(m) is None]
    if missing:
        raise RequestError(
            f"the section serving needs {missing[0]}: pip install 'cognica-mlx[server]'"
        )
    if find_spec("mlx_lm.server") is None:
        raise RequestError("the section serving needs mlx_lm.server: pip install -U mlx-lm")


def serving(setup: Setup, served: Served, prompt_tokens: int) -> list[Figure]:
    """All figures of the section."""
    found = _loads(setup, served, prompt_tokens)
    if len(served.specialists) > 1:
        found += _second_turn(setup, served, prompt_tokens)
    return found


def our_command(model: str, *flags: str) -> list[str]:
    """Our server's command line. It runs as many sequences at once as there are clients at most;
    mlx-lm's server runs up to 32."""
    command = [sys.executable, "-m", "mlx_poe", "server", "--model", model]
    return [*command, "--max-sequences", str(max(CLIENTS)), *flags]


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
        self._fields = {"max_tokens": tokens, "temperature": 0, "stream": True, **fields}
        self._fields["stream_options"] = {"include_usage": True}
        self.path = "/v1/chat/completions" if chat else "/v1/completions"

    def request(self, prompt: str, system: str | None = None) -> bytes:
        """A request for `prompt`, after the shared `system` text if there is one."""
        if self._chat:
            turns = [{"role": "system", "content": system}] if system else []
            asked: Any = {"messages": [*turns, {"role": "user", "content": prompt}]}
        else:
            asked = {"prompt": f"{system}\n{prompt}" if system else prompt}
        return json.dumps({**self._fields, **asked}).encode()

    def ask(self, prompt: str) -> Reply:
        """One reply, as the first that a server gives; RequestError if it fails."""
        with _named(self.server):
            reply = self.server.ask(self.path, self.request(prompt), FIRST_PATIENCE)
            _ = reply.usage
        return reply


class _Texts:
    """Prompts of a given length in tokens, no two with the same beginning."""

    def __init__(self, server: ServerProcess):
        count = server.get("/tokenize", {"content": SENTENCE * 10})["count"]
        self._sentence_tokens: float = count / 10
        self._number = 0

    def long(self, tokens: int) -> str:
        """A text of about `tokens` tokens."""
        return SENTENCE * max(round(tokens / self._sentence_tokens), 1)

    def next(self, tokens: int) -> str:
        """A request after about `tokens` tokens of text, starting with a number of its own."""
        self._number += 1
        return f"{self._number}. {self.long(tokens)}{REQUEST}"


@dataclass
class _Trials:
    """One load's outcomes, trial by trial, None if the peer failed; and the peer's failures."""

    ours: list[Outcome] = field(default_factory=list)
    theirs: list[Outcome | None] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def _loads(setup: Setup, served: Served, prompt_tokens: int) -> list[Figure]:
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
        clients = {
            OURS: _Client(ours, setup.tokens, chat, **own),
            THEIRS: _Client(theirs, setup.tokens, chat),
        }
        return _compare(setup, clients, _Texts(ours), prompt_tokens)


def _compare(
    setup: Setup, clients: dict[str, _Client], texts: _Texts, prompt_tokens: int
) -> list[Figure]:
    loads = [Load(count, shared) for shared in (False, True) for count in CLIENTS]
    system, own_tokens = texts.long(prompt_tokens), len(setup.texts[0])
    for client in clients.values():
        client.ask(REQUEST)
    # The same requests for both servers, new ones in every trial.
    prompts: dict[Load, list[str]] = {}

    def draw() -> None:
        for load in loads:
            count = max(ROUNDS * load.clients, LEAST)
            prompts[load] = [texts.next(own_tokens) for _ in range(count)]

    def run(name: str, load: Load, patience: float) -> Outcome:
        client = clients[name]
        if not client.server.running:
            client.server.start()
            client.server.ask(client.path, client.request(REQUEST, system), FIRST_PATIENCE)
        common = system if load.shared else None
        requests = [client.request(prompt, common) for prompt in prompts[load]]
        return closed_loop(client.server, client.path, requests, load.clients, patience)

    trials: dict[Load, _Trials] = defaultdict(_Trials)

    def ours(load: Load, patience: float) -> float:
        with _named(clients[OURS].server):
            trials[load].ours.append(run(OURS, load, patience))
        return trials[load].ours[-1].rate

    def theirs(load: Load, patience: float) -> float:
        found = trials[load]
        outcome = None
        if len(found.failures) < GIVE_UP:
            try:
                outcome = run(THEIRS, load, patience)
            except ServerFailed as failure:
                clients[THEIRS].server.stop()
                found.failures.append(str(failure))
        found.theirs.append(outcome)
        return outcome.rate if outcome else math.nan

    draw()
    started = time.perf_counter()
    ours(loads[-1], FIRST_PATIENCE)
    longest = time.perf_counter() - started
    trials.clear()
    patience = max(PATIENCE * longest, LEAST_PATIENCE)
    cases: dict[str, Callable[[], float]] = {}
    for load in loads:
        cases[f"{load.name}, ours"] = partial(ours, load, patience)
        cases[f"{load.name}, peer"] = partial(theirs, load, patience)
    setup.interleaved(cases, "serving", draw)
    return [one for load in loads for one in _figures(load, trials[load])]


def _figures(load: Load, trials: _Trials) -> list[Figure]:
    # The first round was a warm-up for both.
    ours, theirs = trials.ours[1:], trials.theirs[1:]
    notes: dict[str, float | str] = {"prompt_tokens": ours[0].replies[0].prompt_tokens}
    same = [
        a.text.strip() == b.text.strip()
        for one, other in zip(ours, theirs, strict=True)
        if other
        for a, b in zip(one.replies, other.replies, strict=True)
    ]
    measures: dict[str, tuple[str, Callable[[Outcome], float]]] = {
        load.name: ("tokens/s", lambda outcome: outcome.rate),
        f"{load.name}, first token": ("ms", lambda outcome: 1e3 * median(_firsts(outcome))),
        f"{load.name}, slowest first token": ("ms", lambda outcome: 1e3 * max(_firsts(outcome))),
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
            about |= _peer_notes(trials.failures, theirs, same)
        samples = Samples(tuple(map(measure, ours)))
        found.append(figure("serving", name, unit, samples, speedup=speedup, notes=about))
    return found


def _peer_notes(
    failures: Sequence[str], outcomes: Sequence[Outcome | None], same: Sequence[bool]
) -> dict[str, float | str]:
    """Further notes on the peer under a load."""
    notes: dict[str, float | str] = {}
    if same:
        notes["agreement"] = sum(same) / len(same)
    if resets := sum(reply.resets for one in outcomes if one for reply in one.replies):
        notes["peer_resets"] = resets
    if failures:
        left_out = ", then left out" * (len(failures) >= GIVE_UP)
        notes["peer_failed"] = f"{len(failures)} x{left_out}: {failures[-1]}"
    return notes


def _firsts(outcome: Outcome) -> list[float]:
    return [reply.first for reply in outcome.replies]


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
        texts = _Texts(server)
        one, other = (
            _Client(server, 1, chat[name], model=name, repetition_penalty=1)
            for name in (first, second)
        )

        def run(name: str, before: _Client | None) -> float:
            prompt = texts.next(prompt_tokens)
            if before:
                before.ask(prompt)
            replies[name].append(other.ask(prompt))
            return 1e3 * replies[name][-1].first

        cases = {"nobody": None, "another": one, "itself": other}
        taken = setup.interleaved(
            {name: partial(run, name, before) for name, before in cases.items()},
            "a second specialist's turn",
        )
    cold, again = taken["nobody"], taken["itself"]
    parts = zip(cold.values, again.values, strict=True)
    own = Samples(tuple(b + share * (a - b) for a, b in parts))
    found = []
    for name, samples in taken.items():
        reply = replies[name][-1]
        about: dict[str, Any] = {
            "prompt_tokens": reply.prompt_tokens,
            "cached": reply.cached_tokens / reply.prompt_tokens,
        }
        label = f"{second}, first token, prompt read before by {name}"
        predicted = cold.over(own) if name == "another" else None
        speedup = cold.over(samples)
        found.append(
            figure(
                "serving", label, "ms", samples, speedup=speedup, predicted=predicted, notes=about
            )
        )
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
