"""mlx_poe.train as a user meets it: what it writes, resuming, interruption, refusals."""

import json
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import change_config, write_base
from conftest import FIXTURES, SOAK
from converting import entries
from training import SMALL_RUN, Watcher, chat, small_run, write_all, write_data, write_rows

from cognica_mlx.calibration_file import Calibration
from cognica_mlx.convert.conversion import prepare
from cognica_mlx.convert.formats import whole_folder
from cognica_mlx.convert.quantization import scheme
from cognica_mlx.convert.sources import locate
from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.training import store
from cognica_mlx.training.saved_training import read_training
from cognica_mlx.training.store import StoredActivations
from cognica_mlx.training.trainer import DivergedError
from mlx_poe import generate, load
from mlx_poe.commands import train as train_command
from mlx_poe.commands.calibrate import main as calibrate
from mlx_poe.commands.train import main
from mlx_poe.loading.specialists import Specialists
from mlx_poe.training import InterruptedTraining, TrainingSettings, after, run, train
from mlx_poe.training.run import checkpoint_file

COMMAND = (sys.executable, "-m", "mlx_poe", "train")
TOKENS = mx.array([[291 + 1, *range(40, 90)]])


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """A store is filled by whole chunks, mostly of padding where texts are as few as here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK", 256)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base, data, stores, and `mine`: a specialist trained straight through."""
    folder = tmp_path_factory.mktemp("training")
    write_all(folder)
    small_run(folder)
    return folder


def flags(folder: Path, output: str, **changes: object) -> list[str]:
    options = {"model": folder / "base", "data": folder / "data", "output": folder / output}
    options |= {"store_path": folder / "stores", **SMALL_RUN, **changes}
    return [
        part
        for name, value in options.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
        if value is not None
    ]


def delta(folder: Path) -> bytes:
    return (folder / "delta.safetensors").read_bytes()


# --- what it writes -----------------------------------------------------------------------------


def test_the_command_from_data_to_a_specialist_that_chats(made, capsys, monkeypatch):
    for name, little in (("CONTINUATIONS", 2), ("REPLIES", 2), ("REPLY_TOKENS", 8)):
        monkeypatch.setattr(after, name, little)
    before = entries(made / "base")
    log, plot = made / "log.jsonl", made / "losses.svg"
    write_rows(made / "data" / "test.jsonl", [chat("red", "der"), chat("cat dog", "dog cat")])
    assert main([*flags(made, "told", log=log, plot=plot), "--test"]) == 0
    stdout, stderr = capsys.readouterr()
    for said in (
        "train: 20 rows",
        "valid: 6 rows",
        "activations are already in",
        "iteration 3: train",
    ):
        assert said in stderr, said
    out = stdout.splitlines()
    assert [line.split(":")[0].split(" in ")[0] for line in out] == [
        *("validation", "trained", f"written to {made / 'told'}", "test", "full", "speculative"),
        "calibrated",
    ]
    assert "% of its drafts kept" in stdout
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 3, 6]
    assert lines[0]["train_loss"] is None and lines[1]["learning_rate"] > 0
    assert plot.read_text().startswith("<?xml")
    names = {f.name for f in (made / "told").iterdir()}
    assert names == {"config.json", "delta.safetensors", "generation_config.json", "README.md",
                     "tokenizer.pkl", "poe_calibration.json"}  # fmt: skip
    card = (made / "told" / "README.md").read_text()
    assert "| rows | 20 to learn from, 6 to measure on |" in card
    assert all(f"| {line['iteration']} |" in card for line in lines)
    best = min(lines, key=lambda line: line["valid_loss"])
    assert f"at iteration {best['iteration']}" in out[0]
    # The same run by the library gives the same bits, and the base is what it was.
    assert delta(made / "told") == delta(made / "mine")
    assert entries(made / "base") == before
    model, tokenizer = load(made / "told", dtype="float32")
    question = [{"role": "user", "content": "red"}]
    alone = generate(model, tokenizer, question, max_tokens=8)
    specialists = Specialists(load(made / "base", dtype="float32")[0])
    attached = specialists.attach("told", made / "told")
    assert generate(attached, tokenizer, question, max_tokens=8) == alone
    assert generate(attached, tokenizer, question, max_tokens=8, mode="speculative") == alone


