"""How much memory there is for decoding states on this machine."""

from __future__ import annotations

import os
from contextlib import suppress

import mlx.core as mx

# Of a machine's memory that other programs want too.
SHARE = 0.5


def memory_for_states() -> int:
    """Bytes that decoding states and cached prompts may take: on Metal what the system recommends
    as a working set, less what is in use; elsewhere half of the device's memory, or the machine's,
    less what is in use. At least an eighth of either."""
    device = mx.device_info()
    if "max_recommended_working_set_size" in device:
        total = int(device["max_recommended_working_set_size"])
    else:
        known = (device[key] for key in ("total_memory", "memory_size") if key in device)
        total = int(SHARE * int(next(known, 0) or _physical()))
    return max(total - mx.get_active_memory(), total // 8)


def _physical() -> int:
    """The machine's memory; 8 GB where it does not tell."""
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 << 30
