"""Loading: every layout of folder, and the built-in models, against the oracle."""

import json
import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import (
    LONG,
    OWN_HEADS,
    SHORT,
    change_config,
    change_tensors,
    read_config,
    some_tokens,
    write_base,
    write_family,
    write_stage,
)
from conftest import FIXTURES, fixture
from mlx.utils import tree_flatten
from reference import Reference

from cognica_mlx.config import PoEConfig
from cognica_mlx.files import stored
from cognica_mlx.network.model import PoEModel
from mlx_poe import load, stream_generate
from mlx_poe.loading.tokenizer import Tokenizer

TOLERANCE = 2e-4


OTHER_SPELLINGS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "sequence_len": "max_position_embeddings",
}


def assert_equals_oracle(model: PoEModel, oracle: Reference, length: int = SHORT) -> None:
    """Full depth and every stage of the base, against plain numpy."""
    tokens = some_tokens(model.config.vocab_size, length)
    answers = oracle.predictions(tokens)
    ours = {"full": model(mx.array(tokens[None]))}
    together = model.forward_all_stages(mx.array(tokens[None]))
    assert len(together) == model.poe_n_stages
    for stage in range(len(model.config.stage_layers)):
        ours[f"stage_{stage}"] = together[stage]
    assert ours.keys() == answers.keys() - {"logop", "base", "spec"}
    for key, logits in ours.items():
        np.testing.assert_allclose(
            np.array(logits)[0], answers[key], rtol=0, atol=TOLERANCE, err_msg=key
        )


def rms_error(ours: mx.array, answer: mx.array) -> float:
    """Root mean square of the difference, as a share of the answer's own spread."""
    return float((mx.sqrt(mx.mean(mx.square(ours - answer))) / mx.std(answer)).item())


# --- bases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        pytest.param({"n_layer": 12, "poe_every": 3}, SHORT, id="twelve layers"),
        pytest.param(
            {"n_layer": 7, "poe_every": None, "poe_stage_layers": [4, 2, 1]}, LONG, id="uneven"
        ),
        pytest.param({"n_layer": 5, "window_pattern": "SL"}, LONG, id="SL, a short last stage"),
        pytest.param({"n_kv_head": 2, "vocab_size": 333}, SHORT, id="grouped queries"),
        pytest.param({"n_kv_head": 1, "head_dim": 32}, SHORT, id="one kv head, wide heads"),
        pytest.param({"intermediate_size": 160}, SHORT, id="own MLP width"),
        pytest.param({**OWN_HEADS, "poe_alpha": 0.5, "n_kv_head": 2}, LONG, id="own heads"),
        pytest.param({"poe_every": None}, SHORT, id="one stage"),
        pytest.param({"rope_theta": 500.0, "n_embd": 48, "n_head": 2}, SHORT, id="own theta"),
        pytest.param({"dtype": "float32"}, SHORT, id="stored in float32"),
        pytest.param({"shards": 3}, SHORT, id="shards"),
        *(
            pytest.param({"prefix": prefix}, SHORT, id=prefix)
            for prefix in ("gpt.", "model.", "_orig_mod.", "_orig_mod.gpt.", "model._orig_mod.")
        ),
    ],
)
def test_bases_equal_the_oracle(tmp_path, changes, length):
    folder = write_base(tmp_path, seed=len(str(changes)), **changes)
    model, tokenizer = load(folder, dtype="float32")
    assert tokenizer.vocab_size == model.config.vocab_size
    assert_equals_oracle(model, Reference.from_folder(folder), length)


def test_other_spellings_of_the_configuration(tmp_path):
    folder = write_base(tmp_path, n_kv_head=2)
    oracle = Reference.from_folder(folder)
    fields = read_config(folder)
    change_config(folder, **{new: fields[old] for old, new in OTHER_SPELLINGS.items()})
    change_config(folder, **dict.fromkeys(OTHER_SPELLINGS))
    assert_equals_oracle(load(folder, dtype="float32")[0], oracle)


def test_old_checkpoints_lack_lambdas_and_window_pattern(tmp_path):
    folder = write_base(tmp_path)

    def age(tensors: dict[str, np.ndarray]) -> None:
        del tensors["resid_lambdas"], tensors["x0_lambdas"]

    change_tensors(folder, age)
    change_config(folder, window_pattern=None)
    model, _ = load(folder, dtype="float32")
    assert model.config.windows == (256,) * 4
    assert model.resid_lambdas.tolist() == [1] * 4
    assert model.x0_lambdas.tolist() == [0] * 4
    assert_equals_oracle(model, Reference.from_folder(folder), LONG)


