"""A Cognica-PoE model's shape: one frozen dataclass that every other module reads.

- in: a Hugging Face `config.json`, a nanochat `model_config` or meta file, or plain arguments
- out: shapes, windows, stage boundaries, heads; all derived numbers are properties
- it knows nothing about files, tensors or tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

from cognica_mlx.errors import ConfigError

# Beyond any meaningful setting, but within the range of every float type.
MAX_NUMBER = 1e30
MAX_LAYERS = 10_000

# The pool is divided by n_stages ** (1 - poe_alpha): 0 is the mean, 1 the sum. Values slightly
# outside that range still make sense.
MIN_ALPHA, MAX_ALPHA = -1, 2

# The heads that a specialist predicts through: the base's and its own, or one of them alone.
HEAD_MODES = ("dual", "base", "specialist")
# Like "dual", but merging has already added the heads: each specialist's head holds the sum.
SUMMED = "summed"

_REQUIRED = ("n_layer", "n_head", "n_embd", "vocab_size", "sequence_len")
# Hugging Face names for the same fields.
_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "max_position_embeddings": "sequence_len",
    "poe_stage_layers": "stage_layers",
}


@dataclass(frozen=True)
class PoEConfig:
    """Everything that defines a model's shape; validates itself on construction.

    `stage_layers` counts the blocks of each stage of the base, `specialist_layers` those of each
    specialist stage stacked on it (nearest to the base first). Zeros, empty tuples and `None` are
    replaced by defaults: `n_kv_head` = n_head, `head_dim` = n_embd / n_head,
    `intermediate_size` = 4 * n_embd, `stage_layers` = one stage, `value_embed_layers` = every
    second base layer, ending with the last.

    Raises ConfigError naming the field that is missing, wrong or contradictory.
    """

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    sequence_len: int
    n_kv_head: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    window_pattern: str = "L"
    rope_theta: float = 100000.0
    stage_layers: tuple[int, ...] = ()
    per_stage_head: bool = False
    poe_alpha: float = 0.0
    specialist_layers: tuple[int, ...] = ()
    head_mode: str = "dual"
    value_embed_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in _REQUIRED:
            self._check_count(name, getattr(self, name), least=1)
        if self.n_layer > MAX_LAYERS:
            raise ConfigError(f"n_layer: {self.n_layer} is beyond {MAX_LAYERS}")
        for name in ("n_kv_head", "head_dim", "intermediate_size"):
            self._check_count(name, getattr(self, name), least=0)
        for name in ("stage_layers", "specialist_layers"):
            if not isinstance(getattr(self, name), (tuple, list)):
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not a list")
            for count in getattr(self, name):
                self._check_count(name, count, least=1)
        for name in ("rope_theta", "poe_alpha"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not abs(value) < MAX_NUMBER:
                raise ConfigError(f"{name}: {value!r} is not a number")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ConfigError(
                f"head_dim: n_embd {self.n_embd} does not divide into n_head {self.n_head} heads; "
                "give head_dim"
            )
        self._settle("n_kv_head", self.n_kv_head or self.n_head)
        self._settle("head_dim", self.head_dim or self.n_embd // self.n_head)
        self._settle("intermediate_size", self.intermediate_size or 4 * self.n_embd)
        self._settle("stage_layers", tuple(self.stage_layers) or (self.base_n_layer,))
        self._settle("specialist_layers", tuple(self.specialist_layers))
        layers, last = self.value_embed_layers, self.base_n_layer - 1
        if layers is None:
            layers = tuple(i for i in range(last + 1) if i % 2 == last % 2)
        self._settle("value_embed_layers", tuple(layers or ()))
        self._settle("window_pattern", str(self.window_pattern).upper())
        self._check_fit()

    @staticmethod
    def _check_count(name: str, value: Any, least: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}: {value!r} is not a whole number of at least {least}")

    def _settle(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_fit(self) -> None:
        if self.n_head % self.n_kv_head:
            raise ConfigError(
                f"n_kv_head: {self.n_kv_head} does not divide n_head {self.n_head} evenly"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: {self.head_dim} is odd; rotary needs two halves")
        if self.n_embd < SMEAR_CHANNELS:
            raise ConfigError(f"n_embd: {self.n_embd} is below the smear's {SMEAR_CHANNELS}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ConfigError(
                f"window_pattern: {self.window_pattern!r} may only contain the letters S and L"
            )
        if self.base_n_layer < 1 or sum(self.stage_layers) != self.base_n_layer:
            raise ConfigError(
                f"stage_layers: {list(self.stage_layers)} adds up to {sum(self.stage_layers)} "
                f"blocks, but the base has {self.base_n_layer}"
            )
        if self.head_mode not in (*HEAD_MODES, SUMMED):
            raise ConfigError(
                f"head_mode: {self.head_mode!r} is not one of {', '.join(HEAD_MODES)}"
            )
        if any(not 0 <= i < self.base_n_layer for i in self.value_embed_layers or ()):
            raise ConfigError(
                f"value_embed_layers: {list(self.value_embed_layers or ())} reaches beyond the "
                f"base's {self.base_n_layer} layers"
            )
        if not self.rope_theta > 0:
            raise ConfigError(f"rope_theta: {self.rope_theta!r} is not a positive number")
        if not MIN_ALPHA <= self.poe_alpha <= MAX_ALPHA:
            raise ConfigError(
                f"poe_alpha: {self.poe_alpha!r} is not between {MIN_ALPHA} and {MAX_ALPHA}"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], base: PoEConfig | None = None) -> PoEConfig:
        """Read any supported form of configuration.

        `fields` is a Hugging Face `config.json`, a nanochat `model_config`, a whole nanochat meta
        file, or the output of `to_dict`; unknown keys are ignored. `base` is the configuration that
        a specialist's blocks stack on; without it, a specialist with `frozen_layers` is assumed to
        sit directly on a base of that many layers.

        Raises ConfigError naming the field that is missing, wrong or contradictory.
        """
        known = _known_fields(fields)
        if fields.get("frozen_layers") is not None or fields.get("new_layers"):
            return cls._specialist(known, fields, base)
        if "stage_layers" not in known and known.get("poe_every"):
            known["stage_layers"] = _even_stages(known.get("n_layer"), known["poe_every"])
        known.pop("poe_every", None)
        missing = [name for name in _REQUIRED if name not in known]
        if missing:
            raise ConfigError(f"the configuration lacks {', '.join(missing)}")
        return cls(**known)

    @classmethod
    def _specialist(
        cls, known: dict[str, Any], fields: Mapping[str, Any], base: PoEConfig | None
    ) -> PoEConfig:
        n_layer, frozen = known.get("n_layer"), fields.get("frozen_layers")
        new = fields.get("new_layers")
        if frozen is None and base is not None:
            frozen = base.n_layer
        if n_layer is None and isinstance(frozen, int) and isinstance(new, int):
            n_layer = frozen + new
        if n_layer is None or frozen is None:
            raise ConfigError(
                "frozen_layers: a specialist needs frozen_layers, and n_layer or new_layers"
            )
        cls._check_count("frozen_layers", frozen, least=1)
        if new is not None:
            cls._check_count("new_layers", new, least=1)
        cls._check_count("n_layer", n_layer, least=frozen + 1)
        if new and frozen + new != n_layer:
            raise ConfigError(
                f"new_layers: {new} on {frozen} frozen_layers does not make n_layer {n_layer}"
            )
        if base is None:
            base = cls.from_dict({**known, "n_layer": frozen})
        if base.n_layer != frozen:
            raise ConfigError(f"frozen_layers: {frozen}, but the base has {base.n_layer} layers")
        for name in ("n_head", "n_kv_head", "n_embd", "head_dim", "vocab_size", "sequence_len"):
            if known.get(name) and known[name] != getattr(base, name):
                raise ConfigError(
                    f"{name}: {known[name]} in the specialist, {getattr(base, name)} in its base"
                )
        return replace(
            base,
            n_layer=n_layer,
            specialist_layers=(*base.specialist_layers, n_layer - frozen),
            window_pattern=known.get("window_pattern", base.window_pattern),
            head_mode=known.get("head_mode", base.head_mode),
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` turns back into an equal configuration."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def base_n_layer(self) -> int:
        """Blocks of the root base, without specialist stages."""
        return self.n_layer - sum(self.specialist_layers)

    @property
    def backout_layer(self) -> int:
        """The block after which the residual stream is saved, to subtract before the final head."""
        return self.base_n_layer // 2

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and head matrices: vocab_size rounded up to a multiple of 64."""
        return -(-self.vocab_size // 64) * 64

    @property
    def poe_n_stages(self) -> int:
        """Number of predictors: the base's stages, then one for each specialist."""
        return len(self.stage_layers) + len(self.specialist_layers)

    @property
    def poe_stage_boundary_layers(self) -> tuple[int, ...]:
        """The last layer of each stage, counted from 0."""
        return tuple(end - 1 for end in accumulate(self.stage_layers + self.specialist_layers))

    def stage_range(self, stage: int) -> range:
        """The layers of `stage`."""
        ends = self.poe_stage_boundary_layers
        return range(ends[stage - 1] + 1 if stage else 0, ends[stage] + 1)

    @property
    def windows(self) -> tuple[int, ...]:
        """Each layer's attention window: a key at j is visible at i when 0 <= i - j <= window."""
        long = self.sequence_len
        short = -(-self.sequence_len // 4 // 128) * 128
        pattern = self.window_pattern
        sizes = [short if pattern[i % len(pattern)] == "S" else long for i in range(self.n_layer)]
        return (*sizes[:-1], long)


# The smear's gate and the value embeddings' gates read only these leading channels.
SMEAR_CHANNELS = 24
VALUE_GATE_CHANNELS = 12


def flatten(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A nanochat meta file's entries on one level; any other form unchanged."""
    if not isinstance(fields.get("model_config"), Mapping):
        return fields
    # The stages may appear only among the training options.
    options = fields.get("user_config")
    options = options if isinstance(options, Mapping) else {}
    training = {k: v for k, v in options.items() if k.startswith("poe_")}
    return {**training, **fields, **fields["model_config"], "model_config": None}


def _known_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of any form of configuration, under the dataclass's field names."""
    names = {*PoEConfig.__dataclass_fields__, "poe_every"}
    known: dict[str, Any] = {}
    for key, given in flatten(fields).items():
        name, value = _ALIASES.get(key, key), tuple(given) if isinstance(given, list) else given
        if name not in names or value is None:
            continue
        if name in known and known[name] != value:
            raise ConfigError(f"{name}: given twice, as {known[name]!r} and ({key}) {value!r}")
        known[name] = value
    return known


def _even_stages(n_layer: Any, poe_every: Any) -> tuple[int, ...]:
    PoEConfig._check_count("n_layer", n_layer, least=1)
    PoEConfig._check_count("poe_every", poe_every, least=1)
    starts = range(0, min(n_layer, MAX_LAYERS), poe_every)
    return tuple(min(poe_every, n_layer - start) for start in starts)
