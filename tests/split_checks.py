"""Run on every rank by `test_machines.py`: models that are split must decode as whole ones do.

Every rank writes its checks to its own file in the folder given first, one line of JSON each, with
what went wrong, if anything. Not to stdout: launchers mix up the lines of several ranks.
"""

# ruff: noqa: I001

import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import cognica_mlx  # noqa: F401  before MLX: it opens a fast BLAS
import mlx.core as mx
from conftest import FIXTURES, fixture

from cognica_mlx.pricing.timed_costs import measure
from cognica_mlx.decoding.modes import MODES, ModeOptions, last_resort, make_mode
from cognica_mlx.decoding.single import advance_through, decode
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.errors import RankError, RankLostError
from cognica_mlx.machines.owner import Owner
from cognica_mlx.machines.remote import Elsewhere
from cognica_mlx.network.model import PoEModel
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.decoding.state import DecodingState
from mlx_poe import batch_generate, load
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.split_loading import on_machines

BOUNDS = 0.3
# Seconds that a rank may take on a busy machine.
PATIENCE = 240


def modes(model: PoEModel) -> Iterator[tuple[str, dict]]:
    """Every mode, with options that make it do something in the models of the tests."""
    last = model.poe_n_stages - 1
    bounds = [BOUNDS / 4**k for k in range(last)]
    yield "full", {}
    yield "stage", {"stage": 1}
    yield "prefix", {"max_stages": last}
    yield "compose", {"stages": [0, last], "stage_weights": [1.0, 0.5]}
    yield "wand", {"p99_bounds": bounds}
    yield "speculative", {"num_draft_tokens": 4}


def reply(model, name, options, prompt, count=14, state=None, **sampling):
    """What a mode emits, to the last bit."""
    mode = make_mode(model, name, ModeOptions(**options))
    sampler = Sampler(SamplingOptions(**sampling))
    steps = decode(
        model, prompt, mode, max_tokens=count, sampler=sampler, state=state, prefill_step_size=128
    )
    return [(t.token, t.logprob, t.stage, t.from_draft) for t in steps]


def check(name: str, found: object, expected: object) -> None:
    wrong = None if found == expected else f"{found!r:.300} is not {expected!r:.300}"
    with (Path(sys.argv[1]) / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps({"check": name, "wrong": wrong}) + "\n")


@contextmanager
def split_model(name: str, split: str, *specialists: str, **options):
    """A fixture, or a built-in model, on all ranks."""
    folder = FIXTURES / name
    path = folder if folder.is_dir() else name
    with on_machines(
        lambda part: load(path, dtype="float32", part=part),
        split,
        [(one, lambda over, one=one: over.attach(one, one)) for one in specialists],
        **options,
    ) as found:
        yield found
        gc.collect()  # states in cycles, as errors leave them, must not outlive the link


def every_mode(name: str, split: str, names: Sequence[str] = tuple(MODES)) -> None:
    """All modes, or some, greedy; one with a temperature; a state that goes on, and its fork."""
    with split_model(name, split) as found:
        if not found:
            return
        whole = fixture(name)[0]
        text = [1 + i * 7 % 60 for i in range(300)]
        for mode, options in modes(whole):
            if mode not in names:
                continue
            # More than a chunk, so that windows slide; elsewhere a short text.
            prompt = text if mode in ("full", "wand") else text[:20]
            mine = reply(found.model, mode, options, prompt)
            check(f"{name} {split} {mode}", mine, reply(whole, mode, options, prompt))
        if len(names) < len(MODES):
            return
        drawn = {"temp": 0.9, "seed": 3}
        mine = reply(found.model, "speculative", {}, prompt[:5], **drawn)
        check(f"{name} {split} drawn", mine, reply(whole, "speculative", {}, prompt[:5], **drawn))
        answers = []
        for model in (found.model, whole):
            state = DecodingState(model)
            first = reply(
                model,
                "wand",
                {"p99_bounds": [BOUNDS] * (model.poe_n_stages - 1)},
                prompt[:9],
                30,
                state,
            )
            other = state.fork()
            again = reply(model, "full", {}, [*prompt[:9], first[0][0], 5], 10, state)
            answers.append((first, again, reply(model, "speculative", {}, prompt[:9], 20, other)))
        check(f"{name} {split} states", *answers)


