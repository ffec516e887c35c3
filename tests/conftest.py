"""What the tests share: the fixture models, loaded once in float32."""
# ruff: noqa: I001

import os

# Pytest starts a worker for each core. Child processes inherit this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cognica_mlx  # noqa: F401  before MLX: it opens a fast BLAS

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings
from servers import COMPOSITION, RunningServer

from cognica_mlx.network.linear import ON_OPENBLAS
from cognica_mlx.network.model import PoEModel
from mlx_poe import load
from mlx_poe.loading.tokenizer import Tokenizer

# What commands measure of this machine is kept apart from what the user's own have.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cognica-mlx-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# How long an example takes depends on the machine, and on what the first one has to load.
settings.register_profile(
    "untimed", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("untimed")

# A case that a plain run leaves out.
SOAK = pytest.mark.soak

FIXTURES = Path(__file__).parent / "fixtures"
GOLDENS = ("flat-d8", "gqa-logop-d8", "stage-on-flat", "chain-on-stage")


@cache
def fixture(name: str) -> tuple[PoEModel, Tokenizer]:
    """A fixture model by folder name, or a built-in one by its own, in float32."""
    folder = FIXTURES / name
    return load(folder if folder.is_dir() else name, dtype="float32")


@cache
def goldens(name: str) -> dict[str, mx.array]:
    """The known answers of a golden model."""
    answers = mx.load(str(FIXTURES / name / "goldens.safetensors"))
    assert isinstance(answers, dict)
    return answers


def assert_bits_equal(ours: mx.array, theirs: mx.array) -> None:
    """Equal to the last bit, or nearly with OpenBLAS, whose last bits depend on the rows."""
    if ON_OPENBLAS:
        assert mx.allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    else:
        assert mx.array_equal(ours, theirs)


@pytest.fixture(params=GOLDENS)
def golden(request: pytest.FixtureRequest) -> tuple[PoEModel, dict[str, mx.array]]:
    """Every golden model with its answers."""
    return fixture(request.param)[0], goldens(request.param)


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """The server as it comes, with a composition; one for all tests of a worker."""
    running = RunningServer(*COMPOSITION)
    yield running
    assert running.stop() == 0, "".join(running.log)
