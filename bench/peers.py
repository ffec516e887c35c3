"""mlx-lm's own engine on its own model of equal size, measured in the same trials as ours.

The peer is mlx-lm's Llama with our width, depth, heads and vocabulary, and with an MLP of the same
size (Llama's has three matrices, so each is two thirds as wide). Weights are random. For its
draft-model speculation, the draft model is the big model's first layers, as many as stage 0 has,
and the big model's other layers add nothing. So every draft is accepted, the best case for its
speculation, while the big model's work is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import mlx.core as mx
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import llama

from cognica_mlx.bench.sections.stage_speeds import Figure, Setup, cut_mode, cut_name, figure
from cognica_mlx.bench.shapes import random_weights
from cognica_mlx.bench.timing import Samples, first_and_next
from cognica_mlx.config import PoEConfig
from cognica_mlx.decoding.single import decode

DRAFTS = 3


def peer_model(config: PoEConfig, n_layer: int, dtype: mx.Dtype) -> llama.Model:
    """mlx-lm's Llama in our model's shape, `n_layer` deep, with random weights."""
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=config.n_embd,
            num_hidden_layers=n_layer,
            intermediate_size=config.intermediate_size * 2 // 3,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head,
            head_dim=config.head_dim,
            rms_norm_eps=1e-6,
            vocab_size=config.padded_vocab_size,
            max_position_embeddings=config.sequence_len,
            tie_word_embeddings=False,
        )
    )
    model.update(random_weights(model, dtype))
    return model


def peers(setup: Setup, prompt_tokens: int) -> list[Figure]:
    """Our full depth and stage 0, and mlx-lm's engine, plain and with its draft-model speculation:
    a token's latency, and tokens per second when reading a prompt of `prompt_tokens`."""
    config, model, prompt = setup.model.config, setup.model, setup.text(prompt_tokens)
    big = peer_model(config, config.n_layer, model.resid_lambdas.dtype)
    depth = len(config.stage_range(0))
    for layer in big.model.layers[depth:]:
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)
    mx.eval(big.parameters())
    draft = _beginning(big, depth)

    def ours(stage: int | None) -> Iterable[object]:
        return decode(model, prompt, cut_mode(model, stage), max_tokens=setup.tokens)

    def theirs(drafts: int = 0) -> Iterable[object]:
        text, most = mx.array(prompt), setup.tokens
        if not drafts:
            return generate_step(text, big, max_tokens=most)
        return speculative_generate_step(text, big, draft, num_draft_tokens=drafts, max_tokens=most)

    plain, full = "mlx-lm's Llama of equal size", f"ours, {cut_name(None)}"
    drafted = f"mlx-lm's Llama, {depth}-layer draft model, all of {DRAFTS} drafts accepted"
    runs: dict[str, Callable[[], Iterable[object]]] = {
        plain: theirs,
        drafted: partial(theirs, DRAFTS),
        full: partial(ours, None),
        f"ours, {cut_name(0)}": partial(ours, 0),
    }
    reading: dict[str, list[float]] = {name: [] for name in runs}

    def run(name: str) -> float:
        first, each = first_and_next(runs[name]())
        reading[name].append(len(prompt) / first)
        return 1e3 * each

    taken = setup.interleaved({name: partial(run, name) for name in runs}, "peers")
    figures = [
        figure("peers", name, "ms/token", samples, baseline=taken[plain])
        for name, samples in taken.items()
    ]
    prompts = {name: Samples(tuple(speeds[1:])) for name, speeds in reading.items()}
    for name in (plain, full):
        label, base = f"{name}, prompt of {len(prompt)} tokens", prompts[plain]
        figures.append(figure("peers", label, "tokens/s", prompts[name], baseline=base))
    return figures


def _beginning(big: llama.Model, depth: int) -> llama.Model:
    """A draft model made of the big model's embedding, first `depth` layers and head."""
    draft = llama.Model(replace(big.args, num_hidden_layers=depth))
    draft.model.embed_tokens, draft.model.norm = big.model.embed_tokens, big.model.norm
    draft.model.layers, draft.lm_head = big.model.layers[:depth], big.lm_head
    return draft
