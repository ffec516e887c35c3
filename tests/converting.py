"""The converter as tests run it, and what it wrote."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from conftest import FIXTURES, fixture, goldens
from safetensors import safe_open

from mlx_poe import load
from mlx_poe.commands.convert import main

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


def entries(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
