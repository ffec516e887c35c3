"""The converter: every source through every path, what it writes, and what it says."""

import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiktoken
from conftest import FIXTURES, fixture, goldens
from mlx.utils import tree_flatten
from safetensors import safe_open
from test_loading import change_config, write_base, write_stage

from cognica_mlx.convert import conversion as conversion_module
from cognica_mlx.convert import safetensors_files
from cognica_mlx.convert.conversion import Conversion, prepare, upload
from cognica_mlx.convert.output_folder import _locked_folder, new_folder
from cognica_mlx.convert.quantization import Scheme, make_plan, mixed, scheme
from cognica_mlx.convert.sources import Source, locate
from cognica_mlx.convert.tokenizer_json import write_tokenizer
from cognica_mlx.errors import CheckpointError, PoEError, RequestError, TokenizerError
from cognica_mlx.model import PoEModel
from mlx_poe import load
from mlx_poe.commands.convert import main
from mlx_poe.verify import compare

NANOCHAT_BASE = FIXTURES / "nanochat" / "base_checkpoints" / "d"
NANOCHAT_STAGE = FIXTURES / "nanochat" / "chatsft_checkpoints" / "stage"


def convert(source: Path, target: Path, *flags: str) -> Path:
    """Run the command on local folders; the folder that it wrote."""
    assert main(["--hf-path", str(source), "--mlx-path", str(target), *flags]) == 0
    return target


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """A folder's tensors as bits, read by the safetensors library and mlx."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("[md]*.safetensors")):
        with safe_open(file, framework="np"):
            pass
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
        found |= {k: np.array(v.view(bits[v.dtype.size])) for k, v in arrays.items()}
    return found


def assert_goldens(folder: Path, name: str) -> None:
    model, tokenizer = load(folder, dtype="float32")
    answers = goldens(name)
    for text in ("short", "long"):
        tokens = answers[f"{text}.tokens"]
        together = model.forward_all_stages(tokens)
        ours = {f"{text}.logits_full": model(tokens)} if not model.pools_stages else {}
        ours |= {f"{text}.logits_stage_{k}": z for k, z in enumerate(together)}
        if model.pools_stages:
            ours[f"{text}.logop"] = model(tokens)
        checked = ours.keys() & answers.keys()
        assert len(checked) >= len(model.config.stage_layers) + 1
        for key in checked:
            answer = answers[key]
            assert mx.abs(ours[key][:, -answer.shape[1] :] - answer).max().item() < 2e-4, key
    assert tokenizer.encode("Hello, world 12") == fixture(name)[1].encode("Hello, world 12")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (FIXTURES / "flat-d8", "flat-d8"),
        (FIXTURES / "gqa-logop-d8", "gqa-logop-d8"),
        (FIXTURES / "stage-on-flat", "stage-on-flat"),
        (FIXTURES / "chain-on-stage", "chain-on-stage"),
        (NANOCHAT_BASE, "flat-d8"),
        (NANOCHAT_STAGE, "stage-on-flat"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.parametrize("flags", [(), ("--dtype", "float32")], ids=["as stored", "float32"])
def test_whole_models_give_the_goldens(tmp_path, source, name, flags):
    once = convert(source, tmp_path / "once", *flags)
    assert_goldens(once, name)
    again = convert(once, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (once / "model.safetensors").read_bytes()
    assert_goldens(again, name)


def test_deltas_give_the_goldens_and_store_the_base_once(tmp_path):
    base = convert(FIXTURES / "flat-d8", tmp_path / "base")
    stage = convert(FIXTURES / "stage-on-flat", tmp_path / "stage", "--base", str(base))
    chain = convert(FIXTURES / "chain-on-stage", tmp_path / "chain", "--base", str(stage))
    from_nanochat = convert(NANOCHAT_STAGE, tmp_path / "nanochat", "--base", str(base))
    assert_goldens(stage, "stage-on-flat")
    assert_goldens(chain, "chain-on-stage")
    assert_goldens(from_nanochat, "stage-on-flat")
    assert len(tensors(stage)) == len(tensors(chain)) == 16  # of two new layers
    assert sorted(f.name for f in stage.glob("*.safetensors")) == ["delta.safetensors"]
    merged = convert(chain, tmp_path / "merged")
    assert_goldens(merged, "chain-on-stage")
    # Relative, so that the folders can move together.
    (tmp_path / "moved").mkdir()
    for name in ("base", "stage"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    assert_goldens(tmp_path / "moved" / "stage", "stage-on-flat")


def test_bits_survive(tmp_path):
    folder = convert(FIXTURES / "flat-d8", tmp_path / "out")
    written, stored = tensors(folder), tensors(FIXTURES / "flat-d8")
    assert len(written) == len(stored)
    for name, bits in stored.items():
        ours = name.removeprefix("gpt.").removeprefix("transformer.")
        if ours.startswith("value_embeds."):
            ours = f"h.{ours.split('.')[1]}.attn.value_embed.weight"
        assert np.array_equal(written[ours], bits), name


def test_a_merged_head_is_the_sum_taken_in_float32(tmp_path):
    folder = convert(FIXTURES / "chain-on-stage", tmp_path / "out")
    source = fixture("chain-on-stage")[0]
    model, _ = load(folder, dtype="float32")
    total = source.lm_head.weight
    for i, head in enumerate(source.lm_head_specialists):
        total = total + head.weight
        assert mx.array_equal(model.lm_head_specialists[i].weight, total)
    assert mx.array_equal(model.lm_head.weight, source.lm_head.weight)
    assert len(tensors(folder)) == len(dict(tree_flatten(model.parameters())))
    with pytest.raises(RequestError, match="heads are summed"):
        load(folder, head_mode="specialist")
    assert load(folder, head_mode="dual")[0].config.head_mode == "summed"
    rounded = convert(FIXTURES / "chain-on-stage", tmp_path / "rounded", "--dtype", "bfloat16")
    assert {a.dtype for a in tensors(rounded).values()} == {np.dtype("uint16")}


def test_small_shards_have_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(
        conversion_module, "lay_out", lambda s, stem: safetensors_files.lay_out(s, stem, 300_000)
    )
    folder = convert(FIXTURES / "gqa-logop-d8", tmp_path / "out")
    files = sorted(f.name for f in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    assert all((folder / name).stat().st_size < 310_000 for name in files)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(folder).keys()
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors(folder).values())
    assert_goldens(folder, "gqa-logop-d8")


def test_old_and_oddly_padded_checkpoints_come_out_regular(tmp_path):
    base = write_base(tmp_path / "base", vocab_size=301)
    arrays = mx.load(str(base / "model.safetensors"))
    assert isinstance(arrays, dict)
    for name in arrays:
        if "wte" in name or "lm_head" in name or "value_embeds" in name:
            arrays[name] = arrays[name][:301]
    mx.save_safetensors(str(base / "model.safetensors"), arrays)
    folder = convert(base, tmp_path / "out")
    assert all(
        a.shape[0] == 320 for k, a in tensors(folder).items() if "wte" in k or "lm_head" in k
    )
    tokens = mx.array([[1, 2, 3, 300]])
    assert mx.array_equal(load(folder)[0](tokens), load(base)[0](tokens))


# Quantisation


def rounded_by_hand(model: PoEModel, folder: Path) -> PoEModel:
    """`model` with every matrix that `folder` has packed replaced by what it unpacks to."""
    arrays = mx.load(str(folder / "model.safetensors"))
    entry = json.loads((folder / "config.json").read_text())["quantization"]
    assert isinstance(arrays, dict)
    other = PoEModel(model.config)
    values = dict(tree_flatten(model.parameters()))
    for name in arrays:
        if name.endswith(".scales"):
            path = name.removesuffix(".scales")
            how = entry.get(path, entry)
            how = {k: how[k] for k in ("bits", "group_size", "mode")}
            scales = [arrays[k] for k in (name, f"{path}.biases") if k in arrays]
            if how["mode"] == "affine":
                scales = [part.astype(mx.float32) for part in scales]
            values[f"{path}.weight"] = mx.dequantize(
                arrays[f"{path}.weight"], *scales, **how
            ).astype(mx.float32)
    other.load_weights(list(values.items()))
    return other


@pytest.mark.parametrize(
    "flags",
    [
        ("-q",),
        ("-q", "--q-bits", "3", "--q-group-size", "32"),
        ("-q", "--q-bits", "8", "--q-bits-for", "embed=16", "--q-bits-for", "stage0=6"),
        ("-q", "--quant-predicate", "mixed_3_6"),
        ("-q", "--q-mode", "mxfp4"),
        ("-q", "--q-mode", "nvfp4", "--q-bits-for", "head=8"),
        ("-q", "--q-mode", "mxfp8"),
        ("-q", "--dtype", "float16"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["gqa-logop-d8", "stage-on-flat"])
def test_quantised_models_compute_with_the_rounded_weights(tmp_path, name, flags):
    folder = convert(FIXTURES / name, tmp_path / "out", *flags)
    model, _ = load(folder, dtype="float32")
    merged = convert(FIXTURES / name, tmp_path / "plain", "--dtype", "float32")
    by_hand = rounded_by_hand(load(merged, dtype="float32")[0], folder)
    tokens = goldens(name)["short.tokens"]
    for ours, expected in zip(
        [model(tokens), *model.forward_all_stages(tokens)],
        [by_hand(tokens), *by_hand.forward_all_stages(tokens)],
        strict=True,
    ):
        assert mx.abs(ours - expected).max().item() < 2e-4
    gates = [v for k, v in tree_flatten(model.parameters()) if "gate" in k]
    assert gates
    assert all(gate.dtype == mx.float32 for gate in gates)


def test_a_quantised_delta_on_a_quantised_base(tmp_path):
    base = convert(FIXTURES / "flat-d8", tmp_path / "base", "-q")
    flags = ("-q", "--q-bits", "8", "--q-bits-for", "head=6", "--q-bits-for", "embed=16")
    delta = convert(FIXTURES / "stage-on-flat", tmp_path / "delta", *flags, "--base", str(base))
    model, _ = load(delta)
    assert model.h[0].attn.c_q.bits == 4
    assert model.h[8].attn.c_q.bits == 8
    assert (model.lm_head.bits, model.lm_head_specialists[0].bits) == (4, 6)
    assert not hasattr(model.wte, "bits")
    own, shared = load(base)[0], goldens("flat-d8")["short.tokens"]
    assert mx.allclose(own.forward_stage(shared, 3), own.forward_all_stages(shared)[3], atol=1e-4)
    with pytest.raises(RequestError, match="quantised heads"):
        prepare(locate(delta))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_loading_quantised_equals_converting(tmp_path, bits):
    folder = convert(Path("poe-tiny"), tmp_path / "out", "-q", "--q-bits", str(bits))
    converted, _ = load(folder, dtype="bfloat16")
    in_memory, _ = load("poe-tiny", dtype="bfloat16", quantize=bits)
    for (name, a), (_, b) in zip(
        tree_flatten(converted.parameters()), tree_flatten(in_memory.parameters()), strict=True
    ):
        assert mx.array_equal(a, b), name
    with pytest.raises(RequestError, match="already quantised"):
        load(folder, quantize=4)
    with pytest.raises(RequestError, match="already quantised"):
        prepare(locate(folder), quantization=scheme())


def test_plans():
    config = fixture("stage-on-flat")[0].config
    plan = make_plan(config, Scheme(4, 64), [("stage1", 8), ("layers3-4", 3), ("mlp", 5)])
    assert plan["h.2.attn.c_q"].bits == 8
    assert plan["h.3.attn.c_q"].bits == 3
    assert plan["h.2.mlp.c_fc"].bits == 5
    assert plan["h.1.attn.value_embed"].bits == 4
    assert "smear_gate" not in plan
    assert not any("ve_gate" in path for path in plan)
    assert "lm_head" not in make_plan(config, Scheme(4, 64), [("head", 16)])
    # The specialist's stage is one more.
    assert make_plan(config, Scheme(4, 64), [("stage4", 8)])["h.9.mlp.c_proj"].bits == 8
    low, rules = mixed(config, "mixed_2_6", Scheme(4, 64))
    recipe = make_plan(config, low, rules)
    assert (recipe["lm_head"].bits, recipe["h.0.attn.c_v"].bits) == (6, 6)
    assert (recipe["h.0.attn.c_q"].bits, recipe["h.1.attn.c_v"].bits) == (2, 2)
    for rule in (("stage5", 4), ("layers8-10", 4), ("tail", 4), ("head", 7), ("layer5-2", 4)):
        with pytest.raises(RequestError):
            make_plan(config, Scheme(4, 64), [rule])
    for options in ((7, 64, "affine"), (4, 48, "affine"), (8, None, "mxfp4"), (4, 64, "gguf")):
        with pytest.raises(RequestError):
            scheme(*options)


CAPITALS = """France Paris, Italy Rome, Japan Tokyo, Germany Berlin, Spain Madrid, Egypt Cairo,
Greece Athens, Bulgaria Sofia, Vietnam Hanoi, Iran Tehran, China Beijing, Turkey Ankara, Peru Lima,
Portugal Lisbon, Ireland Dublin, Iraq Baghdad, Cuba Havana, Hungary Budapest, Finland Helsinki,
Ghana Accra"""
LANGUAGES = """France French, Germany German, Spain Spanish, Mexico Spanish, Finland Finnish,
Bangladesh Bengali, Australia English, Italy Italian, Japan Japanese, Kenya Swahili"""
OTHERS = {
    "The currency of Mexico is the": " peso",
    "The currency of China is the": " yuan",
    "The currency of Tunisia is the": " dinar",
    "The currency of Japan is the": " yen",
    "The symbol of gold is": " Au",
    "The opposite of hot is": " cold",
    "The opposite of low is": " high",
    "The baby of a cow is called a": " calf",
    "Mars is a planet of the": " solar",
    "A cow has four": " legs",
}


def facts(kind: str, pairs: str) -> dict[str, str]:
    split = [pair.split() for pair in pairs.replace("\n", " ").split(",")]
    return {f"The {kind} of {country} is": f" {answer}" for country, answer in split}


PROBES = facts("capital", CAPITALS) | facts("language", LANGUAGES) | OTHERS


def answered(model: PoEModel, tokenizer, prompts: dict[str, str]) -> list[bool]:
    results = []
    for prompt, answer in prompts.items():
        tokens = tokenizer.encode(prompt)
        due = tokenizer.encode(answer, add_special_tokens=False)
        logits = model(mx.array([tokens + due[:-1]]))[0, -len(due) :]
        results.append(mx.argmax(logits, axis=-1).tolist() == due)
    return results


def test_four_bits_still_know_the_facts(tmp_path):
    model, tokenizer = load("poe-tiny")
    texts = [tokenizer.encode((FIXTURES / "heldout.txt").read_text())[:512]]
    n_bytes = tokenizer.token_byte_lengths(model.config.vocab_size)
    before = sum(answered(model, tokenizer, PROBES))
    assert before >= 0.9 * len(PROBES)
    rows = [f"bf16 {before}"]
    for bits in (2, 3, 4, 6, 8):
        folder = convert(Path("poe-tiny"), tmp_path / str(bits), "-q", "--q-bits", str(bits))
        rounded, _ = load(folder)
        after = sum(answered(rounded, tokenizer, PROBES))
        full = compare(model, rounded, texts, n_bytes)[-1]
        size = (folder / "model.safetensors").stat().st_size
        rows.append(
            f"{bits} {after}, {full.agreement:.1%}, {full.bits_per_byte[1]:.4f} bits per byte"
            f" (before {full.bits_per_byte[0]:.4f}), {size / 1e6:.2f} MB"
        )
        if bits >= 4:
            assert after >= before - 0.05 * len(PROBES)
            assert full.bits_per_byte[1] < full.bits_per_byte[0] + 0.1
    print("", f"bits, of {len(PROBES)} probes answered, top-1 agreement", *rows, sep="\n")


def test_comparing_a_model_with_itself():
    model, tokenizer = fixture("poe-tiny")
    text = tokenizer.encode("The capital of France is Paris.")
    for difference in compare(model, model, [text], tokenizer.token_byte_lengths(2048)):
        assert (difference.logit_difference, difference.agreement) == (0, 1)
        assert 0 < difference.bits_per_byte[0] == difference.bits_per_byte[1]


# What lies beside the weights


def test_a_folder_says_where_it_came_from(tmp_path):
    target = convert(Path("poe-tiny-chat"), tmp_path / "chat-4bit", "-q")
    card = (target / "README.md").read_text()
    for text in ("poe-tiny-chat", "on `poe-tiny`", "license: apache-2.0", "4 bits", "# chat-4bit"):
        assert text in card
    assert not list(target.glob("*.pkl"))
    assert load(target)[0].calibration is not None
    assert (target / "chat_template.jinja").is_file()
    config = json.loads((target / "config.json").read_text())
    assert config["eos_token_id"] == [2043, 2039]
    assert str(tmp_path) not in card + json.dumps(config)


def test_sources_from_the_hub_are_named_with_their_commit(tmp_path):
    source = Source(FIXTURES / "flat-d8", "owner/base", from_hub=True, revision="a" * 40)
    prepare(source).write(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: owner/base" in card
    assert "a" * 40 in card


def test_upload(tmp_path, monkeypatch):
    calls: list[tuple[str, object]] = []

    class Api:
        def create_repo(self, repo_id: str, exist_ok: bool) -> None:
            calls.append(("create", repo_id))

        def upload_folder(self, repo_id: str, folder_path: Path) -> object:
            calls.append(("upload", sorted(f.name for f in folder_path.iterdir())))
            if repo_id == "owner/refused":
                raise ConnectionError("no route\nat all")
            return type("Commit", (), {"commit_url": "https://example.org/commit"})()

    monkeypatch.setattr(conversion_module, "HfApi", Api)
    out = convert(FIXTURES / "flat-d8", tmp_path / "out", "--upload-repo", "owner/mine")
    assert calls[0] == ("create", "owner/mine")
    assert "model.safetensors" in calls[1][1]  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"as owner/refused .*no route\)$"):
        upload(out, "owner/refused")
    flags = ["--base", str(out), "--upload-repo", "owner/mine"]
    stage = str(FIXTURES / "stage-on-flat")
    assert main(["--hf-path", stage, "--mlx-path", str(tmp_path / "d"), *flags]) == 2
    assert not (tmp_path / "d").exists()


# What is refused, and that nothing is lost


def entries(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_an_existing_folder_is_replaced_only_when_told(tmp_path, capsys):
    target = convert(FIXTURES / "flat-d8", tmp_path / "out")
    before = entries(target)
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert entries(target) == before
    convert(Path("poe-tiny"), target, "--overwrite")
    assert load(target)[0].config.n_embd == 128
    (target / "notes.txt").write_text("mine")
    before = entries(target)
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(target), "--overwrite"]) == 2
    assert "notes.txt" in capsys.readouterr().err
    assert entries(target) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    convert(FIXTURES / "flat-d8", empty)
    for source in (target, empty):
        flags = ["--hf-path", str(empty), "--mlx-path", str(source), "--overwrite"]
        assert main(flags) == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["empty", "out"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [False, True])
def test_an_end_in_mid_write_leaves_nothing_and_loses_nothing(
    tmp_path, monkeypatch, capfd, fault, existing
):
    target = tmp_path / "out"
    if existing:
        convert(FIXTURES / "flat-d8", target)
    before = entries(tmp_path)
    write, count = safetensors_files.TensorWriter.write, 0

    def fail(self: object, name: str, array: mx.array) -> None:
        nonlocal count
        count += 1
        if count == 20:
            raise fault
        write(self, name, array)  # type: ignore[arg-type]

    monkeypatch.setattr(safetensors_files.TensorWriter, "write", fail)
    status = main(["--hf-path", "poe-tiny", "--mlx-path", str(target), "--overwrite"])
    assert status == (130 if fault is KeyboardInterrupt else 1)
    assert count == 20
    assert entries(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([target] if existing else [])
    if status == 1:
        assert "No space left" in capfd.readouterr().err


def test_what_appears_at_the_target_meanwhile_is_kept(tmp_path, monkeypatch, capsys):
    target = tmp_path / "out"
    write = safetensors_files.TensorWriter.close

    def appear(self: object) -> None:
        write(self)  # type: ignore[arg-type]
        target.mkdir()
        (target / "thesis.txt").write_text("mine")

    monkeypatch.setattr(safetensors_files.TensorWriter, "close", appear)
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert entries(tmp_path) == {"out/thesis.txt": b"mine"}


def test_an_interruption_between_the_renames_keeps_the_old(tmp_path, monkeypatch):
    target = convert(FIXTURES / "flat-d8", tmp_path / "out")
    before, rename = entries(tmp_path), Path.rename

    def interrupted(self: Path, other: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(target), "--overwrite"]) == 130
    assert entries(tmp_path) == before


# Runs the command and is killed by a signal after 20 tensors, or between the two renames.
KILLED = """
import os, signal, sys
from pathlib import Path
from cognica_mlx.convert import safetensors_files
from mlx_poe.commands.convert import main
number, where = int(sys.argv.pop(1)), sys.argv.pop(1)
write, rename, count = safetensors_files.TensorWriter.write, Path.rename, 0
def counted(self, name, array):
    global count
    count += 1
    if where == "writing" and count == 20:
        os.kill(os.getpid(), number)
    write(self, name, array)
