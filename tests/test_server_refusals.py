"""What the server refuses: by name, in OpenAI's shape, before it costs anything."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from conftest import SOAK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import RunningServer, until

from mlx_poe.commands import server as server_command

USER = {"role": "user", "content": "hi"}
CHAT = {"model": "poe-tiny-chat", "messages": [USER], "max_tokens": 2}
TEXT = {"model": "poe-tiny", "prompt": "hi", "max_tokens": 2}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}


def refusal(answer: tuple[int, Any, Mapping[str, str]]) -> tuple[int, dict[str, Any]]:
    """The status and the error, which has OpenAI's shape."""
    status, body, _ = answer
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error = body["error"]
    assert error["message"] and isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return status, error


@pytest.mark.parametrize(
    "path, change, param",
    [
        (CHATS, {"best": 1}, "best"),
        (CHATS, {"temperature": 1e9}, "temperature"),
        (CHATS, {"temperature": "hot"}, "temperature"),
        (CHATS, {"temperature": True}, "temperature"),
        (CHATS, {"temperature": 1e-9}, "temperature"),
        (CHATS, {"top_p": 1.01}, "top_p"),
        (CHATS, {"n": 0}, "n"),
        (CHATS, {"n": 17}, "n"),
        (CHATS, {"stop": 3}, "stop"),
        (CHATS, {"stop": ["a", 3]}, "stop"),
        (CHATS, {"stop": ""}, "stop"),
        (CHATS, {"stop": ["x"] * 17}, "stop"),
        (CHATS, {"stop": "x\ud83d"}, "stop"),
        (CHATS, {"regex": "x\ud83d"}, "regex"),
        (CHATS, {"grammar": 'start: "\ud83d"'}, "grammar"),
        (CHATS, {"seed": 0.5}, "seed"),
        (CHATS, {"max_tokens": 0}, "max_tokens"),
        (CHATS, {"max_tokens": -1}, "max_tokens"),
        (CHATS, {"max_completion_tokens": 3}, "max_completion_tokens"),
        (CHATS, {"presence_penalty": 2.5}, "presence_penalty"),
        (CHATS, {"frequency_penalty": -3}, "frequency_penalty"),
        (CHATS, {"logit_bias": {"5": 101}}, "logit_bias.5"),
        (CHATS, {"logit_bias": {"2048": 1}}, "logit_bias.2048"),
        (CHATS, {"logit_bias": {"x": 1}}, "logit_bias.x"),
        (CHATS, {"top_logprobs": 2}, "top_logprobs"),
        (CHATS, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHATS, {"logprobs": 5}, "logprobs"),
        (CHATS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHATS, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        (CHATS, {"mode": "fast"}, "mode"),
        (CHATS, {"mode": "stage", "stage": 9}, "stage"),
        (CHATS, {"mode": "full", "safety": 1.0}, "safety"),
        (CHATS, {"mode": "wand", "p99_bounds": [1.0]}, "p99_bounds"),
        (CHATS, {"mode": "compose", "stages": ["a"]}, "stages"),
        (CHATS, {"mode": "speculative", "num_draft_tokens": 65}, "num_draft_tokens"),
        (CHATS, {"regex": "("}, "regex"),
        (CHATS, {"grammar": "start: nothing"}, "grammar"),
        (CHATS, {"regex": "a", "grammar": 'start: "a"'}, "regex"),
        (CHATS, {"response_format": {"type": "xml"}}, "response_format.type"),
        (CHATS, {"response_format": SCHEMA}, "response_format"),
        (CHATS, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHATS, {"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (CHATS, {"tools": [{"type": "function"}]}, "tools[0].function"),
        (CHATS, {"tool_choice": "required"}, "tool_choice"),
        (CHATS, {"tools": [TOOL], "tool_choice": "g"}, "tool_choice"),
        (
            CHATS,
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        (CHATS, {"functions": []}, "functions"),
        (CHATS, {"modalities": ["audio"]}, "modalities"),
        (CHATS, {"messages": []}, "messages"),
        (CHATS, {"messages": "hi"}, "messages"),
        (CHATS, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHATS, {"messages": [{"role": "cat", "content": "x"}]}, "messages[0].role"),
        (CHATS, {"messages": [USER, {"role": "system", "content": "x"}]}, "messages[1].role"),
        (CHATS, {"messages": [USER, {"role": "assistant", "content": "x"}]}, "messages"),
        (CHATS, {"messages": [USER, {"role": "assistant"}]}, "messages[1].content"),
        (CHATS, {"messages": [{**USER, "audio": {"id": 1}}]}, "messages[0].audio"),
        (
            CHATS,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        (
            CHATS,
            {"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "c"}]},
            "messages[1].tool_call_id",
        ),
        (CHATS, {"model": "poe-tiny"}, "model"),
        (CHATS, {"model": None}, "model"),
        (TEXTS, {"prompt": ""}, "prompt"),
        (TEXTS, {"prompt": None}, "prompt"),
        (TEXTS, {"prompt": []}, "prompt"),
        (TEXTS, {"prompt": ["a", ""]}, "prompt[1]"),
        (TEXTS, {"prompt": ["a", 5]}, "prompt[1]"),
        (TEXTS, {"prompt": [[1], []]}, "prompt[1]"),
        (TEXTS, {"prompt": [1, 2048]}, "prompt"),
        (TEXTS, {"prompt": [1, -1]}, "prompt"),
        (TEXTS, {"prompt": [True]}, "prompt[0]"),
        (TEXTS, {"prompt": ["a"] * 161}, "prompt"),
        (TEXTS, {"best_of": 2}, "best_of"),
        (TEXTS, {"suffix": "x"}, "suffix"),
        (TEXTS, {"logprobs": 6}, "logprobs"),
        (TEXTS, {"logprobs": True}, "logprobs"),
        (TEXTS, {"max_tokens": 0}, "max_tokens"),
        (TEXTS, {"tools": [TOOL]}, "tools"),
        (TEXTS, {"max_tokens": 20000}, "max_tokens"),
    ],
)
def test_a_field_that_cannot_be_honored_is_named(server, path, change, param):
    body = {**(CHAT if path == CHATS else TEXT), **change}
    status, error = refusal(server.ask(path, body))
    assert (status, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param", "instead"),
    [
        ({"mode": "certified"}, "mode", "speculative"),
        ({"mode": "speculative", "draft_rank": 16}, "draft_rank", "draft_bits"),
        ({"mode": "speculative", "draft_margin": 0.4}, "draft_margin", "num_draft_tokens"),
    ],
)
def test_what_was_deleted_is_answered_with_what_replaces_it(server, change, param, instead):
    status, error = refusal(server.ask(TEXTS, {**TEXT, **change}))
    assert (status, error["param"]) == (400, param)
    assert f"no longer exists: use {instead}" in error["message"]


@pytest.mark.parametrize(
    "change",
    [
        dict.fromkeys(("temperature", "stop", "tools", "seed", "logit_bias", "anything")),
        {"user": "u", "metadata": {"a": "b"}, "store": True, "parallel_tool_calls": False},
        {"n": 1, "response_format": {"type": "text"}, "tool_choice": "auto", "tools": []},
        {"messages": [{"role": "developer", "content": "x"}, USER]},
    ],
)
def test_what_clients_send_without_meaning_it_is_accepted(server, change):
    assert server.ask(CHATS, {**CHAT, **change})[0] == 200


def test_what_completions_take_without_effect(server):
    extra = {"best_of": 1, "suffix": "", "response_format": {"type": "text"}, "user": "x"}
    assert server.ask(TEXTS, {**TEXT, **extra})[0] == 200


@pytest.mark.parametrize("name", ["nope", "../poe-tiny", "/etc/passwd", "gpt2", "poe-tiny/"])
def test_a_model_that_is_not_served_is_not_looked_for(server, name):
    status, error = refusal(server.ask(TEXTS, {**TEXT, "model": name}))
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_a_prompt_that_is_too_long(server):
    status, error = refusal(server.ask(TEXTS, {**TEXT, "prompt": [5] * 16384}))
    assert (status, error["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("path", [CHATS, TEXTS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body, code",
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"a":' * 5000, "invalid_json"),
        (b'{"model": ' + b"[" * 150 + b"]" * 150 + b"}", "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b" " * 1_000_001, "request_too_large"),
    ],
)
def test_a_body_that_is_no_request(server, path, body, code):
    status, error = refusal(server.ask(path, body))
    assert (status, error["code"]) == (413 if "large" in code else 400, code)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", CHATS, 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/nothing", 404),
        ("GET", "/..%2f..%2fetc/passwd", 404),
        ("GET", "/page/../app.py", 404),
        ("POST", "/v1/embeddings", 404),
    ],
)
def test_addresses_that_lead_nowhere(server, method, path, status):
    answer = server.ask(path, b"{}" if method == "POST" else None, method=method)
    assert refusal(answer)[0] == status


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "a", "prompt": "b"}, "content"),
        ("/tokenize", {"content": 3}, "content"),
        ("/tokenize", {"content": "a", "x": 1}, "x"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 2048]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)
def test_tokens_that_are_none(server, path, body, param):
    status, error = refusal(server.ask(path, body))
    assert (status, error["param"]) == (400, param)


# --- who may ask ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers, allowed",
    [
        ({"Host": "localhost:1"}, True),
        ({"Host": "127.0.0.1"}, True),
        ({"Host": "[::1]:8080"}, True),
        ({"Host": "evil.example"}, False),
        ({"Host": "evil.example:8080"}, False),
        ({"Host": "127.0.0.1.evil.example"}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://127.0.0.1:1"}, False),
        ({"Host": "localhost:77", "Origin": "http://localhost:77"}, True),
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", None])
def test_pages_from_elsewhere_are_refused(server, headers, allowed, kind):
    about = {**headers, **({"Content-Type": kind} if kind else {})}
    answer = server.ask(TEXTS, TEXT, headers=about)
    assert answer[0] == (200 if allowed else 403)
    assert allowed or refusal(answer)[1]["code"] == "forbidden_origin"
    assert "access-control-allow-origin" not in answer[2]
    for path in ("/v1/models", "/", "/metrics"):
        assert server.ask(path, headers=headers)[0] == answer[0]


@pytest.fixture(scope="module")
def keyed():
    flags = ("--allow-origin", "https://app.example", "--max-body", "2000", "--max-context", "50")
    running = RunningServer(*flags, env={"MLX_POE_API_KEY": "secret ☃"})
    yield running
    assert running.stop() == 0


def key(text: str) -> dict[str, str]:
    return {"Authorization": text.encode().decode("latin-1")}


def test_with_a_key_only_the_page_and_health_are_open(keyed):
    assert keyed.ask("/")[0] == keyed.ask("/page.js")[0] == keyed.ask("/health")[0] == 200
    for path in ("/v1/models", "/metrics", "/tokenizer_info"):
        status, error = refusal(keyed.ask(path))
        assert (status, error["code"]) == (401, "invalid_api_key")
    for path in (CHATS, TEXTS, "/tokenize"):
        assert keyed.ask(path, TEXT)[0] == 401
    for wrong in ("Bearer secret", "secret ☃", "Basic secret ☃", "Bearer secret ☃x", "Bearer", ""):
        assert keyed.ask("/v1/models", headers=key(wrong))[0] == 401
    assert keyed.ask(TEXTS, TEXT, headers=key("Bearer secret ☃"))[0] == 200


def test_a_page_that_is_allowed(keyed):
    origin = {"Origin": "https://app.example"}
    asked = ("Method", "POST"), ("Headers", "authorization")
    ask = {f"Access-Control-Request-{name}": value for name, value in asked}
    status, _, headers = keyed.ask(CHATS, method="OPTIONS", headers={**origin, **ask})
    assert (status, headers["access-control-allow-origin"]) == (200, "https://app.example")
    status, _, headers = keyed.ask(TEXTS, TEXT, headers={**origin, **key("Bearer secret ☃")})
    assert (status, headers["access-control-allow-origin"]) == (200, "https://app.example")
    other = {"Origin": "https://other.example", **ask}
    assert keyed.ask(CHATS, method="OPTIONS", headers=other)[0] == 403


def test_limits_have_flags(keyed):
    about = key("Bearer secret ☃")
    assert keyed.ask(TEXTS, b" " * 2001, headers=about)[0] == 413
    status, error = refusal(keyed.ask(TEXTS, {**TEXT, "prompt": [5] * 49}, headers=about))
    assert (status, error["code"]) == (400, "context_length_exceeded")
    # Without max_tokens there is as much as fits.
    body = {"model": "poe-tiny", "prompt": [5] * 45, "temperature": 1.5}
    answer = keyed.ask(TEXTS, body, headers=about)[1]
    assert answer["usage"]["completion_tokens"] <= 5


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--host", "0.0.0.0"], "others can reach 0.0.0.0: set a key"),
        (["--no-api-key", "--api-key", "x"], "not both"),
        (["--specialist", "x"], "invalid NAME=MODEL value"),
        (["--specialist", "poe-tiny=poe-tiny-chat"], "two models are named poe-tiny"),
        (["--composition", "x=poe-tiny-chat,nope"], "no specialist nope"),
        (["--composition", "x=a:b"], "a weight must be a number"),
        (["--port", "70000"], "not a port"),
        (
            ["--host", "no.such.host.invalid", "--no-api-key"],
            "cannot listen on no.such.host.invalid",
        ),
        (["--model", "no-such-model"], "no-such-model"),
        (["--max-sequences", "0"], "max_sequences 0"),
        (["--memory", "x"], "not a size"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(flags, problem, monkeypatch, capsys):
    def serves(*_: object) -> int:
        raise AssertionError("it serves all the same")

    # A server that does start would never end.
    monkeypatch.setattr(server_command, "_run", serves)
    assert server_command.main(["--port", "0", *flags]) in (1, 2)
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("mlx_poe.server: error: ") and problem in last
    assert "Traceback" not in error


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "mlx_poe", "server", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and f"port {port}" in done.stderr


def test_without_the_extra_one_line_says_what_to_install(tmp_path):
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError(name='starlette')")
    code = "import sys; from mlx_poe.commands.server import main; sys.exit(main([]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and 'pip install "cognica-mlx[server]"' in done.stderr


# --- anything at all ------------------------------------------------------------------------------

NAMES = ("role", "content", "type", "x", "\udfff")
junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
        st.sampled_from(["user", "full", "wand", "poe-tiny", "poe-tiny-chat", "\ud800"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "x", "\udfff"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
FIELDS = (
    *("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n"),
    *("stop", "seed", "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias", "echo"),
    *("presence_penalty", "repetition_penalty", "response_format", "tools", "tool_choice", "regex"),
    *("grammar", "mode", "stage", "max_stages", "stages", "stage_weights", "safety", "p99_bounds"),
    *("exit_stages", "draft_stage", "num_draft_tokens", "draft_head", "draft_bits", "token_stages"),
)


anything = given(
    path=st.sampled_from([CHATS, TEXTS, "/tokenize", "/detokenize"]),
    change=st.dictionaries(st.sampled_from(FIELDS), junk, min_size=1, max_size=3),
)
SENT = {"suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=200, **SENT)
@anything
def test_nothing_that_is_sent_is_the_servers_fault(server, path, change):
    send(server, path, change)


@SOAK
@settings(max_examples=2000, **SENT)
@anything
def test_nothing_that_is_sent_is_the_servers_fault_at_length(server, path, change):
    send(server, path, change)


def send(server: RunningServer, path: str, change: dict[str, Any]) -> None:
    body = {**(CHAT if path == CHATS else TEXT), **change}
    if path.endswith("tokenize"):
        body = change
    status, answer, headers = server.ask(path, json.dumps(body).encode())
    assert 200 <= status < 500, answer
    if status != 200:
        refusal((status, answer, headers))


def test_no_slot_is_stuck_after_all_this(server):
    # A reply is here before its places are given back.
    until(lambda: server.ask("/health")[1] == {"status": "ok", "running": 0, "waiting": 0})
    assert server.ask(TEXTS, TEXT)[0] == 200
