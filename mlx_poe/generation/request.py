"""One reply to generate: all that determines it, read and checked once.

- in: a prompt of any kind, and options by their Python names, from every entrance
- out: a frozen `GenerationRequest`, which all that generate hand on; it alone makes the sequence
- nothing here decodes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import index
from sys import float_info
from typing import Any

from cognica_mlx.decoding.constraint import Grammar, check_characters
from cognica_mlx.decoding.modes import MODES, PACED_MODES, ModeOptions, last_resort, make_mode
from cognica_mlx.decoding.quantized_prefix import QuantizedPrefix
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.decoding.sequence import DecodingSequence, Mode, check_sequence
from cognica_mlx.decoding.speculative import Speculative
from cognica_mlx.decoding.state import DecodingState, Progress
from cognica_mlx.errors import RequestError, deleted
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs
from cognica_mlx.pricing.pace import KnownCosts, pace_for
from mlx_poe.generation.prompt_cache import chat_marks
from mlx_poe.generation.reply_form import FORM_OPTIONS, make_grammar
from mlx_poe.generation.tools import with_functions
from mlx_poe.loading.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256
EMPTY_PROMPT = "the prompt is empty; give some text, token ids or messages"

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

SAMPLING = tuple(f.name for f in fields(SamplingOptions))
MODE_OPTIONS = tuple(f.name for f in fields(ModeOptions))
# All that a reply may be asked for with; most may also stand in a line of `--prompts`.
OPTIONS = (*SAMPLING, *MODE_OPTIONS, *FORM_OPTIONS, "mode", "max_tokens", "stop")
_OTHERS = ("prompt_logprobs", "prefill_step_size", "no_fallback", "costs")
# Names of version 0.2.
_RENAMED = {"no_park": "no_fallback"}

_LISTS = ("stages", "stage_weights", "p99_bounds", "exit_stages", "weights")
_PLAIN = {
    **dict.fromkeys(("draft_lookup", "prompt_logprobs", "no_fallback"), (bool, "True or False")),
    **dict.fromkeys(("draft_head", "mode"), (str, "text")),
}
_WHOLE = (
    *("top_k", "repetition_context_size", "top_logprobs", "seed", "max_tokens"),
    *("stage", "max_stages", "stages", "exit_stages", "prefill_step_size"),
    *("draft_stage", "num_draft_tokens", "draft_bits"),
)
_AS_GIVEN = ("costs", *FORM_OPTIONS)  # checked by those that use them


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """A prompt and all that determines its reply, checked; compared by identity.

    `marks` are positions up to which other prompts may share this one. `specialist` and `weights`
    name the model for an engine. `model` and `mode` are set by `on`, which checks the rest.
    """

    tokenizer: Tokenizer
    tokens: Sequence[int]
    marks: tuple[int, ...]
    sampling: SamplingOptions
    mode_name: str
    mode_options: ModeOptions
    grammar: Grammar | None
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: tuple[str, ...] = ()
    prompt_logprobs: bool = False
    prefill_step_size: int | None = None
    no_fallback: bool = False
    costs: Costs | KnownCosts | None = None
    specialist: str | tuple[str, ...] | None = None
    weights: tuple[float, ...] | None = None
    model: PoEModel = field(init=False)
    mode: Mode = field(init=False)

    def on(self, model: PoEModel) -> GenerationRequest:
        """The same request of this model. RequestError for anything that the model cannot do."""
        mode = make_mode(model, self.mode_name, self.mode_options, model.calibration)
        check_sequence(model, self.tokens, self.sampling, self.max_tokens, self.prefill_step_size)
        costs = None if self.no_fallback or self.mode_name not in PACED_MODES else self.costs
        one = replace(self, costs=costs(model, mode) if callable(costs) else costs)
        object.__setattr__(one, "model", model)
        object.__setattr__(one, "mode", mode)
        return one

    def sequence(
        self, state: DecodingState | None = None, progress: Progress | None = None
    ) -> DecodingSequence:
        """The sequence to decode, from a state that may hold part of the prompt."""
        return DecodingSequence(
            self.model,
            self.tokens,
            self.mode,
            max_tokens=self.max_tokens,
            sampler=Sampler(self.sampling),
            state=state,
            prefill_step_size=self.prefill_step_size,
            progress=progress,
            advice=pace_for(self.model, self.mode, self.costs),
            fallback=make_mode(self.model),
            last_resort=last_resort(self.model),
            constraint=self.grammar.start() if self.grammar else None,
            score_prompt=self.prompt_logprobs,
            special=self.tokenizer.special_ids,
        )

    @property
    def prefixes(self) -> set[QuantizedPrefix]:
        """The quantized copy that it drafts with, if any."""
        prefix = self.mode.prefix if isinstance(self.mode, Speculative) else None
        return {prefix} if prefix else set()


def read_request(
    tokenizer: Tokenizer,
    prompt: Prompt,
    options: Mapping[str, Any],
    *,
    specialist: str | Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
) -> GenerationRequest:
    """Read a prompt and the options of `stream_generate`, for every way to generate.

    RequestError for an unknown option, or for a value that no model could use.
    """
    options = {_RENAMED.get(name, name): value for name, value in options.items()}
    for name in options:
        if name not in OPTIONS and name not in _OTHERS:
            raise RequestError(deleted(name) or f"there is no option {name}")
    given = {name: _read(name, value) for name, value in options.items() if value is not None}

    def taken(names: Iterable[str]) -> dict[str, Any]:
        return {name: given.pop(name) for name in names if name in given}

    form, mode = taken(FORM_OPTIONS), given.pop("mode", "full")
    sampling, mode_options = SamplingOptions(**taken(SAMPLING)), ModeOptions(**taken(MODE_OPTIONS))
    grammar = make_grammar(tokenizer, **form)
    if "tools" in form and not isinstance(prompt, str) and are_messages(prompt):
        prompt = with_functions(prompt, form["tools"])  # type: ignore[arg-type]
    tokens = encode_prompt(tokenizer, prompt)
    # A prompt to be scored is read whole, so nothing is shared.
    marks = () if given.get("prompt_logprobs") else chat_marks(tokenizer, prompt, tokens)
    specialist, weights = read_specialist(specialist, weights)
    return GenerationRequest(
        *(tokenizer, tokens, marks, sampling, mode, mode_options, grammar),
        specialist=specialist,
        weights=weights,
        **given,
    )


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The token ids of a prompt of any kind; only ids may be special tokens, text never is.

    RequestError if it is empty or of another type.
    """
    if hasattr(prompt, "tolist"):  # an MLX or NumPy array
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        kind = type(prompt).__name__
        raise RequestError(f"a prompt must be text, or a list of token ids or messages, not {kind}")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise RequestError(EMPTY_PROMPT)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if are_messages(prompt):
        return tokenizer.apply_chat_template(prompt)  # type: ignore[arg-type]
    try:
        if not any(isinstance(token, bool) for token in prompt):
            return [index(token) for token in prompt]  # type: ignore[arg-type]
    except TypeError:
        pass
    raise RequestError("a prompt of token ids must contain whole numbers only")


