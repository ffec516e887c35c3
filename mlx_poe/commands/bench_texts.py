"""What models are measured on: the texts that they continue, and how poe-tiny predicts its own."""

from __future__ import annotations

import argparse

import numpy as np

from cognica_mlx.bench.sections.drafts import BEGINNINGS, QUESTIONS
from cognica_mlx.bench.sections.mode_speeds import Recording
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.measuring import record
from mlx_poe.loading.load import DEFAULT_MODEL, load


def recording() -> Recording:
    """How poe-tiny predicts its own texts."""
    tiny, tokenizer = load(DEFAULT_MODEL)
    assert tiny.calibration is not None, "poe-tiny comes with one"
    texts = [tokenizer.encode(text) for text in BEGINNINGS]
    traces = record(tiny, texts, count=len(texts), tokens=64)
    return Recording(traces, tiny.calibration.p99_bounds)


def margins() -> list[float]:
    """Those of poe-tiny's stage 0 along its own texts."""
    return np.concatenate([trace.margins[0] for trace in recording().traces]).tolist()


def long_text(parts: list[list[int]], count: int, bos: int) -> list[int]:
    """A text of `count` tokens that ends with a whole beginning."""
    joined = [token for part in parts for token in part]
    text = joined * (count // len(joined) + 1)
    return [bos, *text[len(text) - count + 1 :]]


def prompts(args: argparse.Namespace, model: PoEModel) -> list[list[int]]:
    """The prompts of the section drafts; none for a shape without weights to reply with."""
    if args.shape:
        return []
    _, tokenizer = load(args.model, revision=args.revision, lazy=True)
    if not model.config.specialist_layers:
        return [tokenizer.encode(text) for text in BEGINNINGS]
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(turn) for turn in turns]
