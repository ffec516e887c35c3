"""Chats in files: what is saved comes back, what people edit is read, damage changes nothing."""

import json
import re
import shutil
import stat
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from chats import FUNCTIONS, TALK, new_chat, say
from conftest import FIXTURES, fixture

from cognica_mlx.errors import CheckpointError, RequestError
from mlx_poe.chat.conversation import Chat, Turn

# Saved by version 0.2, and cut down to two of its arrays.
OLD = FIXTURES / "chats" / "with-state"


def content_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def put(path: Path, *where: Any) -> None:
    """Replace what lies at a place in a file's JSON by the last argument."""
    content = place = content_of(path)
    *keys, last, value = where
    for key in keys:
        place = place[key]
    place[last] = value
    path.write_text(json.dumps(content), "utf-8")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    chat = new_chat()
    say(chat, TALK[0])
    path = tmp_path_factory.mktemp("chats") / "saved"
    chat.save(path)
    return path


@pytest.fixture
def saved(written, tmp_path) -> Path:
    return Path(shutil.copy(written, tmp_path / "saved"))


@cache
def going_on() -> Chat:
    """A chat that no file should change."""
    chat = new_chat(system="Be brief.")
    chat.turns = [Turn("Hello!", "Hi!", [72, 105, 33])]
    return chat


def refuses(path: Path) -> str:
    """Loading is refused in one line that names the file, and changes nothing."""
    chat = going_on()
    before = chat.settings, chat.turns, chat.model, chat.state
    with pytest.raises((CheckpointError, RequestError)) as caught:
        chat.load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert (chat.settings, chat.turns, chat.model, chat.state) == before
    return message


def test_a_saved_chat_goes_on_as_it_would_have(tmp_path):
    chat = new_chat()
    chat.set_mode("speculative", draft_stage=1)
    for text in TALK[:2]:
        say(chat, text)
    path = tmp_path / "saved"
    chat.save(path)
    assert [f.name for f in tmp_path.iterdir()] == ["saved"]
    other = new_chat()
    assert other.load(path) == []
    assert (other.settings, other.turns) == (chat.settings, chat.turns)
    assert other.tokens == chat.tokens
    assert say(other, TALK[2]) == say(chat, TALK[2])


def test_all_settings_come_back(tmp_path):
    chat = new_chat(stop=["Rome"], functions=FUNCTIONS, system="Be brief.", schema={})
    chat.set_option("top_k", 5)
    chat.set_mode("compose", stages=[0, 1], stage_weights=[1, 0.5])
    chat.save(tmp_path / "saved")
    other = new_chat()
    assert other.load(tmp_path / "saved") == []
    assert other.settings == chat.settings
    other.set_functions(None)
    assert other.settings.system_text == "Be brief."


def test_the_file_is_json_in_openais_shape_that_people_can_read(tmp_path):
    chat = new_chat(system="Be brief.")
    mark = "FUNCTION RESPONSE: "
    call = """<functioncall> {"name": "get_capital", "arguments": '{"country": "Per\u00fa"}'}"""
    chat.turns = [
        Turn("The capital\nof [\n1, 2]?", f"Well. {call}", [1, 2]),
        Turn(f"{mark}Lima", "Lima.", [3]),
        Turn(f"{mark}nobody asked", "<functioncall> odd", []),
        Turn("Thanks \U0001f600", f"{call} ", []),
    ]
    path = tmp_path / "saved"
    chat.save(path)
    content = content_of(path)
    assert (content["model"], content["settings"]["specialist"]) == ("poe-tiny", "chat")
    function = {"name": "get_capital", "arguments": '{"country": "Per\u00fa"}'}
    asked = {"id": "call_1", "type": "function", "function": function}
    assert content["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The capital\nof [\n1, 2]?"},
        {"role": "assistant", "content": "Well.", "tool_calls": [asked], "token_ids": [1, 2]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Lima"},
        {"role": "assistant", "content": "Lima.", "token_ids": [3]},
        {"role": "user", "content": f"{mark}nobody asked"},
        {"role": "assistant", "content": "<functioncall> odd", "token_ids": []},
        {"role": "user", "content": "Thanks \U0001f600"},
        {"role": "assistant", "content": f"{call} ", "token_ids": []},  # no call: a space too many
    ]
    text = path.read_text("utf-8")
    assert '"token_ids": [1, 2]' in text and '"content": "Thanks \U0001f600"' in text
    assert max(map(len, text.splitlines())) < 120
    other = new_chat()
    assert other.load(path) == []
    assert [(t.user, t.reply) for t in other.turns] == [(t.user, t.reply) for t in chat.turns]


