"""Sizes in bytes, as text and back."""

import re

import pytest

from cognica_mlx.errors import RequestError
from cognica_mlx.files.byte_sizes import MOST, byte_size, size_text
from mlx_poe.commands.server import build_parser
from mlx_poe.engine.scheduler import Scheduler


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        (4096, 4096),
        ("512MB", 512_000_000),
        ("8gb", 8_000_000_000),
        (" 10 kB ", 10_000),
        ("2T", 2 * 1000**4),
        ("1.5GiB", 3 * 2**29),
        ("1Ki", 1024),
        ("7B", 7),
        (str(MOST), MOST),
    ],
)
def test_a_size_is_a_number_with_or_without_a_unit(text, size):
    assert byte_size(text) == size


@pytest.mark.parametrize(
    "text", [".", "GB", "-1", -1, "1.5", "1e9", "8 G B", "8XB", True, str(MOST + 1), "9" * 14 + "G"]
)
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(RequestError, match=re.escape(str(text))):
        byte_size(text)


def test_sizes_for_people():
    assert [size_text(n) for n in (0, 99_949, 99_950 + 50, 512_000_000, 1e9, 8.5e9)] == [
        *("0.0 kB", "99.9 kB", "0.1 MB", "512.0 MB", "1.00 GB", "8.50 GB")
    ]


def test_flags_and_settings_take_sizes():
    flags = ["--memory", "1.5GiB", "--prompt-cache-bytes", "2MB", "--max-body", "3000"]
    args = build_parser().parse_args(flags)
    assert (args.memory, args.prompt_cache_bytes, args.max_body) == (3 * 2**29, 2_000_000, 3000)
    scheduler = Scheduler(memory="8MB")
    assert scheduler.memory == 8_000_000
    for wrong in ("lots", -1):
        with pytest.raises(RequestError, match=str(wrong)):
            Scheduler(memory=wrong)


@pytest.mark.parametrize("flag", ["--memory", "--prompt-cache-bytes", "--max-body"])
def test_a_flag_that_is_no_size_is_one_line(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([flag, "8 pints"])
    assert ended.value.code == 2
    assert f"argument {flag}: '8 pints' is not a size" in capsys.readouterr().err