@pytest.mark.parametrize(
    "absent",
    [
        ("n_layer",),
        ("n_embd",),
        ("n_kv_head",),
        ("head_dim",),
        ("intermediate_size",),
        ("vocab_size",),
        ("per_stage_head",),
        ("n_layer", "n_embd", "n_kv_head", "head_dim", "intermediate_size", "vocab_size"),
    ],
)
def test_what_the_tensors_tell_need_not_be_configured(tmp_path, absent):
    folder = write_base(
        tmp_path, **OWN_HEADS, n_kv_head=2, head_dim=32, intermediate_size=160, vocab_size=320
    )
    whole = load(folder)[0].config
    change_config(folder, **dict.fromkeys(absent))
    assert load(folder)[0].config == whole


def test_position_tables_are_passed_over_and_padding_may_differ(tmp_path):
    folder = write_base(tmp_path)
    oracle = Reference.from_folder(folder)

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["cos"] = tensors["transformer.rotary.inv_freq"] = np.ones((2, 3), np.float32)
        for name in ("transformer.wte.weight", "lm_head.weight", "value_embeds.1.weight"):
            tensors[name] = tensors[name][:301]

    change_tensors(folder, change)
    assert_equals_oracle(load(folder, dtype="float32")[0], oracle)


@pytest.mark.parametrize(
    ("eos", "expected"), [("7", {7}), ("[7, 8]", {7, 8}), ("null", set()), ("[]", set())]
)
def test_generation_defaults_add_tokens_to_stop_at(tmp_path, eos, expected):
    folder = write_base(tmp_path)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
    assert load(folder)[1].eos_token_ids == {292, 296} | expected  # <|bos|>, <|assistant_end|>


def test_lazy_loading_gives_the_same_model(tmp_path):
    folder = write_base(tmp_path)
    assert_equals_oracle(load(folder, dtype="float32", lazy=True)[0], Reference.from_folder(folder))


# --- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        # Measured: 0.014, 0.0017, 0.019 and 0.32. The floor shows that the option took effect.
        ({"dtype": "bfloat16"}, 0.002, 0.03),
        ({"dtype": "float16"}, 0.0002, 0.004),
        ({"dtype": "float32", "quantize": 8}, 0.004, 0.06),
        ({"dtype": "float32", "quantize": 4}, 0.06, 0.8),
    ],
    ids=str,
)
def test_smaller_types_stay_near(tmp_path, options, least, most):
    folder = write_base(tmp_path, n_layer=6)
    tokens = mx.array(some_tokens(301)[None])
    answer = load(folder, dtype="float32")[0](tokens)
    model, _ = load(folder, **options)
    logits = model(tokens)
    assert logits.dtype == mx.float32
    assert least < rms_error(logits, answer) < most
    floats = {a.dtype for _, a in tree_flatten(model.parameters())} - {mx.uint32}
    assert floats == {getattr(mx, options["dtype"])}


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_other_bits_quantise_the_matrices_and_leave_the_gates(tmp_path, bits):
    model, _ = load(write_base(tmp_path), quantize=bits)
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
    block = model.h[1]
    matrices = [block.attn.c_q, block.attn.value_embed, block.mlp.c_fc, block.mlp.c_proj]
    for matrix in (*matrices, model.wte, model.lm_head):
        assert isinstance(matrix, nn.QuantizedLinear | nn.QuantizedEmbedding)
        assert matrix.bits == bits
    for gate in (block.attn.ve_gate, model.smear_gate):
        assert not isinstance(gate, nn.QuantizedLinear)


# --- specialists ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one", "two", "three"])
@pytest.mark.parametrize("share_base", [False, True])
def test_deltas_and_chains_equal_the_oracle(tmp_path, name, share_base):
    write_family(tmp_path, share_base, n_kv_head=2)
    model, _ = load(tmp_path / name, dtype="float32")
    depth = ["base", "one", "two", "three"].index(name)
    assert model.poe_n_stages == 2 + depth
    assert model.poe_stage_boundary_layers == (1, 3, 5, 6, 7)[: 2 + depth]
    assert model.config.backout_layer == 2
    assert_equals_oracle(model, Reference.from_folder(tmp_path / name), LONG if depth == 3 else 40)


def test_a_delta_on_a_base_with_own_heads_equals_the_oracle(tmp_path):
    write_base(tmp_path / "base", **OWN_HEADS)
    folder = write_stage(tmp_path / "stage")
    model, _ = load(folder, dtype="float32")
    assert model.poe_n_stages == 4
    assert_equals_oracle(model, Reference.from_folder(folder))


def test_heads_of_a_cascade_may_be_padded_differently(tmp_path):
    write_base(tmp_path / "base")
    folder = write_stage(tmp_path / "stage")
    oracle = Reference.from_folder(folder)
    change_tensors(folder, lambda t: t.update({k: v[:301] for k, v in t.items() if len(v) == 320}))
    assert_equals_oracle(load(folder, dtype="float32")[0], oracle)


