"""Tool calls: the system text that offers functions, and parsing calls from the model's reply.

- in: functions as JSON text, a dictionary or a list of them (`name`, `description`, `parameters`);
  then the model's text, piece by piece
- out: the system text in the layout that the tool specialist was trained on, a grammar that admits
  only calls of these functions, the plain text before a call, the call, and any problems with it
- nothing here runs a function; a call is the model's guess and may invent names and arguments
- bad functions raise RequestError, while a bad call, which models do make, is a `problem`
"""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cognica_mlx.decoding.constraint import check_characters, lark_grammar
from cognica_mlx.decoding.json_schema import closed, json_layout
from cognica_mlx.errors import RequestError
from cognica_mlx.files import strict_json

CALL_MARK = "<functioncall>"
MAX_CALL = 64 * 1024
MAX_NESTING = 64

Functions = str | dict[str, Any] | Sequence[dict[str, Any]]

_OFFER = (
    "You are a helpful assistant with access to the following functions. Use them if required -\n"
)
_CHOICES = ("auto", "required", "none")
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_REPR = reprlib.Repr()
_REPR.maxstring = 60


@dataclass(frozen=True)
class ToolCall:
    """The name of the function that the model calls, and its arguments."""

    name: str
    arguments: dict[str, Any]

    def message(self, call_id: str) -> dict[str, Any]:
        """The call as OpenAI's messages have it."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        function = {"name": self.name, "arguments": arguments}
        return {"id": call_id, "type": "function", "function": function}


def tool_system_prompt(functions: Functions) -> str:
    """The system text that offers `functions`, always in the same layout."""
    # Only this layout works: with compact JSON the model answers in prose.
    layouts = (
        json.dumps(function, indent=4, ensure_ascii=False) for function in read_functions(functions)
    )
    return _OFFER + "\n\n".join(layouts)


def with_functions(
    messages: Sequence[Mapping[str, str]], functions: Functions
) -> list[Mapping[str, str]]:
    """Messages whose system text offers `functions`, followed by the original system text."""
    offer, rest = tool_system_prompt(functions), list(messages)
    if rest and rest[0].get("role") == "system":
        offer = f"{offer}\n\n{rest.pop(0).get('content', '')}"
    return [{"role": "system", "content": offer}, *rest]


def call_text(name: str, arguments: str) -> str:
    """A call as the model writes it, for a history: `arguments` is JSON text."""
    return f'{CALL_MARK} {{"name": {json.dumps(name)}, "arguments": \'{arguments}\'}}'


def result_text(content: str) -> str:
    """A function's result as a user's turn. The models' documentation does not specify a layout;
    this one is from the public data set that their call layout comes from."""
    return f"FUNCTION RESPONSE: {content}"


def read_functions(functions: Functions) -> list[dict[str, Any]]:
    """The functions as plain dictionaries, each with a name; RequestError if they are not."""
    try:
        text = functions if isinstance(functions, str) else json.dumps(functions, allow_nan=False)
        read = _from_json(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the functions are not JSON: {error}") from None
    listed = read if isinstance(read, list) else [read]
    # OpenAI's API wraps them.
    wrapped = [isinstance(f, dict) and f.get("type") == "function" for f in listed]
    listed = [f.get("function") if w else f for f, w in zip(listed, wrapped, strict=True)]
    if not listed:
        raise RequestError("the list of functions is empty")
    for number, function in enumerate(listed, 1):
        if not isinstance(function, dict):
            raise RequestError(f"function {number} has type {_kind(function)}, not object")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f'function {number} has no "name"')
        check_characters(function["name"], f"the name of function {number}")
        if not isinstance(function.get("parameters", {}), dict):
            raise RequestError(f"function {number}: its parameters are not an object")
    return listed


def call_grammar(functions: Functions, tool_choice: str = "auto") -> str:
    """An llguidance grammar for replies when `functions` are offered.

    "auto" admits plain text, and a call with or without text before it; "required" admits a call;
    a function's name, a call of that function; "none", plain text. A call has the layout that the
    model was trained on, its arguments fit the function's schema, and it ends the reply.
    RequestError for another choice, or for schemas that cannot be used.
    """
    offered = read_functions(functions)
    names = [function["name"] for function in offered]
    if tool_choice not in (*_CHOICES, *names):
        known = ", ".join((*_CHOICES, *names))
        raise RequestError(f"tool_choice {_shown(tool_choice)} is not one of {known}")
    if tool_choice in names:
        offered = [offered[names.index(tool_choice)]]
    start = {"none": "PLAIN", "auto": "PLAIN | before call"}.get(
        tool_choice, f"{json.dumps(CALL_MARK)} call"
    )
    calls, rules = [], []
    for i, function in enumerate(offered):
        head = f' {{"name": {json.dumps(function["name"])}, "arguments": \''
        calls.append(f'{json.dumps(head)} arguments{i} "\'}}"')
        rules.append(f"arguments{i}: %json {json_layout(_arguments(function))}")
    lines = [
        f"start: {start}",
        f"call: {' | '.join(calls)}",
        f"before[suffix={json.dumps(CALL_MARK)}]: /(?s:.*)/",
        f"PLAIN: /(?s:.*)/ & ~/(?s:.*){CALL_MARK}(?s:.*)/",
        *rules,
    ]
    return lark_grammar("\n".join(lines) + "\n")


class ToolCallParser:
    """Finds the first tool call in text that arrives in pieces of any size.

    Feed it until `done`. Then `call` is the call, or `problem` says why it is not usable; ignore
    the rest of the text. Text without a call is returned unchanged.
    """

    def __init__(self) -> None:
        self.call: ToolCall | None = None
        self.problem: str | None = None
        self._held = ""  # possibly the start of the mark
        self._begun = False
        self._json: list[str] = []
        self._length = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def done(self) -> bool:
        """Whether a call has been read to its end, usable or not."""
        return self.call is not None or self.problem is not None

    def feed(self, text: str) -> str:
        """Take the next piece. Returns the text that is certain to be before any call."""
        plain = ""
        if not self._begun:
            plain, mark, text = (self._held + text).partition(CALL_MARK)
            self._begun = bool(mark)
            starts = (n for n in range(1, len(CALL_MARK)) if plain.endswith(CALL_MARK[:n]))
            certain = len(plain) - (0 if mark else max(starts, default=0))
            plain, self._held = plain[:certain], plain[certain:]
        for char in text:
            if self.done:
                break
            self._read(char)
        return plain

    def finish(self) -> str:
        """The text held back, once no more will come. An unfinished call is a problem."""
        if self._begun and not self.done:
            self.problem = "the call was never closed"
        text, self._held = self._held, ""
        return text

    def _read(self, char: str) -> None:
        """Take one character of the call.

        Counting braces outside strings finds the end, even in quoted arguments. The call is JSON
        once the single quotes around the arguments are removed.
        """
        self._length += 1
        if self._length > MAX_CALL:
            self.problem = f"the call is longer than {MAX_CALL} characters"
        elif self._in_string:
            if self._escaped and char == "'":
                self._json.pop()  # JSON has no \'
            self._json.append(char)
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif self._depth == 0 and char != "{":
            if not char.isspace():
                self.problem = "the call is not an object"
        elif self._depth != 1 or char != "'":
            self._json.append(char)
            self._in_string = char == '"'
            self._depth += (char == "{") - (char == "}")
            if self._depth == 0:
                self._close()

    def _close(self) -> None:
        try:
            call = _from_json("".join(self._json))
            arguments = call.get("arguments", {})
            if isinstance(arguments, str):
                arguments = _from_json(arguments)
        except ValueError as error:
            self.problem = f"the call is not JSON: {error}"
            return
        if not isinstance(call.get("name"), str) or not call["name"]:
            self.problem = 'the call has no "name"'
        elif not isinstance(arguments, dict):
            self.problem = f"the call's arguments have type {_kind(arguments)}, not object"
        else:
            self.call = ToolCall(call["name"], arguments)


def check_call(call: ToolCall, functions: Functions) -> list[str]:
    """The problems of the call according to the functions' schemas; empty if there are none.

    Checks the name, missing and unknown arguments, `type` and `enum`, also inside arrays and
    objects. Other constraints are not checked.
    """
    schemas = {f["name"]: f for f in read_functions(functions)}
    if call.name not in schemas:
        return [f"there is no function {_shown(call.name)}; known: {', '.join(schemas)}"]
    return list(_problems(call.arguments, closed(_arguments(schemas[call.name])), ""))


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments. Without parameters there are none, while any other
    object that lists no properties may contain anything."""
    return {"type": "object", "properties": {}, **function.get("parameters", {})}


