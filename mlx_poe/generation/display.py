"""How a reply looks in a terminal: tokens in their stages' colors, and a legend.

- in: responses
- out: text with colors; a legend on stderr
"""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import category

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.text import Text

from mlx_poe.generation.responses import GenerationResponse

# One color per stage, shallow to deep; deeper models start over.
STAGE_COLORS = ("green", "cyan", "blue", "magenta", "red", "yellow")


def printable(text: str) -> str:
    """`text` without control characters, which could affect the terminal. Keeps tab and newline."""
    return "".join(c for c in text if c in "\n\t" or category(c) != "Cc")


def mean_depth(responses: Sequence[GenerationResponse], n_stages: int) -> str:
    """The tokens' average depth, in words. Forced tokens, which ran no stage, do not count."""
    asked = [r for r in responses if not r.forced] or responses
    mean = sum(r.stage + 1 for r in asked) / len(asked)
    return f"{mean:.1f} of {n_stages} stages"


def paints(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def paint(response: GenerationResponse) -> str:
    """The response's text in its stage's color."""
    # Style.render leaves the text alone; rich's console would drop control characters.
    style = Style.parse(STAGE_COLORS[response.stage % len(STAGE_COLORS)])
    return style.render(response.text, color_system=ColorSystem.STANDARD)


def print_legend(responses: Sequence[GenerationResponse]) -> None:
    """Print each stage in its color, on stderr."""
    legend = Text("stages:")
    for stage in sorted({r.stage for r in responses}):
        legend.append(f" {stage}", style=STAGE_COLORS[stage % len(STAGE_COLORS)])
    Console(stderr=True).print(legend)
