"""The benchmark: its figures, the synthetic model, its files and its command."""

import csv
import io
import json
import os
import re
import shutil
import stat
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_base
from conftest import FIXTURES, SOAK
from mlx.utils import tree_flatten
from rich.console import Console

from cognica_mlx.bench import timing
from cognica_mlx.bench.machine_card import Machine, this_machine
from cognica_mlx.bench.report import Report, compare, read
from cognica_mlx.bench.sections import several_machines
from cognica_mlx.bench.sections import stage_speeds as figures
from cognica_mlx.bench.sections.batch_speeds import batches
from cognica_mlx.bench.sections.mode_speeds import Recording, modes
from cognica_mlx.bench.sections.several_machines import Machines, specialist_over
from cognica_mlx.bench.sections.stage_speeds import Figure, Setup, read_per_token
from cognica_mlx.bench.sections.stage_training import training
from cognica_mlx.bench.shapes import SHAPES, random_model, rounded, shape_config
from cognica_mlx.bench.synthetic import synthetic_model
from cognica_mlx.bench.timing import Samples, first_and_next, interleaved
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.scripted import RIGHT, Script, Scripted
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import Single, drive
from cognica_mlx.errors import RequestError
from cognica_mlx.machines.placement import Part
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs, bytes_read
from cognica_mlx.pricing.measuring import calibrate
from cognica_mlx.pricing.replaying import Trace, replay_drafts
from cognica_mlx.pricing.rounds import RoundCosts
from mlx_poe.commands import bench as command
from mlx_poe.commands import bench_texts

MACHINE = Machine("a chip", 2, 8.0, "MLX CPU", "an OS", "3.12", {"mlx": "1"}, 1e10)
CHEAP = Costs((1,), ((1.0,),) * 4, ((0.1,),) * 4, full_boundaries=(3,))
measured_machine, measured_blas = cache(this_machine), cache(command.slow_blas)
whole_recording = bench_texts.recording
MARGINS = [0.05, 0.1, 0.2, 0.4, 0.8, 2.0, 4.0, 5.0, 6.0, 8.0, 9.0]


@cache
def recorded() -> Recording:
    """Of four texts: enough margins to draw from, and drafts to follow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_texts, "BEGINNINGS", bench_texts.BEGINNINGS[:4])
        return whole_recording()


@pytest.fixture(autouse=True)
def measured_once(monkeypatch) -> None:
    """What takes seconds and is the same for all tests: the machine, and poe-tiny's own text."""
    monkeypatch.setattr(command, "this_machine", measured_machine)
    monkeypatch.setattr(command, "slow_blas", measured_blas)
    monkeypatch.setattr(command, "recording", recorded)
    monkeypatch.setattr(bench_texts, "recording", recorded)


@pytest.mark.parametrize(
    ("shape", "parameters"), [("1.3b", 1_384_122_122), ("1.5b", 1_507_591_082)]
)
def test_shapes_are_the_released_ones(shape, parameters):
    model = PoEModel(shape_config(shape))
    assert sum(p.size for _, p in tree_flatten(model.parameters())) == parameters


def test_a_specialists_shape_adds_what_a_released_one_does():
    sizes = [
        sum(p.size for _, p in tree_flatten(PoEModel(shape_config(shape)).parameters()))
        for shape in ("1.3b", "1.3b-stage")
    ]
    head = 32768 * 1536
    # The released delta brings an embedding table too, and the lambdas of all layers.
    assert sizes[1] - sizes[0] == 213_909_560 - head - 2 * 28 + 2 * 4


def test_trials_take_turns_and_the_first_is_dropped():
    seen = []

    def case(name):
        def run():
            seen.append(name)
            return len(seen)

        return run

    rounds = []
    taken = interleaved({n: case(n) for n in "abc"}, 2, before_round=lambda: rounds.append(1))
    assert seen == [*"cba", *"abc", *"cba"] and len(rounds) == 3
    assert taken["a"].values == (4, 9) and taken["c"].values == (6, 7)
    assert taken["a"].over(taken["c"]) == pytest.approx((4 / 6 + 9 / 7) / 2)
    assert Samples((1.0, 2.0, 9.0)).median == 2


def test_a_token_reads_weights_and_what_the_windows_hold():
    model = PoEModel(shape_config("1.3b"))
    costs = bytes_read(model)
    full = read_per_token(model, 3, 100, full=True)
    assert full == costs.full_token + 24 * 100 * 2 * 12 * 128 * 4
    assert read_per_token(model, 3, 10**6, full=True) == read_per_token(model, 3, 5000, full=True)
    kept = (513 * 18 + 2049 * 6) * 2 * 12 * 128 * 4
    assert read_per_token(model, 3, 5000, full=True) == costs.full_token + kept


