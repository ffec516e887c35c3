"""Checkpoint folders that tests write, change and load."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from reference import read_tensors, write_checkpoint, write_delta, write_tensors

from cognica_mlx.errors import CheckpointError, ConfigError, RequestError, TokenizerError
from mlx_poe import load

SHORT, LONG = 40, 300  # tokens; LONG lies beyond every window of a sequence_len of 256
SPECIAL = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
SPECIAL += ("python_start", "python_end", "output_start", "output_end")

SMALL: dict[str, Any] = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 64,
    "sequence_len": 256,
    "vocab_size": 301,
    "poe_every": 2,
}
OWN_HEADS = {"per_stage_head": True, "poe_stage_layers": [2, 1, 1], "poe_every": None}


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of single bytes, with the special tokens at the vocabulary's end."""
    encoding = tiktoken.Encoding(
        "bytes",
        pat_str=r"\S+|\s+",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={f"<|{s}|>": vocab_size - 9 + i for i, s in enumerate(SPECIAL)},
    )
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))


def write_base(folder: Path, seed: int = 1, **changes: Any) -> Path:
    options = SMALL | changes
    write_checkpoint(folder, seed, **options)
    write_tokenizer(folder, options["vocab_size"])
    return folder


def write_stage(folder: Path, seed: int = 2, **changes: Any) -> Path:
    write_delta(folder, seed, **({"base": "../base", "new_layers": 1} | changes))
    write_tokenizer(folder, read_config(folder)["vocab_size"])
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    fields = json.loads((folder / "config.json").read_text())
    assert isinstance(fields, dict)
    return fields


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of a folder's config.json; None takes them away."""
    fields = read_config(folder) | changes
    kept = {key: value for key, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Edit the tensors of a folder's one safetensors file."""
    (file,) = folder.glob("*.safetensors")
    tensors = read_tensors(file)
    change(tensors)
    write_tensors(file, tensors, "bfloat16")


def some_tokens(vocab_size: int, length: int = SHORT) -> np.ndarray:
    return np.random.default_rng(length).integers(0, vocab_size, length)


def write_family(folder: Path, share_base: bool = False, **base: Any) -> Path:
    """A base, a specialist on it and two more on top of that; the last one's folder."""
    write_base(folder / "base", **base)
    write_stage(folder / "one", 2, new_layers=2, share_base=share_base, prefix="gpt.")
    write_stage(folder / "two", 3, base="../one", prefix="_orig_mod.")
    return write_stage(folder / "three", 4, base=str(folder / "two"), share_base=share_base)


def assert_refused(folder: Path | str, kind: type[Exception], named: str, **options: Any) -> str:
    """Loading fails with this kind of error, in one line that holds `named`."""
    with pytest.raises((CheckpointError, ConfigError, TokenizerError, RequestError)) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert caught.type is kind, message
    assert named in message
    assert "\n" not in message
    return message
