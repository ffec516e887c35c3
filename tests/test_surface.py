"""What others rely on is what it was in version 0.2, but for what was deleted by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any

import pytest
from conftest import FIXTURES

from cognica_mlx import errors
from mlx_poe.__main__ import VERBS

# Import paths with their parameters, fields and methods, and every command's flags, as version 0.2
# had them. Of a class with inner methods, only those that the pages of docs/ or models' users name.
SURFACE = json.loads((FIXTURES / "surface-0.2.json").read_text(encoding="utf-8"))
DELETED = {"certified", "draft_margin", "draft_rank", "--draft-margin", "--draft-rank"}


def kept(names: Iterable[str]) -> list[str]:
    return [name for name in names if name not in DELETED]


def takes(function: Any, names: Iterable[str]) -> bool:
    """Whether calls by position and by keyword still mean what they did."""
    now = list(inspect.signature(function).parameters)
    return [name for name in now if name in names] == kept(names)


@pytest.mark.parametrize("path", SURFACE["paths"])
def test_an_import_path_still_leads_to_what_it_did(path):
    before = SURFACE["paths"][path]
    module, name = path.rsplit(".", 1)
    thing = getattr(import_module(module), name)
    if isinstance(before, list):
        assert takes(thing, before) if callable(thing) else set(kept(before)) <= set(thing)
        return
    for field in kept(before["fields"]):
        # A field may have become a property, under an older name.
        now = {f.name for f in fields(thing)} if is_dataclass(thing) else set()
        assert field in now or hasattr(thing, field)
    for method, parameters in before["methods"].items():
        assert hasattr(thing, method)
        assert parameters is None or takes(getattr(thing, method), parameters), method


def test_errors_keep_their_names():
    assert all(issubclass(getattr(errors, name), Exception) for name in SURFACE["errors"])


@pytest.mark.parametrize("verb", SURFACE["flags"])
def test_a_command_still_takes_its_flags(verb):
    parser = import_module(VERBS[verb]).build_parser()
    flags = {flag for action in parser._actions for flag in action.option_strings or [action.dest]}
    assert set(kept(SURFACE["flags"][verb])) <= flags
