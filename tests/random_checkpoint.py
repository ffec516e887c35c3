"""A Hugging Face style checkpoint in a released model's real shape, with random bfloat16 weights.

    python tests/random_checkpoint.py 1.3b path/to/folder

For measuring what needs size and not sense. The tokenizer is of single bytes.
"""

import json
import re
import sys
from pathlib import Path

import mlx.core as mx
from checkpoints import write_tokenizer
from mlx.utils import tree_flatten

from cognica_mlx.bench.shapes import SHAPES
from cognica_mlx.config import PoEConfig
from cognica_mlx.files.safetensors_files import TensorWriter
from cognica_mlx.network.model import PoEModel

BASES = [name for name in SHAPES if "specialist_layers" not in SHAPES[name]]


def released_name(name: str) -> str:
    """A parameter's name in a released checkpoint."""
    if match := re.fullmatch(r"h\.(\d+)\.attn\.value_embed\.weight", name):
        return f"value_embeds.{match[1]}.weight"
    return f"transformer.{name}" if name.startswith(("h.", "wte.")) else name


def main(shape: str, folder: Path) -> None:
    """Write the checkpoint, a tensor at a time."""
    fields = {**SHAPES[shape], "torch_dtype": "bfloat16"}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    write_tokenizer(folder, fields["vocab_size"])
    parameters = dict(tree_flatten(PoEModel(PoEConfig.from_dict(fields)).parameters()))
    specs = [(released_name(name), p.shape, mx.bfloat16) for name, p in parameters.items()]
    writer = TensorWriter(folder / "model.safetensors", specs)
    for name, size, dtype in specs:
        scale = 1.0 if name == "resid_lambdas" else 0.02
        writer.write(name, (mx.random.normal(size) * scale).astype(dtype))
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in BASES:
        sys.exit(f"usage: {sys.argv[0]} {{{','.join(BASES)}}} FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
