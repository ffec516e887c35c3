"""The README.md of a converted folder: its source, the settings, and how to run it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from huggingface_hub import ModelCard, ModelCardData

from cognica_mlx.convert.checkpoint import Checkpoint
from cognica_mlx.convert.sources import Source
from cognica_mlx.errors import CheckpointError

MOST_CARD_BYTES = 2**20
_LICENSE = re.compile(r"[\w.+ -]{1,60}")


def model_card(
    checkpoint: Checkpoint,
    name: str,
    settings: dict[str, str],
    base: Source | None,
    calibrated: bool,
) -> str:
    """The card as Markdown, with the hub's metadata in front.

    `settings` are the conversion's settings as text; `base` is the converted folder that a delta
    refers to.
    """
    chain = [link.source for link in checkpoint.chain]
    links = [f"`{s.name if s.from_hub else s.folder.resolve().name}`" for s in chain]
    rows = {
        "source": " on ".join(links),
        "revision": checkpoint.revision or "local files",
        **settings,
        "license": license_of(checkpoint) or "the source names none: its own terms apply",
    }
    lines = ["With cognica-mlx installed:", "", "```bash"]
    lines.append(f'mlx_poe.generate --model {name} --prompt "The capital of France is"')
    if base is None:
        lines.append(f"mlx_lm.generate --model {name} --trust-remote-code --prompt ...")
    lines += ["```", ""]
    if base is None:
        lines.append("mlx-lm runs it at full depth; its `--trust-remote-code` is needed to import")
        lines.append("cognica-mlx, which is all that the Python file in this folder does.")
    else:
        lines.append(f"This folder holds only what was trained on top of `{base.name}`, and needs")
        lines.append("that model at the path `base_model_name_or_path` in config.json.")
    if calibrated:
        lines += ["", "`poe_calibration.json` was measured on the source. Rounding shifts margins:"]
        lines.append("run `mlx_poe.calibrate` to measure again what the adaptive modes promise.")
    about = "A Cognica Product-of-Experts language model for MLX."
    return card(checkpoint, name, about, rows, lines)


def card(
    source: Checkpoint, title: str, about: str, rows: Mapping[str, object], lines: Sequence[str]
) -> str:
    """A README.md about a model made from `source`: the hub's metadata, a title, a sentence, a
    table of `rows` and versions, and further lines."""
    data = ModelCardData(
        license=license_of(source),
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "cognica-poe"],
        base_model=source.source.name if source.source.from_hub else None,
    )
    made = f"cognica-mlx {version('cognica-mlx')}, MLX {version('mlx')}"
    table = [f"| {key} | {value} |" for key, value in {**rows, "made with": made}.items()]
    head = ["---", data.to_yaml(), "---", "", f"# {title}", "", about, "", "| | |", "|---|---|"]
    return "\n".join([*head, *table, "", *lines]) + "\n"


def license_of(checkpoint: Checkpoint) -> str | None:
    """The license that the nearest model card in the chain names, if any.

    Raises CheckpointError for a card that cannot be read.
    """
    card = checkpoint.source.folder / "README.md"
    if card.is_file() and card.stat().st_size < MOST_CARD_BYTES:
        try:
            named = ModelCard(card.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True)
        except Exception as error:  # whatever its YAML reader raises
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{card} is not a valid model card ({reason}): fix the part between its --- lines, "
                "or remove the file"
            ) from None
        license_name = named.data.get("license")
        if isinstance(license_name, str) and _LICENSE.fullmatch(license_name):
            return license_name
    return license_of(checkpoint.base) if checkpoint.base else None