@pytest.mark.parametrize(
    ("agreement", "shape"), [(0.75, "tiny"), pytest.param(0.9, "logop", marks=SOAK)]
)
def test_a_synthetic_model_agrees_about_as_often_as_asked(agreement, shape):
    config = replace(shape_config("tiny"), vocab_size=1024)
    if shape == "logop":
        config = replace(config, per_stage_head=True)
    built = synthetic_model(config, mx.float32, agreement, MARGINS)
    assert built.agreement == pytest.approx(agreement, abs=0.03)
    tokens = mx.array([built.text(300, start=700)])
    best = [z.argmax(-1) for z in built.model.forward_all_stages(tokens)]
    full = built.model(tokens).argmax(-1)
    shares = [mx.mean(one == full).item() for one in best]
    assert shares[0] == pytest.approx(agreement, abs=0.09)
    assert shares[0] < shares[2]
    # Stage 0 writes the planted text, most of it among the first half of the ids.
    planted = np.array(built.text(301, start=700)[1:])
    assert np.mean(np.array(best[0][0]) == planted) > 0.8
    assert len(set(planted)) == 300 and 0.75 < np.mean(planted < 512) < 0.9


@SOAK
def test_the_synthetic_model_can_be_calibrated_and_its_modes_measured():
    built = synthetic_model(shape_config("tiny"), mx.float32, 0.88, MARGINS)
    texts = [built.text(150, start) for start in (0, 300)]
    calibration = calibrate(built.model, texts, [1] * 2048, continuations=2, continuation_tokens=24)
    setup = Setup(built.model, MACHINE, [built.text(24, 600)], tokens=24, trials=1)
    found = {figure.name: figure for figure in modes(setup, calibration)}
    assert found["full"].speedup == 1 and found["full"].notes["mean_depth"] == 4
    assert found["stage 0"].notes["mean_depth"] == 1
    for name in ("full", "speculative, 3 drafts", "speculative, as calibrated"):
        assert found[name].notes["agreement"] == 1
    assert found["wand"].notes["agreement"] > 0.9
    assert 0.3 < found["speculative, 3 drafts"].notes["acceptance"] < 1
    for name in ("wand", "speculative, 3 drafts"):
        assert found[name].predicted > 0 and "over_its_parts" in found[name].notes
    drafts = {name for name in found if "speculative" in name}
    plain = {figure.name for figure in modes(setup, None)}
    assert drafts - plain == {"speculative, as calibrated"}
    assert plain - drafts == {"full", "stage 0", "prefix of 2", "compose all"}


def test_recorded_drafts_are_kept_as_recorded():
    """Along a recording of 24 tokens, of which stage 0 has the 10th and 20th wrong."""
    hits = np.ones((3, 24), dtype=bool)
    hits[:, [9, 19]] = False
    trace = Trace(hits, np.full((3, 24), 5.0), hits)
    model = random_model(shape_config("tiny"), mx.float32)
    text = list(range(20, 36))
    for count in (3, 8):
        mode = make_mode(model, "speculative", ModeOptions(num_draft_tokens=count))
        sequence = DecodingSequence(model, text, mode, max_tokens=24)
        script = Script(hits, len(text))
        made = list(drive(sequence.steps(), Scripted(Single(), script)))
        assert {one.token for one in made} == {RIGHT}
        replay = replay_drafts([hits[0]], RoundCosts(CHEAP, mode.drafters), count)
        assert sequence.drafted == pytest.approx(replay.drafted, abs=3)
        assert sum(one.from_draft for one in made) == pytest.approx(replay.kept, abs=3)
    setup = Setup(model, MACHINE, [text], tokens=12, trials=1)
    found = modes(setup, None, Recording([trace], [0.5, 0.5, 0.5]))
    names = [figure.name for figure in found]
    assert "speculative, decided as recorded from poe-tiny" in names
    assert found[-1].notes["agreement"] >= 0.9


@pytest.mark.parametrize("agreement", [0.2, 1.0])
def test_an_agreement_that_makes_no_sense_is_refused(agreement):
    with pytest.raises(RequestError, match="agreement"):
        synthetic_model(shape_config("tiny"), mx.float32, agreement, MARGINS)


