"""Text in, text out: prompts of any kind, streaming, stop strings, statistics.

- in: a loaded model and tokenizer, a prompt, a mode and its options by keyword
- out: one `GenerationResponse` per token, or the whole text
- decoding itself is in `cognica_mlx.decoding`; nothing here knows how deep a token goes
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from operator import index
from typing import Any

from cognica_mlx.calibration_file import CalibrationWarning
from cognica_mlx.decoding.constraint import Grammar
from cognica_mlx.decoding.modes import ModeOptions, last_resort, make_mode
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import Single, drive
from cognica_mlx.decoding.state import DecodingState, Progress
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs
from cognica_mlx.pricing.pace import KnownCosts, Metered, pace_for
from mlx_poe.generation.prompt_cache import chat_marks
from mlx_poe.generation.reply_form import FORM_OPTIONS, make_grammar
from mlx_poe.generation.responses import GenerationResponse, Responses
from mlx_poe.generation.tools import with_functions
from mlx_poe.loading.tokenizer import Tokenizer

__all__ = ["GenerationResponse", "encode_prompt", "generate", "sort_options", "stream_generate"]

DEFAULT_MAX_TOKENS = 256

_TEXT_OPTIONS = ("draft_head",)
_FLAGS = ("draft_lookup",)
LIST_OPTIONS = ("stages", "stage_weights", "p99_bounds", "exit_stages")
WHOLE_OPTIONS = (
    *("top_k", "repetition_context_size", "top_logprobs", "seed"),
    *("stage", "max_stages", "stages", "exit_stages"),
    *("draft_stage", "num_draft_tokens", "draft_rank", "draft_bits"),
)

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


def stream_generate(
    model: PoEModel,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    mode: str = "full",
    stop: str | Sequence[str] | None = None,
    state: DecodingState | None = None,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Progress | None = None,
    costs: Costs | KnownCosts | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Generate token by token.

    `prompt` is text (`<|bos|>` is prepended), a list of token ids (taken as they are) or a list of
    chat messages with "role" and "content". `mode` and its options are those of
    `cognica_mlx.decoding.modes`; further keywords are the sampling options temp, top_p, top_k,
    min_p, repetition_penalty, repetition_context_size, presence_penalty, frequency_penalty,
    logit_bias and seed (see `SamplingOptions`). None means the default. Lists may be NumPy or MLX
    arrays. Greedy by default.

    One of these options gives the reply a form, in any mode: `json_schema` (a schema, or its text;
    {} allows any JSON object), `regex` (Rust syntax), `grammar` (Lark notation), or `tools`,
    functions as `mlx_poe.tools` reads them, with `tool_choice` "auto" (text or a call), "required"
    (a call), "none" or a function's name. If the prompt is messages, `tools` are also added to the
    system text. A reply cut short by `max_tokens` or `stop` may not have the form.

    `top_logprobs=n` reports the n best tokens at each position. With `prompt_logprobs=True` the
    prompt's own tokens are scored too, and the first response has the result; the whole prompt is
    then read, whatever `state` holds.

    Generation ends at one of the tokenizer's `eos_token_ids`, before any of the strings in `stop`,
    or after `max_tokens`. A `state` from an earlier call is reused as far as the prompts agree. The
    rest of the prompt is read in chunks of `prefill_step_size` (default: chosen for the device);
    `prompt_progress_callback(done, total)` is called after each.

    With `costs` (`mlx_poe.machine.known_costs`) every round uses the drafter and draft length that
    pay on this machine. A mode that does not pay falls back to full depth: `wand` for the rest of
    the call, drafting modes for a while.

    Raises RequestError for an empty prompt, an unknown mode, option or stage, or a mode that needs
    a calibration when the model's file is unusable; other modes warn about such a file.
    """
    asked = read_request(tokenizer, prompt, options)
    chosen = make_mode(model, mode, asked.mode_options, model.calibration)
    pace = pace_for(model, chosen, costs)
    if model.calibration_problem:
        warnings.warn(model.calibration_problem, CalibrationWarning, stacklevel=2)
    sequence = DecodingSequence(
        model,
        asked.tokens,
        chosen,
        max_tokens=max_tokens,
        sampler=Sampler(asked.sampling),
        state=state,
        prefill_step_size=prefill_step_size,
        progress=prompt_progress_callback,
        advice=pace,
        fallback=make_mode(model),
        last_resort=last_resort(model),
        constraint=asked.grammar.start() if asked.grammar else None,
        score_prompt=asked.prompt_logprobs,
        special=tokenizer.special_ids,
    )
    responses = Responses(tokenizer, sequence, stop, pace)
    decoded_tokens = drive(sequence.steps(), Metered(Single(), pace) if pace else None)
    with closing(decoded_tokens):
        for decoded in decoded_tokens:
            response = responses.add(decoded)
            yield response
            if response.finish_reason:
                return


