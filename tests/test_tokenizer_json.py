"""tokenizer.json: the same tokens as tiktoken's for Hugging Face and mlx-lm, and the same back."""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from conftest import FIXTURES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from mlx_lm.utils import load_tokenizer
from transformers import AutoTokenizer

from cognica_mlx.convert.formats import tokenizer_json
from cognica_mlx.convert.formats.tokenizer_files import has_tokenizer, read_encoding
from cognica_mlx.convert.formats.tokenizer_json import write_tokenizer
from cognica_mlx.errors import RequestError, TokenizerError
from mlx_poe import models
from mlx_poe.loading.tokenizer import Tokenizer

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


def test_round_trip_of_a_file_that_transformers_saved_again(written, tmp_path):
    before = read_encoding(written)
    AutoTokenizer.from_pretrained(written).save_pretrained(tmp_path / "again")
    after = read_encoding(tmp_path / "again")
    for field in ("_pat_str", "_mergeable_ranks", "_special_tokens"):
        assert getattr(after, field) == getattr(before, field)


BYTES = {bytes([byte]): byte for byte in range(256)}


def test_special_ids_need_not_follow_the_vocabulary(tmp_path):
    special = {"<|x|>": 310, "<|bos|>": 300}
    encoding = tiktoken.Encoding(
        name="gaps", pat_str=r"\S+|\s+", mergeable_ranks=BYTES, special_tokens=special
    )
    write_tokenizer(tmp_path, encoding, chat=False)
    again, theirs = read_encoding(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (again._mergeable_ranks, again._special_tokens) == (BYTES, special)
    assert theirs.encode("h<|x|><|bos|>") == [300, 104, 310, 300]
    assert theirs.decode([300, 104, 310]) == "<|bos|>h<|x|>"


def test_a_special_token_that_is_an_ordinary_one_too_is_refused(tmp_path):
    encoding = tiktoken.Encoding(
        name="both", pat_str=r"\S+|\s+", mergeable_ranks=BYTES, special_tokens={"a": 256}
    )
    with pytest.raises(TokenizerError, match="has 'a' both as a special and as an ordinary token"):
        write_tokenizer(tmp_path, encoding, chat=False)


PLAIN = st.text(alphabet=st.sampled_from("abehilnorst THE'll 12345.,;!?-\n\r\t é世😀\u00a0\u200d"))


@settings(max_examples=80)
@given(st.sampled_from(FOLDERS), st.one_of(st.text(), PLAIN))
@example(TINY, "a<|assistant_end|> b<|bos|><|bos|>")
def test_the_same_tokens_as_tiktoken(folder, text):
    encoding, theirs = both(folder)
    # Text that looks like a special token is one to Hugging Face's tokenizers.
    ids = encoding.encode(text, allowed_special="all")
    assert theirs.encode(text, add_special_tokens=False).ids == ids


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
    with pytest.raises(TemplateError, match="is expected"):
        theirs.apply_chat_template([messages[-1], messages[-1]])


@pytest.mark.parametrize("prompted", [True, False])
def test_the_chat_template_takes_the_same_talks(written, prompted):
    theirs, ours = AutoTokenizer.from_pretrained(written), Tokenizer.from_folder(written)
    accepted = 0
    kinds = product(("system", "user", "assistant", "tool"), repeat=3)
    for roles in (kind[:length] for kind in kinds for length in (1, 2, 3)):
        messages = [{"role": role, "content": f" {role}\n"} for role in roles]
        try:
            expected = ours.apply_chat_template(messages, add_generation_prompt=prompted)
        except RequestError:
            with pytest.raises(TemplateError):
                theirs.apply_chat_template(messages, add_generation_prompt=prompted)
            continue
        accepted += 1
        assert expected == theirs.apply_chat_template(
            messages, add_generation_prompt=prompted, return_dict=False
        )
    assert accepted
    for content in (None, [{"type": "text", "text": "hi"}]):
        with pytest.raises(TemplateError, match="is not text"):
            theirs.apply_chat_template([{"role": "user", "content": content}])


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
    "another decoder": changed(lambda c: c.update(decoder={"type": "WordPiece"})),
    "another sequence": changed(lambda c: c["pre_tokenizer"].update(type="Whitespace")),
    "dropout": changed(lambda c: c["model"].update(dropout=0.5)),
    "a prefix": changed(lambda c: c["model"].update(continuing_subword_prefix="##")),
    "a suffix": changed(lambda c: c["model"].update(end_of_word_suffix="</w>")),
    "byte fallback": changed(lambda c: c["model"].update(byte_fallback=True)),
    "an added token not special": changed(lambda c: c["added_tokens"][0].update(special=False)),
    "an added token that strips": changed(lambda c: c["added_tokens"][0].update(lstrip=True)),
    "a special token twice": changed(
        lambda c: c["added_tokens"].append({**c["added_tokens"][0], "id": 4000})
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


def test_too_large(written):
    with (written / "tokenizer.json").open("r+b") as file:
        file.truncate(tokenizer_json.MOST_BYTES + 1)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is larger than 32 MiB"):
        read_encoding(written)


def test_no_tokenizer_at_all(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer.pkl .* tokenizer.json"):
        read_encoding(tmp_path)