def drafting_on(split: str) -> None:
    """Drafting goes on while others verify: the same tokens, and blocks that were ready in time."""
    with split_model("poe-tiny", split) as found:
        if not found:
            return
        whole, tokenizer = fixture("poe-tiny")
        prompt, ready = tokenizer.encode("Once upon a time"), []
        verify = Speculative._verify

        def watched(*args):
            ahead = yield from verify(*args)
            ready.append(ahead is not None)
            return ahead

        for sampling in ({}, {"repetition_penalty": 1.3}):
            theirs = reply(whole, "speculative", {}, prompt, 48, **sampling)
            Speculative._verify = watched
            mine = reply(found.model, "speculative", {}, prompt, 48, **sampling)
            Speculative._verify = verify
            check(f"drafting on {split} {sampling}", mine, theirs)
        check(f"drafting on {split}, blocks ready", sum(ready) > 4, True)
        # What a stage costs is what it takes until its activations are here.
        fetched, fetch = [], Elsewhere._fetch

        def counted(hidden):
            fetched.append(hidden.stage.number)
            return fetch(hidden)

        Elsewhere._fetch = counted
        measure(found.model, (1,), trials=1)
        Elsewhere._fetch = fetch
        check("costs are waited for", sorted(set(fetched)), [1, 2, 3])


def passing(split: str) -> None:
    """Activations go from owner to owner: none comes here unless somebody asks for it."""
    with split_model("flat-d8", split) as found:
        if not found:
            return
        state, fetched, fetch = DecodingState(found.model), [], Elsewhere._fetch

        def counted(hidden):
            fetched.append(hidden.stage.number)
            return fetch(hidden)

        Elsewhere._fetch = counted
        state.append(range(10))
        advance_through(state, 3)
        check("nothing is fetched on the way", fetched, [])
        mx.eval(state.boundary(3, 9, 10).x)
        check("what is asked for is fetched", fetched, [3])
        Elsewhere._fetch = fetch
        del state  # or it would outlive the link


def failing(split: str) -> None:
    """A pass that fails on another rank: its sequence hears of it, can go on, and others do."""
    with split_model("flat-d8", split) as found:
        if not found:
            return
        model, whole = found.model, fixture("flat-d8")[0]
        state, other, prompt = DecodingState(model), DecodingState(model), [5, 6, 7, 8]
        first = reply(model, "full", {}, prompt, 8, state)
        text = prompt + [token for token, *_ in first]
        # As if its owner had lost the sequence.
        known, state.caches[-1].number = state.caches[-1].number, 10**6
        try:
            reply(model, "full", {}, text, 4, state)
            said = "nothing"
        except RankError as error:
            said = str(error)
        check("a failed pass is reported", said[:7], "rank 1:")
        check("its sequence is where it was", state.filled[-1] <= len(text) - 1, True)
        check("others go on", reply(model, "full", {}, prompt, 8, other), first)
        state.caches[-1].number = known
        again = [reply(m, "full", {}, text, 6, s) for m, s in ((model, state), (whole, None))]
        check("and so can it", [t for t, *_ in again[0]], [t for t, *_ in again[1]])
        del state, other  # or they would outlive the link


