"""The machine that figures come from: its name, its software versions, its memory bandwidth."""

from __future__ import annotations

import os
import platform
import subprocess
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

# Far larger than any cache; a GPU needs more to stay busy.
READ_BYTES = {mx.cpu: 2**29, mx.gpu: 2**31}
TRIALS = 7


@dataclass(frozen=True)
class Machine:
    """The machine as recorded in a result file. bandwidth: bytes read from memory per second."""

    processor: str
    cores: int
    memory_gb: float
    back_end: str
    system: str
    python: str
    versions: dict[str, str]
    bandwidth: float

    def line(self) -> str:
        """A one-line description."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"{self.processor}, {self.cores} cores, {self.memory_gb:.0f} GB, {self.system}; "
            f"{self.back_end}, reads {self.bandwidth / 1e9:.1f} GB/s; "
            f"Python {self.python}, {versions}"
        )


def this_machine() -> Machine:
    """This machine, with its bandwidth measured."""
    info = mx.device_info()
    on_cpu = mx.default_device() == mx.cpu
    gpu = "MLX Metal" if mx.metal.is_available() else "MLX CUDA"
    affinity = getattr(os, "sched_getaffinity", None)
    return Machine(
        processor=_processor() if on_cpu else str(info.get("device_name", _processor())),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        memory_gb=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        back_end="MLX CPU" if on_cpu else gpu,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: version(name) for name in ("cognica-mlx", "mlx", "mlx-lm", "numpy")},
        bandwidth=bandwidth(),
    )


def bandwidth() -> float:
    """Bytes per second, from the fastest of several ways to read a large array once.

    On the CPU one of them is NumPy's matrix-vector product, because NumPy has its own BLAS.
    """
    count = READ_BYTES[mx.cpu if mx.default_device() == mx.cpu else mx.gpu] // 4
    matrix = mx.ones((count // 4096, 4096))
    row = mx.random.uniform(shape=(1, 4096))
    mx.eval(matrix, row)
    ways: list[Callable[[], object]] = [
        lambda: mx.eval(row @ matrix.T),
        lambda: mx.eval(matrix.sum(axis=-1)),
    ]
    if mx.default_device() == mx.cpu:
        same, ones = np.array(matrix, copy=False), np.ones(4096, np.float32)
        ways.append(lambda: same @ ones)
    return max(4 * count / _best_seconds(way) for way in ways)


def slow_blas() -> bool:
    """Whether a matrix product of eight rows costs about as much as eight of one row, which points
    to reference BLAS."""
    matrix = mx.random.uniform(shape=(4096, 1024))
    one, eight = mx.ones((1, 1024)), mx.ones((8, 1024))
    mx.eval(matrix, one, eight)
    alone = _best_seconds(lambda: mx.eval(one @ matrix.T))
    return _best_seconds(lambda: mx.eval(eight @ matrix.T)) > 4 * alone


def _best_seconds(work: Callable[[], object]) -> float:
    return min(timeit.repeat(work, number=1, repeat=TRIALS))


def _processor() -> str:
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
