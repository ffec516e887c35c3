"""Where a checkpoint lies: a local folder, or a repository of the Hugging Face hub.

Only the files that a PoE model needs are fetched, never code. A delta's base is looked up from
here too: beside a local delta, but only on the hub for a delta that came from there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from cognica_mlx.errors import CheckpointError

FILES = ("*.json", "*.safetensors", "tokenizer.pkl")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder on this machine, and whether it came from the hub."""

    folder: Path
    name: str
    from_hub: bool


def locate(name: str | Path, revision: str | None = None) -> Source:
    """Find a checkpoint by its folder or its hub id, downloading it if need be.

    `revision` is a branch, tag or commit of the hub repository. huggingface_hub's own variables
    (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN) apply. Raises CheckpointError where there is no such thing.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision:
            raise CheckpointError(
                f"{name} is a local folder: a revision ({revision}) has no meaning"
            )
        return Source(folder, str(name), from_hub=False)
    if folder.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json")
    text = str(name)
    if not _HUB_ID.fullmatch(text) or ".." in text:
        raise CheckpointError(f"{name}: no such folder, and not a hub id of the form owner/name")
    try:
        snapshot = snapshot_download(text, revision=revision, allow_patterns=list(FILES))
    except (OSError, HFValidationError, ValueError) as error:
        # huggingface_hub's errors for a missing repository, a refused one and being offline are
        # all OSErrors; their first line says which.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{text}: no such folder here, and the hub did not give it ({reason})"
        ) from None
    return Source(Path(snapshot), text, from_hub=True)


def locate_base(reference: str, delta: Source) -> Source:
    """Find the base that `delta` names: relative to its folder, or by hub id."""
    if not delta.from_hub:
        beside = (delta.folder / Path(reference).expanduser()).resolve()
        if beside.is_dir():
            return Source(beside, str(beside), from_hub=False)
    elif not _HUB_ID.fullmatch(reference) or ".." in reference:
        raise CheckpointError(
            f"{delta.name} comes from the hub and names {reference!r} as its base, "
            "which is not a hub id"
        )
    return locate(reference)
