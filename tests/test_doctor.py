"""The doctor: its recorded answers are the oracle's, and it fails when something is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import SOAK, fixture
from record_answers import answers
from test_evaluate import calibrated

from cognica_mlx.backend import blas, traces
from cognica_mlx.bench import machine_card as machine
from cognica_mlx.decoding import passes
from cognica_mlx.decoding.wand import Wand
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.timed_costs import measure
from mlx_poe.commands import doctor as command
from mlx_poe.doctor import agreement, examination, hardware, tracing
from mlx_poe.doctor.agreement import Verdict
from mlx_poe.doctor.recorded import BITS, MODELS, read_recording, recorded_model
from mlx_poe.doctor.verdicts import FAILED, OK, WARNING, Line, Report
from mlx_poe.loading.tokenizer import Tokenizer

base, tokenizer = fixture("poe-tiny")
SOME = ("Once upon a time", "There was a child called", "In the morning", "A long time ago")
MACHINE = machine.Machine("a chip", 2, 8.0, "MLX CPU", "an OS", "3.12", {"mlx": "1"}, 1e10)


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    """Few prompts and few tokens."""
    for module in (agreement, hardware, tracing):
        monkeypatch.setattr(module, "PROMPTS", SOME)
        monkeypatch.setattr(module, "TOKENS", 8)
    monkeypatch.setattr(agreement, "CONTEXTS", 1)
    monkeypatch.setattr(hardware, "PACED_PROMPTS", 1)
    monkeypatch.setattr(tracing, "TRIALS", 1)
    monkeypatch.setattr(machine, "READ_BYTES", dict.fromkeys(machine.READ_BYTES, 2**22))


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Check these modes, and nothing that takes longer."""
    cases = agreement.cases
    monkeypatch.setattr(agreement, "cases", lambda model: {n: cases(model)[n] for n in names})


def by_name(lines: Iterator[Line]) -> dict[str, Line]:
    return {line.name.removesuffix(", float32"): line for line in lines}


@pytest.mark.parametrize("bits", [None, BITS])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_recorded_is_what_the_oracle_says(name, bits):
    tokens, numbers, best = answers(name, bits)
    recording = read_recording(name, bits)
    assert (recording.tokens == tokens).all() and (recording.best == best).all()
    assert np.abs(recording.numbers - numbers).max() < 1e-4
    assert len(set(best[-1].tolist())) > 30  # no model that always says the same


def test_answers_pass_in_every_type_on_this_machine(monkeypatch):
    monkeypatch.setattr(examination, "MODELS", ("poe-tiny-chat", "own heads"))
    lines = list(examination.prediction_lines())
    assert [line.status for line in lines] == [OK] * 8
    assert all(0 < line.numbers["apart"] < 0.4 for line in lines)


def test_a_tokenizer_that_lacks_a_merge_or_decodes_wrongly_is_found(monkeypatch):
    assert examination.tokenizer_line().status == OK
    encode, decode = Tokenizer.encode, Tokenizer.decode

    def parted(self: Tokenizer, text: str) -> list[int]:
        """As if no token crossed the tenth character, which is within a word."""
        return [*encode(self, text[:10]), *encode(self, text[10:], add_special_tokens=False)]

    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "encode", parted)
        line = examination.tokenizer_line()
    assert line.status == FAILED and "report" in line.advice and "the text back" in line.value
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: decode(self, ids).lower())
    line = examination.tokenizer_line()
    assert line.status == FAILED and "another text" in line.value


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_one_wrong_weight_is_found(name, value, monkeypatch):
    def broken(name: str, dtype: str, bits: int | None) -> PoEModel:
        model = recorded_model(name, dtype, bits)
        weight = model.h[1].attn.c_v.weight
        model.h[1].attn.c_v.weight = weight.at[3, 5].add(value)
        return model

    monkeypatch.setattr(examination, "MODELS", (name,))
    monkeypatch.setattr(examination, "TOLERANCES", {("float32", None): (1e-3, 1e-2, 0.99)})
    monkeypatch.setattr(examination, "recorded_model", broken)
    (line,) = examination.prediction_lines()
    assert line.status == FAILED and "report" in line.advice


def test_one_wrong_scale_of_a_quantized_matrix_is_found(monkeypatch):
    def broken(name: str, dtype: str, bits: int | None) -> PoEModel:
        model = recorded_model(name, dtype, bits)
        if bits:
            scales = model.h[1].mlp.c_fc.scales
            model.h[1].mlp.c_fc.scales = scales.at[3].multiply(1.5)
        return model

    monkeypatch.setattr(examination, "MODELS", ("own heads",))
    monkeypatch.setattr(examination, "recorded_model", broken)
    found = {line.name: line.status for line in examination.prediction_lines()}
    assert [name for name, status in found.items() if status != OK] == ["own heads, 4 bits"]
    assert found["own heads, 4 bits"] == FAILED