def test_sections_measure_what_they_say():
    model = random_model(shape_config("tiny"), mx.float32)
    setup = Setup(model, MACHINE, [list(range(20, 52))], tokens=3, trials=1)
    cuts = figures.stages(setup)
    assert [f.name for f in cuts] == [
        *(f"stage {k} (paper: Stage {k + 1})" for k in range(3)),
        "full stack",
    ]
    assert cuts[-1].speedup == 1 and cuts[0].limit < cuts[-1].limit
    assert cuts[0].limit == pytest.approx(1e3 * read_per_token(model, 0, 32, full=False) / 1e10)
    long = figures.lengths(setup, [16, 1500])
    states = [f.notes["state_mb"] for f in long]
    assert [f.name.split(" at ")[1] for f in long] == ["16 tokens"] * 2 + ["1500 tokens"] * 2
    assert states[0] < states[2] and [f.speedup for f in long[:2]] == [1, 1]
    many_rows = figures.rows(setup)
    assert [f.notes["times_one_row"] for f in many_rows if f.notes["rows"] == 1] == [1] * 4
    read_in = figures.prompts(setup, 64)
    assert [f.unit for f in read_in] == ["tokens/s", "ms"] * 2
    assert read_in[2].value * read_in[3].value == pytest.approx(64e3)
    held = figures.memory(setup, 600)
    assert held[0].value == pytest.approx(model_bytes(model) / 1e9)
    assert held[2].value >= held[0].value
    by_bits = figures.quantised(setup, [4])
    assert by_bits[2].notes["read_mb"] < by_bits[0].notes["read_mb"] / 5
    assert by_bits[0].speedup == 1


def test_many_sequences_are_measured_beside_one():
    model = random_model(shape_config("tiny"), mx.float32)
    setup = Setup(model, MACHINE, [list(range(20, 52))], tokens=3, trials=1)
    found = {f.name: f for f in batches(setup, None)}
    one, eight = found["1 sequence, full depth"], found["8 sequences, full depth"]
    assert one.speedup == one.predicted == 1 and eight.predicted > 0
    assert eight.speedup == pytest.approx(eight.value / one.value)
    assert found["8 sequences in full, speculative, stage"].notes["fell_back"]
    (chunks,) = (f.value for f in found.values() if f.unit == "chunks")
    assert 1 <= chunks <= 2
    assert found["held for 8 sequences"].notes["of_states"] < 1.5


def test_an_iteration_of_training_is_measured_with_and_without_its_update():
    config, _ = specialist_over(shape_config("tiny"))
    model = random_model(config, mx.float32)
    found = {f.name: f for f in training(Setup(model, MACHINE, [[5]], tokens=3, trials=1))}
    plain, whole = (
        found[f"{label} running the base"]
        for label in ("an iteration", "the same with its share of an update,")
    )
    share = found["an update"].value * 8 * 64 / 65536
    assert whole.value == pytest.approx(plain.value + share) and plain.speedup == 1
    stored = found["an iteration with a store"]
    assert stored.speedup == pytest.approx(plain.value / stored.value)


def test_a_pipelines_ceiling_follows_from_the_slowest_rank(monkeypatch):
    model = random_model(shape_config("tiny"), mx.float32)
    monkeypatch.setattr(several_machines, "step_size_for", lambda _: 16)
    monkeypatch.setattr(several_machines, "_stage_seconds", lambda *_: [1.0, 2.0, 3.0, 4.0])
    text = list(range(20, 60))
    one, many = Machines(model, model, (0, 0, 1, 1), text, tokens=3, trials=1).prompts()
    # Three chunks: the second rank works for 7 s, the first adds a third of its 3 s.
    assert many.predicted == pytest.approx(10 / 8)
    assert one.value == 10 and many.speedup == pytest.approx(10 / many.value)
    assert many.name == "prompt of 40 tokens, a pipeline of 2 machines"


def model_bytes(model: PoEModel) -> int:
    return sum(p.nbytes for _, p in tree_flatten(model.parameters()))


def test_a_part_of_a_random_model_has_the_wholes_weights():
    config = shape_config("tiny")
    whole = dict(tree_flatten(random_model(config, mx.float32, seed=3).parameters()))
    part = Part(frozenset([2, 3]), False, False, specialist_heads=frozenset())
    found = dict(tree_flatten(random_model(config, mx.float32, 3, part).parameters()))
    assert {name.split(".")[1] for name in found if name.startswith("h.")} == {"2", "3"}
    assert "wte.weight" not in found and "lm_head.weight" not in found
    assert all(mx.array_equal(array, whole[name]) for name, array in found.items())


