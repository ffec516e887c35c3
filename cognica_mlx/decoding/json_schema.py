"""JSON schemas as grammars.

- in: a schema, as a mapping or as text
- out: llguidance's grammar for JSON that fits it
- objects are closed: one that lists `properties` and does not say `additionalProperties` has only
  those, because a small model never stops adding others; one that lists none stays open. Schemas
  that apply to the same object, as in an `allOf`, are closed together
- what would compile for long, or not exactly, is refused before it is compiled
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher

from cognica_mlx.decoding.constraint import check_grammar_text
from cognica_mlx.errors import RequestError, one_line

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Within these limits, and those on its text, a schema compiles in about a second.
MAX_NESTING, MAX_OPTIONAL, MAX_PATTERNS = 100, 400, 64
# llguidance follows references by recursion, and at twice this depth its stack overflows.
MAX_REFERRED = 1000
# Schemas visited, with copies of those referred to.
MAX_VISITED = 50_000
# llguidance computes with floats, which hold whole numbers up to this one.
MAX_NUMBER = 2**53
MAX_COUNT = 2**31 - 1
# JSON is laid out as Python does, with no other white space. Given the choice, a small model fills
# the text with line breaks.
_LAYOUT: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
# Keywords with schemas for the same value, and for values inside it: one, a list, or by name.
_SAME = ("allOf", "anyOf", "oneOf")
_INSIDE = ("items", "additionalItems", "additionalProperties", "contains", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def json_grammar(schema: Mapping[str, Any] | str) -> str:
    """The grammar for JSON that fits a schema; {} is any object.

    Raises RequestError for a schema that is not JSON, or too large.
    """
    text = _text(closed(read_schema(schema) or {"type": "object"}))
    try:
        return LLMatcher.grammar_from_json_schema(text, defaults=_LAYOUT)
    except ValueError as error:
        raise RequestError(f"the JSON schema cannot be used: {one_line(error)}") from None


def json_layout(schema: Mapping[str, Any]) -> str:
    """A schema as text to put after `%json` in a Lark grammar, as in `json_grammar`."""
    return _text({**closed(schema), "x-guidance": _LAYOUT})


def read_schema(schema: Mapping[str, Any] | str) -> dict[str, Any]:
    """A JSON schema, given as a mapping or as text. RequestError unless it is a JSON object."""
    try:
        read = json.loads(check_grammar_text(schema)) if isinstance(schema, str) else schema
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"the JSON schema is not JSON: {one_line(error)}") from None
    if not isinstance(read, Mapping):
        raise RequestError(f"a JSON schema is an object, not {type(read).__name__}")
    return dict(read)


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with its objects closed. RequestError for one that would grow too large."""
    try:
        closing = _Closing(schema)
        made: dict[str, Any] = closing.close(schema)
        if (depth := sum(map(_depth, closing.targets.values()))) > MAX_REFERRED:
            raise RequestError(
                f"the JSON schema refers to schemas nested {depth} deep in all,"
                f" {MAX_REFERRED} is the limit"
            )
        return made
    except RecursionError:
        raise RequestError(f"the JSON schema is nested more than {MAX_NESTING} deep") from None


