"""Chats in files: what is saved comes back, and what is damaged changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from chats import FUNCTIONS, TALK, new_chat, say
from conftest import fixture

from cognica_mlx.errors import CheckpointError, RequestError
from mlx_poe import load
from mlx_poe.chat.conversation import Chat
from mlx_poe.chat.saved_chat import _checksum


def test_a_saved_chat_goes_on_without_being_run_again(tmp_path):
    chat = new_chat()
    chat.set_mode("speculative", draft_stage=1)
    for text in TALK[:3]:
        say(chat, text)
    path = tmp_path / "saved"
    chat.save(path)
    assert [f.name for f in tmp_path.iterdir()] == ["saved"]
    expected = say(chat, TALK[3])
    other = new_chat()
    assert other.load(path)
    assert other.settings.mode == "speculative"
    assert len(other.turns) == 3
    assert say(other, TALK[3]) == expected
    assert other.state.positions_run[0] <= len(other.turns[-1].tokens) + 41
    # Another model's state is of no use, but the conversation is.
    model, tokenizer = fixture("poe-tiny-chat")
    alone = Chat(model, tokenizer, "poe-tiny-chat")
    with pytest.raises(RequestError, match="no specialist chat"):
        alone.load(path)
    assert alone.turns == []


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, mx.array]], object]) -> None:
    """Change a saved chat's content or arrays; the checksum is made to fit."""
    loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    arrays, metadata = loaded
    content = json.loads(metadata["chat"])
    change(content, arrays)
    content.setdefault("checksum", _checksum(arrays))
    partial = path.with_name("partial.safetensors")
    mx.save_safetensors(str(partial), arrays, {"chat": json.dumps(content)})
    partial.rename(path)


def put(content: dict[str, Any], *where: Any) -> None:
    """Replace what lies at a path in nested JSON by the last argument."""
    *path, last, value = where
    for key in path:
        content = content[key]
    content[last] = value


@pytest.fixture
def saved(tmp_path) -> Path:
    chat = new_chat()
    say(chat, TALK[0])
    path = tmp_path / "saved"
    chat.save(path)
    return path


def refuses(path: Path) -> None:
    """Loading is refused in one line, changes nothing, and the chat goes on."""
    chat = new_chat(system="Be brief.")
    say(chat, TALK[1])
    before = chat.settings, chat.turns, chat.model, chat.state
    with pytest.raises((CheckpointError, RequestError)) as caught:
        chat.load(path)
    assert "\n" not in str(caught.value)
    assert (chat.settings, chat.turns, chat.model, chat.state) == before
    assert say(chat, TALK[2])


def test_files_that_are_not_chats_are_refused(saved, tmp_path):
    whole = saved.read_bytes()
    for content in (b"", b"hello", whole[:5000], whole[:-9], b"\xff" * 99):
        saved.write_bytes(content)
        refuses(saved)
    saved.unlink()
    refuses(saved)
    refuses(tmp_path)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros((2,))})
    refuses(tmp_path / "other.safetensors")


@pytest.mark.parametrize("where", [
    ("format", "cognica-mlx chat 99"), ("settings", 5), ("settings", None), ("turns", {}),
    ("turns", [5]), ("turns", 0, {}), ("settings", "options", 5), ("settings", "options", [1]),
    ("settings", "options", {"temp": "hot"}), ("settings", "options", {"temp": True}),
    ("settings", "options", {"temp": float("nan")}), ("settings", "options", {"temp": -1}),
    ("settings", "options", {"temp": 10**400}), ("settings", "options", {"top_k": 1.5}),
    ("settings", "options", {"seed": -1}), ("settings", "options", {"seed": [1]}),
    ("settings", "options", {"repetition_penalty": "1"}), ("settings", "options", {"warp": 9}),
    ("settings", "options", {"stage": 1}), ("settings", "mode", "warp"), ("settings", "mode", 1),
    ("settings", "system", None), ("settings", "system", 5), ("settings", "max_tokens", 0),
    ("settings", "max_tokens", 1.5), ("settings", "max_tokens", True),
    ("settings", "max_tokens", None), ("settings", "specialist", 1),
    ("settings", "specialist", "nobody"), ("settings", "stop", "text"), ("settings", "stop", [""]),
    ("settings", "stop", [1]), ("settings", "functions", 5), ("settings", "functions", [{}]),
    ("settings", "functions", [{"name": "f", "parameters": 1}]), ("settings", "surprise", 1),
    ("turns", 0, "tokens", ["a", None]), ("turns", 0, "tokens", [-1]),
    ("turns", 0, "tokens", [10**6]), ("turns", 0, "tokens", [10**30]),
    ("turns", 0, "reply_tokens", [1.0]), ("turns", 0, "reply_tokens", [True]),
    ("turns", 0, "reply_tokens", [7, 8]), ("turns", 0, "reply", "Another."),
    ("turns", 0, "reply", 5), ("turns", 0, "user", None), ("turns", 0, "ended", "yes"),
    ("turns", 0, "surprise", 1),
])  # fmt: skip
def test_damaged_settings_and_turns_are_refused(saved, where):
    rewrite(saved, lambda content, _: put(content, *where))
    refuses(saved)


