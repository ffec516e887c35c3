"""A request's JSON, read field by field.

- in: the body, as bytes; then each field by name, with its type and range
- out: plain values; null and absent are the same
- a field that is unknown, of the wrong type or out of range gives a 400 that names it
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from cognica_mlx.errors import deleted, one_line
from cognica_mlx.files import strict_json
from mlx_poe.server.error_bodies import ApiError, refused

# Deeper than any sensible request, and far below Python's recursion limit.
MAX_NESTING = 100


class Fields:
    """The fields of one JSON object. `where` is the object's own place in the request."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        self.values = {name: value for name, value in values.items() if value is not None}
        self._where = where
        self._asked: set[str] = set()

    def name(self, field: str) -> str:
        """The field's place in the request."""
        return f"{self._where}.{field}" if self._where else field

    def __contains__(self, field: str) -> bool:
        return field in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def take(self, field: str) -> Any:
        """The field's raw value, or None."""
        self._asked.add(field)
        return self.values.get(field)

    def _taken(self, field: str, kinds: Any, what: str) -> Any:
        value = self.take(field)
        # Python's True is an int, but JSON's true is not a number.
        fits = isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))
        if value is not None and not fits:
            raise refused(self.name(field), f"expected {what}, got {shown(value)}")
        return value

    def text(self, field: str) -> str | None:
        return self._taken(field, str, "a string")

    def flag(self, field: str, default: bool = False) -> bool:
        value = self._taken(field, bool, "true or false")
        return default if value is None else value

    def whole(self, field: str, low: int, high: int) -> int | None:
        return self._within(field, self._taken(field, int, "a whole number"), low, high)

    def number(self, field: str, low: float, high: float) -> float | None:
        return self._within(field, self._taken(field, (int, float), "a number"), low, high)

    def _within(self, field: str, value: Any, low: float, high: float) -> Any:
        if value is not None and not low <= value <= high:
            raise refused(self.name(field), f"{value} is not between {low} and {high}")
        return value

    def object(self, field: str) -> Fields | None:
        value = self._taken(field, dict, "an object")
        return None if value is None else Fields(value, self.name(field))

    def items(self, field: str) -> list[Any] | None:
        """An array, unchecked."""
        return self._taken(field, list, "an array")

    def objects(self, field: str) -> Iterator[Fields]:
        for number, value in enumerate(self.items(field) or []):
            where = f"{self.name(field)}[{number}]"
            if not isinstance(value, dict):
                raise refused(where, f"expected an object, got {shown(value)}")
            yield Fields(value, where)

    def required(self, field: str, read: Callable[[str], Any]) -> Any:
        """The value that `read` returns for the field; a 400 if it is missing."""
        value = read(field)
        if value is None:
            raise refused(self.name(field), "this field is required")
        return value

    def ignore(self, fields: Collection[str]) -> None:
        """Accept fields that have no effect here, whatever they hold."""
        self._asked.update(fields)

    def only(self, field: str, *values: Any) -> None:
        """Accept a field only with one of these values, as nothing else is supported."""
        value = self.take(field)
        if value is not None and not any(value == v and type(value) is type(v) for v in values):
            allowed = " or ".join(shown(v) for v in values)
            raise refused(self.name(field), f"only {allowed} is supported, got {shown(value)}")

    def done(self) -> None:
        """Refuse fields that have not been read."""
        for field in self.values:
            if field not in self._asked:
                name = self.name(ascii(field)[1:-1])[:80]
                problem = deleted(field) or "there is no such field, or it is not supported"
                raise refused(name, problem, "unsupported_parameter")


def read_object(body: bytes) -> Fields:
    """The JSON object in a request's body. ApiError if it is anything else."""
    try:
        value = strict_json.loads(body.decode("utf-8"), MAX_NESTING)
    except ValueError as error:
        message = f"the body is not JSON: {one_line(error)}"
        raise ApiError(400, message, code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is {shown(value)}, not a JSON object", code="invalid_json")
    return Fields(value)


def shown(value: Any) -> str:
    """A short form of a value, for messages."""
    if isinstance(value, (dict, list)):
        return {dict: "an object", list: "an array"}[type(value)]
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return ascii(value)[:60]
