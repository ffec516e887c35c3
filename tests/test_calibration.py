"""Calibration: what is measured, what is kept, what the modes make of it."""

import io
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, SOAK, fixture

from cognica_mlx.calibration_file import (
    CALIBRATION_FILE,
    Calibration,
    CalibrationWarning,
    published_bounds,
)
from cognica_mlx.config import PoEConfig
from cognica_mlx.decoding.drafters import StageDrafter
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import decode, drive
from cognica_mlx.decoding.targets import stage_target
from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.files import lineage
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs, bytes_read, with_bytes_of
from cognica_mlx.pricing.measuring import calibrate
from cognica_mlx.pricing.replaying import (
    Trace,
    best_options,
    recorded_prefix,
    replay_drafts,
    replay_wand,
)
from cognica_mlx.pricing.rounds import RoundCosts
from mlx_poe import generate, load
from mlx_poe.commands.calibrate import main as calibrate_command
from mlx_poe.loading.load import BUILT_IN
from mlx_poe.loading.specialists import Specialists

HELD_OUT = (FIXTURES / "heldout.txt").read_text().strip().split("\n\n")
# Beginnings that the calibration text does not hold.
PROMPTS = [
    *HELD_OUT,
    "The capital of France is",
    "Once upon a time",
    "The planets of the solar system are:",
    "Tom has 12 apples. Tom gives 5 to Mia.",
    "The chemical symbol of gold is",
    "7 + 8 =",
    "Count from one to ten:",
    "PROSPERO:\nMy brave spirit!",
]


@pytest.fixture(scope="module")
def measured() -> Calibration:
    model, tokenizer = fixture("poe-tiny")
    texts = [tokenizer.encode(text) for text in HELD_OUT]
    return calibrate(
        model,
        texts,
        tokenizer.token_byte_lengths(model.config.vocab_size),
        continuations=4,
        continuation_tokens=24,
    )


def test_measurements_are_what_they_are_called(measured):
    model, tokenizer = fixture("poe-tiny")
    lengths = tokenizer.token_byte_lengths(model.config.vocab_size)
    nll, hits, losses, n_bytes, count = np.zeros(5), np.zeros(3), [[], [], []], 0, 0
    for text in HELD_OUT:
        tokens = tokenizer.encode(text)
        *stages, full = (np.array(z[0]) for z in model.predictions(mx.array([tokens])))
        for row, z in enumerate([*stages, full]):
            log_probs = z - np.log(np.exp(z).sum(-1, keepdims=True))
            nll[row] -= log_probs[np.arange(len(tokens) - 1), tokens[1:]].sum()
        for k, after in enumerate([stages[1], stages[2], full]):
            for z, y in zip(stages[k], after, strict=True):
                best = z.argmax()
                lead = z[best] - np.delete(z, best).max()
                losses[k].append(lead - (y[best] - np.delete(y, best).max()))
            hits[k] += (stages[k].argmax(-1) == full.argmax(-1)).sum()
        n_bytes += len(text.encode())
        count += len(tokens)
        assert sum(lengths[t] for t in tokens[1:]) == len(text.encode())
    assert measured.bits_per_byte == pytest.approx(nll / math.log(2) / n_bytes, abs=1e-3)
    assert measured.top1_agreement == pytest.approx(hits / count, abs=1e-3)
    for k in range(3):
        expected = np.percentile(losses[k], (50, 90, 99))
        assert measured.margin_loss[k] == pytest.approx(np.maximum(expected, 0), abs=1e-2)
    assert measured.p99_bounds == pytest.approx([row[2] for row in measured.margin_loss])
    assert measured.text["bytes"] == n_bytes and measured.text["tokens"] == count


def test_acceptance_is_what_speculation_does(measured):
    """The replay of a recorded text makes the very drafts that decoding makes."""
    model, tokenizer = fixture("poe-tiny")
    prompt, length = tokenizer.encode("Once upon a time"), 40
    full = [d.token for d in decode(model, prompt, make_mode(model), max_tokens=length)]
    text = prompt + full
    stages = model.forward_all_stages(mx.array([text]))[:3]
    best = np.stack([np.array(z[0].argmax(-1)) for z in stages])[:, len(prompt) - 1 : -1]
    hits = best == np.array(full)
    for stage, count in [(0, 3), (2, 2), (1, 8)]:
        options = ModeOptions(draft_stage=stage, num_draft_tokens=count)
        mode = make_mode(model, "speculative", options)
        sequence = DecodingSequence(model, prompt, mode, max_tokens=length)
        decoded = list(drive(sequence.steps()))
        rounds = RoundCosts(bytes_read(model), mode.drafters)
        replay = replay_drafts([hits[stage]], rounds, count)
        # They may part in the last round, which decoding cuts short.
        assert abs(sum(d.from_draft for d in decoded) - replay.kept) <= count
        assert abs(sequence.drafted - replay.drafted) <= count


