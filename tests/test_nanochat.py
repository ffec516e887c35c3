"""nanochat's own folders: the same models, the same answers, and a name for every fault."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import FIXTURES, fixture, goldens

from cognica_mlx.errors import CheckpointError
from mlx_poe import load

NANOCHAT = FIXTURES / "nanochat"
BASE, STAGE = "base_checkpoints/d", "chatsft_checkpoints/stage"


@pytest.mark.parametrize(("folder", "name"), [(BASE, "flat-d8"), (STAGE, "stage-on-flat")])
def test_nanochat_folders_give_the_goldens(folder, name):
    model, tokenizer = load(NANOCHAT / folder, dtype="float32")
    assert model.config == fixture(name)[0].config
    answers = goldens(name)
    for text in ("short", "long"):
        logits = model(answers[f"{text}.tokens"])
        answer = answers[f"{text}.logits_full"]
        assert mx.abs(logits[:, -answer.shape[1] :] - answer).max().item() < 2e-4
    assert tokenizer.encode("hello") == fixture(name)[1].encode("hello")


@pytest.fixture
def copied(tmp_path) -> Path:
    return Path(shutil.copytree(NANOCHAT, tmp_path / "run"))


def test_the_latest_step_is_taken(copied):
    base = copied / BASE
    for kind in ("meta_{}.json", "model_{}.pt"):
        shutil.copy(base / kind.format("000010"), base / kind.format("000200"))
    (base / "model_000010.pt").write_bytes(b"an older step, damaged")
    (base / "optim_000200.pt").write_bytes(b"not a model")
    model, _ = load(base)
    assert model.poe_n_stages == 4


def test_old_checkpoints_have_one_kind_of_window(copied):
    meta = copied / BASE / "meta_000010.json"
    content = json.loads(meta.read_text())
    del content["model_config"]["window_pattern"]
    meta.write_text(json.dumps(content))
    assert set(load(copied / BASE)[0].config.windows) == {512}


@pytest.mark.parametrize(
    ("folder", "change", "named"),
    [
        (BASE, lambda d: (d / "model_000010.pt").unlink(), "model_000010.pt"),
        (BASE, lambda d: (d / "meta_000010.json").write_text("{"), "meta_000010.json"),
        (
            BASE,
            lambda d: (d / "model_000010.pt").write_bytes(
                (d / "model_000010.pt").read_bytes()[:500_000]
            ),
            "model_000010.pt",
        ),
        (STAGE, lambda d: shutil.rmtree(d.parent.parent / BASE), "chain so far"),
        (BASE, lambda d: shutil.rmtree(d), "no such folder"),
    ],
)
def test_faults_are_named(copied, folder, change, named):
    change(copied / folder)
    with pytest.raises(CheckpointError, match=named) as caught:
        load(copied / folder)
    assert "\n" not in str(caught.value)
