"""Text to token ids and back.

- in: a `tiktoken.Encoding`, or the folder that holds its file
- `encode` puts `<|bos|>` first, because the models collapse into repetition without it. Text that
  looks like a special token is plain text unless the caller allows it. Lone surrogates become
  U+FFFD, as in tiktoken
- `decode` takes every id that a model can emit. Ids without a token, such as padding rows of the
  vocabulary, become U+FFFD, and so do bytes that are not UTF-8
- the pieces of a streaming detokenizer, joined, are exactly what `decode` gives for the same ids
- `apply_chat_template` and `encode_turn` put a chat into the layout of `convert.chat_layout`
- a bad text or id raises TokenizerError, a bad list of messages RequestError
"""

import codecs
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tiktoken
from llguidance import LLTokenizer
from llguidance.tiktoken import lltokenizer_from_encoding

from cognica_mlx.convert.chat_layout import BOS, REPLY_END, REPLY_START, end, start, turns
from cognica_mlx.convert.formats.tokenizer_files import encode_text, read_encoding
from cognica_mlx.errors import RequestError, TokenizerError

STOPS = (BOS, REPLY_END)

_REPLACEMENT = "\ufffd".encode()


class Tokenizer:
    """A tiktoken encoding with the special tokens and the chat layout of the PoE models."""

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        n_vocab: int | None = None,
        *,
        eos_token_ids: Iterable[int] | None = None,
    ) -> None:
        self.encoding = encoding
        self.special_tokens: dict[str, int] = dict(encoding._special_tokens)
        self.special_ids = frozenset(self.special_tokens.values())
        self.vocab_size = encoding.n_vocab if n_vocab is None else n_vocab
        if self.vocab_size < encoding.n_vocab:
            raise TokenizerError(
                f"the tokenizer has ids up to {encoding.n_vocab - 1}, but the model's vocabulary"
                f" has only {self.vocab_size}: they do not belong together"
            )
        if eos_token_ids is None:
            eos_token_ids = [self.special_tokens[s] for s in STOPS if s in self.special_tokens]
        self.bos_token_id = self.special_tokens.get(BOS)
        self.eos_token_ids = frozenset(_token_id(token) for token in eos_token_ids)
        self._ordinary = {rank: token for token, rank in encoding._mergeable_ranks.items()}
        self._special = {token: name.encode() for name, token in self.special_tokens.items()}

    @classmethod
    def from_folder(cls, folder: str | Path, n_vocab: int | None = None) -> "Tokenizer":
        """The tokenizer of a model folder. Its pickle is read without executing any of it."""
        return cls(read_encoding(Path(folder)), n_vocab)

    def token_id(self, name: str) -> int:
        """The id of a special token, by its text."""
        if name not in self.special_tokens:
            known = ", ".join(self.special_tokens) or "none"
            raise TokenizerError(f"the tokenizer has no special token {name!r}; it has: {known}")
        return self.special_tokens[name]

    def encode(
        self, text: str, add_special_tokens: bool = True, allow_special: bool = False
    ) -> list[int]:
        """Token ids of `text`, after `<|bos|>` unless the text has its own or there is none."""
        if not isinstance(text, str):
            raise TokenizerError(f"only text can be encoded, not {type(text).__name__}")
        tokens = encode_text(self.encoding, text, allow_special)
        bos = self.bos_token_id
        if add_special_tokens and bos is not None and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def decode(self, tokens: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `tokens`, whatever ids the model came up with."""
        pieces = (self._shown_bytes(token, skip_special_tokens) for token in tokens)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` decodes to; those of U+FFFD if the id has no token."""
        return self._shown_bytes(token, skip_special=False)

    def token_byte_lengths(self, n_vocab: int) -> list[int]:
        """Length of each id's text in bytes, for bits per byte; 0 for special and unknown ids."""
        return [len(self._ordinary.get(token, b"")) for token in range(n_vocab)]

    @cached_property
    def vocabulary(self) -> LLTokenizer:
        """The same tokens for llguidance, made once. Its first end token is the one for replies.

        Raises RequestError without an end token that the model can emit.
        """
        ends = [token for token in self.eos_token_ids if 0 <= token < self.vocab_size]
        if not ends:
            raise RequestError("the tokenizer has no end token, so a reply in this form cannot end")
        ends.sort(key=lambda token: (token == self.bos_token_id, token))
        return lltokenizer_from_encoding(self.encoding, n_vocab=self.vocab_size, eos_token=ends)

    def detokenizer(self, skip_special_tokens: bool = False) -> "StreamingDetokenizer":
        """A fresh detokenizer for one stream of ids."""
        return StreamingDetokenizer(self, skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, by default up to where the assistant's next reply starts.

        Messages are {"role": "user", "content": "..."} and so on: optionally one "system" first,
        then "user" and "assistant" in turns. Text in a message never becomes a special token.
        """
        chat = turns(messages)
        if add_generation_prompt and chat[-1][0] == "assistant":
            raise RequestError(
                "the last message is the assistant's: end with a user message,"
                " or pass add_generation_prompt=False"
            )
        tokens = [self.token_id(BOS)]
        for role, content in chat:
            tokens += self.encode_turn(role, content)
        if add_generation_prompt:
            tokens.append(self.token_id(REPLY_START))
        return tokens

    def encode_turn(self, role: str, content: str) -> list[int]:
        """Token ids of one turn between its special tokens; text in `content` never becomes one."""
        content_ids = self.encode(content, add_special_tokens=False)
        return [self.token_id(start(role)), *content_ids, self.token_id(end(role))]

    def _shown_bytes(self, token: int, skip_special: bool) -> bytes:
        token = _token_id(token)
        if token in self._special:
            return b"" if skip_special else self._special[token]
        return self._ordinary.get(token, _REPLACEMENT)


class StreamingDetokenizer:
    """Text from ids that come one at a time. Holds bytes back until they form a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add_token(self, token: int) -> str:
        """The text completed by `token`; "" in the middle of a character."""
        return self._decoder.decode(self._tokenizer._shown_bytes(token, self._skip_special))

    def finalize(self) -> str:
        """The rest, with an unfinished character as U+FFFD. The next token starts a new stream."""
        return self._decoder.decode(b"", final=True)


def _token_id(token: object) -> int:
    try:
        number = -1 if isinstance(token, bool) else operator.index(token)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise TokenizerError(f"a token id must be a whole number >= 0, not {ascii(token)[:60]}")
    return number
