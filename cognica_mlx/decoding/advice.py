"""Advice to a decoding mode: whether it pays, and what to draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cognica_mlx.decoding.requests import Request


@dataclass(frozen=True)
class Plan:
    """What a round drafts: `looked_up` tokens found in the text, then `count` from the mode's
    drafter number `drafter`. If both are 0, the full model emits a token without drafts."""

    looked_up: int = 0
    drafter: int = 0
    count: int = 0

    def __bool__(self) -> bool:
        return bool(self.looked_up or self.count)


# Without costs, the match length from which looked-up tokens are drafted.
AGREEING = 5


class Advice:
    """Advice to a mode on whether it pays, and what the mode reports in return. This one knows no
    costs: every mode goes on with its own options. `Pace` gives advice from costs."""

    def begins(self, position: int) -> None:
        """The mode's own positions start here; earlier ones belong to the prompt."""

    def pays(self) -> bool:
        """Whether to go on in this mode."""
        return True

    def plan(self, offered: int, agreeing: int, most: int, meanwhile: bool = False) -> Plan:
        """What to draft in the next round: up to `offered` looked-up tokens, found by a match of
        `agreeing` tokens, and up to `most` by a drafter. `meanwhile`: drafting will go on while
        other machines verify."""
        taken = offered if agreeing >= AGREEING else 0
        return Plan(taken, 0, max(most - taken, 0))

    def judged(self, drafter: str, kept: int, drafted: int) -> None:
        """The first `kept` of `drafted` tokens in a row by `drafter` were accepted."""

    def drafted_meanwhile(self, drafter: int, rows: int, count: int) -> None:
        """While other machines verified `rows` positions, a drafter guessed a token and drafted
        `count` more behind it."""

    def observed(self, agreeing: int, hit: bool) -> None:
        """A token had a match of `agreeing` tokens; `hit` says whether it was the one looked up."""

    def emitted(self) -> None:
        """The mode has emitted a token."""


class Meter(Protocol):
    """What a batch tells a sequence's costs: `spent` so far, and how many `others` share passes."""

    spent: float
    others: int

    def price(self, request: Request, rows: int | None = None, length: int = 1) -> float:
        """The cost of a request: its share of a pass of `rows` rows, through `length` stages."""
