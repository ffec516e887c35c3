"""Loading from the hub: its cache, its errors, and what is fetched."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import (
    assert_refused,
    change_config,
    read_config,
    write_base,
    write_stage,
)

from cognica_mlx.convert.conversion import prepare
from cognica_mlx.convert.sources import locate
from cognica_mlx.errors import CheckpointError, PoEWarning
from mlx_poe import load
from mlx_poe.chat.conversation import Chat

COMMITS = {"main": "a1" * 20, "v0": "b2" * 20}
LOADER = """
import json, sys
from mlx_poe import load
from cognica_mlx.errors import PoEError
import mlx.core as mx
for options in json.loads(sys.argv[1]):
    try:
        model, _ = load(options.pop("name"), dtype="float32", **options)
        print(json.dumps(model(mx.array([[5, 6, 7]]))[0, -1].tolist()))
    except PoEError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def cache_repository(hub: Path, name: str, folder: Path, revision: str = "main") -> None:
    """Lay a model folder out as huggingface_hub keeps a downloaded repository."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMITS[revision]
    for part in (snapshot, repository / "blobs", repository / "refs"):
        part.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = f"{COMMITS[revision][:8]}{file.name.encode().hex()}"
        shutil.copyfile(file, repository / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob)
    (repository / "refs" / revision).write_text(COMMITS[revision])


def load_offline(hub: Path, calls: list[dict[str, str]]) -> list[Any]:
    """What each call of `load` gives, offline; huggingface_hub reads its variables on import."""
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HOME": str(hub.parent)}
    result = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(calls)],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        cwd=hub.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Families of models under /folder, and the same in a hub cache at /hub."""
    folder = tmp_path_factory.mktemp("hub")
    write_base(folder / "base", seed=1)
    write_base(folder / "old", seed=5)
    write_stage(folder / "stage", seed=2)
    cache_repository(folder / "hub", "org/base", folder / "base")
    cache_repository(folder / "hub", "org/base", folder / "old", "v0")
    references = {"stage": "org/base", "orphan": "org/gone"}
    references |= {"escape": "../../../../../base", "absolute": str(folder / "base")}
    for name, reference in references.items():
        copy = shutil.copytree(folder / "stage", folder / f"{name}-on-hub")
        change_config(Path(copy), base_model_name_or_path=reference)
        cache_repository(folder / "hub", f"org/{name}", Path(copy))
    # Where the program is run there is another folder of the base's name.
    shutil.copytree(folder / "old", folder / "org" / "base")
    return folder


def last_logits(folder: Path) -> list[float]:
    model, _ = load(folder, dtype="float32")
    return model(mx.array([[5, 6, 7]]))[0, -1].tolist()  # type: ignore[return-value]


def test_models_come_from_the_hub_cache(hub):
    shutil.move(hub / "org", hub / "aside")
    found = load_offline(
        hub / "hub",
        [
            {"name": "org/base"},
            {"name": "org/base", "revision": "v0"},
            {"name": "org/base", "revision": COMMITS["v0"]},
            {"name": str(hub / "stage-on-hub")},
        ],
    )
    shutil.move(hub / "aside", hub / "org")
    base, old = last_logits(hub / "base"), last_logits(hub / "old")
    assert found == [base, old, old, last_logits(hub / "stage")]


def test_a_delta_from_the_hub_stands_on_the_hub_alone(hub):
    found = load_offline(
        hub / "hub",
        [{"name": f"org/{name}"} for name in ("stage", "orphan", "escape", "absolute", "base")],
    )
    assert found[0] == last_logits(hub / "stage")
    assert found[1].startswith("CheckpointError: org/gone: no such folder here, and the download")
    assert found[1].endswith("(chain so far: org/orphan)")
    for name, message in zip(("escape", "absolute"), found[2:4], strict=True):
        assert message.startswith(f"CheckpointError: org/{name} comes from the hub and names '")
        assert "as its base, which is not a hub id" in message
    assert found[4] == last_logits(hub / "old")  # a user's own folder does come first


def test_what_the_hub_cannot_give_is_one_clear_line(hub):
    wanted = [
        {"name": "org/gone"},
        {"name": "org/stage", "revision": "nope"},
        {"name": "org/-name"},
        {"name": "org/a--b"},
        {"name": "org/" + "n" * 100},
    ]
    for call, message in zip(wanted, load_offline(hub / "hub", wanted), strict=True):
        start = f"CheckpointError: {call['name']}: no such folder here, and the download failed"
        assert message.startswith(start)
        assert "\n" not in message


def test_errors_of_the_hubs_http_library_are_ours(monkeypatch):
    class TransportError(Exception):
        pass

    def fail(*_: object, **__: object) -> str:
        raise TransportError("Server disconnected\nwithout sending a response")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    assert_refused("org/name", CheckpointError, "(TransportError: Server disconnected)")


