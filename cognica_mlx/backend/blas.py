"""The library that MLX's CPU back end multiplies matrices with on Linux.

- MLX's Linux wheel bundles the reference BLAS, which is many times slower than OpenBLAS
- `open_fast`, called before MLX is imported, opens OpenBLAS for the whole process, as LD_PRELOAD
  would: a library that the user preloaded comes first, then the one of the package
  scipy-openblas32, then the system's
- MLX_POE_BLAS=0 turns this off; a path in MLX_POE_BLAS names another library
- it does nothing on macOS and with MLX's CUDA back end
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from cognica_mlx.backend.symbol_names import name_for_all
from cognica_mlx.errors import RequestError

VARIABLE = "MLX_POE_BLAS"
# NumPy's and SciPy's own OpenBLAS, which suits itself to the processor and needs no other library.
PACKAGE, IN_PACKAGE = "scipy-openblas32", "scipy_openblas32/lib/libscipy_openblas.so"
SYSTEM = "libopenblas.so.0"
CUDA = ("mlx-cuda-12", "mlx-cuda-13")
REMEDY = f"pip install {PACKAGE}"
# What MLX calls, and what that is called in a library: the package's names have a prefix.
PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
PREFIXES = ("", "scipy_")


@dataclass(frozen=True)
class _Library:
    """An open library; its functions' names start with `prefix`."""

    handle: ctypes.CDLL
    prefix: str

    def has(self, name: str) -> bool:
        return hasattr(self.handle, self.prefix + name)

    def __getitem__(self, name: str) -> ctypes._NamedFuncPointer:
        return self.handle[self.prefix + name]

    def address(self, name: str) -> int:
        return ctypes.cast(self[name], ctypes.c_void_p).value or 0

    def says(self, name: str) -> str:
        """The text that a function returns."""
        function = self[name]
        function.restype = ctypes.c_char_p
        return (function() or b"").decode()

    def file(self) -> str:
        """The name of the file that its products come from, or ""."""
        where = _Where()
        address = ctypes.c_void_p(self.address(PRODUCTS[0]))
        if not ctypes.CDLL(None).dladdr(address, ctypes.byref(where)) or not where.file:
            return ""
        return Path(os.fsdecode(where.file)).name


class _Where(ctypes.Structure):
    """What `dladdr` tells about an address."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


# Why MLX does not use a faster library: one line with the remedy, or "".
advice = ""
# What is wrong with MLX_POE_BLAS, or "".
_wrong = ""
# The library that is open for the whole process; None if MLX uses its own.
_library: _Library | None = None


def open_fast() -> None:
    """Open a fast library, unless MLX is imported already: then it is too late for one."""
    global advice, _library, _wrong
    if not sys.platform.startswith("linux") or any(_installed(name) for name in CUDA):
        return
    chosen = os.environ.get(VARIABLE, "")
    if chosen not in ("", "0") and not _opened(chosen):
        _wrong = f"{VARIABLE} names {chosen}, which is not a BLAS library that can be opened"
    preloaded = _Library(ctypes.CDLL(None), "")
    if preloaded.has(PRODUCTS[0]):
        _library = preloaded
    elif chosen == "0":
        advice = f"{VARIABLE}=0 leaves MLX with the slow BLAS of its wheel: unset it"
    elif "mlx.core" in sys.modules:
        advice = (
            "MLX was imported first and multiplies with the slow BLAS of its wheel: "
            "import mlx_poe or cognica_mlx before mlx"
        )
    else:
        paths = [chosen] if chosen else [packaged(), SYSTEM]
        _library = next((library for path in paths if (library := _open_for_all(path))), None)
        if _library is None and not _wrong:
            advice = f"MLX multiplies with the slow BLAS of its wheel: {REMEDY}"


def check() -> None:
    """Raise RequestError if MLX_POE_BLAS names a library that cannot be used."""
    if _wrong:
        raise RequestError(f"{_wrong}; give another path, or 0 for the one in MLX's wheel")


def is_openblas() -> bool:
    """Whether MLX multiplies with OpenBLAS."""
    return _library is not None and _library.has("openblas_get_config")


def in_use() -> str:
    """The library that MLX multiplies with on the CPU, by its file's name, with OpenBLAS's version,
    processor and threads. "unknown" if it cannot be found."""
    if sys.platform == "darwin":
        return "Accelerate"
    library = _library or _mlx_own()
    name = library.file() if library else ""
    if library is None or not is_openblas():
        return name or "unknown"
    version, core = (
        library.says("openblas_get_config").split()[1],
        library.says("openblas_get_corename"),
    )
    threads = library["openblas_get_num_threads"]()
    return f"{name} (OpenBLAS {version}, {core}, threads: {threads})"


def _open_for_all(path: str) -> _Library | None:
    """Open a library for everything that is loaded later; None if that cannot be done."""
    library = _opened(path)
    if library and library.prefix:
        try:
            name_for_all({name: library.address(name) for name in PRODUCTS})
        except OSError:
            return None
    elif library:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return library


def _opened(path: str) -> _Library | None:
    try:
        handle = ctypes.CDLL(path) if path else None
    except OSError:
        return None
    if handle is None:
        return None
    libraries = (_Library(handle, prefix) for prefix in PREFIXES)
    return next((one for one in libraries if all(map(one.has, PRODUCTS))), None)


def packaged() -> str:
    """The path of the package's library, or ""."""
    try:
        return str(distribution(PACKAGE).locate_file(IN_PACKAGE))
    except PackageNotFoundError:
        return ""


def _installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


def _mlx_own() -> _Library | None:
    """MLX's own library, through which its BLAS can be found."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    found = (line.split(maxsplit=5)[-1] for line in lines if line.endswith("/libmlx.so"))
    return _opened(next(found, ""))
