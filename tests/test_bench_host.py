"""The benchmark's section `host`: what is measured, against what, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import mlx.core as mx
import pytest
from test_bench import MACHINE

from cognica_mlx.bench import timing
from cognica_mlx.bench.peers import peer_model
from cognica_mlx.bench.sections import host
from cognica_mlx.bench.sections.stage_speeds import Figure, Setup
from cognica_mlx.bench.shapes import random_model, rounded, shape_config
from cognica_mlx.bench.timing import host_clock, once_begun
from cognica_mlx.errors import RequestError
from mlx_poe.commands import bench as command


@pytest.fixture
def few(monkeypatch) -> None:
    """The section `host` with two sequences at most, and half a model."""
    monkeypatch.setattr(host, "TOGETHER", 2)
    monkeypatch.setattr(host, "LENGTHS", [20, 15])
    monkeypatch.setattr(host, "COUNTS", {1: 1.1, 2: 1.4})
    monkeypatch.setattr(host, "SHAPE", host.SHAPE | {"n_layer": 4, "poe_every": 2})


def test_the_hosts_time_and_the_rate_have_ratios_and_goals(few, monkeypatch):
    model = random_model(shape_config("tiny"), mx.float32)
    setup = Setup(model, MACHINE, [list(range(20, 52))], tokens=8, trials=1)

    def measured(case: host.Case) -> tuple[float, float]:
        _, texts, limits, *_ = case.run.args
        assert len(texts) == len(limits) == case.sequences
        given.add(tuple(limits))
        return float(case.goal == 0) + 1, 3 + case.goal

    given: set[tuple[int, ...]] = set()
    monkeypatch.setattr(host, "_measured", measured)
    found = {f.name: f for f in host.host(setup, None)}
    # For host time all end together, for tokens per second one after the other.
    assert given == {(16,), (16, 16), (16, 14)}
    one, many = "mlx-lm, one sequence", "mlx-lm, batch of 2"
    expected = {
        **{"full": (one, 0.5), "stage 0": (one, 0.16), "wand": (one, 0.4)},
        **{"a round of 3 drafts": (one, 1.2), "full, batch of 2": (many, 0.45)},
        **{f"{f}, {s}": (f, 1.2) for s in host.SAMPLINGS for f in ("full", "full, batch of 2")},
    }
    times = {name: f for name, f in found.items() if f.unit == "host ms/token"}
    assert {*times} == {*expected, one, many}
    for name, (against, goal) in expected.items():
        notes = {"ratio": times[name].value / times[against].value, "against": against}
        assert times[name].notes == notes | {"goal": f"<= {goal:.2f}x"}
    rates = {name: f.notes for name, f in found.items() if f.unit == "tokens/s"}
    plain = ("mlx-lm, 1 sequence", "mlx-lm, 2 sequences")
    assert [rates.pop(name) for name in plain] == [{}, {}]
    for name, goal in {"1 sequence": 1.1, "2 sequences": 1.4}.items():
        notes = {"ratio": (3 + goal) / 3, "goal": f">= {goal:.2f}x", "against": f"mlx-lm, {name}"}
        assert rates.pop(name) == notes
    assert {*rates} == {f"2 sequences, {label}" for label in host.SAMPLINGS}
    for notes in rates.values():
        assert notes["against"] == "2 sequences" and notes["goal"] == ">= 0.85x"
        assert notes["ratio"] == pytest.approx(3.85 / 4.4)


@pytest.mark.parametrize("bits", [None, 4])
def test_every_case_runs(bits, few):
    model = random_model(shape_config("tiny"), mx.float32)
    model = rounded(model, bits) if bits else model
    setup = Setup(model, MACHINE, [list(range(20, 40))], tokens=2, trials=1)
    assert all(f.value > 0 for f in host.host(setup, None))


@pytest.mark.parametrize(
    ("flags", "name"), [([], "poe-tiny"), (["--model", "poe-tiny-chat"], "poe-tiny-chat")]
)
def test_the_command_shows_ratios_beside_goals(flags, name, monkeypatch, capsys):
    monkeypatch.setattr(command, "this_machine", lambda: MACHINE)
    monkeypatch.setattr(command, "slow_blas", lambda: False)

    def section(setup: Setup, model: str | None) -> list[Figure]:
        notes = {"ratio": 0.375, "goal": "<= 0.50x", "against": "mlx-lm"}
        return [Figure("host", f"full of {model}", "host ms/token", 1, 1, 1, notes=notes)]

    monkeypatch.setattr(command, "host", section)
    assert command.main([*flags, "--only", "host", "--dtype", "float32"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if f"full of {name}" in line)
    assert "0.38x" in row and "<= 0.50x" in row and "mlx-lm" in row


def test_both_engines_make_the_tokens_that_are_asked_for():
    model = random_model(shape_config("tiny"), mx.float32)
    peer = peer_model(model.config, 2, mx.float32)
    for texts, limits in (([[5, 6, 7]], [4]), ([[5, 6, 7], [8, 9]], [4, 6])):
        expected = dict(enumerate(limits))
        assert Counter(host.ours(model, texts, limits)) == expected
        assert Counter(host.theirs(peer, texts, limits)) == expected


def test_tokens_are_counted_once_all_sequences_have_begun(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    now = {"perf_counter": lambda: clock.now, "thread_time": lambda: clock.now / 2}
    monkeypatch.setattr(timing, "time", SimpleNamespace(**now))

    def tokens(begun: list[int]) -> Iterator[int]:
        for name in begun:  # each takes a second, and none of them counts
            clock.now += 1
            yield name
        for _ in range(4):
            clock.now += 0.25
            yield 0

    # Until the second has begun, then until they have 16 tokens.
    for begun in ([0] * 20 + [1], [0, 1] * 8):
        assert once_begun(tokens(begun), sequences=2, skip=8) == (125, 4)
    assert once_begun(iter([0, 1]), sequences=2)[1] == 0  # none is left to measure


def test_the_hosts_clock_leaves_out_evaluation_and_leaves_nothing_behind(monkeypatch):
    def failing(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(mx, "eval", failing)
    kept, seconds = (failing, mx.async_eval), iter(range(100))
    monkeypatch.setattr(timing, "time", SimpleNamespace(thread_time=lambda: next(seconds)))
    with pytest.raises(KeyError), host_clock() as clock:
        assert clock() == 0 and clock() == 1
        with pytest.raises(OSError):
            mx.eval(mx.array(1))  # for a second, and another on each side
        assert clock() == 3
        mx.async_eval(mx.array(1))
        assert clock() == 5
        raise KeyError
    assert (mx.eval, mx.async_eval) == kept


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_first_token_of_a_process_is_compared_with_an_untraced_one(
    ratio, monkeypatch, tmp_path
):
    monkeypatch.setenv("MLX_POE_TRACE", "0")  # the user's own setting changes nothing
    script = f"""
import os
untraced = "MLX_POE_TRACE" in os.environ
with open({str(tmp_path / "runs")!r}, "a+") as runs:
    runs.write("" if untraced else ".")
    print(30 if untraced else {30 * ratio}, runs.tell())
"""
    monkeypatch.setattr(host, "_FRESH", script)
    model = random_model(shape_config("tiny"), mx.float32)
    setup = Setup(model, MACHINE, [], tokens=3, trials=1)
    plain, traced, tracing = host._first_tokens(setup, "poe-tiny")
    assert plain.value == 30 and traced.value == 30 * ratio
    assert tracing.value == 2  # the warm-up's was 1
    assert traced.notes == {"ratio": ratio, "goal": "<= 1.05x", "against": plain.name}
    monkeypatch.setattr(host, "_FRESH", "raise SystemExit('no such model')")
    with pytest.raises(RequestError, match="no such model"):
        host._first_tokens(setup, "poe-tiny")


def test_the_first_token_is_that_of_a_real_process():
    model = random_model(shape_config("tiny"), mx.float32)
    found = host._first_tokens(Setup(model, MACHINE, [], tokens=3, trials=1), "poe-tiny")
    assert found[0].value > 0 and found[1].value > 0
