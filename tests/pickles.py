"""Pickles made by hand, instruction by instruction, and calls hidden in them."""

from typing import Any

# of the smallest tiktoken.Encoding
FIELDS: dict[str, Any] = {
    "name": "small",
    "pat_str": r"\S+|\s+",
    "mergeable_ranks": {bytes([byte]): byte for byte in range(256)},
    "special_tokens": {"<|bos|>": 256},
}


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def row(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


class Calls:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call
