"""The tokenizer without a pickle: writes and reads Hugging Face's tokenizer.json.

- out: files for `tokenizers`, transformers and so mlx-lm: byte-level BPE with tiktoken's own
  splitting pattern, the chat layout as a template, `<|bos|>` added at the start
- in: the four fields of a `tiktoken.Encoding`, the same as were written; ranks are the ids, so the
  merges follow from them and are not read
- tiktoken joins any two neighbors that make a token, lowest rank first, so every split of a token
  into two tokens is listed as a merge, in order of rank
- differences on Hugging Face's side: text that looks like a special token becomes one, even inside
  a chat message, while our `Tokenizer` keeps it as text; lone surrogates are refused, not replaced;
  and mlx-lm's streaming drops one space from the very start of a reply
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiktoken

from cognica_mlx.convert.chat_layout import BOS, REPLY_END, TEMPLATE
from cognica_mlx.errors import TokenizerError
from cognica_mlx.files import strict_json

FILE_NAME = "tokenizer.json"
MOST_SPLITS = 50_000_000  # characters of merges; 48000 tokens take 3 million
MOST_BYTES = 32 * 2**20  # 48000 tokens with their merges take 8 million


def _byte_characters() -> dict[int, str]:
    """The visible character that stands for each byte in byte-level BPE files (as GPT-2's).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return dict(zip([*plain, *others], map(chr, [*plain, *range(256, 512)]), strict=False))


# BPE options that change tokens and that tiktoken does not have
_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_OTHER_BPE = ("dropout", *_AFFIXES, "byte_fallback")
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}


def write_tokenizer(folder: Path, encoding: tiktoken.Encoding, *, chat: bool) -> None:
    """Write an encoding as tokenizer.json and tokenizer_config.json, with `chat` a chat template.

    Text ends at `<|assistant_end|>` in a chat, else at the next document's `<|bos|>`. Raises
    TokenizerError if a special token's text is also an ordinary token: the file's single vocabulary
    cannot hold both.
    """
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    content = _tokenizer_json(encoding._pat_str, ranks, special)
    strict_json.write(folder / FILE_NAME, content, ensure_ascii=False, indent=1)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,  # windows slide, so there is no limit
    }
    end = REPLY_END if chat else BOS
    config |= {k: v for k, v in (("bos_token", BOS), ("eos_token", end)) if v in special}
    strict_json.write(folder / "tokenizer_config.json", config, ensure_ascii=False, indent=1)
    if chat:
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _tokenizer_json(
    pat_str: str, ranks: Mapping[bytes, int], special: Mapping[str, int]
) -> dict[str, Any]:
    if sum(len(token) ** 2 for token in ranks) > MOST_SPLITS:
        raise TokenizerError("has tokens far too long to list with all their splits")
    tokens = sorted(ranks, key=lambda token: ranks[token])
    names = {token: "".join(_CHARACTERS[byte] for byte in token) for token in tokens}
    for text in special.keys() & set(names.values()):
        raise TokenizerError(f"has {ascii(text)[:60]} both as a special and as an ordinary token")
    merges = [
        [names[token[:i]], names[token[i:]]]
        for token in tokens
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    flags = dict.fromkeys(_ADDED_FLAGS, False)
    added = [
        {"id": number, "content": text, **flags, "special": True}
        for text, number in sorted(special.items(), key=lambda item: item[1])
    ]
    options = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    byte_level = {"type": "ByteLevel", **options}
    split = {"type": "Split", "pattern": {"Regex": pat_str}, "behavior": "Isolated"}
    # with the special tokens, or `tokenizers` would number them from the vocabulary's size
    vocabulary = {**{names[token]: ranks[token] for token in tokens}, **special}
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**split, "invert": False}, byte_level],
        },
        "post_processor": _bos_first(special),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", *_AFFIXES)),
            **{"fuse_unk": False, "byte_fallback": False},
            "ignore_merges": True,  # tiktoken looks for the whole piece first
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _bos_first(special: Mapping[str, int]) -> dict[str, Any] | None:
    if BOS not in special:
        return None
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": text, "type_id": 0}} for text in "AB")
    return {
        **{"type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, second]},
        "special_tokens": {BOS: {"id": BOS, "ids": [special[BOS]], "tokens": [BOS]}},
    }


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a `tiktoken.Encoding` from a tokenizer.json that `write_tokenizer` wrote.

    They are not checked. Raises TokenizerError, without the file's name, for another kind of
    tokenizer, and whatever its reader raises for a damaged file.
    """
    if path.stat().st_size > MOST_BYTES:
        raise TokenizerError(f"is larger than {MOST_BYTES >> 20} MiB: not a tokenizer")
    content = strict_json.read(path)
    model = content["model"]
    split, byte_level = content["pre_tokenizer"]["pretokenizers"]
    added = content["added_tokens"]
    known = (
        content["normalizer"] is None
        and content["decoder"]["type"] == "ByteLevel"
        and content["pre_tokenizer"]["type"] == "Sequence"
        and (model["type"], model["ignore_merges"]) == ("BPE", True)
        and not any(model.get(option) for option in _OTHER_BPE)
        and all(token["special"] for token in added)
        and not any(token[flag] for token in added for flag in _ADDED_FLAGS)
        and (split["type"], split["behavior"]) == ("Split", "Isolated")
        and not split["invert"]
        and (byte_level["type"], byte_level["use_regex"]) == ("ByteLevel", False)
        and not byte_level["add_prefix_space"]
    )
    if not known:
        raise TokenizerError("is not byte-level BPE as in converted models")
    special = {token["content"]: token["id"] for token in added}
    if len(special) != len(added):
        raise TokenizerError("has a special token twice")
    ranks = {
        bytes(_BYTES[character] for character in token): number
        for token, number in model["vocab"].items()
        if (token, number) not in special.items()
    }
    return {
        "name": path.parent.name,
        "pat_str": split["pattern"]["Regex"],
        "mergeable_ranks": ranks,
        "special_tokens": special,
    }
