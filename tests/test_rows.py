"""Files of text and rows: one way to read them, whichever command asks."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import threading
from pathlib import Path

import pytest
from conftest import fixture

from cognica_mlx.calibration_file import Calibration
from cognica_mlx.errors import RequestError
from cognica_mlx.files.safetensors_files import read_json
from mlx_poe.commands.entry import read_stdin
from mlx_poe.commands.measured_texts import read_texts, replies, segments
from mlx_poe.generation.tools import tool_system_prompt
from mlx_poe.loading.load import BUILT_IN
from mlx_poe.rows import json_lines, read_rows, read_text
from mlx_poe.training.data import read_split

TOKENIZER = fixture("poe-tiny")[1]
CHAT = [{"role": "user", "content": "2 and 2?"}, {"role": "assistant", "content": "4"}]
TOOLS = [{"name": "add", "description": "Add", "parameters": {"type": "object"}}]


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_text_keeps_its_line_ends_and_counts_its_own_bytes(tmp_path):
    content = "one\r\ntwo\rthree\n\u2028four\n"
    file = written(tmp_path / "a.txt", content)
    assert read_texts(file) == [content]
    (tokens,) = segments([content], TOKENIZER, 1000)
    sizes = TOKENIZER.token_byte_lengths(TOKENIZER.vocab_size)
    assert sum(sizes[token] for token in tokens) == file.stat().st_size


def test_a_byte_order_mark_is_no_part_of_text_or_rows(tmp_path):
    mark = b"\xef\xbb\xbf"
    assert read_texts(written(tmp_path / "a.txt", mark + b"Once")) == ["Once"]
    rows = mark + b'{"text": "Once"}\n'
    assert read_texts(written(tmp_path / "a.jsonl", rows)) == ["Once"]
    assert list(json_lines(tmp_path / "a.jsonl")) == [(1, {"text": "Once"})]
    assert read_split(tmp_path / "a.jsonl", TOKENIZER, longest=9).rows == 1
    with pytest.raises(RequestError, match=r"b\.jsonl, line 2: not a JSON object"):
        read_texts(written(tmp_path / "b.jsonl", rows + rows))
    # Only at the beginning; elsewhere it is a character like any other.
    assert read_texts(written(tmp_path / "b.txt", b"a" + mark)) == ["a\ufeff"]


NOT_TEXT = {
    "latin-1": ("\n\ncaf\xe9".encode("latin-1"), "line 3: not UTF-8 text at position 5;", "latin1"),
    "utf-16": ("Once".encode("utf-16"), "line 1: not UTF-8", "iconv -f utf-16 "),
    "utf-16-le": ("Once".encode("utf-16-le"), "line 1: not UTF-8 text at position 1", "utf-16le"),
    "utf-16-be": ("Once".encode("utf-16-be"), "line 1: not UTF-8 text at position 0", "utf-16be"),
    "binary": (b"Once upon a time\x00", "line 1: not UTF-8 text at position 16", "convert it"),
    "gzip": (gzip.compress(b"Once"), "the file is compressed", "gunzip"),
    "bzip2": (bz2.compress(b"Once"), "the file is compressed", "bunzip2"),
    "xz": (lzma.compress(b"Once"), "the file is compressed", "xz -dc"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer", "git-lfs"),
    "cut short": ("caf\xe9".encode()[:-1], "line 1: not UTF-8 text at position 3", "convert it"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_TEXT)
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_what_is_not_utf_8_is_refused_with_the_place_and_the_remedy(tmp_path, kind, ending):
    content, *said = NOT_TEXT[kind]
    with pytest.raises(RequestError) as refused:
        read_texts(written(tmp_path / f"a.{ending}", content))
    assert all(part in str(refused.value) for part in ("a." + ending, *said)), refused.value


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.NDJson", "a.json", "pipe"])
def test_rows_are_known_by_the_files_name_or_if_it_says_nothing_by_the_first_line(tmp_path, name):
    lines = "\n" + json.dumps({"text": "one\u2028line"}) + "\r\n" + json.dumps({"messages": CHAT})
    assert read_texts(written(tmp_path / name, lines)) == ["one\u2028line", CHAT]


def test_other_names_and_first_lines_mean_text(tmp_path):
    row = '{"text": "Once"}\n'
    assert read_texts(written(tmp_path / "a.txt", row)) == [row]
    for text in ("Once", '"Once"\n' + row, '{"name": "Once"}\n', "{\n" + row):
        assert read_texts(written(tmp_path / "nameless", text)) == [text]
    with pytest.raises(RequestError, match=r"a\.json, line 1: .*name it \.txt"):
        read_texts(written(tmp_path / "a.json", '{\n "text": "Once"\n}\n'))


def test_stdin_is_read_as_a_file_is(tmp_path, monkeypatch):
    for content in ("Once\r\n\n", json.dumps({"messages": CHAT}) + "\n"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
        assert read_texts(Path("-")) == read_texts(written(tmp_path / "nameless", content))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    with pytest.raises(RequestError, match="stdin, line 1: not UTF-8"):
        read_texts(Path("-"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": None}, "its text is null, not a string"),
        ({"text": 17}, "its text is 17, not a string"),
        ({"text": "x", "tools": TOOLS}, "a text cannot offer tools"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "its role is 'robot'"),
        ({"messages": CHAT, "tools": [{"description": "?"}]}, 'function 1 has no "name"'),
        (["x"], "not a JSON object but list"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_whoever_reads(tmp_path, row, said):
    file = written(tmp_path / "a.jsonl", '{"text": ""}\n\n' + json.dumps(row) + "\n")
    for read in (lambda: list(read_rows(file)), lambda: read_texts(file)):
        with pytest.raises(RequestError, match=r"a\.jsonl, line 3: ") as refused:
            read()
        assert said in str(refused.value)


def test_everybody_reads_the_functions_that_a_row_offers(tmp_path):
    row = {"messages": CHAT, "tools": TOOLS}
    file = written(tmp_path / "a.jsonl", json.dumps(row) + "\n")
    (trained,) = read_split(file, TOKENIZER, longest=512).texts
    (measured,) = segments(read_texts(file), TOKENIZER, 512)
    (masked,), _ = replies(read_texts(file, True), TOKENIZER, 512)
    assert trained.tokens.tolist() == measured == masked
    assert tool_system_prompt(TOOLS) + "\n\n2 and 2?<|user_end|>" in TOKENIZER.decode(measured)


def test_a_mask_needs_replies_and_says_where_they_are_missing(tmp_path):
    with pytest.raises(RequestError, match=r"a\.txt: mask_prompt"):
        read_texts(written(tmp_path / "a.txt", "Once"), True)
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}]
    file = written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_texts(file) == [CHAT, CHAT[:1]]
    with pytest.raises(RequestError, match=r"a\.jsonl, line 2: there is no assistant message"):
        read_texts(file, True)
    with pytest.raises(RequestError, match="within the first 4 tokens"):
        replies([CHAT], TOKENIZER, 512, longest=4)


def test_documents_are_cut_up_to_the_number_of_tokens_and_no_further(monkeypatch):
    encoded = []
    real = TOKENIZER.encode

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return real(text)

    monkeypatch.setattr(TOKENIZER, "encode", encode)
    documents = ["one two three four five six seven"] * 1000
    whole = real(documents[0])
    cut = segments(documents, TOKENIZER, 3 * len(whole) + 2, longest=len(whole))
    assert cut == [whole] * 3 + [whole[:2]]
    assert len(encoded) <= 5
    # A <|bos|> with nothing after it would say nothing.
    assert segments(documents, TOKENIZER, 3 * len(whole) + 1, longest=len(whole)) == [whole] * 3


def test_a_pipe_is_read_once(tmp_path):
    # A process substitution is such a file.
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=('{"text": "Once"}\n',))
    writer.start()
    assert read_texts(tmp_path / "pipe") == ["Once"]
    writer.join()


def test_files_that_cannot_be_read_are_named(tmp_path):
    for file in (tmp_path, tmp_path / "nowhere.txt", tmp_path / "nowhere.jsonl"):
        with pytest.raises(RequestError, match=f"{file} cannot be read: "):
            read_texts(file)
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


def test_every_text_read_may_begin_with_a_byte_order_mark(tmp_path, monkeypatch):
    mark = b"\xef\xbb\xbf"
    marked = written(tmp_path / "a.json", mark + b'{"a": 1}')
    assert read_json(marked) == {"a": 1}
    config = fixture("poe-tiny")[0].config
    plain = BUILT_IN / "poe-tiny" / "poe_calibration.json"
    calibration = written(tmp_path / "c.json", mark + plain.read_bytes())
    assert Calibration.load(calibration, config) == Calibration.load(plain, config)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mark + b"Hello\n")))
    assert read_stdin() == "Hello"
