"""Reads plain values from pickles without unpickling, so nothing in a file is ever executed.

- In: a pickle's bytes, and a `Dialect` that lists what one kind of file may contain.
- Out: what the pickle leaves on its stack: text, numbers, tuples and dictionaries; a `Global` for
  each class or function that the dialect allows; and the results of the dialect's own rules.
- No unpickler runs. pickletools parses the file without executing it, and `replay` interprets the
  few instructions that the dialect lists. It imports nothing, sets no attribute, and calls nothing
  but the dialect's rules, which are chosen by the instruction, never by a value in the file.
  Any other instruction, and any other global, is refused by name.
- Values are never hashed (except text and bytes), compared or traversed, so their depth needs no
  limit.

A `pickle.Unpickler` with a strict `find_class` would not be enough: extension codes cached by
copyreg bypass `find_class`, a large memo index allocates gigabytes, and hashing a deeply nested
tuple overflows the C stack.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from cognica_mlx.errors import PoEError

TEXT = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"})
BYTES = frozenset({"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"})
INTEGERS = frozenset({"BININT", "BININT1", "BININT2"})
NUMBERS = INTEGERS | {"LONG1", "BINFLOAT"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_SPELLED = TEXT | BYTES | NUMBERS  # instructions that carry their value as an argument
# Allowed in every dialect: dictionaries, the memo, names, and framing.
_COMMON = frozenset(
    {"MARK", "EMPTY_DICT", "EMPTY_TUPLE", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL"}
    | {"MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "PROTO", "FRAME", "STOP"}
)
# The instructions that a dialect may have a rule for, with their numbers of operands.
_OPERANDS = {"REDUCE": 2, "NEWOBJ": 2, "BUILD": 2, "BINPERSID": 1}


class Global(NamedTuple):
    """Placeholder for a class or function that unpickling would have imported."""

    name: str


@dataclass(frozen=True)
class Dialect:
    """What one kind of file may contain; everything else is refused.

    `kind` names it in messages; refusals raise `error`. `values` are the allowed instructions for
    plain values beyond dictionaries and (), `names` the allowed globals, as "module.name". `rules`
    compute the results of REDUCE, NEWOBJ, BUILD and BINPERSID; their operands may be anything.
    """

    kind: str
    error: type[PoEError]
    most_steps: int
    values: frozenset[str]
    names: frozenset[str]
    rules: Mapping[str, Callable[..., object]]


def replay(data: bytes, dialect: Dialect) -> list[object]:
    """What the pickle in `data` leaves on its stack: one value, if the pickle is valid.

    Raises the dialect's error for anything refused, and any Exception for a damaged pickle.
    """
    known = _COMMON | dialect.values | dialect.rules.keys()
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, object] = {}

    def take(count: int) -> list[Any]:
        if not 0 <= count <= len(stack):
            raise ValueError("the pickle pops more values than it has pushed")
        start = len(stack) - count
        items = stack[start:]
        del stack[start:]
        return items

    for step, (opcode, arg, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if step == dialect.most_steps:
            raise dialect.error(
                f"has over {dialect.most_steps} pickle instructions: not a {dialect.kind}"
            )
        if name not in known:
            raise dialect.error(
                f"uses the pickle instruction {name}, which no {dialect.kind} needs:"
                " refused, nothing was run"
            )
        if name in _SPELLED:
            stack.append(arg)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "TUPLE" or name in TUPLES:
            count = len(stack) - marks.pop() if name == "TUPLE" else TUPLES[name]
            stack.append(tuple(take(count)))
        elif name in ("SETITEM", "SETITEMS"):
            items = take(len(stack) - marks.pop() if name == "SETITEMS" else 2)
            _set_items(stack[-1], items, dialect)
        elif name == "GLOBAL":
            stack.append(_global(dialect, *str(arg).split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_global(dialect, *take(2)))
        elif name in dialect.rules:
            stack.append(dialect.rules[name](*take(_OPERANDS[name])))
    return stack


def _global(dialect: Dialect, module: object, name: object = "") -> Global:
    # Exact types: only a real str may be looked up or shown.
    if type(module) is not str or type(name) is not str:
        full_name = "a non-name"
    else:
        full_name = f"{module}.{name}"
        if full_name in dialect.names and "." not in name:
            return Global(full_name)
    raise dialect.error(f"asks for {ascii(full_name)[:120]}: refused, nothing was run")


def _set_items(target: object, items: list[Any], dialect: Dialect) -> None:
    keys, values = items[::2], items[1::2]
    if not isinstance(target, dict) or len(keys) != len(values):
        raise ValueError("it sets items of something that is not a dictionary")
    # Hashing a deep tuple overflows the C stack.
    if any(type(key) not in (str, bytes) for key in keys):
        kinds = "neither text nor bytes" if dialect.values & BYTES else "not text"
        raise ValueError(f"it has dictionary keys that are {kinds}")
    target.update(zip(keys, values, strict=True))