def test_it_learns(made):
    watcher = Watcher()
    small_run(made, "learnt", watcher, iters=60, steps_per_eval=60, overwrite=True)
    first, last = watcher.evaluations
    assert last.valid_loss < 0.7 * first.valid_loss
    assert last.train_loss < first.valid_loss


def test_validation_is_calibrations_own_measure_of_the_folder(made, capsys):
    watcher = Watcher()
    result = small_run(made, "measured", watcher, store=False)
    file = made / "measured.json"
    data = str(made / "data" / "valid.jsonl")
    arguments = ["--model", str(made / "measured"), "--data", data, "--output", str(file)]
    arguments += ["--dtype", "float32", "--continuations", "2"]
    assert calibrate([*arguments, "--mask-prompt"]) == 0
    found = Calibration.load(file, load(made / "measured")[0].config)
    assert found.bits_per_byte[-1] == pytest.approx(result.best.bits_per_byte, abs=6e-5)
    assert calibrate(arguments) == 0
    whole = Calibration.load(file, load(made / "measured")[0].config)
    assert abs(whole.bits_per_byte[-1] - found.bits_per_byte[-1]) > 1e-3


def test_the_stores_rounding_hardly_shows(made):
    exact, sixteen, eight = Watcher(), Watcher(), Watcher()
    small_run(made, "exact", exact, store=False, overwrite=True)
    small_run(made, "sixteen", sixteen)
    small_run(made, "eight", eight, store_bits=8)
    for one, most in ((sixteen, 1e-4), (eight, 2e-2)):
        for a, b in zip(exact.evaluations, one.evaluations, strict=True):
            assert abs(a.valid_loss - b.valid_loss) < most * a.valid_loss
        last = exact.evaluations[-1].train_loss, one.evaluations[-1].train_loss
        assert last[0] != last[1]


def test_the_folder_holds_the_least_validation_loss(made):
    # A rate so high that it soon gets worse.
    watcher = Watcher()
    result = small_run(
        made, "best", watcher, iters=20, steps_per_eval=2, learning_rate=3.0, store=False
    )
    losses = {e.iteration: e.valid_loss for e in watcher.evaluations}
    assert losses[result.best.iteration] == min(losses.values()) < losses[20]
    again = small_run(made, "best2", iters=1, store=False)
    assert again.curve[0] == result.curve[0]
    assert f"those of iteration {result.best.iteration}," in (made / "best/README.md").read_text()
    tokens = [text.tokens for text in result.valid]
    model, _ = load(made / "best", dtype="float32")
    nats = count = 0
    for text in result.valid:
        logits = model(mx.array(text.tokens)[None])[0, :-1]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        own = mx.take_along_axis(logprobs, mx.array(text.tokens[1:])[:, None], axis=-1)[:, 0]
        nats -= float((own * mx.array(text.counted[1:])).sum())
        count += int(text.counted[1:].sum())
    assert len(tokens) and nats / count == pytest.approx(min(losses.values()), rel=1e-5)


@pytest.mark.parametrize("head_mode", ["dual", "specialist", "base"])
def test_on_a_specialist_and_at_any_head_mode(made, tmp_path, head_mode):
    result = small_run(
        made, f"chain-{head_mode}", model=str(made / "mine"), head_mode=head_mode, iters=2
    )
    folder = made / f"chain-{head_mode}"
    fields = json.loads((folder / "config.json").read_text())
    assert fields["base_model_name_or_path"] == "../mine"
    assert (fields["frozen_layers"], fields["new_layers"]) == (5, 1)
    assert (fields["head_mode"], fields["dual_head"]) == (head_mode, head_mode == "dual")
    model, _ = load(folder, dtype="float32")
    assert model.config.specialist_layers == (1, 1) and model.config.head_mode == head_mode
    base = Specialists(load(made / "base", dtype="float32")[0]).attach("chain", folder)
    assert mx.array_equal(base(TOKENS), model(TOKENS))
    assert result.curve[-1].valid_loss < result.curve[0].valid_loss