def test_seconds_are_told_apart_from_the_first_on(monkeypatch):
    times = iter([10.0, 13.0, 14.0, 16.0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert first_and_next("abc") == (3, 1.5)


def test_rounding_is_that_of_the_loader():
    model = random_model(shape_config("tiny"), mx.float32)
    tokens = mx.array([[5, 6, 7]])
    difference = mx.abs(rounded(model, 8)(tokens) - model(tokens)).max().item()
    assert 0 < difference < 0.2


def test_this_machine_has_a_name_and_a_bandwidth():
    machine = measured_machine()
    assert machine.bandwidth > 1e8 and machine.cores >= 1
    assert "GB/s" in machine.line() and "mlx" in machine.line()


def report(value: float = 2.0, processor: str = "a chip") -> Report:
    found = [
        Figure("stages", "full stack", "ms/token", value, value, value, 1.0, 1.0),
        Figure("prompt", "full stack, 512 tokens", "tokens/s", 10 * value, 1, 2, notes={"x": 1.5}),
    ]
    machine = replace(MACHINE, processor=processor)
    return Report("a model", "float32", "mlx_poe.bench", "2026-01-01", machine, found)


def test_a_report_survives_its_file_and_compares():
    old = read(report(4.0).to_json(), "old.json")
    console = Console(file=io.StringIO(), width=200)
    compare(report(2.0), old, console)
    text = console.file.getvalue()
    # Half the latency is twice as good, half the tokens a second half as good.
    assert re.search(r"full stack .*2\.00x", text) and re.search(r"512 tokens .*0\.50x", text)
    assert "another machine" not in text
    compare(report(2.0, "another chip"), old, console)
    assert "another machine, a chip" in console.file.getvalue()
    table = list(csv.reader(io.StringIO(report().to_csv())))
    assert table[0][:3] == ["section", "name", "unit"] and table[0][-1] == "x"
    assert table[2][-1] == "1.5" and len(table) == 3


def kept(**changes: object) -> str:
    """A result file whose first figure has other fields."""
    fields = json.loads(report().to_json())
    fields["figures"][0] |= changes
    return json.dumps(fields)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"format": 9}', '{"format": 1, "figures": [{}]}', "[" * 100_000),
        *(kept(name=[]), kept(value="2"), kept(value=10**400), kept(speedup="fast")),
        *(kept(unit=None), json.dumps({**json.loads(kept()), "date": 5})),
    ],
)
def test_what_is_no_result_file_is_named(content):
    with pytest.raises(RequestError, match="is not a result file"):
        read(content, "old.json")


@pytest.fixture
def quick() -> list[str]:
    return ["--dtype", "float32", "--trials", "1", "-m", "3", "--context", "20"]


def test_the_bounds_of_other_ways_to_draft_are_bytes(capsys):
    """Matrices alone: a stage of the tiny shape has two blocks of 12 D^2, the head has V D."""
    shape = ["--only", "drafts", "--shape", "tiny"]
    assert command.main([*shape, "--agreement", "0.8"]) == 0
    out, stage, head = capsys.readouterr().out, 2 * 12 * 128**2, 2048 * 128
    full = 4 * stage + head
    free = max(sum(0.8**i for i in range(n + 1)) * full / (n * stage + full) for n in range(1, 9))
    for name, expected in (("never verified", full / (stage + head)), ("free head", free)):
        (row,) = [line for line in out.splitlines() if name in line]
        assert float(re.search(r"([0-9.]+)x", row)[1]) == pytest.approx(expected, rel=0.03)


def test_the_command_end_to_end(quick, tmp_path, capsys):
    paths = [tmp_path / name for name in ("r.json", "r.csv", "r.png")]
    flags = [*quick, "--only", "stages,modes", "--peers"]
    outputs = ["--json", str(paths[0]), "--csv", str(paths[1]), "--plot", str(paths[2])]
    assert command.main([*flags, *outputs]) == 0
    out = capsys.readouterr().out
    for part in ("poe-tiny, float32", "GB/s", "stage 0 (paper: Stage 1)", "wand", "mlx-lm"):
        assert part in out
    kept = json.loads(paths[0].read_text())
    assert kept["command"].startswith("mlx_poe.bench --dtype float32")
    assert {f["section"] for f in kept["figures"]} == {"stages", "modes", "peers"}
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert command.main([*quick, "--only", "stages", "--compare", str(paths[0])]) == 0
    assert "better by" in capsys.readouterr().out


def test_without_a_calibration_it_says_what_is_left_out(quick, tmp_path, capsys):
    folder = shutil.copytree(FIXTURES / "flat-d8", tmp_path / "flat")
    assert command.main([*quick, "--model", str(folder), "--only", "modes"]) == 0
    out = capsys.readouterr().out
    assert "mlx_poe.calibrate makes one" in out and "speculative, 3 drafts" in out