def test_only_a_models_own_files_are_fetched(monkeypatch, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    stored = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.pkl"]
    stored += ["README.md"]  # for its license
    others = ["modeling_cognica_poe.py", "token_bytes.pt", "old/model.safetensors"]
    fetched: list[str] = []

    def fetch(name: str, revision: str | None, **patterns: list[str]) -> str:
        fetched.extend(filter_repo_objects([*stored, *others], **patterns))
        return str(write_base(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    load("org/name")
    assert fetched == stored


def pinned(folder: Path, hub: Path) -> None:
    """In a hub cache: stages whose base moves, one of which names its base's commit."""
    for name, fields in (("loose", {}), ("fixed", {"base_model_revision": COMMITS["v0"]})):
        copy = Path(shutil.copytree(folder / "stage", folder / f"{name}-stage"))
        change_config(copy, base_model_name_or_path="org/base", **fields)
        cache_repository(hub, f"org/{name}", copy)
    write_stage(folder / "on-old", seed=2, base="../old")


def test_the_commit_of_a_base_is_pinned_by_the_delta_or_by_the_user(hub, tmp_path):
    pinned(hub, hub / "hub")
    new, old = last_logits(hub / "stage"), last_logits(hub / "on-old")
    both = f"{COMMITS['main']}:{COMMITS['v0']}"
    calls: dict[str, dict[str, str]] = {
        "newest": {"name": "org/loose"},
        "asked": {"name": "org/loose", "revision": "main:v0"},
        "asked in the name": {"name": f"org/loose@{both}"},
        "only the base": {"name": "org/loose", "revision": ":v0"},
        "recorded": {"name": "org/fixed"},
        "asked against the record": {"name": "org/fixed", "revision": ":main"},
        "a local delta": {"name": str(hub / "loose-stage"), "revision": ":v0"},
        "a base of a base": {"name": "org/base@main:v0"},
        "twice": {"name": "org/base@v0", "revision": "v0"},
        "a local folder": {"name": str(hub / "loose-stage"), "revision": "v0:v0"},
    }
    found = dict(zip(calls, load_offline(hub / "hub", list(calls.values())), strict=True))
    assert new != old
    for name, logits in found.items():
        if not isinstance(logits, str):
            assert logits == (new if name in ("newest", "asked against the record") else old), name
    assert "org/base is a base: it has none of revision v0" in found["a base of a base"]
    assert "names a revision, so leave out" in found["twice"]
    assert "is a local folder, which has no revision v0" in found["a local folder"]


@pytest.fixture
def cached(hub, monkeypatch) -> None:
    """Repositories are found in the hub cache by this process too."""

    def fetch(name: str, revision: str | None, **_: object) -> str:
        commit = COMMITS[revision or "main"] if revision in (None, *COMMITS) else revision
        return str(hub / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)


def test_a_pinned_delta_warns_that_its_base_may_move(cached):
    with pytest.warns(PoEWarning, match=f"org/stage .* add :{COMMITS['main']} to the revision"):
        model, _ = load("org/stage", revision="main")
    assert model.revision == f"{COMMITS['main']}:{COMMITS['main']}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load("org/stage", revision=model.revision)
        load("org/stage")


def test_conversions_record_the_commits_that_they_were_made_from(cached, tmp_path):
    stage, base = locate("org/stage", "main:v0"), locate("org/base", "v0")
    prepare(stage).write(tmp_path / "merged")
    commits = f"{COMMITS['main']}:{COMMITS['v0']}"
    assert f"| revision | {commits} |" in (tmp_path / "merged" / "README.md").read_text()
    prepare(stage, base=base).write(tmp_path / "delta")
    assert read_config(tmp_path / "delta")["base_model_revision"] == COMMITS["v0"]
    # The base moves on, and the delta does not.
    merged = last_logits(tmp_path / "merged")
    assert last_logits(tmp_path / "delta") == pytest.approx(merged, abs=1e-4)
    assert load(tmp_path / "delta")[0].revision == f":{COMMITS['v0']}"


def test_a_chat_is_continued_with_the_commits_that_it_was_saved_with(tmp_path):
    model, tokenizer = load("poe-tiny-chat")
    model.revision = "a1:b2"
    chat = Chat(model, tokenizer, "org/stage")
    chat.change(max_tokens=3)
    list(chat.send("Hello"))
    chat.save(tmp_path / "chat")
    assert chat.load(tmp_path / "chat") == []
    model.revision = "a1:c3"
    (note,) = chat.load(tmp_path / "chat")
    assert "was saved with revision a1:b2 of org/stage" in note
    chat.name = "org/other"
    (note,) = chat.load(tmp_path / "chat")
    assert "was saved with org/stage; this is org/other" in note