@SOAK
@pytest.mark.parametrize("mode", ["wand", "speculative"])
def test_shipped_calibration_keeps_99_percent_agreement_at_well_below_full_depth(mode):
    """Run it with `-m soak -n 0 -s` for the figures that the README gives."""
    model, tokenizer = fixture("poe-tiny")
    assert model.calibration is not None
    agreeing = total = depth = 0
    chosen = make_mode(model, mode, calibration=model.calibration)
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt)
        decoded = list(decode(model, tokens, chosen, max_tokens=64))
        made = [d.token for d in decoded]
        full = model(mx.array([tokens + made[:-1]]))[0, len(tokens) - 1 :].argmax(-1)
        agreeing += sum(int(a == b) for a, b in zip(full.tolist(), made, strict=True))
        total += len(made)
        depth += sum(d.stage + 1 for d in decoded)
    print(
        f"\n{mode}: {agreeing / total:.1%} of {total} tokens agree, mean depth {depth / total:.2f}"
    )
    assert agreeing / total >= (1 if mode == "speculative" else 0.99)
    assert depth / total < 0.7 * model.poe_n_stages


@pytest.mark.parametrize("count", [2, pytest.param(None, marks=SOAK)])
@pytest.mark.parametrize("name", ["chat", "math", "tool"])
@pytest.mark.parametrize("mode", ["wand", "speculative"])
def test_shipped_specialists_answer_the_same_in_every_mode(name, mode, count):
    model, _ = fixture(f"poe-tiny-{name}")
    assert model.calibration is not None
    known = json.loads((FIXTURES / "poe-tiny-goldens.json").read_text())[name]
    assert known
    chosen = make_mode(model, mode, calibration=model.calibration)
    for one in known[:count]:
        made = decode(model, one["prompt"], chosen, max_tokens=len(one["full"]))
        assert [d.token for d in made] == one["full"]


def test_replayed_costs_add_up():
    """Ten tokens, one of them wrong at stage 0 and weak; costs of 1 a stage and 10 a head."""
    hits = np.ones((3, 10), dtype=bool)
    hits[0, 4] = False
    margins = np.full((3, 10), 5.0)
    margins[0, 4] = 0.1
    trace = Trace(hits, margins, hits)
    costs = Costs((1,), ((1,),) * 4, ((10,),) * 4, full_boundaries=(3,))
    assert costs.full_token == 14
    wand = replay_wand([trace], costs, [4.0, 2.0, 1.0], (0,), pools_stages=False)
    assert (wand.tokens, wand.agreeing) == (10, 10)
    assert wand.cost == 10 * (1 + 10) + 1 * (3 + 10)
    wand = replay_wand([trace], costs, [6.0, 2.0, 1.0], (0, 1), pools_stages=False)
    assert wand.cost == 10 * (1 + 10) + 10 * (1 + 10)
    # Rounds of two drafts emit 3 tokens, 2 (the draft at 4 is rejected), 3 and 3.
    drafter = StageDrafter(stage_target(fixture("poe-tiny")[0], 0))
    rounds = replay_drafts([hits[0]], RoundCosts(costs, [drafter]), 2)
    assert (rounds.tokens, rounds.kept, rounds.drafted) == (11, 7, 8)
    # A round costs its drafts (11 each), stage 0 for the last of them (1), then three stages and
    # the head (13).
    assert rounds.cost == 8 * 11 + 4 * (1 + 13)