@pytest.mark.parametrize(
    ("shape", "flags", "left_out"),
    [
        ({}, ["--quantize", "4"], "3 drafts of a 4-bit copy is left out: draft_bits"),
        ({"poe_every": None, "poe_stage_layers": [4]}, [], "prefix of 2 is left out: max_stages 2"),
    ],
)
def test_the_default_sections_leave_out_what_a_model_cannot_do(
    quick, tmp_path, capsys, shape, flags, left_out
):
    folder = write_base(tmp_path / "base", **shape)
    flags = [*flags, "--trials", "1", "--max-tokens", "2", "--prompt-tokens", "16"]
    assert command.main([*quick, "--model", str(folder), *flags]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert left_out in shown and "looked up only" in shown


@SOAK
def test_the_command_on_a_planted_text(quick, capsys, monkeypatch):
    # What a calibration says is tested above; on a CPU a rounded model takes its time for it.
    little = {"continuations": 2, "continuation_tokens": 24}
    monkeypatch.setattr(command, "calibrate", lambda *a, **k: calibrate(*a, **{**k, **little}))
    flags = ["--shape", "tiny", "--agreement", "0.85", "--quantize", "8", "--only", "modes"]
    assert command.main([*quick, *flags]) == 0
    out = capsys.readouterr().out
    assert "tiny, random weights, planted text: stage 0 agrees on" in out and "8 bits" in out
    assert "speculative, as calibrated" in out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "poe-tiny", "--shape", "tiny"], "not both"),
        (["--agreement", "0.9"], "needs --shape"),
        (["--only", "speed"], "--only speed"),
        (["--trials", "0"], "--trials 0"),
        (["-m", "500"], "--max-tokens 500"),
        (["--lengths", "1"], "--lengths"),
        (["--q-bits", "7"], "--q-bits"),
        (["--quantize", "4", "--only", "quantised"], "--quantize"),
        (["--plot", "x.png", "--only", "rows"], "--plot"),
        (["--plot", "x.docx"], "name it .png, .svg or .pdf"),
        (["--json", "no/such/folder/r.json"], "there is no folder"),
        (["--csv", "/"], "is a folder"),
        (["--json", "~nosuchuser/r.json"], "no such home folder"),
        (["--compare", "a\0b"], "null character"),
        (["--only", "stages,"], "empty name"),
        (["--shape", "huge"], "--shape"),
        (["--shape", "tiny", "--agreement", "0.1"], "agreement 0.1"),
    ],
)
def test_flags_that_make_no_sense(flags, named, capsys):
    assert command.main(flags) == 2
    error = capsys.readouterr().err.replace("warning", "")
    assert named in error and error.strip().splitlines()[-1].startswith("mlx_poe.bench: error:")


def test_figures_that_are_not_finite_are_null():
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = report(float("nan")).to_json()
    fields = json.loads(text, parse_constant=refuse)
    assert fields["figures"][0]["value"] is None
    console = Console(file=io.StringIO(), width=200)
    compare(report(), read(text, "old.json"), console)
    compare(report(), read(kept(value=float("inf")), "old.json"), console)
    assert "nan" not in console.file.getvalue()


def test_a_binary_file_is_not_a_result_file(tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xfd\x00\xff")
    assert command.main(["--compare", str(tmp_path / "binary")]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert "binary, line 1: not UTF-8 text at position 0" in error


def test_results_go_through_links_and_to_devices(quick, tmp_path):
    table, drawing = tmp_path / "table.csv", tmp_path / "drawing.svg"
    table.write_text("old")
    for file in (table, drawing):
        (tmp_path / f"link{file.suffix}").symlink_to(file)
    flags = ["--csv", str(tmp_path / "link.csv"), "--plot", str(tmp_path / "link.svg")]
    assert command.main([*quick, *flags, "--only", "stages", "--json", os.devnull]) == 0
    assert table.read_text().startswith("section,") and "<svg" in drawing.read_text()
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "link.svg").is_symlink()
    assert len(list(tmp_path.iterdir())) == 4
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_an_unusable_calibration_is_named(quick, tmp_path, capsys):
    folder = shutil.copytree(FIXTURES / "flat-d8", tmp_path / "flat")
    (folder / "poe_calibration.json").write_text("{}")
    assert command.main([*quick, "--model", str(folder), "--only", "modes"]) == 0
    assert "stage_layers is missing" in " ".join(capsys.readouterr().out.split())


def test_a_missing_result_file_is_named(capsys):
    assert command.main(["--compare", "nowhere.json"]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1) and "nowhere.json" in error


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main(["--plot", "x.png"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_every_shape_has_a_help_entry(capsys):
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(shape in out for shape in SHAPES)
