"""Finds checkpoints: in a local folder, or in a repository on the Hugging Face hub.

Only the files that a PoE model needs are downloaded, never code. A delta's base is found here too:
relative to a local delta's folder, but only on the hub for a delta that came from there.

A revision is a branch, tag or commit. After a colon it may go on with that of a delta's base, and
of the base's own base: "v1:5a0f3c1". A name may end in one: "owner/name@v1:5a0f3c1".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub  # its client takes long to load, and most models are in folders

from cognica_mlx.errors import CheckpointError

FILES = ("*.json", "*.safetensors", "tokenizer.pkl", "README.md", "LICENSE")
_HUB_ID = re.compile(r"(?!.*\.\.)[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A checkpoint's folder on this machine, and whether it came from the hub.

    `revision` is the commit that was downloaded, `pinned` whether a certain one was asked for, and
    `base_revision` the revision that was asked for its base.
    """

    folder: Path
    name: str
    from_hub: bool
    revision: str | None = None
    pinned: bool = False
    base_revision: str | None = None


def locate(name: str | Path, revision: str | None = None) -> Source:
    """Find a checkpoint by its folder or its hub id, downloading it if need be.

    `revision` is one of the hub repository, and perhaps of its base. huggingface_hub's own
    variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN) apply. Raises CheckpointError if there is none.
    """
    folder = _existing(name)
    if folder is None:
        hub_id, _, named = str(name).partition("@")
        if named and revision:
            raise CheckpointError(f"{name} names a revision, so leave out the revision {revision}")
        return _fetch(hub_id, named or revision)
    if not folder.is_dir():
        raise CheckpointError(f"{name} is a file: give the folder that holds config.json")
    return _local(folder, str(name), revision)


def locate_base(reference: str, delta: Source, revision: str | None) -> Source:
    """Find the base that `delta` names: relative to its folder, or by hub id and `revision`."""
    if not delta.from_hub:
        beside = _existing(reference, delta.folder)
        if beside and beside.is_dir():
            return _local(beside.resolve(), reference, revision)
    # Otherwise never relative to the current folder, whatever is there.
    elif not _HUB_ID.fullmatch(reference):
        raise CheckpointError(
            f"{delta.name} comes from the hub and names {reference!r} as its base, "
            "which is not a hub id"
        )
    return _fetch(reference, revision)


def _local(folder: Path, name: str, revision: str | None) -> Source:
    own, _, base = (revision or "").partition(":")
    if own:
        raise CheckpointError(f"{name} is a local folder, which has no revision {own}")
    return Source(folder, str(folder), from_hub=False, base_revision=base or None)


def _existing(name: str | Path, beside: Path = Path()) -> Path | None:
    """The file or folder of that name, relative to `beside`; None if there is none."""
    try:
        path = beside / Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        # Not a possible path: too long, contains a NUL, or has the ~ of an unknown user.
        return None


def _fetch(hub_id: str, revision: str | None) -> Source:
    if not _HUB_ID.fullmatch(hub_id):
        raise CheckpointError(f"{hub_id}: no such folder, and not a hub id of the form owner/name")
    own, _, base = (revision or "").partition(":")
    try:
        # A pattern's * matches subfolders too, which we do not need.
        snapshot = huggingface_hub.snapshot_download(
            hub_id, revision=own or None, allow_patterns=list(FILES), ignore_patterns=["*/*"]
        )
    except Exception as error:
        raise CheckpointError(
            f"{hub_id}: no such folder here, and the download failed ({hub_reason(error)})"
        ) from None
    return Source(
        Path(snapshot),
        hub_id,
        from_hub=True,
        revision=Path(snapshot).name,
        pinned=bool(own),
        base_revision=base or None,
    )


def hub_reason(error: Exception) -> str:
    """What went wrong with the hub, in one line.

    The error may come from the hub client's HTTP library, which differs between versions.
    """
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
