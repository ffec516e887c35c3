"""Writes figures to a terminal, to JSON and CSV, and compares two result files."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from cognica_mlx.bench.machine_card import Machine
from cognica_mlx.bench.sections.stage_speeds import Figure
from cognica_mlx.errors import RequestError
from cognica_mlx.files import strict_json

FORMAT = 1

TITLES = {
    "stages": "Latency by stage cut-off",
    "batch": "Many sequences at once; the ceiling is what batches of rows alone would allow",
    "host": "What the host spends on a token; decoding after the prompt; the first token",
    "constrained": "Constrained output: what masks cost, what forced stretches gain",
    "machines": "Several machines; the prediction is what the parts' own times allow",
    "serving": "Servers under load, beside mlx-lm's; a second specialist's turn",
    "lengths": "Latency by text length",
    "rows": "A batch of rows",
    "prompt": "Reading a prompt",
    "modes": "Decoding modes, greedy",
    "drafts": "Drafters: how often a draft is accepted; predicted from bytes of weights read",
    "quantised": "Quantized",
    "memory": "Memory",
    "peers": "mlx-lm in the same run",
    "training": "Training a stage: an iteration of forward, loss and backward",
}


@dataclass(frozen=True)
class Report:
    """One run: the figures, the model, the machine, and the command that repeats it."""

    model: str
    dtype: str
    command: str
    date: str
    machine: Machine
    figures: Sequence[Figure]
    remarks: Sequence[str] = ()

    def to_json(self) -> str:
        """The result file: one line per figure, without empty fields."""
        fields = {"format": FORMAT, **asdict(self)}
        figures = [
            strict_json.dumps({k: v for k, v in one.items() if v is not None}, ensure_ascii=False)
            for one in fields.pop("figures")
        ]
        head = strict_json.dumps(fields, indent=1, ensure_ascii=False).removesuffix("\n}")
        return f'{head},\n "figures": [\n  ' + ",\n  ".join(figures) + "\n ]\n}\n"

    def to_csv(self) -> str:
        """The figures as CSV, one line each, with a column for each note."""
        names = sorted({k for f in self.figures for k, v in f.notes.items() if v != ""})
        columns = [name for name in Figure.__dataclass_fields__ if name != "notes"]
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow([*columns, *names])
        for figure in self.figures:
            values = [getattr(figure, name) for name in columns]
            values += [figure.notes.get(name) for name in names]
            writer.writerow(["" if value is None else value for value in values])
        return out.getvalue()


def show(report: Report, console: Console) -> None:
    """Print a table for each section, under a line that names the machine."""
    console.print(f"{report.model}, {report.dtype}", style="bold", highlight=False)
    for line in (report.machine.line(), *report.remarks):
        console.print(line, highlight=False)
    for section, title in TITLES.items():
        figures = [figure for figure in report.figures if figure.section == section]
        if figures:
            console.print(_table(title, figures))


def _with(form: str, value: float | str | None) -> str:
    return "" if value is None else form.format(value)


# Columns of a section's table: a figure's field or note, and its form. One is shown if any of the
# figures has a value for it.
_COLUMNS = {
    "speed": ("speedup", "{:.2f}x"),
    "ratio": ("ratio", "{:.2f}x"),
    "goal": ("goal", "{}"),
    "to": ("against", "{}"),
    "mlx_lm.server": ("peer", "{:.4g}"),
    "parts predict": ("predicted", "{:.2f}x"),
    "over its parts": ("over_its_parts", "{:+.1%}"),
    "limit": ("limit", "{:.4g}"),
    "of limit": ("of_limit", "{:.0%}"),
    "reads": ("read_mb", "{:.1f} MB"),
    "of one row": ("times_one_row", "{:.2f}x"),
    "state": ("state_mb", "{:.1f} MB"),
    "of weights": ("of_weights", "{:.1%}"),
    "agreement": ("agreement", "{:.1%}"),
    "of the states": ("of_states", "{:.1%}"),
    "fell back": ("fell_back", "{}"),
    "depth": ("mean_depth", "{:.2f}"),
    "accepted": ("acceptance", "{:.1%}"),
    "tokens a round": ("tokens_a_round", "{:.2f}"),
    "best drafts": ("best_drafts", "{}"),
    "copy": ("copy_mb", "{:.3g} MB"),
    "of the prompt kept": ("cached", "{:.1%}"),
    "tokens a reply": ("reply_tokens", "{:.1f}"),
    "peer's resets": ("peer_resets", "{}"),
    "peer failed": ("peer_failed", "{}"),
}


def _table(title: str, figures: Sequence[Figure]) -> Table:
    values = [{**asdict(f), **f.notes, "of_limit": f.limit and f.limit / f.value} for f in figures]
    cells = {k: [_with(form, v.get(name)) for v in values] for k, (name, form) in _COLUMNS.items()}
    shown = {name: column for name, column in cells.items() if any(column)}
    table = _headed(title, "median", "quartiles", *shown)
    for i, f in enumerate(figures):
        quartiles = f"{f.low:.4g} to {f.high:.4g}" if f.low != f.high else ""
        more = [column[i] for column in shown.values()]
        table.add_row(f.name, f"{f.value:.4g} {f.unit}", quartiles, *more)
    return table


def _headed(title: str, *names: str) -> Table:
    columns = (Column(name, justify="right") for name in names)
    return Table("", *columns, title=title, title_justify="left")


def read(text: str, name: str) -> dict[str, Any]:
    """The parts of a result file that `compare` uses; RequestError if it is not a result file."""
    try:
        fields: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
        if fields["format"] != FORMAT:
            raise ValueError(f"its format is {fields['format']}, not {FORMAT}")
        texts = [fields["date"], fields["model"], fields["machine"]["processor"]]
        for figure in fields["figures"]:
            texts += [figure[name] for name in ("section", "name", "unit")]
            for number in (figure["value"], figure.get("speedup")):
                # null means that it was not finite
                if number is not None and not abs(number) < sys.float_info.max:
                    raise ValueError(f"{number} is not a usable number")
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"{odd[0]} is not text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise RequestError(f"{name} is not a result file of mlx_poe.bench ({reason})") from None
    return fields


def compare(report: Report, old: dict[str, Any], console: Console) -> None:
    """Print how each figure that both runs have has changed; above 1 is an improvement."""
    before = {(f["section"], f["name"]): f for f in old["figures"]}
    if old["machine"]["processor"] != report.machine.processor:
        console.print(
            f"the other run was on another machine, {old['machine']['processor']}: "
            "compare speed-ups rather than times",
            highlight=False,
        )
    title = f"Against {old['date']}, {old['model']}"
    table = _headed(title, "then", "now", "better by", "speed then", "speed now")
    for now in report.figures:
        then = before.get((now.section, now.name))
        if then is None or not then.get("value") or not now.value:
            continue
        gain = then["value"] / now.value
        if now.unit == "tokens/s":  # for all other units lower is better
            gain = now.value / then["value"]
        table.add_row(
            now.name,
            f"{then['value']:.4g}",
            f"{now.value:.4g} {now.unit}",
            f"{gain:.2f}x",
            _with("{:.2f}x", then.get("speedup")),
            _with("{:.2f}x", now.speedup),
        )
    nothing = "the two runs have no figure in common"
    console.print(table if table.row_count else nothing, highlight=False)
