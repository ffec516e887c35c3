"""The tokenizer: round trips, streaming, chat layout."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from pickles import FIELDS

from cognica_mlx.errors import RequestError, TokenizerError
from mlx_poe.loading.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TINY = ROOT / "mlx_poe" / "models" / "poe-tiny"
GOLDENS = json.loads((ROOT / "tests" / "fixtures" / "poe-tiny-goldens.json").read_text())
TOKENIZER = Tokenizer.from_folder(TINY)

# ids over 2047 have no token; single high bytes make broken UTF-8
HIGH_BYTES = [TOKENIZER.encoding.encode_single_token(bytes([byte])) for byte in range(128, 256)]
TOKENS = st.lists(st.integers(0, 2100) | st.sampled_from(HIGH_BYTES) | st.integers(2039, 2047))
UTF8_TOKENS = st.text().map(
    lambda text: [TOKENIZER.encoding.encode_single_token(bytes([b])) for b in text.encode()]
)


# --- text and ids ---------------------------------------------------------------------------------


@given(st.text(st.characters()))
def test_round_trip_of_any_text_with_lone_surrogates_replaced(text: str) -> None:
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for special in (False, True):
        bare = TOKENIZER.encode(text, add_special_tokens=False, allow_special=special)
        assert TOKENIZER.decode(bare) == expected
        brings_bos = special and expected.startswith("<|bos|>")
        tokens = TOKENIZER.encode(text, allow_special=special)
        assert tokens == (bare if brings_bos else [2039, *bare])


@given(TOKENS | UTF8_TOKENS, st.booleans())
def test_streamed_pieces_join_to_decode(tokens: list[int], skip: bool) -> None:
    stream = TOKENIZER.detokenizer(skip_special_tokens=skip)
    for _ in range(2):  # finalize() starts afresh
        pieces = [stream.add_token(token) for token in tokens]
        assert "".join([*pieces, stream.finalize()]) == TOKENIZER.decode(tokens, skip)


def test_streaming_holds_back_half_a_character() -> None:
    stream = TOKENIZER.detokenizer()
    tokens = TOKENIZER.encode("\U0001f600!", add_special_tokens=False)
    assert [stream.add_token(token) for token in tokens] == ["", "", "", "\U0001f600", "!"]
    assert stream.add_token(tokens[0]) == ""
    assert stream.finalize() == "\ufffd"
    assert stream.finalize() == ""


def test_goldens_are_what_encode_makes() -> None:
    assert TOKENIZER.encode("The capital of France is") == GOLDENS["base"][0]["prompt"]
    for entry in GOLDENS["base"]:
        text = TOKENIZER.decode(entry["prompt"], skip_special_tokens=True)
        assert TOKENIZER.encode(text) == entry["prompt"]


def test_special_text_is_plain_unless_allowed() -> None:
    bos, end = 2039, 2043
    text = "<|bos|>a<|assistant_end|>"
    assert not set(TOKENIZER.encode(text, add_special_tokens=False)) & {bos, end}
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == "<|bos|>" + text
    tokens = TOKENIZER.encode(text, allow_special=True)
    assert (tokens[0], tokens[-1], tokens.count(bos)) == (bos, end, 1)
    assert TOKENIZER.decode(tokens) == text
    assert TOKENIZER.decode(tokens, skip_special_tokens=True) == "a"


def test_attributes() -> None:
    assert (TOKENIZER.vocab_size, TOKENIZER.bos_token_id) == (2048, 2039)
    assert TOKENIZER.eos_token_ids == frozenset({2039, 2043})
    assert (
        TOKENIZER.special_tokens["<|output_end|>"] == TOKENIZER.token_id("<|output_end|>") == 2047
    )
    with pytest.raises(TokenizerError, match=r"no special token '<\|nope\|>'.*<\|bos\|>"):
        TOKENIZER.token_id("<|nope|>")
    assert Tokenizer(TOKENIZER.encoding, 2112).vocab_size == 2112
    assert Tokenizer(TOKENIZER.encoding, eos_token_ids=[5]).eos_token_ids == frozenset({5})
    with pytest.raises(TokenizerError, match=r"2047.*2000.*do not belong together"):
        Tokenizer(TOKENIZER.encoding, 2000)


def test_encoding_without_the_special_tokens() -> None:
    plain = Tokenizer(tiktoken.Encoding(**{**FIELDS, "special_tokens": {}}))
    assert plain.bos_token_id is None
    assert plain.eos_token_ids == frozenset()
    assert plain.encode("hi") == [104, 105]
    with pytest.raises(TokenizerError, match=r"<\|bos\|>"):
        plain.apply_chat_template([{"role": "user", "content": "hi"}])


def test_unknown_ids_decode_and_bad_ids_raise() -> None:
    assert TOKENIZER.decode([2048, 72, 10**30]) == "\ufffd" + TOKENIZER.decode([72]) + "\ufffd"
    assert TOKENIZER.token_bytes(5000).decode() == "\ufffd"
    for bad in (-1, 1.0, "1", None, True):
        for call in (TOKENIZER.token_bytes, TOKENIZER.detokenizer().add_token):
            with pytest.raises(TokenizerError, match="whole number >= 0, not"):
                call(bad)  # type: ignore[arg-type]
        with pytest.raises(TokenizerError):
            TOKENIZER.decode([1, bad])  # type: ignore[list-item]
    with pytest.raises(TokenizerError, match="not bytes"):
        TOKENIZER.encode(b"text")  # type: ignore[arg-type]


def test_text_too_much_for_tiktoken_is_one_clear_error() -> None:
    with pytest.raises(TokenizerError, match="cannot split this text"):
        TOKENIZER.encode(" " * 1_500_000)


def test_token_byte_lengths_are_those_released_with_the_model() -> None:
    with zipfile.ZipFile(TINY / "token_bytes.pt") as archive:
        released = struct.unpack("<2048i", archive.read("token_bytes/data/0"))
    lengths = TOKENIZER.token_byte_lengths(2112)
    assert lengths[:2048] == list(released)
    assert lengths[2039:] == [0] * 73
    assert TOKENIZER.token_byte_lengths(3) == list(released[:3])


# --- chat -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("specialist", ["chat", "math", "tool"])
def test_chat_layout_is_that_of_the_goldens(specialist: str) -> None:
    head, tail = "<|bos|><|user_start|>", "<|user_end|><|assistant_start|>"
    for entry in GOLDENS[specialist]:
        text = TOKENIZER.decode(entry["prompt"])
        assert text.startswith(head)
        assert text.endswith(tail)
        content = text[len(head) : -len(tail)]
        user = {"role": "user", "content": content}
        assert TOKENIZER.apply_chat_template([user]) == entry["prompt"]
        if specialist == "tool":
            system, _, question = content.rpartition("\n\n")
            messages = [
                {"role": "system", "content": system},
                {"role": "user", "content": question},
            ]
            assert TOKENIZER.apply_chat_template(messages) == entry["prompt"]


def test_chat_of_several_turns_keeps_special_text_plain() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi<|user_end|>"},
        {"role": "assistant", "content": "Hello"},
    ]
    tokens = TOKENIZER.apply_chat_template(messages, add_generation_prompt=False)
    layout = "<|bos|><|user_start|>{}<|user_end|><|assistant_start|>{}<|assistant_end|>"
    assert TOKENIZER.decode(tokens) == layout.format("Be kind.\n\nHi<|user_end|>", "Hello")
    assert tokens.count(TOKENIZER.token_id("<|user_end|>")) == 1
    more = [*messages, {"role": "user", "content": "Bye"}]
    longer = TOKENIZER.apply_chat_template(more)
    assert longer[: len(tokens)] == tokens
    assert longer[-1] == TOKENIZER.token_id("<|assistant_start|>")
    assert TOKENIZER.apply_chat_template(more, add_generation_prompt=False) == longer[:-1]


USER, ASSISTANT, SYSTEM = (
    {"role": role, "content": "x"} for role in ("user", "assistant", "system")
)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no user message"),
        ([SYSTEM], "no user message"),
        ("hello", "list of dictionaries, not str"),
        (USER, "list of dictionaries, not dict"),
        (None, "list of dictionaries, not NoneType"),
        (["hello"], "message 1 is not a dictionary but str"),
        ([ASSISTANT, USER], "message 1 has the role assistant where user is expected"),
        ([USER, USER], "message 2 has the role user where assistant is expected"),
        ([SYSTEM, ASSISTANT], "message 2 has the role assistant where user is expected"),
        ([SYSTEM, SYSTEM, USER], "message 2 has the role system where user is expected"),
        ([USER, SYSTEM], "message 2 has the role system"),
        ([USER, ASSISTANT], "end with a user message"),
        ([{"role": "tool", "content": "x"}], "message 1: its role is 'tool', not one of system"),
        ([{"role": ["user"], "content": "x"}], r"its role is \['user'\]"),
        ([{"content": "x"}], "its role is missing"),
        ([USER, {"role": "assistant"}], "message 2: its content is missing"),
        ([{"role": "user", "content": None}], "its content is NoneType, not text"),
    ],
)
def test_bad_messages(messages: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint) as caught:
        TOKENIZER.apply_chat_template(messages)
    assert "\n" not in str(caught.value)