def watched(self, other):
    if where == "renaming" and self.name.endswith(".partial"):
        os.kill(os.getpid(), number)
    return rename(self, other)
safetensors_files.TensorWriter.write = counted
Path.rename = watched
sys.exit(main(sys.argv[1:]))
"""


def convert_killed(number: int, where: str, target: Path, **options: Any) -> int:
    flags = ["--hf-path", "poe-tiny", "--mlx-path", str(target), "--overwrite"]
    script = [sys.executable, "-c", KILLED, str(int(number)), where, *flags]
    done = subprocess.run(script, capture_output=True, text=True, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_being_told_to_end_cleans_up(tmp_path, number):
    assert convert_killed(number, "writing", tmp_path / "new" / "out") == 130
    assert not list(tmp_path.iterdir())


def test_nohup_keeps_converting(tmp_path):
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    assert convert_killed(signal.SIGHUP, "writing", tmp_path / "out", preexec_fn=ignore) == 0
    assert load(tmp_path / "out")[0].config.n_embd == 128


def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    target = tmp_path / "out"
    assert convert_killed(signal.SIGKILL, "writing", target) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".partial")
    # Of another target, though its name begins alike, and nothing that is ours.
    others = [tmp_path / name for name in (".out.v2.0123abcd.partial", ".out.notes.partial")]
    for other in others:
        other.mkdir()
    convert(Path("poe-tiny"), target)
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


def test_the_next_run_puts_back_what_a_killed_one_moved_away(tmp_path, capsys):
    target = convert(FIXTURES / "flat-d8", tmp_path / "out")
    before = entries(target)
    assert convert_killed(signal.SIGKILL, "renaming", target) == -signal.SIGKILL
    assert not target.exists() and len(list(tmp_path.iterdir())) == 2
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert entries(target) == before and list(tmp_path.iterdir()) == [target]


def test_a_run_that_is_alive_keeps_its_folder(tmp_path):
    target = tmp_path / "out"
    with new_folder(target, 1000, overwrite=False) as first:
        (first / "config.json").write_text("{}")
        script = (
            "import sys; from pathlib import Path\n"
            "from cognica_mlx.convert.output_folder import remove_leftovers\n"
            "remove_leftovers(Path(sys.argv[1]))\n"
        )
        subprocess.run([sys.executable, "-c", script, str(target)], check=True)
        assert (first / "config.json").exists()
    assert (target / "config.json").read_text() == "{}"


def test_a_folder_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    mkdir, made = Path.mkdir, []

    def removed(self: Path, *args: Any, **options: Any) -> None:
        mkdir(self, *args, **options)
        made.append(self)
        if len(made) == 1:
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed)
    with _locked_folder(tmp_path / "out") as folder:
        assert folder.is_dir() and folder != made[0]


def test_a_source_in_another_spelling_is_not_overwritten(tmp_path, monkeypatch, capsys):
    """As a disk that takes Model and model for the same sees it."""
    source = Path(shutil.copytree(FIXTURES / "flat-d8", tmp_path / "Model"))
    target = Path(shutil.copytree(FIXTURES / "flat-d8", tmp_path / "model"))
    before = entries(tmp_path)

    def same(one: Path, other: Path) -> bool:
        return str(one).casefold() == str(other).casefold()

    monkeypatch.setattr(Path, "samefile", same)
    flags = ["--hf-path", str(source), "--mlx-path", str(target), "--overwrite"]
    assert main(flags) == 2
    assert "is what is being converted" in capsys.readouterr().err
    assert entries(tmp_path) == before


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a\0b", "loop", ""])
def test_names_that_are_no_path(tmp_path, monkeypatch, capfd, name):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for flags in (
        ["--hf-path", "poe-tiny", "--mlx-path", name],
        ["--hf-path", name, "--mlx-path", "out"],
        ["--hf-path", "poe-tiny-chat", "--base", name, "--mlx-path", "out"],
        ["--hf-path", "poe-tiny", "--mlx-path", "out", "--verify", name],
    ):
        assert main(flags) in (1, 2)
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and error.startswith("mlx_poe.convert: error: "), error
    assert [entry.name for entry in tmp_path.iterdir()] == ["loop"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.txt", "", "has no text in it"),
        ("empty.jsonl", "\n", "has no text in it"),
        ("empty.jsonl", '{"text": ""}', "has no text in it"),
        ("roles.jsonl", '{"messages": [{"role": "king", "content": "x"}]}', "its role is 'king'"),
    ],
)
def test_the_text_to_verify_on_is_read_first(tmp_path, capsys, name, content, named):
    text = tmp_path / name
    text.write_text(content)
    flags = ["--hf-path", "poe-tiny", "--mlx-path", str(tmp_path / "out"), "--verify", str(text)]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [text]


def test_an_unusable_calibration_is_left_out_with_a_warning(tmp_path, capsys):
    source = Path(shutil.copytree(FIXTURES / "flat-d8", tmp_path / "source"))
    (source / "poe_calibration.json").write_text('{"p99_bounds": null}')
    out = convert(source, tmp_path / "out")
    error = capsys.readouterr().err
    assert error.startswith("mlx_poe.convert: warning: calibration not copied: ")
    assert error.count("\n") == 1
    assert not (out / "poe_calibration.json").exists()
    assert load(out)[0].calibration_problem is None


def test_room_is_looked_for_first(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(["--hf-path", "poe-tiny", "--mlx-path", str(tmp_path / "out")]) == 1
    assert "GB are needed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def other_seed(tmp_path: Path) -> Path:
    write_base(tmp_path / "base", seed=1)
    write_stage(tmp_path / "stage")
    return convert(write_base(tmp_path / "other", seed=9), tmp_path / "other-mlx")


def merged(tmp_path: Path) -> Path:
    write_base(tmp_path / "base", seed=1)
    write_stage(tmp_path / "stage")
    write_stage(tmp_path / "chain", base="../stage")
    shutil.rmtree(tmp_path / "stage" / "unused", ignore_errors=True)
    return convert(tmp_path / "stage", tmp_path / "merged")


@pytest.mark.parametrize(
    ("make", "source", "named"),
    [
        (other_seed, "stage", "is not what .* stands on: its"),
        (merged, "chain", "merged"),
        (
            lambda p: convert(write_base(p / "stage", vocab_size=333), p / "b"),
            "stage",
            "a base itself",
        ),
    ],
)
def test_a_delta_needs_its_own_base(
    tmp_path, make: Callable[[Path], Path], source: str, named: str
):
    base = make(tmp_path)
    with pytest.raises(PoEError, match=named):
        prepare(locate(tmp_path / source), base=locate(base))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--q-bits", "4"], "add -q"),
        (["--q-mode", "mxfp4"], "add -q"),
        (["--q-bits-for", "head=8"], "add -q"),
        (["-q", "--q-bits", "7"], "invalid choice"),
        (["-q", "--q-bits-for", "head"], "WHAT=BITS"),
        (["-q", "--q-bits-for", "tail=4"], "name head, embed"),
        (["-q", "--q-mode", "mxfp4", "--q-bits", "8"], "always has 4 bits"),
        (["-q", "--q-mode", "mxfp4", "--quant-predicate", "mixed_2_6"], "affine only"),
        (["--step", "5"], "no step 5"),
        (["--revision", "main"], "revision"),
        (["--base", "nowhere"], "nowhere"),
        (["--base", ""], "--base is empty"),
        (["--upload-repo", ""], "--upload-repo is empty"),
        (["--upload-repo", "a/b/c"], "--upload-repo a/b/c"),
        (["-q", "--q-bits-for", "head=0"], "q-bits 0"),
        (["-q", "--q-group-size", "0"], "q-group-size 0"),
        (["--q-group-size", "0"], "add -q"),
        (["-q", "--q-bits", "8", "--quant-predicate", "mixed_2_6"], "leave out --q-bits"),
        (["--verify", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_flags_that_make_no_sense(tmp_path, capfd, flags, named):
    argv = ["--hf-path", "poe-tiny", "--mlx-path", str(tmp_path / "out"), *flags]
    assert main(argv) in (1, 2)
    error = capfd.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_steps_and_tags_of_nanochat_are_named(tmp_path, capsys):
    run = shutil.copytree(FIXTURES / "nanochat", tmp_path / "run")
    base = run / "base_checkpoints" / "d"
    for kind in ("meta_{}.json", "model_{}.pt"):
        shutil.copy(base / kind.format("000010"), base / kind.format("000200"))
    (base / "model_000200.pt").write_bytes(b"a later step, damaged")
    assert_goldens(convert(base, tmp_path / "out", "--step", "10"), "flat-d8")
    target = ["--mlx-path", str(tmp_path / "other")]
    assert main(["--hf-path", str(base), *target, "--step", "11"]) == 1
    assert "it has: 10, 200" in capsys.readouterr().err
    assert main(["--hf-path", str(base.parent), *target]) == 1
    assert "it holds d: name one" in capsys.readouterr().err


def test_a_dry_run_writes_nothing_and_says_it_all(tmp_path, capsys):
    argv = ["--hf-path", "poe-tiny-chat", "--mlx-path", str(tmp_path / "out"), "-q", "--dry-run"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    for text in ("16 tensors", "63 tensors", "model.safetensors", "bits per weight", "3,801,230"):
        assert text in printed
    assert not list(tmp_path.iterdir())


def test_verify_prints_every_stage(tmp_path, capsys):
    convert(FIXTURES / "gqa-logop-d8", tmp_path / "out", "--verify")
    printed = capsys.readouterr().out
    rows = [line.split("│") for line in printed.splitlines() if "->" in line and "│" in line]
    assert [row[1].strip() for row in rows] == ["0", "1", "2", "3", "full"]
    assert all(row[2].strip() == "0.00000" for row in rows)


def test_only_a_few_tensors_are_held_at_a_time(tmp_path, monkeypatch):
    """What is read has been written or dropped before the next is read."""
    alive: list[str] = []
    conversion = prepare(locate(FIXTURES / "gqa-logop-d8"))

    def watched(self: Conversion, name: str, array: mx.array) -> dict[str, mx.array]:
        alive.append(name)
        return packed(self, name, array)

    packed, written = Conversion._packed, []
    _ = conversion.layout
    monkeypatch.setattr(Conversion, "_packed", watched)
    write = safetensors_files.TensorWriter.write

    def note(self: object, name: str, array: mx.array) -> None:
        write(self, name, array)  # type: ignore[arg-type]
        written.append(name)
        assert len(alive) == len(written)

    monkeypatch.setattr(safetensors_files.TensorWriter, "write", note)
    conversion.write(tmp_path / "out")
    assert written == list(conversion.weights)


# Sources that are not what they seem


def test_a_tensor_comes_from_the_shard_that_the_index_names(tmp_path):
    base = write_base(tmp_path / "base", shards=2)
    index = base / "model.safetensors.index.json"
    first, last = sorted({*json.loads(index.read_text())["weight_map"].values()})
    held = mx.load(str(base / first))
    stale = {**mx.load(str(base / last)), **{k: mx.zeros_like(v) for k, v in held.items()}}  # type: ignore[dict-item,union-attr]
    before = load(base)[0](mx.array([[1, 2, 3]]))
    mx.save_safetensors(str(base / last), stale)
    assert mx.array_equal(load(base)[0](mx.array([[1, 2, 3]])), before)


def test_a_base_with_other_matrices_is_not_the_deltas(tmp_path):
    base = convert(FIXTURES / "flat-d8", tmp_path / "base")
    arrays = mx.load(str(base / "model.safetensors"))
    assert isinstance(arrays, dict)
    arrays["lm_head.weight"] = mx.zeros_like(arrays["lm_head.weight"])
    mx.save_safetensors(str(base / "model.safetensors"), arrays)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        prepare(locate(FIXTURES / "stage-on-flat"), base=locate(base))
    # Rounding, even to 2 bits, is no difference.
    rough = convert(FIXTURES / "flat-d8", tmp_path / "rough", "-q", "--q-bits", "2")
    prepare(locate(FIXTURES / "stage-on-flat"), base=locate(rough))


def test_what_would_not_load_is_not_written(tmp_path, capsys):
    small = shutil.copytree(FIXTURES / "flat-d8", tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    card = shutil.copytree(FIXTURES / "flat-d8", tmp_path / "card")
    (card / "README.md").write_text("---\nlicense: [\n---\n")
    bomb = shutil.copytree(FIXTURES / "flat-d8", tmp_path / "bomb")
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {b"a" * n: 254 + n for n in range(2, 1000)}
    encoding = tiktoken.Encoding("b", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    (bomb / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    (bomb / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    for source, named in (
        (small, "vocab_size is 300"),
        (card, "is no model card"),
        (bomb, "vocab_size is 300"),
    ):
        assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
    with pytest.raises(TokenizerError, match="far too long"):
        write_tokenizer(tmp_path, encoding, chat=False)


def test_a_base_is_looked_for_beside_its_delta_only(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    change_config(write_stage(tmp_path / "stage"), base_model_name_or_path="base")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "stage", tmp_path / "elsewhere" / "stage")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="chain walked so far"):
        load("elsewhere/stage")


def test_names_are_not_markup(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    convert(FIXTURES / "flat-d8", Path("[/x]"))
    convert(FIXTURES / "stage-on-flat", Path("[red]y"), "--base", "[/x]")
    assert "[/x]" in capsys.readouterr().out
    assert_goldens(tmp_path / "[red]y", "stage-on-flat")


@pytest.mark.parametrize(
    "entry", [{"bits": 4.0, "group_size": 64.0}, {"bits": 0, "group_size": 64}]
)
def test_quantization_entries_that_are_none(tmp_path, entry):
    folder = convert(FIXTURES / "flat-d8", tmp_path / "out", "-q")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": entry}))
    with pytest.raises(CheckpointError, match="no valid quantization"):
        load(folder)
