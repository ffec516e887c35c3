"""fixtures/torch/views.pt: what it holds, and how the reader refuses what is not like it."""

from pathlib import Path

import mlx.core as mx
import pytest
from conftest import FIXTURES

from cognica_mlx.convert.formats.torch_files import read_torch_file
from cognica_mlx.errors import CheckpointError

VIEWS = FIXTURES / "torch" / "views.pt"


def expected_views() -> dict[str, mx.array]:
    grid = mx.arange(24.0).reshape(2, 3, 4)
    half = (mx.arange(12.0) / 8 - 1).astype(mx.float16)
    return {
        "plain": grid,
        "transposed": grid.transpose(2, 0, 1),
        "tail": mx.array([[17.0, 19.0], [21.0, 23.0]]),
        "expanded": mx.broadcast_to(grid[:, :1], (2, 5, 4)),
        "overlapping": mx.stack([half[1:5], half[3:7], half[5:9], half[7:11]]),
        "half": half.reshape(3, 4),
        "half.transposed": half.reshape(3, 4).T,
        "nans": mx.array([0x7FC1, 0xFF81, 0x8000, 0x0001], mx.uint16).view(mx.bfloat16),
        "scalar": mx.array(-2.5, mx.bfloat16),
        "empty": mx.zeros((0, 3), mx.float16),
        "one": mx.array([[[23.0]]]),
        "parameter": grid[0],
    }


def refusal(path: Path) -> str:
    """The one line that `path` is refused with."""
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 350
    return message[len(str(path)) + 1 :]