def test_settings_of_a_mode_are_refused_when_their_types_are_wrong(saved):
    rewrite(saved, lambda content, _: put(content, "settings", "mode", "compose"))
    for options in ({"stages": 5}, {"stages": ["0"]}, {"stages": [0], "stage_weights": [None]}):
        rewrite(saved, lambda content, _, o=options: put(content, "settings", "options", o))
        refuses(saved)


def recast(name: str, dtype: mx.Dtype) -> Callable[..., None]:
    def change(content: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        arrays[name] = arrays[name].astype(dtype)
        content.pop("checksum")

    return change


def without(name: str) -> Callable[..., None]:
    def change(content: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        del arrays[name]
        content.pop("checksum")

    return change


@pytest.mark.parametrize("change", [
    recast("cache.0.0.keys", mx.float16), recast("cache.1.1.values", mx.bfloat16),
    recast("cache.1.1.values", mx.int32), recast("given.0.x", mx.float16),
    recast("given.4.backout", mx.bfloat16), without("given.4.backout"),
    without("given.0.x0"), without("cache.1.1.keys"),
    lambda content, _: put(content, "state", 5), lambda content, _: put(content, "state", []),
    lambda content, _: put(content, "state", "tokens", 5),
    lambda content, _: put(content, "state", "filled", [0, None]),
    lambda content, _: put(content, "state", "starts", []),
    lambda content, _: put(content, "state", "slack", 2**30),
    lambda content, _: put(content, "state", "max_pending", 10**9),
    lambda content, _: put(content, "state", "keep_trunk", None),
    lambda content, _: put(content, "probe", {"a": 1}),
    lambda content, _: put(content, "checksum", "0"),
])  # fmt: skip
def test_a_damaged_state_is_left_out_and_the_conversation_run_again(saved, change):
    rewrite(saved, change)
    expected = new_chat()
    say(expected, TALK[0])
    chat = new_chat()
    assert not chat.load(saved)
    assert chat.state.length == 0
    assert chat.turns == expected.turns
    assert say(chat, TALK[1]) == say(expected, TALK[1])


def test_a_flipped_bit_in_the_state_is_noticed(saved):
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    assert not new_chat().load(saved)


def test_a_chat_that_version_0_1_saved_can_be_loaded(saved):
    def change(content: dict[str, Any], arrays: dict[str, mx.array]) -> None:
        content["format"] = "cognica-mlx chat 1"
        content["checksum"] = None
        for name in ("stop", "functions"):
            del content["settings"][name]

    rewrite(saved, change)
    chat = new_chat()
    chat.load(saved)
    assert len(chat.turns) == 1 and chat.settings.stop == []
    assert say(chat, TALK[1])


def test_all_settings_come_back(tmp_path):
    chat = new_chat(stop=["Rome"], functions=FUNCTIONS, system="Be brief.")
    chat.set_option("top_k", 5)
    chat.set_mode("compose", stages=[0, 1], stage_weights=[1, 0.5])
    say(chat, TALK[0])
    chat.save(tmp_path / "saved")
    other = new_chat()
    assert other.load(tmp_path / "saved")
    assert other.settings == chat.settings
    assert other.turns == chat.turns
    assert say(other, TALK[1]) == say(chat, TALK[1])
    other.set_functions(None)
    assert other.settings.system_text == "Be brief."


@pytest.mark.parametrize("how", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"quantize": 4}])
def test_the_state_comes_back_whatever_the_weights_are_kept_in(tmp_path, how):
    model, tokenizer = load("poe-tiny-chat", **how)
    chat = Chat(model, tokenizer, "poe-tiny-chat")
    say(chat, TALK[0])
    chat.save(tmp_path / "saved")
    other = Chat(model, tokenizer, "poe-tiny-chat")
    assert other.load(tmp_path / "saved")
    assert say(other, TALK[1]) == say(chat, TALK[1])


def test_an_empty_chat_and_text_that_utf8_cannot_hold_come_back(tmp_path):
    chat = new_chat()
    chat.save(tmp_path / "saved")
    assert new_chat().load(tmp_path / "saved")
    say(chat, "half a pair: \udcff \ud83d")
    chat.save(tmp_path / "saved")
    other = new_chat()
    assert other.load(tmp_path / "saved")
    assert other.turns == chat.turns


def test_saving_follows_links_keeps_devices_and_is_private(tmp_path):
    chat, target, link = new_chat(), tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    folder = tmp_path.stat().st_mode
    for _ in range(2):
        chat.save(link)
        assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o600
        target.chmod(0o644)  # as version 0.2 wrote it
    assert tmp_path.stat().st_mode == folder
    chat.save(Path("/dev/null"))
    assert Path("/dev/null").is_char_device()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.parametrize("path", ["~nosuchuser/x", "a\0b", "nowhere/x", "."])
def test_paths_that_cannot_be_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = new_chat()
    for action in (chat.save, chat.load):
        with pytest.raises((CheckpointError, RequestError)):
            action(Path(path))
    assert list(tmp_path.iterdir()) == []
