"""tokenizer.json: the same tokens as tiktoken's for Hugging Face and mlx-lm, and the same back."""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from mlx_lm.utils import load_tokenizer
from transformers import AutoTokenizer

from cognica_mlx.convert.tokenizer_files import has_tokenizer, read_encoding
from cognica_mlx.convert.tokenizer_json import write_tokenizer
from cognica_mlx.errors import TokenizerError
from mlx_poe import models
from mlx_poe.tokenizer import Tokenizer

TINY = Path(models.__path__[0]) / "poe-tiny"
FOLDERS = (TINY, FIXTURES / "flat-d8")


@cache
def both(folder: Path) -> tuple[Any, tokenizers.Tokenizer]:
    """A folder's tiktoken encoding, and its tokenizer.json as Hugging Face reads it."""

    encoding = read_encoding(folder)
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(Path(name), encoding, chat=False)
        return encoding, tokenizers.Tokenizer.from_file(f"{name}/tokenizer.json")


@pytest.fixture
def written(tmp_path) -> Path:
    write_tokenizer(tmp_path, read_encoding(TINY), chat=True)
    return tmp_path


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_round_trip(tmp_path, folder):
    encoding = read_encoding(folder)
    write_tokenizer(tmp_path, encoding, chat=False)
    again = read_encoding(tmp_path)
    for field in ("_pat_str", "_mergeable_ranks", "_special_tokens"):
        assert getattr(again, field) == getattr(encoding, field)
    assert has_tokenizer(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<|bos|>"


PLAIN = st.text(alphabet=st.sampled_from("abehilnorst THE'll 12345.,;!?-\n\r\t é世😀\u00a0\u200d"))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FOLDERS), st.one_of(st.text(), PLAIN))
def test_the_same_tokens_as_tiktoken(folder, text):
    encoding, theirs = both(folder)
    assert theirs.encode(text, add_special_tokens=False).ids == encoding.encode_ordinary(text)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_the_same_tokens_for_a_real_text(folder):
    encoding, theirs = both(folder)
    text = (FIXTURES / "heldout.txt").read_text(encoding="utf-8")
    ids = encoding.encode_ordinary(text)
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert theirs.decode(ids) == text
    bos = encoding._special_tokens["<|bos|>"]
    assert theirs.encode("hello").ids == [bos, *encoding.encode_ordinary("hello")]


TALKS = [
    [("user", "What is the capital of France?")],
    [("system", "Be brief."), ("user", "Hello,\n you"), ("assistant", "Hi."), ("user", "Bye é")],
    [("user", " a "), ("assistant", "b\n")],
]


@pytest.mark.parametrize("talk", TALKS, ids=len)
def test_the_chat_template_is_the_tokenizers_own(written, talk):
    theirs, ours = AutoTokenizer.from_pretrained(written), Tokenizer.from_folder(written)
    messages = [{"role": role, "content": content} for role, content in talk]
    prompted = talk[-1][0] == "user"
    expected = ours.apply_chat_template(messages, add_generation_prompt=prompted)
    got = theirs.apply_chat_template(messages, add_generation_prompt=prompted, return_dict=False)
    assert got == expected
    with pytest.raises(TemplateError, match="is due"):
        theirs.apply_chat_template([messages[-1], messages[-1]])


def test_mlx_lm_streams_it(written):
    theirs = load_tokenizer(written)
    assert theirs.has_chat_template
    text = "Héllo, wörld 😀 12\n"
    ids = Tokenizer.from_folder(written).encode(text, add_special_tokens=False)
    detokenizer = theirs.detokenizer
    for token in ids:
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == text
    assert theirs.eos_token_ids == {theirs.convert_tokens_to_ids("<|assistant_end|>")}


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        content = json.loads(data)
        change(content)
        return json.dumps(content).encode()

    return edit


FAULTS = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "not text": lambda data: b"\xff" + data,
    "deep": lambda data: b"[" * 200_000,
    "a list": lambda data: b"[1, 2]",
    "another model": changed(lambda c: c["model"].update(type="Unigram")),
    "a normalizer": changed(lambda c: c.update(normalizer={"type": "NFC"})),
    "another splitter": changed(lambda c: c["pre_tokenizer"].update(pretokenizers=[])),
    "no vocabulary": changed(lambda c: c["model"].pop("vocab")),
    "no bytes": changed(lambda c: c["model"]["vocab"].update({"世": 1900})),
    "a text for an id": changed(lambda c: c["model"]["vocab"].update(a="1")),
    "an id twice": changed(lambda c: c["model"]["vocab"].update(a=98)),
    "a byte less": changed(lambda c: c["model"]["vocab"].pop("a")),
    "a bad pattern": changed(
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("})
    ),
    "a special token of another kind": changed(lambda c: c["added_tokens"].append(7)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_damaged_and_foreign_files(written, fault):
    path = written / "tokenizer.json"
    path.write_bytes(fault(path.read_bytes()))
    with pytest.raises(TokenizerError) as caught:
        read_encoding(written)
    assert "tokenizer.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_at_all(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer.pkl .* tokenizer.json"):
        read_encoding(tmp_path)