def _problems(value: Any, schema: Any, where: str) -> Iterator[str]:
    """Where `value` does not fit `schema`. Invalid parts of a schema are ignored."""
    if not isinstance(schema, dict):
        return
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(kinds, list) and not any(_is(value, kind) for kind in kinds):
        yield f"argument {where} has type {_kind(value)}, not {' or '.join(map(str, kinds))}"
        return
    enum = schema.get("enum")
    if isinstance(enum, list) and value not in enum:
        yield f"argument {where} is {_shown(value)}, not one of {', '.join(map(_shown, enum))}"
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _problems(item, schema.get("items"), f"{where}[{index}]")
    if isinstance(value, dict):
        prefix = f"{where}." if where else ""
        properties, required = schema.get("properties"), schema.get("required")
        for name in required if isinstance(required, list) else []:
            if isinstance(name, str) and name not in value:
                yield f"argument {prefix}{name} is missing"
        if not isinstance(properties, dict):
            return
        for name, item in value.items():
            if name in properties:
                yield from _problems(item, properties[name], f"{prefix}{name}")
            elif not schema.get("additionalProperties"):
                yield f"there is no argument {_shown(prefix + name)}"


def _is(value: Any, kind: Any) -> bool:
    if not isinstance(kind, str) or kind not in _TYPES:
        return True
    if isinstance(value, bool):  # an int to Python, but not a number in JSON
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _kind(value: Any) -> str:
    return next(kind for kind in ("integer", *_TYPES) if _is(value, kind))


def _shown(value: Any) -> str:
    """`value` on one short line that is safe to print."""
    return _REPR.repr(value)


def _from_json(text: str) -> Any:
    """Parse `text`. ValueError if it is not JSON, or nested too deeply."""
    # Not strict: the model may write a line break inside a string.
    return strict_json.loads(text, MAX_NESTING, strict=False)
