"""Evaluate a new specialist: calibrate it, time it, and measure it on unseen rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from cognica_mlx.calibration_file import CALIBRATION_FILE, Calibration
from cognica_mlx.decoding.choosing import logprob_of
from cognica_mlx.decoding.sampling import bits_per_byte
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.measuring import calibrate
from cognica_mlx.training.batches import Text
from mlx_poe.generation.text import stream_generate
from mlx_poe.loading.load import load
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.training.data import first_texts

# Tokens to calibrate on and continuations to try drafts in; replies to time, and their length.
MOST_TOKENS, CONTINUATIONS = 4096, 8
REPLIES, REPLY_TOKENS = 4, 64
TIMED_MODES = ("full", "speculative")


@dataclass(frozen=True)
class Speed:
    """A mode's tokens per second over a few replies, and the share of its drafts that were kept."""

    tokens_per_second: float
    acceptance: float | None


def calibrate_folder(
    folder: Path,
    dtype: str | None,
    texts: Sequence[Text],
    progress: Callable[[str, int, int], None],
) -> tuple[Calibration, dict[str, Speed]]:
    """Calibrate the specialist in `folder` on the first of the `texts`, write the file to the
    folder, and time replies to their prompts."""
    model, tokenizer = load(folder, dtype=dtype)
    chosen = first_texts(texts, MOST_TOKENS)
    calibration = calibrate(
        model,
        [text.tokens.tolist() for text in chosen],
        tokenizer.token_byte_lengths(model.config.vocab_size),
        continuations=CONTINUATIONS,
        counted=[text.counted.tolist() for text in chosen],
        progress=progress,
    )
    calibration.save(folder / CALIBRATION_FILE)
    model.calibration = calibration
    return calibration, {mode: _speed(model, tokenizer, mode, texts) for mode in TIMED_MODES}


def _speed(model: PoEModel, tokenizer: Tokenizer, mode: str, texts: Sequence[Text]) -> Speed:
    tokens, seconds, drafted, kept = 0, 0.0, 0, 0
    for text in texts[:REPLIES]:
        prompt = text.tokens[: int(np.flatnonzero(text.counted)[0])].tolist()
        stream = stream_generate(model, tokenizer, prompt, max_tokens=REPLY_TOKENS, mode=mode)
        last = next(stream)
        kept += last.from_draft
        started = time.perf_counter()  # without the prompt's time
        for last in stream:
            tokens += 1
            kept += last.from_draft
        seconds += time.perf_counter() - started
        drafted += last.drafted_tokens
    return Speed(tokens / max(seconds, 1e-9), kept / drafted if drafted else None)


def measured_bits(folder: Path, dtype: str | None, texts: Sequence[Text]) -> float:
    """Bits per byte of the counted tokens of `texts`, under the model in `folder`."""
    model, _ = load(folder, dtype=dtype)
    nats = 0.0
    for text in texts:
        tokens = mx.array(text.tokens)
        logprobs = logprob_of(model(tokens[None])[0, :-1], tokens[1:])
        nats -= float((logprobs * mx.array(text.counted[1:])).sum())
    return bits_per_byte(nats, sum(text.n_bytes for text in texts))
