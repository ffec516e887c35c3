"""Pickles read without unpickling: values that a file spells out, and nothing that it runs.

- In: a pickle's bytes, and a `Dialect` that lists what one kind of file is made of.
- Out: what the pickle leaves on its stack, made of text, numbers, tuples and dictionaries; `Global`
  for a class or function that the dialect knows; and what the dialect's own rules make of these.
- No unpickler runs. pickletools takes the file apart, which never executes it, and `replay` carries
  out the few instructions that the dialect lists. It imports nothing, sets no attribute, and calls
  nothing but the dialect's rules, which the instruction picks and no value in the file can.
  Any other instruction, and any other global, is refused by name.
- Values are never hashed (but for text and bytes), compared or walked, so their depth needs no
  limit.

A `pickle.Unpickler` with a strict `find_class` was not enough: extension codes that copyreg has
cached bypass `find_class`, a large memo index allocates gigabytes, and hashing a deeply nested
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

_SPELLED = TEXT | BYTES | NUMBERS  # whose argument is their value
# Of every dialect: dictionaries, the memo, names, and what only frames the rest.
_COMMON = frozenset(
    {"MARK", "EMPTY_DICT", "EMPTY_TUPLE", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL"}
    | {"MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "PROTO", "FRAME", "STOP"}
)
# The instructions that do something, if a dialect has a rule for them, and how much they take.
_OPERANDS = {"REDUCE": 2, "NEWOBJ": 2, "BUILD": 2, "BINPERSID": 1}


class Global(NamedTuple):
    """Stands where unpickling would have imported something."""

    name: str


@dataclass(frozen=True)
class Dialect:
    """What one kind of file may hold; all else is refused.

    `kind` names it in messages, `error` is what a refusal raises. `values` are the instructions for
    plain values beyond dictionaries and (), `names` the globals, as "module.name". `rules` say what
    REDUCE, NEWOBJ, BUILD and BINPERSID make of their operands, which may be anything.
    """

    kind: str
    error: type[PoEError]
    most_steps: int
    values: frozenset[str]
    names: frozenset[str]
    rules: Mapping[str, Callable[..., object]]


def replay(data: bytes, dialect: Dialect) -> list[object]:
    """What the pickle in `data` leaves on its stack: one value, if it is a sound one.

    Raises the dialect's error for what is refused, and any Exception for what is damaged.
    """
    known = _COMMON | dialect.values | dialect.rules.keys()
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, object] = {}

    def take(count: int) -> list[Any]:
        if not 0 <= count <= len(stack):
            raise ValueError("the pickle takes more than it has made")
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
    # Exact types: a text is all that may be looked for, or shown.
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
        raise ValueError("it sets items where there is no dictionary")
    # Hashing a deep tuple overflows the C stack.
    if any(type(key) not in (str, bytes) for key in keys):
        kinds = "neither text nor bytes" if dialect.values & BYTES else "not text"
        raise ValueError(f"it has dictionary keys that are {kinds}")
    target.update(zip(keys, values, strict=True))
