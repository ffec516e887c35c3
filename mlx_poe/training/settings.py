"""The settings of a training run, each with its default, its check and its help, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cognica_mlx.config import HEAD_MODES
from cognica_mlx.errors import RequestError
from cognica_mlx.files.stored import DTYPES
from cognica_mlx.training.optimizer import OPTIMIZERS
from cognica_mlx.training.store import STORE_BITS
from mlx_poe.loading.load import DEFAULT_MODEL

# Settings that may change when training resumes from a checkpoint.
CHANGEABLE = frozenset(
    {"iters", "learning_rate", "steps_per_eval", "save_every", "store", "store_bits", "test"}
)


@dataclass(frozen=True)
class Kind:
    """What values a setting may have: `fits` says whether a value is one, `what` describes them,
    and `flag` holds argparse's options to read one."""

    fits: Callable[[Any], bool]
    what: str
    flag: Mapping[str, Any]


def _whole(least: int) -> Kind:
    return Kind(
        lambda value: type(value) is int and least <= value < 2**31,
        f"a whole number of at least {least}",
        {"type": int},
    )


def _number(fits: Callable[[float], bool], what: str) -> Kind:
    return Kind(lambda value: type(value) in (int, float) and fits(value), what, {"type": float})


def _one_of(known: Sequence[Any]) -> Kind:
    names, kind = ", ".join(map(str, known)), type(known[0])
    flag = {"type": kind, "choices": known}
    return Kind(lambda value: type(value) is kind and value in known, f"one of {names}", flag)


TEXT = Kind(lambda value: isinstance(value, str), "a string", {})
SWITCH = Kind(lambda value: type(value) is bool, "true or false", {"action": "store_true"})


def _setting(default: Any, kind: Kind, help: str = "", shown: str = "", *flags: str) -> Any:
    """A field. If its default is None, None means `shown`; `flags` are further names."""
    about = {"kind": kind, "help": f"{help} (default: {shown or default})", "flags": flags}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class TrainingSettings:
    """A run's settings, named as the command's flags, whose help says what they mean; checks itself
    on construction.

    model, revision and dtype are as in `load`; data is the folder with train.jsonl and valid.jsonl.

    Raises RequestError naming an invalid setting.
    """

    model: str = _setting(DEFAULT_MODEL, TEXT)
    revision: str | None = _setting(None, TEXT)
    dtype: str | None = _setting(None, _one_of(tuple(DTYPES)))
    data: str = _setting("", TEXT)
    layers: int = _setting(2, _whole(1), "how many new layers", "", "--num-layers")
    head_mode: str | None = _setting(
        None,
        _one_of(HEAD_MODES),
        "predict with the model's heads and a new one (dual), only the new one (specialist), or "
        "only the model's (base)",
        "the model's",
    )
    chat_tokens: str = _setting(
        "auto",
        _one_of(("auto", "words", "keep")),
        "embeddings of the chat tokens: those of words, the model's own (keep), or words for "
        "tokens that the model never saw (auto)",
    )
    iters: int = _setting(800, _whole(1), "batches to train on")
    batch_size: int = _setting(32, _whole(1), "rows per batch")
    learning_rate: float = _setting(
        0.01,
        _number(lambda value: 0 < value < 1e6, "a positive number below 1e6"),
        "peak rate; the head's is half of it or less",
    )
    optimizer: str = _setting(
        "muon", _one_of(OPTIMIZERS), "for the layers' matrices; the rest uses AdamW"
    )
    grad_accumulation_steps: int = _setting(1, _whole(1), "batches per update")
    max_grad_norm: float = _setting(
        1.0,
        _number(lambda value: 0 <= value < 1e6, "a number below 1e6, or 0 for no bound"),
        "clip the gradient to this norm; 0 is off",
    )
    max_seq_length: int | None = _setting(
        None, _whole(2), "cut longer rows to this many tokens", "the model's sequence length"
    )
    mask_prompt: bool | None = _setting(
        None, SWITCH, "count only what the assistant says", "yes; plain text counts as a whole"
    )
    pack: bool = _setting(
        False, SWITCH, "join rows up to --max-seq-length; each row sees those before it", "no"
    )
    seed: int = _setting(0, _whole(0), "seed for the weights and the order of the data")
    steps_per_eval: int = _setting(100, _whole(1), "iterations between validations")
    val_batches: int = _setting(
        -1,
        Kind(lambda value: value == -1 or _whole(1).fits(value), "-1 or at least 1", {"type": int}),
        "batches to validate on, -1 for all",
    )
    save_every: int = _setting(100, _whole(1), "iterations between checkpoints")
    grad_checkpoint: bool = _setting(
        False, SWITCH, "compute activations twice to save memory", "no"
    )
    store: bool = _setting(True, SWITCH)
    store_bits: int = _setting(16, _one_of(STORE_BITS), "bits per value")
    test: bool = _setting(False, SWITCH)

    def __post_init__(self) -> None:
        for one in fields(self):
            value, kind = getattr(self, one.name), one.metadata["kind"]
            if not (kind.fits(value) or (value is None and one.default is None)):
                raise RequestError(f"{one.name} {value!r} is not {kind.what}")
        if not self.data:
            raise RequestError("data: name the folder that holds train.jsonl and valid.jsonl")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-compatible dictionary for `TrainingSettings(**…)`."""
        return asdict(self)


SETTINGS = {one.name: one for one in fields(TrainingSettings)}


def resumed(saved: Mapping[str, Any], given: Mapping[str, Any]) -> TrainingSettings:
    """The settings of a checkpoint, with changes that are allowed when resuming.

    Raises RequestError naming a setting that cannot change anymore.
    """
    for name, value in given.items():
        if name not in CHANGEABLE and saved.get(name) != value:
            raise RequestError(
                f"{name} {value!r}: training began with {saved.get(name)!r}, which cannot change "
                "when resuming; leave it out, or start over with --overwrite"
            )
    known = {name: value for name, value in saved.items() if name in SETTINGS}
    return TrainingSettings(**{**known, **given})