def test_a_stage_belongs_to_the_specialist_that_it_was_trained_on(made, tmp_path):
    small_run(made, "sibling", seed=1)
    top = made / "top"
    small_run(made, "top", model=str(made / "mine"), iters=1)
    # However its base is rounded in memory, but no other of the same shape.
    for options in ({"dtype": "float16"}, {"quantize": 2}, {"dtype": "bfloat16", "quantize": 8}):
        Specialists(load(made / "mine", **options)[0]).attach("top", top)
        with pytest.raises(CheckpointError, match=r"mine, which is not the model in memory: its"):
            Specialists(load(made / "sibling", **options)[0]).attach("top", top)
    # On disk too.
    moved = shutil.copytree(top, made / "moved")
    change_config(moved, base_model_name_or_path="../sibling")
    for use in (load, lambda folder: prepare(locate(folder))):
        with pytest.raises(CheckpointError, match=r"was trained on another model than .*sibling"):
            use(moved)
    packed = tmp_path / "packed"
    prepare(locate(made / "base"), quantization=scheme(2)).write(tmp_path / "base")
    over = {"quantization": scheme(2), "base": locate(tmp_path / "base")}
    prepare(locate(made / "mine"), **over).write(packed)
    prepare(locate(top), base=locate(packed)).write(tmp_path / "top")
    with pytest.raises(CheckpointError, match=r"packed is not the base of .*moved: its"):
        prepare(locate(unrecorded(moved)), base=locate(packed))
    change_config(top, base_model_name_or_path=str(packed))
    for folder in (top, tmp_path / "top"):
        assert load(folder)[0].config.specialist_layers == (1, 1)
    change_config(top, trained_on={"x0_lambdas": "?"})
    with pytest.raises(CheckpointError, match="trained_on is damaged"):
        load(top)


def unrecorded(folder: Path) -> Path:
    """As older versions wrote it, and as deltas are released: it loads."""
    change_config(folder, trained_on=None)
    load(folder)
    return folder


def test_a_quantised_base_keeps_its_bits(made, tmp_path):
    packed = made / "packed"
    prepare(locate(made / "base"), quantization=scheme(8)).write(packed)
    small_run(made, "on-packed", model=str(packed), chat_tokens="words", iters=2)
    base = load(packed, dtype="float32")[0]
    attached = Specialists(base).attach("mine", made / "on-packed")
    assert 1 <= len(attached.wte.rows) <= 8
    assert mx.array_equal(attached(TOKENS), load(made / "on-packed", dtype="float32")[0](TOKENS))
    for ours, theirs in zip(attached.stages, base.stages, strict=False):
        assert ours is theirs


def test_a_converted_base_and_a_delta_of_it_convert_again(made, tmp_path):
    base, merged = tmp_path / "converted", tmp_path / "merged"
    prepare(locate(made / "base")).write(base)
    write_all(tmp_path)
    small_run(tmp_path, "mine", model=str(base), iters=2)
    assert {"tokenizer.json", "chat_template.jinja"} <= {
        f.name for f in (tmp_path / "mine").iterdir()
    }
    prepare(locate(tmp_path / "mine")).write(merged)
    ours, theirs = (load(f, dtype="float32")[0](TOKENS) for f in (tmp_path / "mine", merged))
    assert mx.abs(ours - theirs).max().item() < 1e-4


def test_the_base_is_not_in_memory_while_training(made, monkeypatch):
    models = []
    loaded = run.load

    def watched(*args, **options):
        model, tokenizer = loaded(*args, **options)
        models.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(run, "load", watched)
    alive = []
    small_run(made, "light", Watcher(lambda _: alive.append(models[0]() is not None)), iters=2)
    assert alive and not any(alive)
    alive.clear()
    small_run(
        made,
        "heavy",
        Watcher(lambda _: alive.append(models[-1]() is not None)),
        iters=2,
        store=False,
    )
    assert all(alive)


# --- stores -------------------------------------------------------------------------------------


