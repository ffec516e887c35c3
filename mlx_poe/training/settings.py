"""The settings of a training run, each with its default and its check, in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from cognica_mlx.config import HEAD_MODES
from cognica_mlx.convert.formats.stored import DTYPES
from cognica_mlx.errors import RequestError
from cognica_mlx.training.optimizer import OPTIMIZERS
from cognica_mlx.training.store import STORE_BITS
from mlx_poe.loading.load import DEFAULT_MODEL

CHAT_TOKENS = ("auto", "words", "keep")
# Settings that may change when training resumes from a checkpoint.
CHANGEABLE = frozenset(
    {"iters", "learning_rate", "steps_per_eval", "save_every", "store", "store_bits", "test"}
)


@dataclass(frozen=True)
class TrainingSettings:
    """A run's settings, named as the command's flags; checks itself on construction.

    model, revision, dtype: as in `load`. data: the folder with train.jsonl and valid.jsonl.
    layers: how many new blocks. head_mode: "dual", "base" or "specialist"; default: the model's
    own. chat_tokens: whether chat tokens get the embeddings of words ("auto": if the base never saw
    them). iters: batches to train on. batch_size: rows per batch. learning_rate: Muon's, or AdamW's
    if that is the `optimizer`. grad_accumulation_steps: batches per update. max_grad_norm: bound on
    the gradient's norm, 0 for none. max_seq_length: most tokens in a row; default: the model's
    sequence_len. mask_prompt: count only what the assistant says (None: yes, but plain text counts
    as a whole). pack: join rows up to max_seq_length; each row sees those before it.
    steps_per_eval, save_every: in iterations. val_batches: validation batches, -1 for all. store:
    keep the base's activations on disk, with store_bits per value.

    Raises RequestError naming an invalid setting.
    """

    model: str = DEFAULT_MODEL
    revision: str | None = None
    dtype: str | None = None
    data: str = ""
    layers: int = 2
    head_mode: str | None = None
    chat_tokens: str = "auto"
    iters: int = 800
    batch_size: int = 32
    learning_rate: float = 0.01
    optimizer: str = "muon"
    grad_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    max_seq_length: int | None = None
    mask_prompt: bool | None = None
    pack: bool = False
    seed: int = 0
    steps_per_eval: int = 100
    val_batches: int = -1
    save_every: int = 100
    grad_checkpoint: bool = False
    store: bool = True
    store_bits: int = 16
    test: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            *(("layers", 1), ("iters", 1), ("batch_size", 1), ("grad_accumulation_steps", 1)),
            *(("max_seq_length", 2), ("steps_per_eval", 1), ("save_every", 1), ("seed", 0)),
        ):
            value = getattr(self, name)
            if value is None and name == "max_seq_length":
                continue
            if type(value) is not int or not least <= value < 2**31:
                raise RequestError(f"{name} {value!r} is not a whole number of at least {least}")
        if type(self.val_batches) is not int or (self.val_batches < 1 and self.val_batches != -1):
            raise RequestError(f"val_batches {self.val_batches!r}: at least 1, or -1 for all")
        for name, what in (
            ("learning_rate", "a positive number below 1e6"),
            ("max_grad_norm", "a number below 1e6, or 0 for no bound"),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < 1e6 or (name == "learning_rate" and not value):
                raise RequestError(f"{name} {value!r} is not {what}")
        for name in ("pack", "grad_checkpoint", "store", "test", "mask_prompt"):
            value = getattr(self, name)
            if type(value) is not bool and not (value is None and name == "mask_prompt"):
                raise RequestError(f"{name} {value!r} is not true or false")
        for name, known in (
            *(("optimizer", OPTIMIZERS), ("chat_tokens", CHAT_TOKENS), ("store_bits", STORE_BITS)),
            *(("head_mode", HEAD_MODES), ("dtype", tuple(DTYPES))),
        ):
            value = getattr(self, name)
            if value is None and name in ("head_mode", "dtype"):
                continue
            if type(value) is bool or value not in known:
                raise RequestError(f"{name} {value!r} is not one of {', '.join(map(str, known))}")
        for name in ("model", "data", "revision"):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name == "revision"):
                raise RequestError(f"{name} {value!r} is not a string")
        if not self.data:
            raise RequestError("data: name the folder that holds train.jsonl and valid.jsonl")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-compatible dictionary for `TrainingSettings(**…)`."""
        return asdict(self)


NAMES = tuple(field.name for field in fields(TrainingSettings))


def resumed(saved: dict[str, Any], given: dict[str, Any]) -> TrainingSettings:
    """The settings of a checkpoint, with changes that are allowed when resuming.

    Raises RequestError naming a setting that cannot change anymore.
    """
    for name, value in given.items():
        if name not in CHANGEABLE and saved.get(name) != value:
            raise RequestError(
                f"{name} {value!r}: training began with {saved.get(name)!r}, which cannot change "
                "when resuming; leave it out, or start over with --overwrite"
            )
    known = {name: value for name, value in saved.items() if name in NAMES}
    return TrainingSettings(**{**known, **given})
