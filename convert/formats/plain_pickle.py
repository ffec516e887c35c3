"""Reads plain values from pickles without unpickling, so nothing in a file is ever executed.

- In: a pickle's bytes, and what one kind of file may contain, its dialect; the rest is refused.
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


def replay(
    data: bytes,
    *,
    kind: str,
    error: type[PoEError],
    most_steps: int,
    values: frozenset[str],
    names: frozenset[str],
    rules: Mapping[str, Callable[..., object]],
) -> list[object]:
    """What the pickle in `data` leaves on its stack: one value, if the pickle is valid.

    `kind` names such a file in messages. It may hold plain values beyond dictionaries and () by the
    instructions `values`, and the globals `names`, as "module.name". `rules` compute the results of
    REDUCE, NEWOBJ, BUILD and BINPERSID; their operands may be anything. Raises `error` for
    everything else, and any Exception for a damaged pickle.
    """
    known = _COMMON | values | rules.keys()
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

    def named(module: object, name: object = "") -> Global:
        # Exact types: only a real str may be looked up or shown.
        full_name = "a non-name"
        if type(module) is str and type(name) is str:
            full_name = f"{module}.{name}"
            if full_name in names and "." not in name:
                return Global(full_name)
        raise error(f"asks for {ascii(full_name)[:120]}: refused, nothing was run")

    for step, (opcode, arg, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if step == most_steps:
            raise error(f"has over {most_steps} pickle instructions: not a {kind}")
        if name not in known:
            raise error(
                f"uses the pickle instruction {name}, which no {kind} needs: refused, nothing was"
                " run"
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
            keys = items[::2]
            if not isinstance(stack[-1], dict) or len(items) % 2:
                raise ValueError("it sets items of something that is not a dictionary")
            # Hashing a deep tuple overflows the C stack.
            if any(type(key) not in (str, bytes) for key in keys):
                kinds = "neither text nor bytes" if values & BYTES else "not text"
                raise ValueError(f"it has dictionary keys that are {kinds}")
            stack[-1].update(zip(keys, items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(named(*str(arg).split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(named(*take(2)))
        elif name in rules:
            stack.append(rules[name](*take(_OPERANDS[name])))
    return stack
