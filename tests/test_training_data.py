"""Rows in mlx-lm's formats: what of them counts, and what is refused by its line."""

import json

import numpy as np
import pytest
from conftest import fixture
from training import chat, some_rows, write_rows

from cognica_mlx.errors import RequestError
from mlx_poe.generation.tools import tool_system_prompt
from mlx_poe.training.chat_tokens import never_seen, word_rows
from mlx_poe.training.data import Split, first_texts, read_split

TOKENIZER = fixture("poe-tiny")[1]


def read(tmp_path, rows, longest=512, **options) -> Split:
    return read_split(write_rows(tmp_path / "d.jsonl", rows), TOKENIZER, longest=longest, **options)


def counted(text) -> str:
    return TOKENIZER.decode(text.tokens[text.counted].tolist())


def whole(text) -> str:
    return TOKENIZER.decode(text.tokens.tolist())


def test_only_what_the_assistant_says_counts(tmp_path):
    rows = [chat("Hi?", "Hello.", "And?", "Bye."), {"prompt": "Who?", "completion": "Me."}]
    rows.append(
        {"messages": [{"role": "system", "content": "Be brief."}, *chat("A", "B")["messages"]]}
    )
    several, completion, system = read(tmp_path, rows).texts
    assert counted(several) == "Hello.<|assistant_end|>Bye.<|assistant_end|>"
    assert several.n_bytes == len("Hello.Bye.")
    assert counted(completion) == "Me.<|assistant_end|>"
    start = "<|bos|><|user_start|>Who?<|user_end|><|assistant_start|>"
    assert whole(completion) == f"{start}Me.<|assistant_end|>"
    assert counted(system) == "B<|assistant_end|>"
    assert whole(system).startswith("<|bos|><|user_start|>Be brief.\n\nA<|user_end|>")
    # The tokens are just those that a chat is decoded with.
    assert several.tokens.tolist() == TOKENIZER.apply_chat_template(
        rows[0]["messages"], add_generation_prompt=False
    )


def test_everything_counts_without_a_mask_and_in_plain_text(tmp_path):
    (text,) = read(tmp_path, [chat("Hi?", "Hello.")], mask_prompt=False).texts
    assert "<|bos|>" + counted(text) == whole(text)
    (plain,) = read(tmp_path, [{"text": "Once upon <|assistant_end|>"}]).texts
    assert counted(plain) == "Once upon <|assistant_end|><|bos|>"
    # What looks like a special token is none, and counts by its bytes; the end counts none.
    assert plain.n_bytes == len("Once upon <|assistant_end|>")
    with pytest.raises(RequestError, match=r"line 1: mask_prompt"):
        read(tmp_path, [{"text": "Once"}], mask_prompt=True)


def test_functions_are_offered_as_they_are_when_decoding(tmp_path):
    tools = [{"name": "add", "description": "Add", "parameters": {"type": "object"}}]
    (text,) = read(tmp_path, [{**chat("2 and 2?", "4"), "tools": tools}]).texts
    assert tool_system_prompt(tools) + "\n\n2 and 2?<|user_end|>" in whole(text)


def test_rows_longer_than_the_limit_are_cut_and_counted(tmp_path):
    rows = [chat("A", "B"), chat("A", "one two three " * 20), chat("x " * 200, "B")]
    split = read(tmp_path, rows, longest=40)
    assert (split.rows, split.cut, split.emptied) == (3, 2, 1)
    assert [len(text.tokens) for text in split.texts][1] == 40
    assert split.tokens == sum(len(text.tokens) for text in split.texts)
    assert split.counted == sum(int(text.counted.sum()) for text in split.texts)
    with pytest.raises(RequestError, match="raise --max-seq-length"):
        read(tmp_path, rows[2:], longest=40)


def test_packed_rows_follow_each_other(tmp_path):
    rows = some_rows(30)
    apart, packed = read(tmp_path, rows, longest=60), read(tmp_path, rows, longest=60, pack=True)
    assert len(packed.texts) < len(apart.texts)
    assert all(len(text.tokens) <= 60 for text in packed.texts)
    for part in ("tokens", "counted"):
        one, other = (np.concatenate([getattr(t, part) for t in s.texts]) for s in (apart, packed))
        assert np.array_equal(one, other)
    assert sum(t.n_bytes for t in packed.texts) == sum(t.n_bytes for t in apart.texts)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"messages": [', "not a JSON object"),
        ("[1, 2]", "not a JSON object but list"),
        ('"text"', "not a JSON object but str"),
        ("{}", "neither messages, nor prompt and completion, nor text"),
        ('{"prompt": "a"}', "neither messages"),
        ('{"messages": []}', "no user message"),
        ('{"messages": "hello"}', "list of dictionaries"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "there is no assistant message"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "its role is 'robot'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "where user is expected"),
        ('{"prompt": "a", "completion": 7}', "its content is int"),
        ('{"text": ""}', "its text is empty"),
        ('{"text": 7}', "its text is 7, not a string"),
        ('{"messages": [{"role": "user", "content": "\ud800"}', "not UTF-8 text at"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_line(tmp_path, line, said):
    file = tmp_path / "train.jsonl"
    good = json.dumps(chat("A", "B"))
    file.write_bytes(f"{good}\n\n{line}\n{good}\n".encode("utf-8", "surrogatepass"))
    with pytest.raises(RequestError, match=r"train\.jsonl, line 3: ") as refused:
        read_split(file, TOKENIZER, longest=99)
    assert said in str(refused.value)


def test_files_that_are_empty_or_missing_are_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n \n")
    with pytest.raises(RequestError, match=r"train\.jsonl is empty"):
        read_split(tmp_path / "train.jsonl", TOKENIZER, longest=99)
    with pytest.raises(RequestError, match=r"valid\.jsonl is missing"):
        read_split(tmp_path / "valid.jsonl", TOKENIZER, longest=99)


def test_the_first_texts_that_fit(tmp_path):
    texts = read(tmp_path, some_rows(9)).texts
    assert first_texts(texts, 10**6) == texts
    assert first_texts(texts, 1) == texts[:1]
    assert first_texts(texts, len(texts[0].tokens) + len(texts[1].tokens)) == texts[:2]


def test_the_base_never_saw_the_chat_tokens():
    base, tokenizer = fixture("poe-tiny")
    chats = sorted(id for name, id in tokenizer.special_tokens.items() if name != "<|bos|>")
    seen = tokenizer.encode("The capital of France is Paris. What do cats eat? 3 + 4 = 7")
    assert never_seen(base, sorted({*seen, *chats})) == set(chats)
    words = word_rows(base, tokenizer, "auto")
    assert {tokenizer.decode([t]): tokenizer.decode([w]) for t, w in words.items()}[
        "<|user_end|>"
    ] == "?"
    # The specialists that came along have the same rows: their keys and values are ours.
    theirs = fixture("poe-tiny-math")[0].wte.weight
    assert set(words) == set(chats)
    for token, word in words.items():
        assert (theirs[token] == base.wte.weight[word]).all().item()
    assert word_rows(base, tokenizer, "keep") == {}
    specialist = fixture("poe-tiny-math")[0]
    assert word_rows(specialist, tokenizer, "auto") == {}
    assert word_rows(specialist, tokenizer, "words") == words


def test_chat_tokens_that_a_base_has_seen_keep_their_embeddings():
    # Random heads: no two rows are alike.
    base, tokenizer = fixture("flat-d8")
    assert word_rows(base, tokenizer, "auto") == {}
    assert set(word_rows(base, tokenizer, "words")) <= set(tokenizer.special_tokens.values())