def test_a_store_is_used_again_where_it_fits(made, tmp_path):
    def phases(**changes) -> dict[str, int]:
        watcher = Watcher()
        small_run(tmp_path, "mine", watcher, iters=1, overwrite=True, **changes)
        return watcher.phases

    write_all(tmp_path)
    write_data(tmp_path / "data", train_rows=8, valid_rows=2)
    assert phases()["reading"] > 50
    others = {"seed": 3, "layers": 2, "batch_size": 2, "mask_prompt": False}
    assert "reading" not in phases(**others)
    folders = [tmp_path / "stores", *(tmp_path / "stores").iterdir()]
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    for other in ({"store_bits": 8}, {"max_seq_length": 20}, {"chat_tokens": "words"}):
        assert "reading" in phases(**other), other
    write_base(tmp_path / "base", seed=9)
    assert "reading" in phases()


def test_a_disk_too_small_is_refused_before_anything_is_written(made, tmp_path, monkeypatch):
    write_all(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(whole_folder.shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    with pytest.raises(
        CheckpointError, match=r"has 1.0 kB free, but .* are needed: make room.*--no-store"
    ):
        small_run(tmp_path)
    assert not (tmp_path / "stores").exists() and not (tmp_path / "mine").exists()


def test_a_broken_off_store_leaves_nothing(made, tmp_path, monkeypatch):
    write_all(tmp_path)

    class Stops(Watcher):
        def progress(self, *_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path, "mine", Stops())
    assert not any((tmp_path / "stores").glob("*")) and not (tmp_path / "mine").exists()


OTHER_RUN = """
import sys
from pathlib import Path
from training import Watcher, small_run
class Pauses(Watcher):
    def progress(self, name, *done):
        if name == "reading" and name not in self.phases:
            print("reading", flush=True)
            sys.stdin.readline()
        super().progress(name, *done)
small_run(Path(sys.argv[1]), "theirs", Pauses(), iters=1)
"""


def test_a_second_run_waits_for_the_firsts_activations(tmp_path):
    write_all(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_RUN, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert other.stdout is not None and other.stdout.readline() == "reading\n"

    class Resumes(Watcher):
        def note(self, text):
            super().note(text)
            if "another run" in text and not other.stdin.closed:
                other.stdin.close()

    watcher = Resumes()
    small_run(tmp_path, "ours", watcher, iters=1)
    assert any("another run is reading the same texts" in note for note in watcher.notes)
    assert other.wait() == 0
    assert delta(tmp_path / "ours") == delta(tmp_path / "theirs")
    assert len(list((tmp_path / "stores").iterdir())) == 2


def test_a_store_that_another_run_has_made_first_is_used(made, tmp_path):
    write_all(tmp_path)
    stores = tmp_path / "stores"

    class Overtaken(Watcher):
        def progress(self, name, *done):
            super().progress(name, *done)
            if name == "reading":
                shutil.copytree(made / "stores", stores, dirs_exist_ok=True)

    small_run(tmp_path, "mine", Overtaken())
    assert delta(tmp_path / "mine") == delta(made / "mine")
    assert not list(stores.glob(".*"))


def test_what_a_killed_run_left_among_the_stores_is_removed(made, tmp_path):
    write_all(tmp_path)
    stores = tmp_path / "stores"
    left, other = stores / f".{'a' * 20}.0123abcd.partial", stores / ".notes.partial"
    for folder in (left, other):
        folder.mkdir(parents=True)
    small_run(tmp_path, "mine", iters=1)
    assert not left.exists() and other.exists()
    store = next(folder for folder in stores.iterdir() if folder != other)
    (store / "store.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{store.name} lacks store\.json: delete it"):
        small_run(tmp_path, "again", iters=1)


# --- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "accumulation"),
    [(2, 1), (5, 3), *(pytest.param(*pair, marks=SOAK) for pair in ((1, 1), (3, 2), (6, 1)))],
)
def test_what_is_resumed_ends_as_if_it_had_never_stopped(made, stop, accumulation):
    changes = {"grad_accumulation_steps": accumulation, "overwrite": True}
    straight, broken = f"straight-{accumulation}", f"broken-{stop}"
    small_run(made, straight, **changes)

    def interrupt(iteration: int) -> None:
        if iteration == stop:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedTraining) as stopped:
        small_run(made, broken, Watcher(interrupt), **changes)
    # The iteration that was under way is done again.
    assert stopped.value.iteration == stop - 1
    assert not (made / broken).exists()
    watcher = Watcher()
    result = small_run(made, broken, watcher, resume=True, grad_accumulation_steps=accumulation)
    assert watcher.notes[-1] == f"resuming after iteration {stop - 1}"
    assert delta(made / broken) == delta(made / straight)
    assert (made / broken / "README.md").read_text().split("\n| iter")[1] == (
        made / straight / "README.md"
    ).read_text().split("\n| iter")[1]
    assert result.curve[-1].iteration == 6
    assert not checkpoint_file(made / broken).exists()


def test_ctrl_c_saves_and_says_how_to_go_on(made, capsys, uncalibrated):
    log = made / "stopped.jsonl"
    arguments = flags(made, "stopped", iters=100_000, steps_per_eval=5, log=log)
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert error.splitlines()[-1].endswith(
        f"continue with: mlx_poe.train --output {made / 'stopped'} --resume --log {log} "
        f"--store-path {made / 'stores'}"
    )
    assert checkpoint_file(made / "stopped").is_file() and not (made / "stopped").exists()
    # A new run does not throw it away in passing; a finished one does.
    store = ["--store-path", str(made / "stores"), "--output", str(made / "stopped")]
    for wrong, said in (
        (flags(made, "stopped"), "--resume"),
        (["--resume", *store, "--batch-size", "5"], "batch_size 5"),
        (["--resume", *store, "--iters", "1"], "iters 1"),
        (["--resume", *store, "--model", "poe-tiny"], "model 'poe-tiny': training began with"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
    assert checkpoint_file(made / "stopped").is_file()
    before = json.loads(log.read_text().splitlines()[-1])["iteration"]
    assert main(["--resume", *store, "--iters", str(before + 9)]) == 0
    assert "not calibrated: left out" in capsys.readouterr().err
    assert (made / "stopped" / "delta.safetensors").is_file()
    assert not checkpoint_file(made / "stopped").exists()


def test_changed_data_or_a_changed_base_is_not_gone_on_with(tmp_path):
    write_all(tmp_path)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedTraining):
        small_run(tmp_path, "mine", Watcher(interrupt))
    saved = checkpoint_file(tmp_path / "mine").read_bytes()
    data = (tmp_path / "data" / "train.jsonl").read_text()
    write_rows(tmp_path / "data" / "train.jsonl", [chat("a", "b")] * 20)
    with pytest.raises(CheckpointError, match=r"train\.jsonl has changed"):
        small_run(tmp_path, "mine", resume=True)
    (tmp_path / "data" / "train.jsonl").write_text(data)
    data = (tmp_path / "data" / "valid.jsonl").read_text()
    write_rows(tmp_path / "data" / "valid.jsonl", [chat("a", "b")] * 6)
    with pytest.raises(CheckpointError, match=r"valid\.jsonl has changed"):
        small_run(tmp_path, "mine", resume=True)
    (tmp_path / "data" / "valid.jsonl").write_text(data)
    write_base(tmp_path / "base", seed=5)
    with pytest.raises(CheckpointError, match=r"the model .* has changed"):
        small_run(tmp_path, "mine", resume=True)
    assert checkpoint_file(tmp_path / "mine").read_bytes() == saved
    for damaged in (saved[:1000], b"", saved[:-5]):
        checkpoint_file(tmp_path / "mine").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged or not a training checkpoint"):
            small_run(tmp_path, "mine", resume=True)
    checkpoint_file(tmp_path / "mine").unlink()
    with pytest.raises(CheckpointError, match="nothing to resume from"):
        small_run(tmp_path, "mine", resume=True)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(made, monkeypatch):
    read, count = StoredActivations.read, [0]

    def broken(self, batch):
        hidden = read(self, batch)
        count[0] += 1
        # After the first evaluation's two batches and three iterations of training.
        return hidden if count[0] < 6 else type(hidden)(hidden.tokens, hidden.x * mx.nan, hidden.x0,
                                                          hidden.backout)  # fmt: skip

    monkeypatch.setattr(StoredActivations, "read", broken)
    with pytest.raises(DivergedError, match=r"checkpoint of iteration 2 is kept.*learning-rate"):
        small_run(made, "diverged", steps_per_eval=100)
    monkeypatch.undo()
    assert not (made / "diverged").exists()
    small_run(made, "diverged", resume=True, steps_per_eval=100)
    assert (made / "diverged").is_dir()


@pytest.mark.parametrize("fault", [CheckpointError("the disk is full"), KeyboardInterrupt()])
def test_what_cannot_be_written_in_the_end_is_not_lost(made, tmp_path, monkeypatch, fault):
    output, saved = tmp_path / "unwritten", []

    def failing(self, target, overwrite):
        saved.append(checkpoint_file(output).is_file())
        raise fault

    watcher = Watcher()
    with monkeypatch.context() as patch:
        patch.setattr(run.Delta, "write", failing)
        with pytest.raises((CheckpointError, InterruptedTraining)):
            small_run(made, output, watcher, save_every=100)
    assert saved == [True]  # so it would not be lost either if the process were killed there
    if isinstance(fault, CheckpointError):
        assert watcher.notes[-1].startswith("the checkpoint of iteration 6 is kept; continue it")
    small_run(made, output, watcher, resume=True, save_every=100)
    assert watcher.notes[-1] == "resuming after iteration 6"
    assert delta(output) == delta(made / "mine")
    assert [entry.name for entry in tmp_path.iterdir()] == ["unwritten"]


def test_a_run_told_to_stop_where_it_is_writes_that_iteration(made, tmp_path):
    output = tmp_path / "early"

    def interrupt(iteration: int) -> None:
        if iteration == 5:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedTraining):
        small_run(made, output, Watcher(interrupt), steps_per_eval=3)
    reached = read_training(checkpoint_file(output))[0]
    assert (reached.iteration, reached.best_iteration) == (4, 3)
    result = small_run(made, output, resume=True, iters=4)
    assert [e.iteration for e in result.curve] == [0, 3, 4] and result.best.iteration == 4
    written = mx.load(str(output / "delta.safetensors"))
    for name, array in reached.parameters.items():
        if name.startswith("h."):
            assert mx.array_equal(written[f"transformer.{name}"], array.astype(mx.bfloat16)), name
    assert "| iterations | 4 |" in (output / "README.md").read_text()


def test_a_checkpoint_that_cannot_be_written_says_what_is_kept(made, tmp_path, monkeypatch):
    save, count = run.save_training, [0]

    def full(path, state, settings):
        count[0] += 1
        if count[0] != 1:
            raise CheckpointError(f"{path} cannot be written: No space left on device")
        save(path, state, settings)

    monkeypatch.setattr(run, "save_training", full)
    output = tmp_path / "full"
    said = r"full\.checkpoint.*No space left.*; the checkpoint of iteration 2 is kept; continue it"
    with pytest.raises(CheckpointError, match=said):
        small_run(made, output)
    # There is room for the folder, if not for another checkpoint.
    small_run(made, output, resume=True, save_every=100)
    assert delta(output) == delta(made / "mine") and not checkpoint_file(output).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_loses_nothing(made, capsys):
    assert main(flags(made, "unlogged", log="/dev/full")) == 1
    error = capsys.readouterr().err.splitlines()
    assert "No space left on device: '/dev/full'" in error[-1]
    assert error[-2].startswith("the checkpoint of iteration 0 is kept")
    assert checkpoint_file(made / "unlogged").is_file()


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--layers", "0"], "layers 0 is not a whole number of at least 1"),
        (["--learning-rate", "-1"], "learning_rate -1.0 is not a positive number"),
        (["--learning-rate", "nan"], "learning_rate nan is not a positive number"),
        (["--max-grad-norm", "-1"], "max_grad_norm -1.0 is not a number below 1e6, or 0 for no"),
        (["--val-batches", "0"], "val_batches 0"),
        (["--data", "nowhere"], "nowhere/train.jsonl is missing"),
        (["--test"], "test.jsonl is missing"),
        (["--model", "poe-tiny", "--head-mode", "x"], "invalid choice"),
        (["--plot", "a.txt"], "name a .png, .svg or .pdf file"),
        (["--log", "/nowhere/log"], "there is no folder"),
        (["-c", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    ],
)
def test_what_makes_no_sense_is_one_line(tmp_path, capsys, extra, said):
    write_rows(tmp_path / "d" / "train.jsonl", [chat("a", "b")])
    write_rows(tmp_path / "d" / "valid.jsonl", [chat("a", "b")])
    arguments = ["--data", str(tmp_path / "d"), "--output", str(tmp_path / "out"), *extra]
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mlx_poe.train: error: ") and said in error
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_is_not_replaced(made, capsys):
    before = entries(made / "mine")
    log = made / "earlier.jsonl"
    log.write_text("of an earlier run")
    assert main(flags(made, "mine", log=log)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert log.read_text() == "of an earlier run"
    assert main([*flags(made, "base"), "--overwrite"]) == 2
    assert main([*flags(made, "data"), "--overwrite"]) == 2
    assert entries(made / "mine") == before
    with pytest.raises(RequestError, match="exists"):
        small_run(made)


@pytest.fixture
def uncalibrated(monkeypatch):
    """Calibrating and timing, which take longest, left out."""

    def refuse(*_):
        raise RequestError("left out")

    monkeypatch.setattr(train_command, "calibrate_folder", refuse)


def test_settings_from_a_file_and_flags_that_win(made, capsys, uncalibrated):
    file = made / "settings.yaml"
    file.write_text(
        f"model: {made / 'base'}\ndata: {made / 'data'}\nnum_layers: 1\nlearning_rate: 1e-3\n"
        "iters: 5\nbatch_size: 4\nsteps_per_eval: 3\nseed: 4\nmask_prompt: true\ndtype: float32\n"
    )
    base = ["-c", str(file), "--store-path", str(made / "stores")]
    assert main([*base, "--output", str(made / "yaml"), "--iters", "2"]) == 0
    fields = json.loads((made / "yaml" / "config.json").read_text())["stage_training"]
    assert (fields["iterations"], fields["learning_rate"], fields["seed"]) == (2, 0.001, 4)
    # A flag that equals its default is given as well.
    assert main([*base, "--output", str(made / "tiny"), "--model", "poe-tiny", "--iters", "1"]) == 0
    fields = json.loads((made / "tiny" / "config.json").read_text())
    assert Path(fields["base_model_name_or_path"]).name == "poe-tiny"
    for text, said in (
        ("batchsize: 4", "'batchsize' is not a setting"),
        ("- 4", "must contain settings"),
        ("iters: many", "iters 'many' is not a whole number"),
        ("learning_rate: fast", "learning_rate 'fast' is not a number"),
        ("store: 3", "store 3 is not true or false"),
        ("a: [", "cannot be read as YAML"),
    ):
        file.write_text(f"data: {made / 'data'}\n{text}\n" if ":" in text else text)
        assert main([*base, "--output", str(made / "other")]) == 2, text
        assert said in capsys.readouterr().err


def test_help_shows_examples_and_every_setting(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "--resume" in text
    from mlx_poe.training.settings import SETTINGS

    for name in SETTINGS:
        flag = f"--{name.replace('_', '-')}"
        assert flag in text or f"--no-{name}" in text, name


def test_poe_tiny_with_its_words_and_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [json.loads(line) for line in (FIXTURES / "poe-tiny-math-calibration.jsonl").open()]
    write_rows(tmp_path / "d" / "train.jsonl", rows[:8])
    write_rows(tmp_path / "d" / "valid.jsonl", rows[8:12])
    settings = TrainingSettings(data=str(tmp_path / "d"), iters=2, batch_size=4, dtype="float32")
    train(settings, tmp_path / "mine", Watcher())
    assert any((tmp_path / "cache" / "cognica-mlx" / "activations").iterdir())
    shutil.move(tmp_path / "mine", tmp_path / "moved")  # a built-in base is found from anywhere
    model, tokenizer = load(tmp_path / "moved", dtype="float32")
    base = load("poe-tiny", dtype="float32")[0]
    attached = Specialists(base).attach("mine", tmp_path / "moved")
    assert len(attached.wte.rows) == 8
    ids = mx.array([tokenizer.encode("The capital of France is")])
    for stage in range(4):
        assert mx.array_equal(model.forward_stage(ids, stage), base.forward_stage(ids, stage))
    # poe-tiny's own specialists read a chat as this one does, but for their own layers.
    chats = mx.array([tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}])])
    math = load("poe-tiny-math", dtype="float32")[0]
    assert mx.array_equal(model.forward_stage(chats, 3), math.forward_stage(chats, 3))
