"""The converter: every source through every path, and what it writes."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import write_base
from conftest import FIXTURES, SOAK, fixture, goldens
from converting import NANOCHAT_BASE, NANOCHAT_STAGE, assert_goldens, convert, tensors
from mlx.utils import tree_flatten

from cognica_mlx.convert import conversion as conversion_module
from cognica_mlx.convert.conversion import prepare, upload
from cognica_mlx.convert.quantization import make_plan, mixed, scheme
from cognica_mlx.convert.sources import Source, locate
from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.files import safetensors_files
from cognica_mlx.network.model import PoEModel
from cognica_mlx.scheme import Scheme
from mlx_poe import load
from mlx_poe.commands.convert import main
from mlx_poe.loading.verify import compare


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
@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--dtype", "float32"), marks=SOAK)], ids=["as stored", "float32"]
)
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
    mx.eval(arrays)  # before their file is written over
    mx.save_safetensors(str(base / "model.safetensors"), arrays)
    folder = convert(base, tmp_path / "out")
    assert all(
        a.shape[0] == 320 for k, a in tensors(folder).items() if "wte" in k or "lm_head" in k
    )
    tokens = mx.array([[1, 2, 3, 300]])
    # A product over other numbers of rows may sum in another order.
    assert mx.abs(load(folder)[0](tokens) - load(base)[0](tokens)).max().item() < 1e-5


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
    with pytest.raises(RequestError, match="quantized heads"):
        prepare(locate(delta))


@pytest.mark.parametrize("bits", [3, 8])
def test_loading_quantised_equals_converting(tmp_path, bits):
    folder = convert(Path("poe-tiny"), tmp_path / "out", "-q", "--q-bits", str(bits))
    converted, _ = load(folder, dtype="bfloat16")
    in_memory, _ = load("poe-tiny", dtype="bfloat16", quantize=bits)
    for (name, a), (_, b) in zip(
        tree_flatten(converted.parameters()), tree_flatten(in_memory.parameters()), strict=True
    ):
        assert mx.array_equal(a, b), name
    with pytest.raises(RequestError, match="already quantized"):
        load(folder, quantize=4)
    with pytest.raises(RequestError, match="already quantized"):
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
    # Of ten layers the first, the last two, and every third between.
    more = [i for i in range(config.n_layer) if recipe[f"h.{i}.attn.c_v"].bits == 6]
    assert more == [0, 3, 6, 8, 9]
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


@SOAK
def test_four_bits_still_know_the_facts(tmp_path):
    """With ALL_BITS=1 and `-n 0 -s` it prints the table in docs/measured.md."""
    model, tokenizer = load("poe-tiny")
    texts = [tokenizer.encode((FIXTURES / "heldout.txt").read_text())[:512]]
    n_bytes = tokenizer.token_byte_lengths(model.config.vocab_size)
    before = sum(answered(model, tokenizer, PROBES))
    assert before >= 0.9 * len(PROBES)
    rows = [f"bf16 {before}"]
    for bits in (2, 3, 4, 6, 8) if os.environ.get("ALL_BITS") else (4,):
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
    with pytest.raises(CheckpointError, match=r"to owner/refused .*no route\)$"):
        upload(out, "owner/refused")
    flags = ["--base", str(out), "--upload-repo", "owner/mine"]
    stage = str(FIXTURES / "stage-on-flat")
    assert main(["--hf-path", stage, "--mlx-path", str(tmp_path / "d"), *flags]) == 2
    assert not (tmp_path / "d").exists()