@pytest.mark.parametrize(
    ("head_mode", "key"), [("dual", "full"), ("base", "base"), ("specialist", "spec")]
)
def test_head_modes_of_a_chain_equal_the_oracle(tmp_path, head_mode, key):
    folder = write_family(tmp_path)
    tokens = some_tokens(301)
    model, _ = load(folder, dtype="float32", head_mode=head_mode)
    answer = Reference.from_folder(folder).predictions(tokens)[key]
    ours = np.array(model(mx.array(tokens[None])))[0]
    np.testing.assert_allclose(ours, answer, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "absent",
    [("n_layer",), ("new_layers",), ("frozen_layers",), ("new_layers", "frozen_layers"), "all"],
)
def test_a_delta_needs_little_configuration(tmp_path, absent):
    write_base(tmp_path / "base")
    folder = write_stage(tmp_path / "stage", new_layers=2)
    whole = load(folder)[0].config
    if absent == "all":
        absent = read_config(folder).keys() - {"base_model_name_or_path"}
    change_config(folder, **dict.fromkeys(absent))
    assert load(folder)[0].config == whole


# --- built-in models ------------------------------------------------------------------------------

TINY = json.loads((FIXTURES / "poe-tiny-goldens.json").read_text())


def test_the_default_model_is_poe_tiny():
    model, tokenizer = load()
    named, _ = load("poe-tiny")
    assert model.poe_n_stages == 4
    assert tokenizer.vocab_size == model.config.vocab_size == 2048
    assert model.config == named.config
    ours, theirs = tree_flatten(model.parameters()), tree_flatten(named.parameters())
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    kind = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    assert model.lm_head.weight.dtype == kind


def test_the_built_in_specialist_has_a_fifth_stage():
    model, tokenizer = load("poe-tiny-chat")
    assert model.poe_n_stages == 5
    assert model.config.specialist_layers == (2,)
    assert tokenizer.eos_token_ids == {2039, 2043}


def test_a_folder_of_that_name_comes_before_the_built_in_model(tmp_path, monkeypatch):
    write_base(tmp_path / "poe-tiny")
    monkeypatch.chdir(tmp_path)
    assert load("poe-tiny")[0].config.vocab_size == 301


@pytest.mark.parametrize("entry", TINY["base"][::9], ids=range(0, len(TINY["base"]), 9))
def test_streamed_tokens_of_the_base_are_the_goldens(entry):
    model, tokenizer = fixture("poe-tiny")
    endless = Tokenizer(tokenizer.encoding, eos_token_ids=[])  # as the goldens were made
    modes: dict[str, dict[str, Any]] = {"full": {}}
    modes |= {f"stage_{k}": {"mode": "stage", "stage": k} for k in range(4)}
    for key, options in modes.items():
        count = len(entry[key])
        stream = stream_generate(model, endless, entry["prompt"], max_tokens=count, **options)
        assert [response.token for response in stream] == entry[key]


@pytest.mark.parametrize("entry", TINY["chat"], ids=range(len(TINY["chat"])))
def test_streamed_tokens_of_the_specialist_are_the_goldens(entry):
    model, tokenizer = fixture("poe-tiny-chat")
    responses = list(stream_generate(model, tokenizer, entry["prompt"], max_tokens=60))
    assert [response.token for response in responses] == entry["full"]
    ended = entry["full"][-1] == tokenizer.token_id("<|assistant_end|>")
    assert responses[-1].finish_reason == ("stop" if ended else "length")


def test_mlx_without_a_back_end_names_what_to_install(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: no such file')")
    for module in ("mlx_poe", "cognica_mlx.config", "cognica_mlx.convert.sources"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        last = done.stderr.splitlines()[-1]
        assert "libmlx.so: no such file" in last and "pip install 'mlx[cpu]'" in last


def test_configurations_round_trip_through_a_folder(tmp_path):
    folder = write_base(tmp_path, **OWN_HEADS, poe_alpha=0.25)
    config = load(folder)[0].config
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    assert load(folder)[0].config == config == PoEConfig.from_dict(config.to_dict())


def test_the_default_type_is_float32_on_the_cpu_and_bfloat16_on_a_gpu(monkeypatch):
    for device, dtype in ((mx.cpu, mx.float32), (mx.gpu, mx.bfloat16)):
        monkeypatch.setattr(stored.mx, "default_device", lambda device=device: device)
        assert stored.dtype_named(None) == dtype
        assert stored.dtype_named("float16") == mx.float16
    assert [stored.dtype_name(dtype) for dtype in stored.DTYPES.values()] == list(stored.DTYPES)


@pytest.mark.parametrize(
    ("module", "most", "absent"),
    [
        ("mlx_poe", 550, ["starlette", "matplotlib", "prompt_toolkit", "rich", "mlx_poe.chat"]),
        ("mlx_poe.commands.server", 600, ["matplotlib", "prompt_toolkit", "mlx_poe.chat"]),
        ("mlx_poe.chat.slash_commands", 900, ["starlette", "mlx_poe.commands", "mlx_poe.server"]),
    ],
)
def test_importing_a_module_loads_no_package_that_it_does_not_need(module, most, absent):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert module in loaded
    assert not {*absent, "mlx_lm", "huggingface_hub.hf_api"} & {*loaded}
    assert len(loaded) < most