@pytest.mark.parametrize("right", [True, False])
def test_a_copy_is_advised_by_its_own_drafts(right):
    """Stage 0's own drafts are right on every second token."""
    model, _ = fixture("poe-tiny")
    hits = np.tile(np.arange(24) % 2 == 0, (3, 1))
    trace = Trace(hits, np.zeros((3, 24)), hits, np.full(24, right))
    costs = with_bytes_of(bytes_read(model), recorded_prefix(model))
    options, replay = best_options(model, [trace], costs, [1.0, 1.0, 1.0])["speculative"]
    assert options.get("draft_bits") == (4 if right else None)
    assert replay.agreeing == replay.tokens >= 24


def test_costs_are_the_bytes_of_the_real_shapes():
    shape = {
        "n_layer": 24,
        "n_head": 12,
        "n_embd": 1536,
        "vocab_size": 32768,
        "sequence_len": 2048,
        "poe_every": 6,
    }
    costs = bytes_read(PoEModel(PoEConfig.from_dict(shape)))
    # MODEL: 56.6 MB a layer and 100.7 MB for the head in bfloat16; built weights are float32.
    assert costs.lower(3) / 2 == pytest.approx(24 * 56.6e6, rel=1e-3)
    assert costs.full_head() / 2 == pytest.approx(100.7e6, rel=1e-3)
    ratio = costs.full_token / (costs.lower(0) + costs.head(0))
    assert ratio == pytest.approx(3.31, abs=0.01)


def test_file_survives_a_round_trip(measured, tmp_path):
    path = tmp_path / CALIBRATION_FILE
    measured.save(path)
    model, _ = fixture("poe-tiny")
    assert json.loads(path.read_text()) == json.loads(json.dumps(measured.__dict__))
    again = Calibration.load(path, model.config)
    assert again.p99_bounds == measured.p99_bounds and again.options["wand"]
    assert [p.name for p in tmp_path.iterdir()] == [CALIBRATION_FILE]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"p99_bounds": 3}', "\x00"])
def test_damaged_file_is_named(content, tmp_path):
    path = tmp_path / CALIBRATION_FILE
    path.write_text(content)
    with pytest.raises(CheckpointError, match=CALIBRATION_FILE):
        Calibration.load(path, fixture("poe-tiny")[0].config)


def test_file_of_another_model_is_refused(measured, tmp_path):
    path = tmp_path / CALIBRATION_FILE
    replace(measured, stage_layers=(4, 4)).save(path)
    with pytest.raises(CheckpointError, match="but this model has"):
        Calibration.load(path, fixture("poe-tiny")[0].config)


def test_a_calibration_of_another_model_with_the_same_stages_is_not_used(measured, tmp_path):
    folder = Path(shutil.copytree(BUILT_IN / "poe-tiny", tmp_path / "tiny"))
    for made_for, fits in ((fixture("poe-tiny")[0], True), (retrained(), False)):
        of = lineage.record(lineage.of_model(made_for))
        replace(measured, weights=of).save(folder / CALIBRATION_FILE)
        for options in ({}, {"dtype": "bfloat16"}, {"quantize": 4}):
            model = load(folder, **options)[0]
            assert (model.calibration is not None) == fits
            assert fits or "made for another model: its h.0.attn.c_q" in model.calibration_problem
    assert measured.weights == lineage.record(lineage.of_model(fixture("poe-tiny")[0]))


def retrained():
    model = load("poe-tiny", dtype="float32")[0]
    model.h[0].attn.c_q.weight = -model.h[0].attn.c_q.weight
    return model