def test_a_reply_edited_by_hand_is_read_as_edited(saved):
    ids = content_of(saved)["messages"][1]["token_ids"]
    edited = saved.read_text("utf-8").replace("Rome", "Milan").replace("Italy?", "Lombardy?")
    saved.write_text(edited, "utf-8-sig")  # as some editors save it
    chat = new_chat()
    assert chat.load(saved) == []
    assert chat.turns[0].user == "What is the capital of Lombardy?"
    assert chat.turns[0].reply == "The capital of Italy is Milan."
    assert chat.turns[0].reply_tokens != ids
    assert "of Italy is Milan.<|assistant_end|>" in chat.tokenizer.decode(chat.tokens)
    assert say(chat, TALK[1])


@pytest.mark.parametrize(
    "ids", [None, [], [1.0], [True], "ids", [-1], [10**6], [10**30], [0, 1], {}]
)
def test_token_ids_that_do_not_decode_to_the_text_are_not_used(saved, ids):
    put(saved, "messages", 1, "token_ids", ids)
    chat = new_chat()
    assert chat.load(saved) == []
    reply = chat.turns[0].reply
    assert reply == "The capital of Italy is Rome."
    assert chat.turns[0].reply_tokens == chat.tokenizer.encode(reply, add_special_tokens=False)


def test_token_ids_that_decode_to_the_text_are_used_as_they_are(saved):
    chat = new_chat()
    ids = [i for c in "Hello" for i in chat.tokenizer.encode(c, add_special_tokens=False)]
    assert ids != chat.tokenizer.encode("Hello", add_special_tokens=False)
    put(saved, "messages", 1, {"role": "assistant", "content": "Hello", "token_ids": ids})
    chat.load(saved)
    assert chat.turns[0].reply_tokens == ids
    for text, others in (("Hell", ids), ("\ufffd", [10**6])):  # more than the text; no token
        put(saved, "messages", 1, {"role": "assistant", "content": text, "token_ids": others})
        chat.load(saved)
        encoded = chat.tokenizer.encode(text, add_special_tokens=False)
        assert chat.turns[0].reply_tokens == encoded


def test_messages_written_by_hand_need_no_settings(saved):
    messages = content_of(saved)["messages"]
    saved.write_text(json.dumps({"format": "cognica-mlx chat 3", "messages": messages[:2]}))
    chat = new_chat()
    chat.use(None)
    assert chat.load(saved) == []
    assert len(chat.turns) == 1 and chat.settings.mode == "full"


def test_an_old_file_loads_without_its_state(tmp_path):
    """And without its mode, which is gone, and that mode's options."""
    chat = new_chat()
    old, note = chat.load(OLD)
    assert "decoding state" in old and str(OLD) in old
    assert "mode certified" in note and "draft_margin" in note
    assert chat.turns == [Turn("Hi", "Hello!", [72, 523, 111, 33])] and chat.state.length == 0
    assert (chat.settings.mode, chat.settings.options) == ("full", {"top_k": 5})
    assert (chat.settings.max_tokens, chat.settings.specialist) == (4, "chat")
    assert say(chat, TALK[0])
    chat.save(tmp_path / "new")
    assert new_chat().load(tmp_path / "new") == []


def test_an_old_file_of_another_version_or_without_replies_is_refused(tmp_path):
    for number, (old, new) in enumerate(
        [(b"chat 2", b"chat 9"), (b'"user\\"', b'"usur\\"'), (b"turns", b"terms")]
    ):
        content = OLD.read_bytes()
        assert old in content
        damaged = tmp_path / f"damaged{number}"
        damaged.write_bytes(content.replace(old, new))
        refuses(damaged)


def test_settings_that_this_version_lacks_are_named_and_left_out(saved):
    put(saved, "settings", "surprise\x1b", 1)
    put(saved, "settings", "options", {"temp": 0.5, "draft_rank": 9, "warp": 9, "stage": 1})
    chat = new_chat()
    (note,) = chat.load(saved)
    assert all(name in note for name in ("surprise", "warp", "draft_rank", "stage"))
    assert chat.settings.options == {"temp": 0.5}
    put(saved, "settings", "mode", "warp")
    assert "mode warp" in chat.load(saved)[0] and chat.settings.mode == "full"