def siblings(split: str) -> None:
    """Specialists on ranks of their own: alone, composed, drafting, and many at once."""
    names = ("poe-tiny-math", "poe-tiny-chat", "poe-tiny-tool")
    with split_model("poe-tiny", split, *names) as found:
        if not found:
            return
        tokenizer = found.tokenizer
        whole = Specialists(fixture("poe-tiny")[0])
        for name in names:
            whole.attach(name, name)
        owners = [found.specialists.use(name).stages[-1].rank for name in names]
        check("each has a rank of its own", owners, [1, 2, 3])
        prompt = tokenizer.encode("What is 3 + 4?")
        for chosen in (names[:1], names):
            weights = [1.0, 0.5, 0.25][: len(chosen)]
            mine, theirs = (
                s.compose(chosen, weights) if len(chosen) > 1 else s.use(chosen[0])
                for s in (found.specialists, whole)
            )
            for mode in ("full", "speculative"):
                answers = [reply(model, mode, {}, prompt) for model in (mine, theirs)]
                check(f"siblings {split} {len(chosen)} {mode}", *answers)
        options = [
            {"mode": mode, "model": name, "seed": 1, "temp": temp}
            for mode, name, temp in (
                ("full", None, 0), ("full", names[0], 0.7), ("wand", None, 0),
                ("speculative", names[2], 0), ("full", None, 0), ("stage", None, 0),
            )
        ]  # fmt: skip
        answers = []
        for specialists in (found.specialists, whole):
            own = [{**o, "model": specialists.use(o["model"])} for o in options]
            prompts = [f"Once there was a {'very ' * i}big" for i in range(len(own))]
            result = batch_generate(
                specialists.base, tokenizer, prompts, per_prompt=own, max_tokens=8
            )
            tokens = [[(r.token, r.stage) for r in reply] for reply in result.responses]
            answers.append(tokens)
        check(f"siblings {split} batch", *answers)


def lost(how: str) -> None:
    """A rank is killed, or stopped, between two tokens: rank 0 says which, or goes on. Then it ends
    with a status of its own, or by Ctrl-C."""
    with split_model("flat-d8", "0,1|2,3", timeout=PATIENCE, degrade=True) as found:
        if not found:
            return
        model, whole = found.model, fixture("flat-d8")[0]
        mode, prompt = make_mode(model), [5, 6, 7]
        steps = decode(model, prompt, mode, max_tokens=12, last_resort=last_resort(model))
        tokens = [next(steps) for _ in range(4)]
        os.kill(int(os.environ["RANK_1"]), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        # Nothing comes any more, however long rank 0 waits; before, a busy machine had time.
        model.stages[-1].link.timeout = 0.5
        tokens += steps
        check(f"{how}: a token for each", len(tokens), 12)
        stages = [token.stage for token in tokens]
        first = stages.index(1)  # by its stage every token after says so
        check(f"{how}: stages", stages, [3] * first + [1] * (12 - first))
        text = prompt + [token.token for token in tokens]
        stage = reply(whole, "stage", {"stage": 1}, text[: 3 + first], 12 - first)
        check(f"{how}: the stage's own tokens", text[3 + first :], [t for t, *_ in stage])
        # Without leave to go on, the rank is named.
        try:
            list(decode(model, prompt, mode, max_tokens=4))
        except RankLostError as error:
            check(f"{how}: the rank is named", "rank 1" in str(error), True)
        if how == "stop":
            raise KeyboardInterrupt
        found.status = 7


def late() -> None:
    """A rank stops while it loads."""

    def stopped(part):
        if "RANK_1" not in os.environ:  # rank 0 knows the other's process
            os.kill(os.getpid(), signal.SIGSTOP)
        return load(FIXTURES / "flat-d8", dtype="float32", part=part)

    with on_machines(stopped, "0,1|2,3", timeout=0.05):
        raise AssertionError("nothing has been loaded")


def leaves_nothing(serve):
    """When rank 0 ends, its owners hold nothing any more."""

    def watched(owner):
        serve(owner)
        held = [*owner.caches, *owner.given]
        check(f"rank {owner.wire.rank} holds nothing at the end", held, [])

    return watched


def main(cases: list[str]) -> None:
    Owner.serve = leaves_nothing(Owner.serve)
    for case in cases:
        name, _, rest = case.partition(":")
        if name == "lost":
            with suppress(KeyboardInterrupt):
                lost(rest)
        elif name == "some":
            every_mode(*rest.split(":"), ("full", "wand", "compose"))
        elif name == "siblings":
            siblings(rest)
        elif name == "drafting":
            drafting_on(rest)
        elif name == "passing":
            passing(rest)
        elif name == "failing":
            failing(rest)
        elif name == "late":
            late()
        else:
            every_mode(name, rest)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    try:
        main(sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # others wait for this rank, and MPI for them before it ends