def are_messages(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def read_specialist(
    specialist: Any, weights: Any = None
) -> tuple[str | tuple[str, ...] | None, tuple[float, ...] | None]:
    """The name of a specialist, or several to be mixed with `weights`. RequestError for others."""
    if specialist is not None and not isinstance(specialist, str):
        listed = isinstance(specialist, Sequence)
        if not listed or not all(isinstance(name, str) for name in specialist):
            raise RequestError(
                f"specialist takes a name, or a list of names, not {specialist!r:.60}"
            )
        specialist = tuple(specialist)
    return specialist, None if weights is None else tuple(_read("weights", weights))


def _read(name: str, value: Any) -> Any:
    """An option's value as plain Python; converts arrays and NumPy numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if name in _AS_GIVEN or (name == "draft_bits" and isinstance(value, str)):
        return value
    if name == "mode" and (not isinstance(value, str) or value not in MODES):
        problem = f"mode {value!r:.60} is not one of {', '.join(MODES)}"
        raise RequestError(deleted(value) or problem)
    if name in _PLAIN:
        kind, what = _PLAIN[name]
        if not isinstance(value, kind):
            raise RequestError(f"{name} must be {what}, not {value!r:.60}")
        return value
    if name in _READERS:
        return _READERS[name](value)
    if name not in _LISTS:
        return _number(name, value)
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} takes a list of numbers, not {value!r:.60}")
    return [_number(name, item.tolist() if hasattr(item, "tolist") else item) for item in value]


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    for one in strings if not isinstance(value, Mapping) else [value]:
        if not isinstance(one, str):
            raise RequestError(f"stop: a stop string is text, not {type(one).__name__}")
        if not one:
            raise RequestError("stop: a stop string is empty")
        check_characters(one, "stop: a stop string")
    return tuple(strings)


def _biases(value: Any) -> dict[int, float]:
    """Token ids (strings in JSON) and the values to add to their scores."""
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias takes numbers by token id, not {value!r:.60}")
    try:
        tokens = [int(token) for token in value]
    except (TypeError, ValueError):
        raise RequestError(f"logit_bias: {list(value)!r:.60} are not all token ids") from None
    biases = (_number("logit_bias", bias) for bias in value.values())
    return dict(zip(tokens, biases, strict=True))


def _number(name: str, value: Any) -> int | float:
    whole = name in _WHOLE
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise RequestError(
            f"{name} takes {'whole numbers' if whole else 'numbers'}, not {value!r:.60}"
        )
    if not whole and isinstance(value, int) and abs(value) > float_info.max:
        raise RequestError(f"{name} {value!r:.30} is out of range")
    return value


_READERS = {"stop": _stop_strings, "logit_bias": _biases}