def test_a_few_wrong_places_are_found_where_no_logit_is_far_off():
    limits = (1e-3, 1e-2, 0.99)
    found = [
        examination._prediction_line("a", apart, agree, limits).status
        for apart, agree in ((1e-4, 1.0), (5e-3, 1.0), (2e-2, 1.0), (1e-4, 0.98), (math.nan, 1.0))
    ]
    assert found == [OK, WARNING, FAILED, FAILED, FAILED]


def test_every_mode_passes_here():
    lines = by_name(agreement.modes(base, tokenizer))
    assert [line.status for line in lines.values()] == [OK] * 7
    counted = [line.numbers["tokens"] for line in lines.values() if line.section == "modes"]
    assert counted == [32] * 6
    assert lines["speculative"].numbers["agreement"] == 1
    assert lines["stage 0"].numbers["agreement"] < 1
    assert agreement.rows(base, tokenizer).status == OK


@SOAK
@pytest.mark.parametrize("name", ["gqa-logop-d8", "stage-on-flat"])
def test_every_mode_passes_with_other_kinds_of_models(name):
    model = calibrated(name)
    lines = by_name(agreement.modes(model, fixture(name)[1]))
    # Bounds that fit nothing: what WAND chooses is right by its rule, but not the full model's.
    assert [line.numbers.get("wrong", 0) for line in lines.values()] == [0] * 7
    assert {line.status for line in list(lines.values())[:5]} == {OK}


def test_a_mode_that_keeps_every_draft_is_found(monkeypatch):
    choose = passes.choose

    def generous(how: Any, scores: Any, **given: Any) -> Any:
        chosen = choose(how, scores, **given)
        if "accepted" in chosen:
            drafted = given["drafted"]
            chosen["accepted"] = drafted >= 0
            chosen["token"] = mx.where(drafted >= 0, drafted, chosen["token"])
        return chosen

    monkeypatch.setattr(passes, "choose", generous)
    only(monkeypatch, "full", "stage 0", "speculative")
    with traces.off():  # a trace would go on as it was
        lines = by_name(agreement.modes(base, tokenizer))
    assert lines["speculative"].status == FAILED and "report" in lines["speculative"].advice
    assert lines["full"].status == lines["stage 0"].status == OK