NESTED = "[" * 100_000
SHIPPED = json.loads((BUILT_IN / "poe-tiny" / CALIBRATION_FILE).read_text())


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("stage_layers", None, "stage_layers: null is not a list"),
        ("stage_layers", [True, 2, 2, 2], "stage_layers: true is not a whole number"),
        ("p99_bounds", None, "p99_bounds: null is not a list"),
        ("p99_bounds", [None, 1, 1], "p99_bounds: null is not a number"),
        ("p99_bounds", ["1", 1, 1], 'p99_bounds: "1" is not a number'),
        ("p99_bounds", [-1, 1, 1], "p99_bounds: -1 is not between"),
        ("p99_bounds", [float("nan"), 1, 1], "p99_bounds: NaN is not between"),
        ("p99_bounds", [10**400, 1, 1], "p99_bounds: 1000"),
        ("p99_bounds", [1, 1], "p99_bounds has 2 entries, not 3"),
        ("margin_loss", [[1, 1]] * 3, "margin_loss has 2 entries, not 3"),
        ("top1_agreement", [0.5, 0.5, 1.5], "top1_agreement: 1.5 is not between 0 and 1"),
        ("bits_per_byte", [1] * 4, "bits_per_byte has 4 entries, not 5"),
        ("acceptance", {"7": [0.5]}, 'acceptance: "7" is not one of 0, 1, 2'),
        ("acceptance", {"0": 0.5}, "acceptance: 0.5 is not a list"),
        ("options", [], "options: [] is not an object"),
        ("options", {"deep": {}}, 'options: "deep" is not one of wand'),
        ("options", {"wand": None}, "options: null is not an object"),
        ("options", {"wand": {"depth": 1}}, 'options of wand: "depth" is not one of safety'),
        ("options", {"wand": {"safety": "high"}}, 'safety in the options of wand: "high"'),
        ("options", {"wand": {"exit_stages": 0}}, "exit_stages in the options of wand: 0"),
        ("options", {"wand": {"exit_stages": [4]}}, "4 is not between 0 and 3"),
        ("options", {"speculative": {"draft_stage": 9}}, "9 is not between 0 and 3"),
        ("options", {"speculative": {"draft_head": 1}}, "1 is not one of summed, base"),
        ("options", {"speculative": {"num_draft_tokens": 1.5}}, "1.5 is not a whole number"),
        ("options", {"speculative": {"draft_vocab": 9}}, "draft_vocab"),
        ("options", {"speculative": {"num_draft_tokens": 0}}, "0 is not between 1 and 64"),
        ("speedups", {"wand": []}, "speedups: [] is not a number"),
        ("recommended", ["wand"], 'recommended: ["wand"] is not one of full'),
        ("text", "long", 'text: "long" is not an object'),
        ("weights", {"smear_lambda": "?"}, "weights is damaged"),
    ],
)
def test_every_entry_of_the_file_is_checked(field, value, named, tmp_path):
    path = tmp_path / CALIBRATION_FILE
    config = fixture("poe-tiny")[0].config
    path.write_text(json.dumps(SHIPPED))
    assert Calibration.load(path, config).p99_bounds == tuple(SHIPPED["p99_bounds"])
    path.write_text(json.dumps({**SHIPPED, field: value}))
    with pytest.raises(CheckpointError, match=re.escape(named)):
        Calibration.load(path, config)


@pytest.mark.parametrize("content", ["{}", NESTED, '{"p99_bounds": [null]}', b"\xff\x00"])
def test_a_model_runs_without_its_calibration_where_that_is_unusable(content, tmp_path):
    folder = Path(shutil.copytree(BUILT_IN / "poe-tiny", tmp_path / "tiny"))
    write = folder / CALIBRATION_FILE
    write.write_bytes(content) if isinstance(content, bytes) else write.write_text(content)
    model, tokenizer = load(folder, dtype="float32")
    assert model.calibration is None and CALIBRATION_FILE in model.calibration_problem
    expected = generate(*fixture("poe-tiny"), "Once upon", max_tokens=4)
    for options in ({}, {"mode": "speculative"}, {"mode": "wand", "p99_bounds": [9.0] * 3}):
        with pytest.warns(CalibrationWarning, match="is not a usable calibration"):
            assert generate(model, tokenizer, "Once upon", max_tokens=4, **options) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RequestError, match="is not a usable calibration"):
            generate(model, tokenizer, "Once upon", max_tokens=4, mode="wand")


