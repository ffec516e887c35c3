"""Other names for functions of a shared library, for everything that is loaded later (Linux).

The loader finds a function by its name, and cannot be told another one. So this makes the smallest
library that it accepts: a table of names with the addresses of functions that are loaded already.
Formats: ELF-64, System V gABI, chapters 4 and 5.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Mapping
from tempfile import NamedTemporaryFile

MACHINES = {"x86_64": 62, "aarch64": 183}
LOAD, DYNAMIC, STACK = 1, 2, 0x6474E551
READ_WRITE = 6
HASH, STRTAB, SYMTAB, STRSZ, SYMENT = 4, 5, 6, 10, 11
GLOBAL_FUNCTION, ABSOLUTE = 0x12, 0xFFF1
HEADERS = 64 + 3 * 56
PAGE = 0x1000


def name_for_all(addresses: Mapping[str, int]) -> ctypes.CDLL:
    """Give the functions at `addresses` global names. They must stay loaded.

    Raises OSError if no temporary file can be written or loaded.
    """
    with NamedTemporaryFile(suffix=".so") as file:
        file.write(library_of_names(addresses))
        file.flush()
        return ctypes.CDLL(file.name, mode=ctypes.RTLD_GLOBAL)


def library_of_names(addresses: Mapping[str, int]) -> bytes:
    """A shared library that consists of a symbol table: every symbol's value is an address in this
    process, not in the library."""
    strings, symbols = b"\0", bytes(24)  # the first symbol stands for none
    for name, address in addresses.items():
        symbols += struct.pack("<IBBHQQ", len(strings), GLOBAL_FUNCTION, 0, ABSOLUTE, address, 0)
        strings += name.encode() + b"\0"
    # One bucket, in which each symbol leads to the next.
    count = len(addresses)
    table = struct.pack(f"<{4 + count}I", 1, count + 1, 1, 0, *range(2, count + 1), 0)
    parts, offsets, end = [], {}, HEADERS
    for tag, part in ((HASH, table), (SYMTAB, symbols), (STRTAB, strings)):
        part += bytes(-len(part) % 8)
        parts.append(part)
        offsets[tag], end = end, end + len(part)
    entries = {**offsets, STRSZ: len(strings), SYMENT: 24, 0: 0}
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries.items())
    size = end + len(dynamic)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", 3, MACHINES.get(platform.machine(), 0), 1),  # a shared library
        *(0, 64, 0, 0, 64, 56, 3, 64, 0, 0),  # its program headers follow; no sections
    )
    segments = ((LOAD, 0, size, PAGE), (DYNAMIC, end, len(dynamic), 8), (STACK, 0, 0, 16))
    for kind, start, length, align in segments:
        header += struct.pack(
            "<IIQQQQQQ", kind, READ_WRITE, start, start, start, length, length, align
        )
    return header + b"".join(parts) + dynamic
