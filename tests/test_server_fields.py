"""A request's fields, read without a server; and JSON on its way back."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import fixture

from mlx_poe.server.chat_completions import ChatResponse
from mlx_poe.server.error_bodies import ApiError
from mlx_poe.server.fields import Fields, read_object, shown
from mlx_poe.server.shared_fields import Options
from mlx_poe.server.wire import event, to_json


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (lambda body: body.whole("x", 0, 9), True),
        (lambda body: body.number("x", 0, 9), False),
        (lambda body: body.number("x", 0, 9), True),
        (lambda body: body.flag("x"), 1),
        (lambda body: body.flag("x"), 0),
        (lambda body: body.only("x", False), 0),
        (lambda body: body.only("x", 1), True),
        (lambda body: body.text("x"), True),
    ],
)
def test_true_is_no_number_and_one_is_not_true(read, value):
    with pytest.raises(ApiError, match=rf"x: .*{shown(value)}"):
        read(Fields({"x": value}))


def test_true_and_numbers_are_read_as_what_they_are():
    body = Fields({"yes": True, "no": False, "one": 1, "half": 0.5})
    assert body.flag("yes") is True and body.flag("no") is False
    assert body.flag("absent") is False and body.flag("absent", default=True) is True
    assert body.whole("one", 0, 9) == 1 and body.number("half", 0, 1) == 0.5
    body.only("no", False)
    assert [shown(value) for value in (True, False, None, 1)] == ["true", "false", "null", "1"]


def test_a_number_too_large_for_a_float_is_refused():
    assert read_object(b'{"x": 1e308}').number("x", 0, 1e309) == 1e308
    with pytest.raises(ApiError, match="1e400 is not a number in JSON, or too large"):
        read_object(b'{"x": 1e400}')


@pytest.mark.parametrize("text", ["naïve 日本 🎉", "\ud83c", "\u2028", "\x00"])
def test_any_text_goes_back_as_ascii(text):
    value: dict[str, Any] = {"text": text}
    sent = to_json(value)
    assert sent.isascii() and json.loads(sent) == value
    assert event(value) == b"data: " + sent + b"\n\n" and sent.count(b"\n") == 0


@pytest.mark.parametrize("usage", [False, True])
def test_every_chunk_is_a_whole_document(usage):
    """Whatever the model's name, and with numbers that JSON lacks."""
    served: Any = SimpleNamespace(name='a [] "b" {', info=SimpleNamespace(stages=1))
    options = Options(served, 5, 5, ["Hi"], stream=True, include_usage=usage)
    frame = ChatResponse(options, fixture("poe-tiny")[1], tools=False)
    chunks = [*frame.first_chunks(), frame._chunk({"index": 0, "x": [math.nan, math.inf, 1.5, []]})]
    read = [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]
    assert all(chunk.endswith(b"\n\n") and chunk.count(b"\n") == 2 for chunk in chunks)
    about = {"id": frame.id, "model": served.name, "object": "chat.completion.chunk"}
    about |= {"usage": None} if usage else {}
    for one in read:
        assert isinstance(one.pop("created"), int)
        assert {name: one[name] for name in one if name != "choices"} == about
    assert read[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert read[1]["choices"] == [{"index": 0, "x": [None, None, 1.5, []]}]
    assert [len(json.loads(c.removeprefix(b"data: "))["choices"]) for c in frame.last_chunks()] == (
        [0] if usage else []
    )