def test_wand_that_leaves_too_early_is_found(monkeypatch):
    init = Wand.__init__

    def hasty(self: Wand, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.exits = {stage: needed / 2 for stage, needed in self.exits.items()}

    monkeypatch.setattr(Wand, "__init__", hasty)
    only(monkeypatch, "wand")
    lines = by_name(agreement.modes(base, tokenizer))
    assert lines["wand"].status == FAILED and "report" in lines["wand"].advice


def test_wand_that_agrees_too_seldom_is_found():
    found = [
        agreement._mode_line("wand", mx.float32, Verdict(100, 0, 0.0, agree)).status
        for agree in (99, 96, 89)
    ]
    assert found == [OK, WARNING, FAILED]
    found = agreement._mode_line("stage 0", mx.float32, Verdict(100, 0, 0.0, 50))
    assert found.status == OK


def test_a_cache_that_forgets_the_token_before_is_found(monkeypatch):
    embed = PoEModel.embed
    monkeypatch.setattr(PoEModel, "embed", lambda self, tokens, _=None: embed(self, tokens))
    only(monkeypatch, "full")
    assert agreement.rows(base, tokenizer).status == FAILED
    assert by_name(agreement.modes(base, tokenizer))["full"].status == FAILED


def test_rows_that_are_no_numbers_are_found(monkeypatch):
    scores = agreement.score

    def spoilt(requests: Any) -> list:
        (found,) = scores(requests)
        return [found * math.nan if len(found) == 3 else found]

    monkeypatch.setattr(agreement, "score", spoilt)
    line = agreement.rows(base, tokenizer)
    assert line.status == FAILED and line.numbers["apart"] == math.inf


def test_a_batch_that_mixes_up_its_texts_is_found(monkeypatch):
    embed = passes.embed

    def mixed(models: Any, texts: Any) -> Any:
        if len(texts) > 1 and all(text.tokens.shape[1] == 1 for text in texts):
            texts = [texts[0], *[type(t)(texts[0].tokens, t.previous) for t in texts[1:]]]
        return embed(models, texts)

    monkeypatch.setattr(passes, "embed", mixed)
    only(monkeypatch, "full", "stage 0")
    lines = by_name(agreement.modes(base, tokenizer))
    assert lines["all modes together against alone"].status == FAILED
    assert lines["full"].status == lines["stage 0"].status == OK


def test_mlx_is_told_to_keep_float32_before_anything_is_multiplied(monkeypatch):
    order: list[Any] = []
    monkeypatch.setattr(examination, "prepare", order.append)
    monkeypatch.setattr(examination, "this_machine", lambda: order.append("measured") or MACHINE)
    monkeypatch.setattr(examination, "_all_lines", lambda *_: iter(()))
    assert not examination.examine("poe-tiny").failed
    assert order == [mx.float32, "measured"]


def test_a_model_that_does_not_exist_is_named_before_any_check(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(examination, "this_machine", lambda: pytest.fail("it was measured"))
    assert command.main(["--model", "nosuch"]) == 1
    assert "nosuch: no such folder" in capsys.readouterr().err


def test_near_ties_are_a_warning_and_more_is_a_failure():
    assert Verdict(10, 0, 0.0, 10).status(mx.bfloat16) == OK
    assert Verdict(10, 1, 0.1, 9).status(mx.bfloat16) == WARNING
    assert Verdict(10, 1, 0.1, 9).status(mx.float32) == FAILED
    assert Verdict(10, 1, float("inf"), 9).status(mx.bfloat16) == FAILED
    line = agreement._mode_line("speculative", mx.bfloat16, Verdict(10, 1, 0.1, 9))
    assert line.status == WARNING and "--dtype float32" in line.advice


@SOAK
def test_half_precision_is_no_failure():
    half = recorded_model("poe-tiny", "float16")
    assert half.resid_lambdas.dtype == mx.float16
    assert agreement.rows(half, tokenizer).status in (OK, WARNING)
    options = {"mode": "speculative"}
    verdict = agreement.judged(
        half, tokenizer, options, agreement.replies(half, tokenizer, options)
    )
    assert verdict.tokens == 32 and verdict.status(mx.float16) in (OK, WARNING)


def test_a_model_without_bounds_is_checked_in_the_other_modes(monkeypatch):
    model, words = fixture("flat-d8")
    assert {"wand"} == {*agreement.cases(base)} - {*agreement.cases(model)}
    only(monkeypatch, "full", "stage 0")
    lines = by_name(agreement.modes(model, words))
    assert lines["wand"].status == WARNING
    assert "mlx_poe.calibrate" in lines["wand"].advice
    assert {line.status for name, line in lines.items() if name != "wand"} == {OK}


def test_a_slow_blas_is_a_warning_with_the_remedy(monkeypatch):
    monkeypatch.setattr(hardware, "slow_blas", lambda: True)
    line = hardware.blas_line()
    assert line.status == WARNING and blas.REMEDY in line.advice
    measured = iter([True, False])
    monkeypatch.setattr(hardware, "slow_blas", lambda: next(measured))
    line = hardware.blas_line()
    assert line.status == OK and line.value == blas.in_use()
    # The reason is known, so nothing is measured.
    monkeypatch.setattr(blas, "advice", "MLX was imported first")
    line = hardware.blas_line()
    assert (line.status, line.advice) == (WARNING, "MLX was imported first")


def test_what_modes_cost_follows_from_what_parts_cost(monkeypatch):
    rows, flat = hardware.ROWS, (1.0,) * 5
    costs = hardware.Costs(rows, (flat,) * 4, ((0.1,) * 5,) * 4, full_boundaries=(3,))
    monkeypatch.setattr(hardware, "measure", lambda *_, **__: costs)
    whole, *paced = hardware.cost_lines(base, tokenizer)
    assert "4 rows 1.00" in whole.value and whole.status == OK
    assert [line.name for line in paced] == ["speculative", "wand"]
    assert [line.status for line in paced] == [OK] * 2
    dear = tuple(float(n) for n in rows)
    costs = hardware.Costs(rows, (dear,) * 4, ((0.1,) * 5,) * 4, full_boundaries=(3,))
    whole, drafting, *_ = hardware.cost_lines(base, tokenizer)
    assert whole.status == drafting.status == WARNING and "full depth" in drafting.advice


def test_traced_and_untraced_replies_are_compared_in_each_mode():
    lines = list(tracing.same_lines(base, tokenizer))
    assert [line.name for line in lines] == [
        *("full", "stage 0", "speculative", "wand", "a batch of 4")
    ]
    assert [line.status for line in lines] == [OK] * 5
    assert all(line.numbers == {"replies": 4, "parted": 0, "apart": 0} for line in lines)
    assert "4 of 4" in lines[0].value and "to the last bit" in lines[0].value


def test_only_one_of_the_two_is_traced(monkeypatch):
    on: list[bool] = []
    stream = tracing.stream_generate

    def watched(*args: Any, **options: Any) -> Any:
        on.append(traces.enabled())
        return stream(*args, **options)

    monkeypatch.setattr(tracing, "stream_generate", watched)
    next(tracing.same_lines(base, tokenizer))
    assert on == [True] * 4 + [False] * 4 and traces.enabled()
    on.clear()
    monkeypatch.setattr(tracing, "_host", lambda *_: on.append(traces.enabled()) or 1.0)
    tracing.host_line(base, tokenizer)
    # A warm-up round and one that counts, in turn.
    assert on == [False, True] * 4 + [True, False] * 4


@pytest.mark.parametrize(
    ("traced", "dtype", "fused", "status", "advice"),
    [
        ([(7, 3, -0.5), (8, 3, -0.25)], mx.float32, False, OK, ""),
        ([(7, 3, -0.5), (8, 3, -0.2501)], mx.float32, False, WARNING, "tell us"),
        ([(7, 3, -0.5), (8, 3, -0.2501)], mx.float32, True, OK, ""),
        ([(7, 3, -0.5), (8, 3, -0.26)], mx.float32, True, FAILED, "MLX_POE_TRACE=0"),
        ([(7, 3, -0.5), (8, 3, math.nan)], mx.float32, True, FAILED, "MLX_POE_TRACE=0"),
        ([(7, 3, -0.5), (9, 3, -0.25)], mx.float32, True, FAILED, "MLX_POE_TRACE=0"),
        ([(7, 3, -0.5), (9, 3, -0.9)], mx.bfloat16, True, WARNING, "--dtype float32"),
        ([(7, 3, -0.5), (8, 2, -0.25)], mx.float32, True, FAILED, "MLX_POE_TRACE=0"),
        ([(7, 3, -0.5)], mx.float32, True, FAILED, "MLX_POE_TRACE=0"),
    ],
)
def test_what_traces_may_change(traced, dtype, fused, status, advice, monkeypatch):
    def reply(tokens: Any) -> list[Any]:
        names = ("token", "stage", "logprob")
        return [SimpleNamespace(**dict(zip(names, one, strict=True))) for one in tokens]

    monkeypatch.setattr(tracing.traces, "fuses", lambda: fused)
    untraced = [reply([(7, 3, -0.5), (8, 3, -0.25)])] * 2
    line = tracing.compared("full", dtype, [untraced[0], reply(traced)], untraced)
    assert line.status == status and advice in line.advice and bool(advice) == bool(line.advice)


def test_the_hosts_time_is_reported_traced_and_untraced(monkeypatch):
    spent = {True: 1.0, False: 4.0}
    monkeypatch.setattr(tracing, "_host", lambda *_: spent[traces.enabled()])
    line = tracing.host_line(base, tokenizer)
    assert line.status == OK and "full 1 of 4 ms (0.25)" in line.value
    assert line.numbers == dict.fromkeys(("full", "stage 0", "speculative", "wand"), 0.25)
    spent[True] = 5.0
    line = tracing.host_line(base, tokenizer)
    assert line.status == WARNING and "MLX_POE_TRACE=0" in line.advice
    monkeypatch.setattr(traces, "enabled", lambda: False)
    line = tracing.host_line(base, tokenizer)
    assert line.status == WARNING and "unset MLX_POE_TRACE" in line.advice


def test_the_command_prints_writes_and_says_by_its_status(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(examination, "MODELS", ("own heads",))
    monkeypatch.setattr(hardware, "measure", partial(measure, trials=1))
    monkeypatch.setattr(hardware, "TRIALS", 1)
    only(monkeypatch, "full", "speculative", "wand")
    file = tmp_path / "report.json"
    assert command.main(["--json", str(file)]) == 0
    out, err = capsys.readouterr()
    report = json.loads(file.read_text())
    assert not err and report["model"] == "poe-tiny" and report["machine"]["cores"]
    for line in report["lines"]:
        assert f"{line['status']:8} {line['name']}: {line['value']}" in out
    traced = [line["name"] for line in report["lines"] if line["section"] == "tracing"]
    assert traced[0] == "full, float32" and traced[-1] == "host time"
    sections = [line["section"] for line in report["lines"]]
    assert list(dict.fromkeys(sections)) == [
        *("machine", "recorded answers", "rows", "modes", "batch", "tracing", "costs")
    ]
    bad = Line("modes", "full", FAILED, "no", "report it", {"apart": float("inf")})
    monkeypatch.setattr(command, "examine", lambda *_: Report(MACHINE, "poe-tiny", [bad]))
    assert command.main(["--json", "-"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["lines"][0]["numbers"] == {"apart": None}
    assert "report" in err
    assert command.main([]) == 1
    assert "1 FAILED" in capsys.readouterr().out
    assert command.main(["--json", str(tmp_path)]) == 2