def test_what_an_old_file_says_of_deleted_modes_and_options_is_ignored_with_one_note(tmp_path):
    """Version 0.2 wrote such files for the built-in models."""
    path, config = tmp_path / CALIBRATION_FILE, fixture("poe-tiny")[0].config
    drafts = {"draft_stage": 1, "num_draft_tokens": 2}
    old = {
        **SHIPPED,
        "options": {
            "wand": {"safety": 0.5},
            "speculative": {**drafts, "draft_margin": 0.386, "draft_rank": 32},
            "certified": {**drafts, "safety": 0.5, "draft_margin": 0.386},
        },
        "speedups": {"wand": 1.4, "speculative": 1.6, "certified": 1.759},
        "recommended": "certified",
    }
    path.write_text(json.dumps(old))
    with pytest.warns(CalibrationWarning) as notes:
        found = Calibration.load(path, config)
    (note,) = [str(one.message) for one in notes]
    assert all(name in note for name in (str(path), "certified", "draft_margin", "draft_rank"))
    assert found.options == {"wand": {"safety": 0.5}, "speculative": drafts}
    assert found.speedups == {"wand": 1.4, "speculative": 1.6}
    assert found.recommended == "speculative"
    path.write_text(json.dumps({**SHIPPED, "recommended": "wand"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Calibration.load(path, config).recommended == "wand"
    # Whatever else such a file holds is still checked.
    path.write_text(json.dumps({**old, "speedups": []}))
    with pytest.warns(CalibrationWarning), pytest.raises(CheckpointError, match="speedups"):
        Calibration.load(path, config)


def test_a_specialist_attaches_without_its_calibration(tmp_path):
    for name in ("poe-tiny", "poe-tiny-chat"):
        shutil.copytree(BUILT_IN / name, tmp_path / name)
    (tmp_path / "poe-tiny-chat" / CALIBRATION_FILE).write_text("{}")
    model = Specialists(fixture("poe-tiny")[0]).attach("chat", tmp_path / "poe-tiny-chat")
    assert model.calibration is None and "p99" not in model.calibration_problem
    assert "stage_layers is missing" in model.calibration_problem


def test_commands_show_an_unusable_calibration_in_one_line(tmp_path):
    folder = Path(shutil.copytree(BUILT_IN / "poe-tiny", tmp_path / "tiny"))
    (folder / CALIBRATION_FILE).write_text(json.dumps({**SHIPPED, "p99_bounds": None}))
    flags = ["--model", str(folder), "--dtype", "float32", "--prompt", "Once", "-m", "3"]
    for mode, status, kind in (("full", 0, "warning"), ("wand", 2, "error")):
        done = command(*flags, "--mode", mode, verb="generate")
        assert done.returncode == status and bool(done.stdout) == (status == 0)
        assert done.stderr.startswith(f"mlx_poe.generate: {kind}: {folder}")
        assert "p99_bounds: null is not a list" in done.stderr and done.stderr.count("\n") == 1


def test_measurements_that_are_not_numbers_are_not_saved(measured, tmp_path):
    broken = replace(measured, bits_per_byte=(float("nan"),) * 5)
    with pytest.raises(RequestError, match="not finite"):
        broken.save(tmp_path / CALIBRATION_FILE)
    assert not list(tmp_path.iterdir())


def test_calibration_steers_only_what_was_not_said():
    model, _ = load(dtype="float32")
    file = model.calibration
    assert file is not None
    mode = make_mode(model, "speculative", calibration=file)
    assert mode.num_draft_tokens == file.options["speculative"]["num_draft_tokens"]
    mode = make_mode(model, "speculative", ModeOptions(num_draft_tokens=7), file)
    assert (mode.num_draft_tokens, mode.prefix) == (7, None)
    mode = make_mode(model, "wand", ModeOptions(safety=2.0), file)
    assert mode.exits[0] == pytest.approx(2 * sum(file.p99_bounds))
    mode = make_mode(model, "wand", ModeOptions(p99_bounds=[1.0] * 3), file)
    assert mode.exits == {0: 3.0, 1: 2.0, 2: 1.0}


def test_published_bounds_serve_the_one_model_they_were_measured_on():
    base = PoEConfig(24, 12, 1536, 32768, 2048, stage_layers=(6, 6, 6, 6))
    assert published_bounds(base) == (7.09, 3.03, 2.15)
    assert published_bounds(replace(base, stage_layers=(12, 12))) is None
    assert published_bounds(replace(base, n_layer=28, specialist_layers=(4,))) is None
    assert published_bounds(fixture("poe-tiny")[0].config) is None


def test_too_short_a_text_is_refused():
    model, _ = fixture("poe-tiny")
    with pytest.raises(RequestError, match="has 20 tokens"):
        calibrate(model, [[1] * 20], [1] * 2048)


def test_pooling_model_calibrates_on_its_running_pool():
    model, _ = fixture("gqa-logop-d8")
    texts = [list(range(1, 120))]
    found = calibrate(model, texts, [1] * 320, continuations=2, continuation_tokens=8)
    stages = [np.array(z[0]) for z in model.forward_all_stages(mx.array(texts))]
    pools = [np.array(model.pool([mx.array(s) for s in stages[: k + 1]])) for k in range(4)]
    losses = []
    for before, after in zip(pools[2], pools[3], strict=True):
        best = before.argmax()
        losses.append(
            before[best]
            - np.delete(before, best).max()
            - (after[best] - np.delete(after, best).max())
        )
    assert found.p99_bounds[2] == pytest.approx(np.percentile(losses, 99), abs=1e-3)
    assert "exit_stages" in found.options["wand"] and len(found.bits_per_byte) == 5


def command(
    *argv: str, stdin: str | None = None, verb: str = "calibrate"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlx_poe", verb, *argv],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def command_here(monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`command` without a process of its own."""

    def run_main(*argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((stdin or "").encode())))
        status = calibrate_command(argv)
        out, error = capsys.readouterr()
        return subprocess.CompletedProcess(argv, status, out, error)

    return run_main


def test_command_measures_a_text_and_writes_beside_the_model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "flat-d8", folder)
    done = command(
        "--model", str(folder), "--data", str(FIXTURES / "heldout.txt"), "--num-tokens", "300",
        "--continuations", "2", "--json",
    )  # fmt: skip
    assert done.returncode == 0 and "written to" in done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((folder / CALIBRATION_FILE).read_text())
    assert printed["text"]["tokens"] <= 300
    model, _ = load(folder, dtype="float32")
    assert model.calibration is not None and len(model.calibration.p99_bounds) == 3
    make_mode(model, "wand", calibration=model.calibration)


def test_command_reads_chats_and_prints_tables(command_here, tmp_path):
    data = tmp_path / "chats.jsonl"
    lines = (FIXTURES / "poe-tiny-chat-calibration.jsonl").read_text().splitlines()
    data.write_text("\n".join([*lines[:8], "", '{"text": "The capital of Peru is Lima."}']))
    out = tmp_path / "out.json"
    done = command_here(
        "--model", "poe-tiny-chat", "--data", str(data), "--continuations", "1",
        "--output", str(out),
    )  # fmt: skip
    assert done.returncode == 0 and out.is_file()
    for title in ("Stages, on the text", "Acceptance of drafts", "recommended: --mode"):
        assert title in done.stdout


@pytest.mark.parametrize(
    ("argv", "stdin", "status", "message"),
    [
        (["--data", "nowhere.txt"], None, 2, "nowhere.txt"),
        (["--data", "-"], "too short", 2, "at least 100"),
        (["--data", "-"], "", 2, "stdin contains no text"),
        (["--data", "~nosuchuser/x"], None, 2, "no such home folder"),
        (["--data", "-", "--num-tokens", "0"], "x", 2, "--num-tokens"),
        (["--data", "-", "--output", "-"], "x", 2, "- is stdout, which this flag does not"),
        (["--data", "-", "--output", "no/such/folder/x.json"], "x", 2, "no/such/folder"),
        ([], None, 2, "--data"),
    ],
)
def test_command_names_what_is_wrong(command_here, argv, stdin, status, message):
    done = command_here(*argv, stdin=stdin)
    assert done.returncode == status and message in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


def test_json_goes_to_stdout_whatever_the_output_is(command_here, tmp_path):
    link, kept = tmp_path / "link.json", tmp_path / "kept.json"
    kept.write_text("old")
    link.symlink_to(kept.name)
    flags = ["--data", str(FIXTURES / "heldout.txt"), "--num-tokens", "200", "--json"]
    flags += ["--continuations", "1"]
    for output in (os.devnull, str(link)):
        done = command_here(*flags, "--output", output)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["text"]["tokens"] <= 200
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)
    assert link.is_symlink() and json.loads(kept.read_text()) == json.loads(done.stdout)
    done = command_here(*flags, "--output", str(tmp_path))
    assert done.returncode == 2 and "is a folder" in done.stderr


@pytest.mark.parametrize(
    "line", ['{"words": "?"}', '{"messages": 5}', '{"messages": ["x"]}', "no", "[" * 100_000]
)
def test_command_names_the_line_that_is_no_entry(command_here, line, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "one\u2028line"}\n' + line + "\n")
    done = command_here("--data", str(data))
    assert done.returncode == 2 and "bad.jsonl, line 2" in done.stderr
