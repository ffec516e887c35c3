"""The result of a check: a line that passes, warns or fails; and the report made of these lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from cognica_mlx.bench.machine_card import Machine
from cognica_mlx.files import strict_json

FORMAT = 1
OK, WARNING, FAILED = "ok", "warning", "FAILED"


@dataclass(frozen=True)
class Line:
    """One check. `status` is OK, WARNING or FAILED; `advice` says what to do about the last two;
    `numbers` are what was measured, by name."""

    section: str
    name: str
    status: str
    value: str
    advice: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All results on a machine, and the model that modes and costs were checked with."""

    machine: Machine
    model: str
    lines: Sequence[Line]

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return any(line.status == FAILED for line in self.lines)

    def to_text(self) -> str:
        """Plain text, with a line for each check."""
        text, section = [self.machine.line(), f"model: {self.model}"], ""
        for line in self.lines:
            if line.section != section:
                section = line.section
                text += ["", section]
            text.append(f"  {line.status:8} {line.name}: {line.value}")
            if line.advice:
                text.append(f"{'':11}-> {line.advice}")
        counts = Counter(line.status for line in self.lines)
        found = ", ".join(f"{counts[s]} {s}" for s in (OK, WARNING, FAILED) if counts[s])
        return "\n".join([*text, "", found])

    def to_json(self) -> str:
        """The content of a result file; null stands for NaN and infinity."""
        content = {
            "format": FORMAT,
            "model": self.model,
            "machine": asdict(self.machine),
            "lines": [asdict(line) for line in self.lines],
        }
        return strict_json.dumps(content, indent=1) + "\n"
