"""Write a trained stage as a specialist's folder, in the released layout.

- in: the checkpoint below it, the trained parameters, the chat tokens' embeddings
- out: `delta.safetensors` with the released names, a configuration that names the base, tokenizer
  files, a model card; whole or not at all
- the base's embeddings and lambdas are copied bit by bit
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from cognica_mlx.config import PoEConfig
from cognica_mlx.convert.checkpoint import Checkpoint
from cognica_mlx.convert.conversion import SMALL_FILES_BYTES, delta_fields, write_config
from cognica_mlx.convert.formats.tokenizer_files import FILE_NAME, read_encoding
from cognica_mlx.convert.formats.tokenizer_json import write_tokenizer
from cognica_mlx.convert.formats.whole_folder import new_folder
from cognica_mlx.convert.model_card import card
from cognica_mlx.convert.quantization import to_fields
from cognica_mlx.files.safetensors_files import TensorWriter, nbytes
from cognica_mlx.files.stored import dtype_name
from cognica_mlx.training.stage import LAMBDAS
from cognica_mlx.training.trainer import Training

# The released files beside a pickled tokenizer.
_TOKENIZER = (FILE_NAME, "tokenizer_config.json", "special_tokens_map.json", "token_bytes.pt")
_MOST_ROWS = 12  # about


@dataclass(frozen=True)
class Delta:
    """The content of a specialist's folder.

    `state` has the parameters to save and their type; `embeddings` maps tokens to the tokens whose
    rows of the base's table they use; `base_name` is the base's name for people, `reference` the
    one written to the folder.
    """

    base: Checkpoint
    config: PoEConfig
    state: Training
    embeddings: dict[int, int]
    base_name: str
    reference: str
    training: dict[str, Any]

    def write(self, target: Path, overwrite: bool) -> None:
        """Write the folder, whole or not at all.

        Raises CheckpointError or OSError if it cannot be written, RequestError if `target` must
        not be replaced.
        """
        tensors = self._tensors()
        specs = [(name, array.shape, array.dtype) for name, array in tensors.items()]
        size = sum(map(nbytes, specs)) + SMALL_FILES_BYTES
        with new_folder(target, size, overwrite) as folder:
            writer = TensorWriter(folder / "delta.safetensors", specs)
            for name, array in tensors.items():
                writer.write(name, array)
            writer.close()
            self._write_small_files(folder, target)

    def _tensors(self) -> dict[str, mx.array]:
        """The tensors by their released names."""
        head = f"lm_head_specialists.{len(self.config.specialist_layers) - 1}.weight"
        found = {
            f"transformer.{name}": array
            for name, array in self.state.best.items()
            if name.startswith("h.")
        }
        found["lm_head_stage.weight"] = self.state.best[head]
        # The table as it is stored, packed or not, with `embeddings` applied.
        for name in self.base.weights:
            if name.rpartition(".")[0] == "wte":
                table = self.base.weights[name].read()
                if self.embeddings:
                    table[mx.array(list(self.embeddings))] = table[
                        mx.array(list(self.embeddings.values()))
                    ]
                found[f"transformer.{name}"] = table
        for name in LAMBDAS:
            ours = self.base.weights[name].read()
            new = self.state.best[name].astype(ours.dtype)
            found[name] = mx.concatenate([ours, new])
        mx.eval(found)
        return found

    def _write_small_files(self, folder: Path, target: Path) -> None:
        encoding = read_encoding(self.base.tokenizer_folder)
        if (self.base.tokenizer_folder / FILE_NAME).is_file():
            for name in _TOKENIZER:
                if (self.base.tokenizer_folder / name).is_file():
                    shutil.copyfile(self.base.tokenizer_folder / name, folder / name)
        else:
            write_tokenizer(folder, encoding, chat=True)
        dtype = next(a.dtype for k, a in self.state.best.items() if k.startswith("h."))
        fields = delta_fields(self.config, self.reference, self.base) | {
            "dual_head": self.config.head_mode == "dual",
            "torch_dtype": dtype_name(dtype),
            "stage_training": self.training,
        }
        if "wte" in self.base.plan:
            entry = to_fields({"wte": self.base.plan["wte"]})
            fields["quantization"] = fields["quantization_config"] = entry
        write_config(folder, fields, encoding)
        text = self._card(target.resolve().name)
        (folder / "README.md").write_text(text, encoding="utf-8", errors="replace")

    def _card(self, name: str) -> str:
        """The model card: data, settings, loss curve, how to use it."""
        about = f"A specialist stage over `{self.base_name}`, trained with `mlx_poe.train`."
        rows = {"base": f"`{self.base_name}`", **self.training}
        kept, curve = self.state.best_iteration, self.state.curve
        lines = [
            "| iteration | train loss | validation loss | bits per byte |",
            "|---|---|---|---|",
        ]
        step = max(-(-len(curve) // _MOST_ROWS), 1)
        for i in sorted({*range(0, len(curve), step), len(curve) - 1}):
            e = curve[i]
            train = "" if e.train_loss is None else f"{e.train_loss:.4f}"
            lines += [f"| {e.iteration} | {train} | {e.valid_loss:.4f} | {e.bits_per_byte:.4f} |"]
        lines += [
            "",
            f"Losses are in nats per counted token. The weights are those of iteration "
            f"{kept}, which has the lowest validation loss. This folder needs its",
            "base, which `base_model_name_or_path` in config.json names.",
            "",
            "```bash",
            f"poe-chat --specialist {name}=path/to/{name} --model {self.base_name}",
            "```",
        ]
        return card(self.base, name, about, rows, lines)
