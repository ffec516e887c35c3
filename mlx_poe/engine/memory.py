"""How much memory decoding states may use on this machine."""

from __future__ import annotations

import os
from contextlib import suppress

import mlx.core as mx

# The share of the machine's memory to use; other programs need the rest.
SHARE = 0.5


def memory_for_states() -> int:
    """Bytes that decoding states and cached prompts may take.

    On Metal this is the recommended working set, elsewhere half of the device's (or the machine's)
    memory. Memory in use is subtracted, but at least an eighth of the total remains.
    """
    device = mx.device_info()
    if "max_recommended_working_set_size" in device:
        total = int(device["max_recommended_working_set_size"])
    else:
        known = (device[key] for key in ("total_memory", "memory_size") if key in device)
        total = int(SHARE * int(next(known, 0) or _physical()))
    return max(total - mx.get_active_memory(), total // 8)


def _physical() -> int:
    """The machine's memory in bytes; 8 GiB if the system does not report it."""
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 << 30
