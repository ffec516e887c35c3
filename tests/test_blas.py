"""Which library MLX multiplies with on Linux: opened before MLX, chosen by rank, named."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import fixture

from cognica_mlx.backend import blas
from cognica_mlx.backend.symbol_names import MACHINES, library_of_names
from cognica_mlx.errors import RequestError
from cognica_mlx.network import device

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in MACHINES or not blas.packaged(),
    reason=f"needs Linux and {blas.PACKAGE}",
)
REPORT = """
import json, pathlib
from cognica_mlx.backend import blas
from cognica_mlx.network import linear
import mlx.core as mx
a = mx.arange(12, dtype=mx.float32).reshape(3, 4) - 5
c = (a + 1j * a).astype(mx.complex64)
maps = pathlib.Path("/proc/self/maps").read_text()
print(json.dumps({
    "name": blas.in_use(), "advice": blas.advice, "openblas": linear.ON_OPENBLAS,
    "opened": "libscipy_openblas.so" in maps,
    "right": bool(mx.allclose(a @ a.T, mx.sum(a[:, None] * a[None], axis=-1)))
        and bool(mx.allclose(c @ c.T, mx.sum(c[:, None] * c[None], axis=-1))),
}))
"""


def report(before: str = "import cognica_mlx", **env: str) -> dict:
    """What a new process says of its library, after running `before`."""
    around = {name: value for name, value in os.environ.items() if name != blas.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", before + REPORT],
        capture_output=True,
        text=True,
        env={**around, **env},
        check=True,
    )
    found = json.loads(done.stdout)
    assert found.pop("right")
    return found


def bound_to(before: str, log: Path) -> str:
    """Where the loader has MLX's products come from."""
    env = {"LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(log)}
    report(before, **env)
    (written,) = log.parent.glob(f"{log.name}.*")
    lines = written.read_text(errors="replace").splitlines()
    (line,) = {x.split(" to ")[1] for x in lines if "libmlx.so" in x and "`cblas_sgemm'" in x}
    return line


def test_mlx_multiplies_with_the_packages_library(tmp_path):
    found = report()
    assert found["name"].startswith("libscipy_openblas.so (OpenBLAS ") and found["openblas"]
    assert found["opened"] and not found["advice"]
    assert tempfile.gettempdir() in bound_to("import mlx_poe", tmp_path / "log")


def test_if_mlx_is_imported_first_nothing_is_opened_and_the_remedy_is_named(tmp_path):
    found = report("import mlx.core; import mlx_poe")
    assert "imported first" in found["advice"] and "mlx_poe" in found["advice"]
    assert not found["opened"] and not found["openblas"]
    assert "openblas" not in found["name"] and "blas" in found["name"]
    assert "libblas" in bound_to("import mlx.core; import mlx_poe", tmp_path / "log")


def test_a_variable_turns_it_off_or_names_a_library(tmp_path):
    off = report(**{blas.VARIABLE: "0"})
    assert not off["opened"] and not off["openblas"] and blas.VARIABLE in off["advice"]
    other = tmp_path / "other.so"
    shutil.copyfile(blas.packaged(), other)
    named = report(**{blas.VARIABLE: str(other)})
    assert named["name"].startswith("other.so (OpenBLAS") and not named["advice"]
    assert report(**{blas.VARIABLE: ""})["name"].startswith("libscipy_openblas.so")


def test_a_preloaded_library_comes_first(tmp_path):
    # Only its names matter: these are of no functions.
    path = tmp_path / "preloaded.so"
    path.write_bytes(library_of_names(dict.fromkeys(blas.PRODUCTS, 8)))
    script = (
        "from cognica_mlx.backend import blas\n"
        "from cognica_mlx.network import linear\n"
        "print(blas.in_use(), linear.ON_OPENBLAS)"
    )
    for env in ({}, {blas.VARIABLE: "0"}, {blas.VARIABLE: blas.packaged()}):
        around = {**os.environ, "LD_PRELOAD": str(path), **env}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=around, check=True
        )
        assert done.stdout.split() == ["unknown", "False"]


@pytest.mark.parametrize(
    "lacks",
    [
        "blas.distribution = missing",
        "tempfile.NamedTemporaryFile = missing",
    ],
)
def test_without_the_package_the_systems_library_is_next_and_then_the_remedy(lacks):
    """Either way: the package is not installed, or the system has no room for the names."""
    before = (
        "import importlib.metadata, tempfile\n"
        "error = importlib.metadata.PackageNotFoundError if %r else OSError\n"
        "def missing(*_, **__): raise error\n"
        "%s\n"
        "import ctypes; whole = ctypes.CDLL\n"
        "tried = []\n"
        "def opened(path, *a, **k):\n"
        "    tried.append(path)\n"
        "    if path == 'libopenblas.so.0': raise OSError\n"
        "    return whole(path, *a, **k)\n"
        "ctypes.CDLL = opened\n"
        "import cognica_mlx\n"
        "assert tried[-1] == 'libopenblas.so.0', tried\n"
    )
    without = lacks.startswith("blas")
    lacking = lacks.replace("blas.distribution", "importlib.metadata.distribution")
    found = report(before % (without, lacking))
    assert f"pip install {blas.PACKAGE}" in found["advice"] and not found["openblas"]


@pytest.mark.parametrize("path", ["/no/such/library.so", sys.executable])
def test_a_path_that_is_no_library_is_refused_in_one_line(path):
    # Also by a command that loads no model.
    command = [sys.executable, "-m", "mlx_poe", "bench", "--compare", "/no/such/file.json"]
    env = {**os.environ, blas.VARIABLE: path}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and not done.stdout
    assert blas.VARIABLE in done.stderr and path in done.stderr and done.stderr.count("\n") == 1


def test_loading_refuses_it_too(monkeypatch):
    monkeypatch.setattr(blas, "_wrong", "MLX_POE_BLAS names nothing")
    with pytest.raises(RequestError, match="another path, or 0"):
        device.prepare(fixture("flat-d8")[0].resid_lambdas.dtype)


@pytest.mark.parametrize("elsewhere", ["macOS", "CUDA"])
def test_nothing_happens_on_macos_and_with_cuda(elsewhere, monkeypatch):
    if elsewhere == "macOS":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        monkeypatch.setattr(blas, "_installed", lambda name: name == "mlx-cuda-13")
    monkeypatch.setattr(blas, "_library", None)
    monkeypatch.setenv(blas.VARIABLE, "/no/such/library.so")
    monkeypatch.setattr(blas, "_wrong", "")
    monkeypatch.setattr(blas, "advice", "")
    blas.open_fast()
    assert (blas._library, blas._wrong, blas.advice) == (None, "", "")
    assert elsewhere == "CUDA" or blas.in_use() == "Accelerate"
