"""Costs, paces and falling back to full depth; the few-rows path of matrices."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import fixture
from hypothesis import given
from hypothesis import strategies as st

from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.requests import DecodedToken
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import Single, decode, drive, prefill
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.decoding.targets import draft_target, stage_target
from cognica_mlx.network import linear
from cognica_mlx.network.linear import FULL_ROWS, Linear
from cognica_mlx.pricing.costs import Costs, bytes_read
from cognica_mlx.pricing.pace import PATIENCE, Metered, Pace
from cognica_mlx.pricing.timed_costs import measure
from mlx_poe import generate, stream_generate
from mlx_poe.commands import generate as generate_command
from mlx_poe.loading import machine_costs as machine

# Drafting is cheap and batches cost what one row does; and a machine where nothing pays.
CHEAP = Costs((1, 8), ((1.0, 1.0),) * 4, ((0.1, 0.1),) * 4, full_boundaries=(3,))
DEAR = Costs((1, 2), ((1.0, 9.0),) * 4, ((9.0, 9.0),) * 4, full_boundaries=(3,))


def decoded(mode: str, count: int = 48, **options) -> list[DecodedToken]:
    """What a mode writes, whatever it costs."""
    model, tokenizer = fixture("poe-tiny")
    chosen = make_mode(model, mode, ModeOptions(**options), model.calibration)
    return list(decode(model, tokenizer.encode("Once upon a time"), chosen, max_tokens=count))


def paced(
    mode: str,
    costs: Costs,
    *,
    falls_back: bool = True,
    count: int = 48,
    text: str = "Once upon a time",
    **options,
) -> tuple[list[DecodedToken], DecodingSequence, Pace]:
    """What a mode writes at these costs, with full depth to fall back to."""
    model, tokenizer = fixture("poe-tiny")
    chosen = make_mode(model, mode, ModeOptions(**options), model.calibration)
    pace = Pace(costs, chosen, falls_back=falls_back)
    sequence = DecodingSequence(
        model,
        tokenizer.encode(text),
        chosen,
        max_tokens=count,
        advice=pace,
        fallback=make_mode(model),
    )
    return list(drive(sequence.steps(), Metered(Single(), pace))), sequence, pace


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, FULL_ROWS - 1, FULL_ROWS])
@pytest.mark.parametrize("n_out", [24, 4096, 5000])
def test_few_rows_give_what_a_plain_matrix_gives(rows, n_out, monkeypatch):
    monkeypatch.setattr(linear, "ON_OPENBLAS", True)
    ours = Linear(16, n_out, bias=False)
    plain = nn.Linear(16, n_out, bias=False)
    plain.weight = ours.weight
    x = mx.random.normal((1, rows, 16))
    assert ours(x).shape == (1, rows, n_out)
    np.testing.assert_allclose(np.array(ours(x)), np.array(plain(x)), atol=1e-5)


def test_costs_between_and_beyond_the_rows_measured():
    costs = Costs((1, 2, 4), ((1.0, 2.0, 6.0),), ((3.0, 3.0, 3.0),), (0,))
    assert [costs.stage(0, rows) for rows in (1, 2, 3, 4, 5)] == [1, 2, 4, 6, 8]
    assert costs.head(0, 100) == 3 and costs.full_token == 4


def test_measured_costs_have_a_figure_for_every_part_and_leave_the_state_alone():
    model, tokenizer = fixture("poe-tiny")
    state = DecodingState(model)
    prefill(state, tokenizer.encode("Once upon a time"), 3)
    before = list(state.tokens)
    costs = measure(model, (1, 2), state=state, trials=1)
    assert state.tokens == before and state.filled == [len(before)] * 4
    assert np.array(costs.stages).shape == np.array(costs.heads).shape == (4, 2)
    assert (np.array(costs.stages) > 0).all() and costs.full_boundaries == (3,)


@pytest.mark.parametrize("mode", ["speculative", "wand"])
def test_a_mode_that_does_not_pay_falls_back_and_says_why(mode):
    full = decoded("full")
    made, _, pace = paced(mode, DEAR)
    assert [one.token for one in made] == [one.token for one in full]
    assert {one.stage for one in made[PATIENCE + 8 :]} == {3}
    assert pace.fell_back and "times as much as at full depth" in pace.fell_back
    made, _, forced = paced(mode, DEAR, falls_back=False)
    assert forced.fell_back is None and any(one.stage == 0 for one in made[-24:])


@pytest.mark.parametrize("mode", ["speculative", "wand"])
def test_a_mode_that_pays_goes_on(mode):
    made, _, pace = paced(mode, CHEAP)
    assert pace.fell_back is None and pace.tokens >= len(made)
    assert any(one.stage == 0 for one in made[-24:])


@pytest.mark.parametrize("mode", ["speculative", "wand"])
def test_reading_a_long_prompt_is_not_held_against_a_mode(mode):
    costs = Costs((1, 8), ((1.0, 1.5),) * 4, ((0.1, 0.15),) * 4, full_boundaries=(3,))
    made, _, pace = paced(mode, costs, text="Once upon a time " * 60)
    assert pace.fell_back is None and any(one.stage == 0 for one in made[-24:])


def test_drafting_that_cannot_pay_is_not_begun():
    costs = Costs((1, 8), ((1.0, 8.0),) * 4, ((1.0, 8.0),) * 4, (3,))
    made, sequence, pace = paced("speculative", costs)
    assert sequence.drafted == 0 and pace.fell_back
    assert {one.stage for one in made} == {3}


@pytest.mark.parametrize("late", [False, True])
def test_beside_others_drafting_is_weighed_for_so_many_rows(late):
    """Alone it pays, in a batch whose rows are almost free it does not: at once, or once the others
    have come."""
    model, _ = fixture("poe-tiny")
    drafting = make_mode(model, "speculative")
    pace, batch = Pace(CHEAP, drafting), Batch()
    sequence = DecodingSequence(
        model, [5] * 9, drafting, max_tokens=60, advice=pace, fallback=make_mode(model)
    )
    batch.add("drafting", sequence.steps(), pace)
    if late:
        for _ in range(4):
            batch.run()
        assert sequence.drafted and pace.fell_back is None
    drafted = sequence.drafted
    for i in range(7):
        other = DecodingSequence(model, [6] * 9, make_mode(model), max_tokens=60)
        batch.add(i, other.steps())
    for _ in range(8):
        batch.run()
    assert pace.fell_back and sequence.drafted <= drafted + 3 * late
    batch.close()


def test_what_is_spent_is_what_was_run():
    """Three drafts a round, counted from the tokens alone."""
    options = {"draft_stage": 0, "num_draft_tokens": 3}
    made, sequence, pace = paced("speculative", CHEAP, falls_back=False, count=41, **options)
    rounds = sum(not one.from_draft for one in made)
    # A draft costs a stage and a head; a verification the stage 0 of the last draft, three others
    # and a head.
    assert pace.spent == pytest.approx(sequence.drafted * 1.1 + rounds * 4.1)


@given(
    st.floats(0.01, 0.99),
    st.floats(0, 0.5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), max_size=30),
    st.integers(1, 8),
)
def test_draft_length_is_the_cheapest(step, slope, history, most):
    """A draft costs `step`, half of it stage 0; a row more costs each deeper stage `slope`."""
    model, _ = fixture("poe-tiny")
    stages = ((step / 2,) * 2, *((1.0, 1 + 8 * slope),) * 3)
    costs = Costs((1, 9), stages, ((step / 2,) * 2, *((0.1,) * 2,) * 3), full_boundaries=(3,))
    pace = Pace(costs, make_mode(model, "speculative"))
    for kept, drafted in history:
        pace.judged("stages", min(kept, drafted), drafted)
    a = pace.acceptance("stages")
    assert 0 < a <= 1

    def token(n: int) -> float:
        verify = step / 2 + 3 * (1 + slope * n) + 0.1
        return (n * step + verify) / sum(a**i for i in range(n + 1))

    plan = pace.plan(0, 0, most)
    best, full = min(token(n) for n in range(1, most + 1)), costs.full_token
    assert plan.looked_up == 0 and 0 <= plan.count <= most
    if plan.count:
        assert token(plan.count) == pytest.approx(best) and best < full
    else:
        assert best > full * (1 - 1e-9) and pace.fell_back


def test_costs_are_measured_once(monkeypatch, tmp_path):
    model, _ = fixture("poe-tiny")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(machine, "measure", lambda *a, **k: calls.append(1) or CHEAP)
    assert machine.known_costs(model) == machine.known_costs(model) == CHEAP
    assert len(calls) == 1
    (kept,) = (tmp_path / "cognica-mlx").iterdir()
    assert json.loads(kept.read_text()) == json.loads(json.dumps(asdict(CHEAP)))
    kept.write_text("{broken")
    assert machine.known_costs(model) == CHEAP and len(calls) == 2
    monkeypatch.setattr(machine.blas, "in_use", lambda: "another")
    machine.known_costs(model)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        *([], {}, {"rows": None}, {"rows": []}, {"rows": [8, 1]}, {"rows": [1, 1]}),
        *({"rows": [1]}, {"rows": [1, "8"]}, {"rows": "18"}, {"rows": [0, 8]}),
        *({"stages": [[1.0, 1.0]] * 3}, {"heads": [[0.1, 0.1]] * 5}, {"stages": {"0": 1}}),
        *({"full_boundaries": []}, {"full_boundaries": [4]}, {"full_boundaries": [-1]}),
        *({"full_boundaries": [True]}, {"stages": [[1.0]] * 4}, {"heads": [[0.1, -0.1]] * 4}),
        *({"heads": [[0.0, 0.1]] * 4}, {"heads": [[0.1, math.nan]] * 4}, {"heads": ["12"] * 4}),
        *({"stages": [[1.0, math.inf]] * 4}, {"stages": [[1.0, 10**400]] * 4}),
        *({"stages": [[1.0, True]] * 4}, {"stages": [[1.0, None]] * 4}),
    ],
)
def test_a_wrong_costs_file_is_measured_again_and_replaced(monkeypatch, tmp_path, wrong):
    model, _ = fixture("poe-tiny")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "measure", lambda *_, **__: CHEAP)
    assert machine.known_costs(model) == CHEAP
    (kept,) = (tmp_path / "cognica-mlx").iterdir()
    right = kept.read_text()
    content = {**json.loads(right), **wrong} if wrong else wrong
    kept.write_text(json.dumps(content))
    assert machine.known_costs(model) == CHEAP
    assert kept.read_text() == right


def test_costs_are_known_by_what_stays_the_same(monkeypatch, tmp_path):
    model, _ = fixture("poe-tiny")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(machine, "measure", lambda *a, **k: calls.append(1) or CHEAP)
    device = {"device_name": "GPU", "architecture": "sm_90", "total_memory": 80}
    for free, changes, measured in ((70, {}, 1), (60, {}, 1), (60, {"total_memory": 140}, 2)):
        info = {**device, "free_memory": free, **changes}
        monkeypatch.setattr(machine.mx, "device_info", lambda info=info: info)
        machine.known_costs(model)
        assert len(calls) == measured


def test_without_a_home_folder_costs_are_measured_each_time(monkeypatch, tmp_path):
    model, _ = fixture("poe-tiny")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "measure", lambda *a, **k: CHEAP)
    assert machine.known_costs(model) == CHEAP
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_in_the_cache(monkeypatch, tmp_path):
    def full(*args: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    model, _ = fixture("poe-tiny")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "measure", lambda *a, **k: CHEAP)
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "replace", full)
    assert machine.known_costs(model) == CHEAP
    assert not list((tmp_path / "cognica-mlx").iterdir())


def test_an_unwritable_cache_only_costs_the_measurement(monkeypatch):
    model, _ = fixture("poe-tiny")
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    monkeypatch.setattr(machine, "measure", lambda *a, **k: CHEAP)
    assert machine.known_costs(model) == CHEAP


def test_the_command_falls_back_with_one_line(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "measure", lambda *a, **k: DEAR)
    flags = ["--dtype", "float32", "--prompt", "Once upon a time", "-m", "40"]
    assert generate_command.main([*flags, "--mode", "wand"]) == 0
    slow = capsys.readouterr()
    assert slow.err.startswith("wand fell back to full depth: ") and slow.err.count("\n") == 1
    for kept in ("--no-fallback", "--no-park"):  # the second as in version 0.2
        assert generate_command.main([*flags, "--mode", "wand", kept]) == 0
        assert capsys.readouterr().err == ""
    assert generate_command.main(flags) == 0
    assert capsys.readouterr().out == slow.out


def test_responses_say_when_a_mode_has_fallen_back():
    model, tokenizer = fixture("poe-tiny")
    options = {"max_tokens": 40, "mode": "speculative"}
    stream = list(stream_generate(model, tokenizer, "Once", costs=DEAR, **options))
    assert stream[-1].fell_back
    assert "".join(r.text for r in stream) == generate(model, tokenizer, "Once", max_tokens=40)
    assert not any(r.fell_back for r in stream_generate(model, tokenizer, "Once", **options))


def test_bytes_of_pooled_heads():
    model, _ = fixture("gqa-logop-d8")
    costs = bytes_read(model)
    assert costs.full_head() == sum(costs.head(k) for k in range(model.poe_n_stages))
    assert costs.target(draft_target(model, 1, "base")) == costs.head(0) + costs.head(1)
    assert costs.target(stage_target(model, 1)) == costs.head(1)
    model, _ = fixture("stage-on-flat")
    costs = bytes_read(model)
    assert costs.target(draft_target(model, 0, "summed")) == costs.full_head()
    assert costs.target(draft_target(model, 0, "base")) == costs.head(0)
