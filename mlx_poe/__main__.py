"""`python -m mlx_poe <verb>`: the commands, without the installed scripts."""

from __future__ import annotations

import sys
from importlib import import_module

from mlx_poe.commands.entry import open_missing_streams

VERBS = {
    "generate": "mlx_poe.commands.generate",
    "bench": "mlx_poe.commands.bench",
    "calibrate": "mlx_poe.commands.calibrate",
    "convert": "mlx_poe.commands.convert",
    "train": "mlx_poe.commands.train",
    "chat": "mlx_poe.commands.poe_chat",
    "server": "mlx_poe.commands.server",
    "evaluate": "mlx_poe.commands.evaluate",
    "doctor": "mlx_poe.commands.doctor",
}


def main() -> int:
    """Run the verb's main."""
    open_missing_streams()
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in ("-h", "--help"):
        print(f"usage: python -m mlx_poe {{{','.join(VERBS)}}} ...")
        return 0
    if verb not in VERBS:
        print(
            f"mlx_poe: error: {verb or 'no verb'!r}: choose from {', '.join(VERBS)}",
            file=sys.stderr,
        )
        return 2
    return int(import_module(VERBS[verb]).main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