class _Closing:
    def __init__(self, root: Any):
        self._root, self._visited = root, 0
        # What schemas refer to.
        self.targets: dict[str, Any] = {}

    def close(self, schema: Any, whole: bool = True, refs: tuple[str, ...] = ()) -> Any:
        """`schema` with objects closed, its own only if it is `whole`: not one of several for the
        same value. `refs` have been followed to come here."""
        if not isinstance(schema, Mapping):
            return schema
        self._visit()
        lists = isinstance(schema.get("properties"), Mapping) or "allOf" in schema
        alone = whole and not lists
        made = dict(schema)
        for key, value in schema.items():
            if key in _NAMED and isinstance(value, Mapping):
                made[key] = {name: self.close(inner) for name, inner in value.items()}
            elif key in _SAME and isinstance(value, list):
                made[key] = [self.close(part, alone, refs) for part in value]
            elif key in _INSIDE:
                listed = isinstance(value, list)
                made[key] = [self.close(v) for v in value] if listed else self.close(value)
        target = self._target(schema, refs)
        if target is not None and not alone:
            # By itself the target is closed; here it is one of several.
            refs = (*refs, made.pop("$ref"))
            parts = [self.close(target, False, refs), *made.pop("allOf", ())]
            made = {"allOf": parts, **made}
        if whole and lists:
            same = list(self._same(schema, ()))
            said = any("additionalProperties" in part for part in same)
            if not said and any("properties" in part for part in same):
                for key in ("properties", "patternProperties"):
                    named = [part[key] for part in same if isinstance(part.get(key), Mapping)]
                    names = dict.fromkeys(name for part in named for name in part)
                    if named:
                        made[key] = {name: made.get(key, {}).get(name, {}) for name in names}
                made["additionalProperties"] = False
        return made

    def _same(self, schema: Any, refs: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
        """All schemas for the same value, this one first."""
        if not isinstance(schema, Mapping):
            return
        self._visit()
        yield schema
        for key in _SAME:
            for part in schema[key] if isinstance(schema.get(key), list) else ():
                yield from self._same(part, refs)
        if (target := self._target(schema, refs)) is not None:
            yield from self._same(target, (*refs, schema["$ref"]))

    def _target(self, schema: Mapping[str, Any], refs: tuple[str, ...]) -> Any:
        """The schema that this one refers to; None if it does not, or has done so before."""
        ref, found = schema.get("$ref"), self._root
        if not isinstance(ref, str) or not ref.startswith("#") or ref in refs:
            return None
        if ref in self.targets:
            return self.targets[ref]
        for step in ref[1:].split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping):
                found = found.get(name)
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                return None
        self.targets[ref] = found
        return found

    def _visit(self) -> None:
        self._visited += 1
        if self._visited > MAX_VISITED:
            raise RequestError(
                f"the JSON schema has more than {MAX_VISITED} parts, each $ref counted anew"
            )


def _text(schema: Mapping[str, Any]) -> str:
    """A closed schema as text, after checking it."""
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        _check(schema, MAX_NESTING)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"the JSON schema cannot be used: {one_line(error)}") from None
    return check_grammar_text(text)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, Mapping) else value
    return (
        1 + max(map(_depth, inner), default=0)
        if isinstance(inner, Iterable) and not isinstance(inner, str)
        else 0
    )


def _check(value: Any, levels: int, name: str = "") -> None:
    """Raise RequestError for what llguidance would not compile soon and exactly. `name` is the
    property or keyword that has the value."""
    if levels == 0:
        raise RequestError(f"the JSON schema is nested more than {MAX_NESTING} deep")
    if isinstance(value, list):
        for item in value:
            _check(item, levels - 1, name)
    elif isinstance(value, Mapping):
        for key, most in (("properties", MAX_OPTIONAL), ("patternProperties", MAX_PATTERNS)):
            named, required = value.get(key), value.get("required")
            if isinstance(named, Mapping):
                needed = set(map(str, required)) if isinstance(required, list) else set()
                if (count := sum(one not in needed for one in named)) > most:
                    what = "optional properties" if key == "properties" else key
                    raise RequestError(
                        f"an object in the JSON schema has {count} {what}, {most} is the limit"
                    )
        for key, inner in value.items():
            if key not in ("default", "examples") or isinstance(inner, Mapping):
                _check(inner, levels - 1, key)
    elif isinstance(value, (int, float)):
        most = MAX_COUNT if name in _COUNTS else MAX_NUMBER
        whole = isinstance(value, int) or name in (*_NUMBERS, *_COUNTS)
        if whole and abs(value) > most:
            raise RequestError(f"{name} in the JSON schema has {value}, beyond the limit of {most}")
