"""A random walk over the scheduler: whatever happens around it, each reply is what it is alone.

`-m soak` walks on for longer, POE_WALK_STEPS=20000 for as long as that; a failure names its
POE_WALK_SEED.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import pytest
from conftest import SOAK
from mlx.utils import tree_flatten, tree_unflatten
from test_scheduler import BOUNDS, TALK, held, text, tokenizer

from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.shared_base import share_base
from cognica_mlx.pricing.costs import Costs
from mlx_poe import stream_generate
from mlx_poe.engine.scheduler import Scheduler
from mlx_poe.generation.request import GenerationRequest, read_request
from mlx_poe.generation.responses import GenerationResponse, is_last
from mlx_poe.loading.specialists import Specialists

STEPS = int(os.environ.get("POE_WALK_STEPS", "80"))
SEED = int(os.environ.get("POE_WALK_SEED", "1"))
# How many different requests there are; what each gets alone is computed once.
REQUESTS = 60
# A new scheduler, with another budget, after so many steps.
EPISODE = 40
# Where interruptions come: at any call in the modes, the passes and the states.
CODE = Path(sys.modules["cognica_mlx"].__file__ or "").parent
DRIVERS = {CODE / "decoding" / "batch.py", CODE / "decoding" / "single.py"}
HIT = {
    str(p) for folder in ("decoding", "cache") for p in {*(CODE / folder).glob("*.py")} - DRIVERS
}
DEAR = Costs((1, 8), ((1.0, 20.0),) * 6, ((1.0, 20.0),) * 6, (3,))
# Windows of 32 and 128; prompts that begin alike up to about their multiples and the slack's (128).
SHAPE = {"n_embd": 64, "n_head": 2, "head_dim": 32, "n_kv_head": 1, "intermediate_size": 128}
SHAPE |= {"vocab_size": 2048, "sequence_len": 128, "window_pattern": "SL", "n_layer": 4}
SHAPE |= {"stage_layers": [1, 1, 1, 1]}
NAMES = ["chat", "math", "code"]
CUTS = [9, 21, 40, 127, 129, 159, 161, 250, 256, 257, 287, 289, 383, 385]
SYSTEM = {"role": "system", "content": "You are a kind teacher. " * 8}


def random_model(seed: int, **fields: Any) -> PoEModel:
    """A small model of random weights: the same for the same seed."""
    model = PoEModel(PoEConfig.from_dict({**SHAPE, **fields}))
    keys = iter(mx.random.split(mx.random.key(seed), 200))
    weights = [
        (name, 1 + 0 * array if "lambdas" in name else 0.3 * mx.random.normal(array.shape, key=k))
        for (name, array), k in zip(tree_flatten(model.parameters()), keys, strict=False)
    ]
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


def specialist(name: str, base: PoEModel) -> PoEModel:
    """A specialist over the base; `code` has a few token embeddings of its own."""
    model = random_model(sum(name.encode()), n_layer=5, specialist_layers=[1], head_mode="dual")
    rows = mx.random.normal((2, 64), key=mx.random.key(9))
    share_base(model, base, [3, 2039] if name == "code" else [], rows)
    return model


@cache
def models() -> dict[str, PoEModel]:
    """Those that replies are compared with."""
    attached = Specialists(random_model(0))
    for name in NAMES:
        attached.add(name, specialist(name, attached.base))
    both = attached.compose(["chat", "math"], [1, 2])
    return {"base": attached.base, "both": both, **{n: attached.use(n) for n in attached.names}}


@contextmanager
def interrupted(calls: int) -> Any:
    """KeyboardInterrupt at one of the next calls, if there are so many."""
    left = calls

    def hit(frame: Any, event: str, _: Any) -> None:
        nonlocal left
        if event == "call" and frame.f_code.co_filename in HIT:
            left -= 1
            if not left:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(hit)
    try:
        yield
    finally:
        sys.setprofile(None)


def any_prompt(random: Random) -> Any:
    if random.random() < 0.15:
        return [SYSTEM, {"role": "user", "content": random.choice("abc") * 5}]
    if random.random() < 0.1:
        return TALK
    stem = text(600, start=random.randrange(2))
    cut = random.choice(CUTS[:3] if random.random() < 0.8 else CUTS)
    return [*stem[:cut], *range(random.randrange(4))]


def any_options(random: Random) -> dict[str, Any]:
    mode = random.choice(
        ["full", "full", "stage", "prefix", "compose", "wand", *4 * ["speculative"]]
    )
    options: dict[str, Any] = {"mode": mode, "max_tokens": random.randint(1, 24)}
    if random.random() < 0.4:
        options |= {"temp": 0.8, "top_k": 8, "seed": random.randrange(99)}
    if mode in ("stage", "prefix"):
        options["stage" if mode == "stage" else "max_stages"] = random.randint(1, 3)
    if mode == "compose":
        options["stages"] = [0, 3]
    if mode == "wand":
        options["p99_bounds"] = BOUNDS
    if mode == "speculative":
        options["num_draft_tokens"] = random.randint(1, 6)
        options["draft_stage"] = random.randint(0, 1)
    if mode == "speculative":
        options["draft_lookup"] = random.random() < 0.5
        options["draft_bits"] = random.choice([None, None, 4, 8])
        if "seed" not in options and random.random() < 0.2:
            options["costs"] = DEAR
    for name, value in (
        ("regex", "[a-z ]{6,30}"),
        ("repetition_penalty", 1.3),
        ("prompt_logprobs", True),
        ("stop", " the"),
        ("prefill_step_size", 40),
    ):
        if random.random() < 0.1:
            options[name] = value
    return options


@cache
def alone(model: str, prompt: str, options: str) -> list[GenerationResponse]:
    """What a request gets alone; the arguments are written out."""
    asked = eval(options, {"Costs": Costs})
    return list(stream_generate(models()[model], tokenizer, eval(prompt), **asked))


class Asked:
    """One request of the walk: what it asked for, and what came of it."""

    def __init__(self, task: GenerationRequest, key: tuple[str, str, str]):
        self.task, self.key = task, key
        self.got: list[GenerationResponse] = []
        self.ended = self.disturbed = False

    def check(self) -> None:
        """So far the reply is what it is alone."""
        expected = alone(*self.key)
        assert len(self.got) == len(expected) or not self.ended, self.key
        for ours, theirs in zip(self.got, expected, strict=False):
            told = [(r.token, r.text, r.stage, r.finish_reason) for r in (ours, theirs)]
            assert told[0] == told[1], self.key
            assert self.disturbed or ours.drafted_tokens == theirs.drafted_tokens, self.key


class Walk:
    """A scheduler, and what has been asked of it."""

    def __init__(self, seed: int):
        self.random = Random(seed)
        self.attached = Specialists(models()["base"])
        self.steps = self.interruptions = 0

    def begin(self) -> None:
        """A new scheduler, with a budget that barely fits some of the requests, and not others."""
        random = self.random
        probe = Scheduler(keep_trunk=1024, max_sequences=random.choice([1, 2, 3, 6]))
        asked = read_request(tokenizer, text(random.choice(CUTS)), SPECULATIVE).on(models()["base"])
        need = probe.bytes_needed(asked) + sum(prefix.nbytes for prefix in asked.prefixes)
        memory = int(need * random.choice([1, 1, 1.3, 2.5]))
        self.scheduler = Scheduler(
            keep_trunk=1024,
            max_sequences=probe.max_sequences,
            memory=memory,
            prompt_cache_bytes=random.choice([0, memory // 4, memory]),
        )
        self.asked: dict[GenerationRequest, Asked] = {}
        self.paused: list[GenerationRequest] = []

    @property
    def alive(self) -> list[GenerationRequest]:
        return [task for task, asked in self.asked.items() if not asked.ended]

    def join(self) -> None:
        request, attached = Random(self.random.randrange(REQUESTS)), {*self.attached.names}
        name = request.choice(["base", "base", *NAMES, "both"])
        needed = {"chat", "math"} if name == "both" else {name} & {*NAMES}
        if not needed <= attached:
            name = "base"
        model = self.attached.use(None if name in ("base", "both") else name)
        if name == "both":
            model = self.attached.compose(["chat", "math"], [1, 2])
        prompt, options = any_prompt(request), any_options(request)
        if "p99_bounds" in options:
            options["p99_bounds"] = [0.3] * (model.poe_n_stages - 1)
        task = read_request(tokenizer, prompt, options).on(model)
        try:
            self.scheduler.add(task)
        except RequestError:
            copies = sum(prefix.nbytes for prefix in task.prefixes)
            assert self.scheduler.bytes_needed(task) + copies > self.scheduler.memory
        else:
            self.asked[task] = Asked(task, (name, repr(prompt), repr(options)))

    def happen(self) -> None:
        """Something that a caller may do between two steps."""
        random, scheduler = self.random, self.scheduler
        alive = self.alive
        if len(alive) < 10 and random.random() < 0.4:
            self.join()
        if alive and random.random() < 0.04:
            task = random.choice(alive)
            scheduler.cancel(task)
            self.asked.pop(task).check()
            self.paused = [other for other in self.paused if other is not task]
        if alive and random.random() < 0.06:
            task = random.choice(alive)
            if task in self.asked:
                scheduler.pause(task)
                self.asked[task].disturbed = True
                self.paused.append(task)
        if self.paused and random.random() < 0.12:
            scheduler.resume(self.paused.pop(random.randrange(len(self.paused))))
        if random.random() < 0.01:
            name = random.choice(NAMES)
            if name in self.attached.names:
                gone = self.attached.use(name)
                self.attached.detach(name)
                scheduler.cache.drop([gone])
            else:
                self.attached.add(name, specialist(name, self.attached.base))

    def step(self) -> None:
        self.steps += 1
        scheduler = self.scheduler
        calls = int(10 ** self.random.uniform(0, 4)) if self.random.random() < 0.08 else 0
        try:
            with interrupted(calls):
                all_news = scheduler.step()
        except KeyboardInterrupt:
            self.interruptions += 1
            for task in self.alive:
                self.asked[task].disturbed = True
            return
        for task, news in all_news:
            asked = self.asked[task]
            assert not isinstance(news, Exception), (asked.key, news)
            asked.got.append(news)
            asked.ended = is_last(news)
            if asked.ended:
                asked.check()
                del self.asked[task]
        stats = scheduler.stats
        assert stats.state_bytes + stats.cache_bytes + stats.copy_bytes <= stats.memory_bytes
        for running in scheduler._running.values():
            assert running.state.nbytes <= running.need, running.request.mode
        assert held(scheduler) <= stats.state_bytes + stats.cache_bytes

    def end(self) -> None:
        """Everything accepted comes to its end."""
        while self.paused:
            self.scheduler.resume(self.paused.pop())
        for _ in range(4000):
            if not self.alive:
                break
            self.step()
        assert not self.alive and not len(self.scheduler)
        self.scheduler.close()
        assert held(self.scheduler) == 0


SPECULATIVE: dict[str, Any] = {"mode": "speculative", "draft_bits": 4, "max_tokens": 20}


# One that comes while a generator is closed is lost.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("steps", [STEPS, pytest.param(600, marks=SOAK)])
def test_whatever_happens_every_reply_is_what_it_is_alone_and_fits(steps):
    walk = Walk(SEED)
    try:
        while walk.steps < steps:
            walk.begin()
            end = walk.steps + EPISODE
            while walk.steps < end:
                walk.happen()
                walk.step()
            walk.end()
    except BaseException as error:
        pytest.fail(f"POE_WALK_SEED={SEED} at step {walk.steps}: {error!r}")
    assert walk.interruptions > steps // 50