def test_a_file_for_another_model(saved):
    model, tokenizer = fixture("poe-tiny-chat")
    alone = Chat(model, tokenizer, "poe-tiny-chat")
    with pytest.raises(RequestError, match=f"{re.escape(str(saved))}: no specialist chat"):
        alone.load(saved)
    assert alone.turns == []
    put(saved, "settings", "specialist", None)
    (note,) = alone.load(saved)
    assert note == f"{saved} was saved with poe-tiny; this is poe-tiny-chat"
    assert len(alone.turns) == 1 and say(alone, TALK[1])


def test_files_that_are_not_chats_are_refused(saved, tmp_path):
    whole, old = saved.read_bytes(), OLD.read_bytes()
    nested = b"[" * 100_000
    for content in (b"", b"hello", b"[]", whole[:-9], b"\xff" * 99, old[:500], old[:-9], nested):
        saved.write_bytes(content)
        refuses(saved)
    saved.unlink()
    refuses(saved)
    refuses(tmp_path)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros((2,))})
    refuses(tmp_path / "other.safetensors")
    saved.write_bytes(whole.replace(b'"role": "user",', b'"role": "user"'))
    assert "line 11 column" in refuses(saved)


@pytest.mark.parametrize("where", [
    ("format", "cognica-mlx chat 99"), ("format", None), ("settings", 5), ("settings", None),
    ("messages", None), ("messages", {}), ("messages", [5]), ("messages", 0, {}),
    ("messages", 0, "role", "assistant"), ("messages", 1, "role", "user"),
    ("messages", 0, "content", None), ("messages", 1, "content", 5),
    ("messages", 1, {"role": "user", "content": "?"}),
    ("messages", 1, "tool_calls", 5), ("messages", 1, "tool_calls", [{}]),
    ("messages", 0, {"role": "tool", "content": 5}),
    ("messages", [{"role": "user", "content": "Nobody replies."}]),
    ("messages", [{"role": "system", "content": 5}]),
    ("settings", "options", 5), ("settings", "options", [1]),
    ("settings", "options", {"temp": "hot"}), ("settings", "options", {"temp": float("nan")}),
    ("settings", "options", {"temp": -1}), ("settings", "options", {"temp": 10**400}),
    ("settings", "options", {"top_k": 1.5}), ("settings", "options", {"seed": [1]}),
    ("settings", "mode", 1), ("settings", "system", None), ("settings", "max_tokens", 0),
    ("settings", "max_tokens", 1.5), ("settings", "max_tokens", True),
    ("settings", "specialist", 1), ("settings", "specialist", "nobody"),
    ("settings", "stop", "text"), ("settings", "stop", [""]), ("settings", "stop", [1]),
    ("settings", "functions", 5), ("settings", "functions", [{}]),
    ("settings", "functions", [{"name": "f", "parameters": 1}]),
    ("settings", "schema", {"type": 5}),
])  # fmt: skip
def test_damaged_settings_and_messages_are_refused(saved, where):
    put(saved, *where)
    refuses(saved)


def test_an_empty_chat_and_text_that_utf8_cannot_hold_come_back(tmp_path):
    for chat in (new_chat(), new_chat(system="Be brief.")):
        chat.save(tmp_path / "saved")
        other = new_chat(system="Another.")
        assert other.load(tmp_path / "saved") == [] and other.turns == []
        assert other.settings.system == chat.settings.system
    chat.turns = [Turn("half a pair: \udcff \ud83d \\ud83d", "and \udcff", [])]
    chat.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    assert [(t.user, t.reply) for t in other.turns] == [(t.user, t.reply) for t in chat.turns]


def test_saving_follows_links_keeps_devices_and_is_private(tmp_path):
    chat, target, link = new_chat(), tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    folder = tmp_path.stat().st_mode
    for _ in range(2):
        chat.save(link)
        assert link.is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o600
        shutil.copy(OLD, target)
        target.chmod(0o644)  # as version 0.2 wrote it
    assert tmp_path.stat().st_mode == folder
    chat.save(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.parametrize("path", ["~nosuchuser/x", "a\0b", "nowhere/x", ".", "/dev/full"])
def test_paths_that_cannot_be_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = new_chat()
    for action in (chat.save, chat.load):
        with pytest.raises((CheckpointError, RequestError)):
            action(Path(path))
    assert list(tmp_path.iterdir()) == []