def generate(model: PoEModel, tokenizer: Tokenizer, prompt: Prompt, **options: Any) -> str:
    """Generate and return the whole text. Takes the arguments of `stream_generate`."""
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, **options))


@dataclass(frozen=True)
class Asked:
    """A prompt's tokens, its options, `marks` (positions up to which other prompts may share it),
    and whether to score its own tokens."""

    tokens: list[int]
    marks: tuple[int, ...]
    sampling: SamplingOptions
    mode_options: ModeOptions
    grammar: Grammar | None
    prompt_logprobs: bool = False


def read_request(tokenizer: Tokenizer, prompt: Prompt, options: Mapping[str, Any]) -> Asked:
    """Read a prompt and its options, for every way to generate. RequestError for bad ones."""
    formal = {k: v for k, v in options.items() if k in FORM_OPTIONS}
    rest = {k: v for k, v in options.items() if k not in formal}
    scored = rest.pop("prompt_logprobs", None) or False
    if not isinstance(scored, bool):
        raise RequestError(f"prompt_logprobs must be True or False, not {scored!r}")
    sampling, mode_options = sort_options(rest)
    grammar = make_grammar(tokenizer, **formal)
    tools = formal.get("tools")
    if tools is not None and not isinstance(prompt, str) and _are_messages(prompt):
        prompt = with_functions(prompt, tools)  # type: ignore[arg-type]
    tokens = encode_prompt(tokenizer, prompt)
    # A prompt to be scored is read whole, so nothing is shared.
    marks = () if scored else chat_marks(tokenizer, prompt, tokens)
    return Asked(tokens, marks, sampling, mode_options, grammar, scored)


def _are_messages(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The token ids of a prompt of any kind. RequestError if it is empty or of another type."""
    if hasattr(prompt, "tolist"):  # an MLX or NumPy array
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        kind = type(prompt).__name__
        raise RequestError(f"a prompt must be text, or a list of token ids or messages, not {kind}")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise RequestError("the prompt is empty; give some text, token ids or messages")
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if _are_messages(prompt):
        return tokenizer.apply_chat_template(prompt)  # type: ignore[arg-type]
    try:
        return [index(token) for token in prompt]  # type: ignore[arg-type]
    except TypeError:
        raise RequestError("a prompt of token ids must contain whole numbers only") from None


def sort_options(options: Mapping[str, Any]) -> tuple[SamplingOptions, ModeOptions]:
    """Split options by name into sampling and mode options. RequestError for an unknown name."""
    sampling_names = {f.name for f in fields(SamplingOptions)}
    mode_names = {f.name for f in fields(ModeOptions)}
    for name in options:
        if name not in sampling_names | mode_names:
            raise RequestError(f"there is no option {name}")
    plain = {name: _plain(name, value) for name, value in options.items() if value is not None}
    return (
        SamplingOptions(**{k: v for k, v in plain.items() if k in sampling_names}),
        ModeOptions(**{k: v for k, v in plain.items() if k in mode_names}),
    )


def _plain(name: str, value: Any) -> Any:
    """An option as a plain number or list; converts arrays and NumPy numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if name in _TEXT_OPTIONS or (name == "draft_bits" and isinstance(value, str)):
        return value
    if name in _FLAGS:
        if not isinstance(value, bool):
            raise RequestError(f"{name} must be True or False, not {value!r}")
        return value
    if name == "logit_bias":
        return _biases(value)
    if name not in LIST_OPTIONS:
        return _number(name, value)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} takes a list of numbers, not {value!r}")
    return [_number(name, item.tolist() if hasattr(item, "tolist") else item) for item in value]


def _biases(value: Any) -> dict[int, float]:
    """Token ids (strings in JSON) and the values to add to their scores."""
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias takes numbers by token id, not {value!r}")
    try:
        return {int(token): _number("logit_bias", bias) for token, bias in value.items()}
    except (TypeError, ValueError):
        raise RequestError(f"logit_bias: {list(value)!r:.60} are not all token ids") from None


def _number(name: str, value: Any) -> int | float:
    whole = name in WHOLE_OPTIONS
    if isinstance(value, int) or (isinstance(value, float) and not whole):
        return value
    raise RequestError(f"{name} takes {'whole numbers' if whole else 'numbers'}, not {value!r}")
