"""Configurations: every form read, every number derived, every contradiction named."""

import json

import pytest
from conftest import FIXTURES, GOLDENS
from mlx.utils import tree_flatten

from cognica_mlx.config import PoEConfig
from cognica_mlx.errors import ConfigError
from cognica_mlx.network.model import PoEModel

BASE_13 = {
    "n_layer": 24,
    "n_head": 12,
    "n_kv_head": 12,
    "n_embd": 1536,
    "head_dim": 128,
    "vocab_size": 32768,
    "sequence_len": 2048,
    "window_pattern": "SSSL",
    "poe_every": 6,
}
BASE_15 = {
    **BASE_13,
    "n_kv_head": 6,
    "vocab_size": 48000,
    "poe_every": 1,
    "poe_stage_layers": [12, 5, 4, 3],
    "per_stage_head": True,
}
BASE_3 = {
    **BASE_13,
    "n_layer": 32,
    "n_head": 16,
    "n_kv_head": 8,
    "n_embd": 2048,
    "poe_stage_layers": [16, 6, 5, 5],
    "per_stage_head": True,
    "intermediate_size": 12800,
}
SMALL = {"n_layer": 4, "n_head": 2, "n_embd": 32, "vocab_size": 100, "sequence_len": 256}


def parameter_count(config: PoEConfig) -> int:
    return sum(array.size for _, array in tree_flatten(PoEModel(config).parameters()))


@pytest.mark.parametrize(
    ("fields", "count"),
    [(BASE_13, 1_384_122_122), (BASE_15, 1_507_591_082), (BASE_3, 3_019_900_506)],
    ids=["1.3B", "1.5B", "3B"],
)
def test_released_models_have_their_published_parameter_counts(fields, count):
    # The 3B's published count is "about 3.02e9"; the last digits are this module's own.
    assert parameter_count(PoEConfig.from_dict(fields)) == count


def test_specialist_adds_its_delta_but_for_what_it_replaces():
    stage = {**BASE_13, "n_layer": 28, "frozen_layers": 24, "new_layers": 4}
    added = parameter_count(PoEConfig.from_dict(stage)) - 1_384_122_122
    replaced = 32768 * 1536 + 24 + 24  # wte, and the lambdas of the base's layers
    assert added == 213_909_560 - replaced


def test_boundaries_windows_and_value_embeddings_of_the_released_shapes():
    flat = PoEConfig.from_dict(BASE_13)
    assert flat.poe_stage_boundary_layers == (5, 11, 17, 23)
    assert flat.windows[:4] == (512, 512, 512, 2048) and flat.windows[-1] == 2048
    assert flat.value_embed_layers == tuple(range(1, 24, 2))
    assert flat.backout_layer == 12
    uneven = PoEConfig.from_dict(BASE_15)
    assert uneven.poe_stage_boundary_layers == (11, 16, 20, 23)
    assert uneven.head_dim == 128 and uneven.intermediate_size == 4 * 1536


def test_last_stage_takes_what_poe_every_leaves_over():
    config = PoEConfig.from_dict({**SMALL, "n_layer": 7, "poe_every": 3})
    assert config.poe_stage_boundary_layers == (2, 5, 6)


def test_last_layer_is_long_whatever_the_pattern():
    config = PoEConfig.from_dict({**SMALL, "sequence_len": 2048, "window_pattern": "s"})
    assert config.windows == (512, 512, 512, 2048)


def test_specialist_keeps_the_base_backout_and_recomputes_the_windows():
    fields = {**SMALL, "poe_every": 2, "window_pattern": "SSSL", "sequence_len": 2048}
    config = PoEConfig.from_dict({**fields, "n_layer": 6, "frozen_layers": 4, "new_layers": 2})
    assert config.backout_layer == 2 and config.base_n_layer == 4
    assert config.windows == (512, 512, 512, 2048, 512, 2048)
    assert config.poe_n_stages == 3 and config.poe_stage_boundary_layers == (1, 3, 5)
    assert config.value_embed_layers == (1, 3)


def test_chain_needs_its_base_and_stacks_on_it():
    base = PoEConfig.from_dict({**SMALL, "poe_every": 2})
    first = PoEConfig.from_dict({**SMALL, "n_layer": 6, "frozen_layers": 4}, base=base)
    second = PoEConfig.from_dict({**SMALL, "n_layer": 7, "new_layers": 1}, base=first)
    assert second.specialist_layers == (2, 1) and second.base_n_layer == 4
    assert second.poe_stage_boundary_layers == (1, 3, 5, 6)


def test_hugging_face_spellings():
    config = PoEConfig.from_dict(
        {
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 64,
            "max_position_embeddings": 512,
            "vocab_size": 300,
        }
    )
    assert (config.n_layer, config.n_head, config.n_kv_head) == (4, 4, 2)
    assert config.n_embd == 64 and config.sequence_len == 512
    assert config.padded_vocab_size == 320
    assert config.windows == (512,) * 4 and config.stage_layers == (4,)


def test_nanochat_meta_takes_the_stages_from_the_training_options():
    meta = {"model_config": SMALL, "user_config": {"poe_every": 2, "depth": 99}, "step": 10}
    assert PoEConfig.from_dict(meta).stage_layers == (2, 2)
    both = {"model_config": {**SMALL, "poe_every": 1}, "user_config": {"poe_every": 0}}
    assert PoEConfig.from_dict(both).stage_layers == (1, 1, 1, 1)


@pytest.mark.parametrize("name", GOLDENS)
def test_to_dict_reads_back_equal(name):
    config = PoEConfig.from_dict(json.loads((FIXTURES / name / "config.json").read_text()))
    assert PoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_layer": None}, "n_layer"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_layer": "4"}, "n_layer"),
        ({"n_layer": 10**12, "poe_every": 1}, "n_layer"),
        ({"n_head": 3}, "head_dim"),
        ({"n_kv_head": 3}, "n_kv_head"),
        ({"head_dim": 15}, "head_dim"),
        ({"n_embd": 16}, "n_embd"),
        ({"window_pattern": "SXL"}, "window_pattern"),
        ({"window_pattern": ""}, "window_pattern"),
        ({"poe_stage_layers": [2, 3]}, "stage_layers"),
        ({"poe_stage_layers": [4, 0]}, "stage_layers"),
        ({"poe_every": -1}, "poe_every"),
        ({"head_mode": "both"}, "head_mode"),
        ({"hidden_size": 64}, "n_embd"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"poe_alpha": 600, "per_stage_head": True}, "poe_alpha: 600 is not between -1 and 2"),
        ({"poe_alpha": 1e29}, "poe_alpha"),
        ({"poe_alpha": -1.5}, "poe_alpha"),
        ({"poe_alpha": float("nan")}, "poe_alpha"),
        ({"value_embed_layers": [9]}, "value_embed_layers"),
        ({"frozen_layers": 4, "new_layers": 1}, "frozen_layers|n_layer"),
        ({"n_layer": 6, "frozen_layers": 4, "new_layers": 3}, "new_layers"),
    ],
)
def test_wrong_fields_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        PoEConfig.from_dict({**SMALL, **change})


def test_specialist_must_fit_its_base():
    base = PoEConfig.from_dict(SMALL)
    stage = {**SMALL, "n_layer": 6, "frozen_layers": 4}
    with pytest.raises(ConfigError, match=r"frozen_layers: 5"):
        PoEConfig.from_dict({**stage, "frozen_layers": 5}, base=base)
    with pytest.raises(ConfigError, match=r"n_embd: 64"):
        PoEConfig.from_dict({**stage, "n_embd": 64}, base=base)
