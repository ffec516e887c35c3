"""Text in, text out: prompts of any kind, streaming, stop strings, statistics.

- in: a loaded model and tokenizer, a prompt, a mode and its options by keyword
- out: one `GenerationResponse` for every token, or the whole text
- decoding itself is `cognica_mlx.decoding`'s; nothing here knows how deep a token goes
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from operator import index
from typing import Any

from cognica_mlx.calibration import CalibrationWarning
from cognica_mlx.costs import Costs
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.pace import Metered, Pace
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import Single, drive
from cognica_mlx.errors import RequestError
from cognica_mlx.model import PoEModel
from cognica_mlx.sampling import Sampler, SamplingOptions
from cognica_mlx.state import DecodingState, Progress
from mlx_poe.responses import GenerationResponse, Responses
from mlx_poe.tokenizer import Tokenizer

__all__ = ["GenerationResponse", "encode_prompt", "generate", "sort_options", "stream_generate"]

DEFAULT_MAX_TOKENS = 256

_TEXT_OPTIONS = ("draft_head",)
_LIST_OPTIONS = ("stages", "stage_weights", "p99_bounds", "exit_stages")
_WHOLE_OPTIONS = (
    *("top_k", "repetition_context_size", "seed"),
    *("stage", "max_stages", "stages", "exit_stages"),
    *("draft_stage", "num_draft_tokens", "draft_rank"),
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
    costs: Costs | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Generate token by token.

    `prompt` is text (`<|bos|>` is prepended), a list of token ids (taken as they are) or a list of
    chat messages with "role" and "content". `mode` and its options are those of
    `cognica_mlx.decoding.modes`; further keywords are the sampling options temp, top_p, top_k,
    min_p, repetition_penalty, repetition_context_size and seed; None stands for the default. Lists
    may be arrays of NumPy or MLX. Greedy by default.

    Generation ends at one of the tokenizer's `eos_token_ids`, before any of the strings `stop`, or
    after `max_tokens`. A `state` from an earlier call is continued as far as the prompts agree. The
    rest of the prompt is read in chunks of `prefill_step_size`, by default as suits the device;
    `prompt_progress_callback(done, total)` is called after each.

    With `costs` (`mlx_poe.machine.known_costs(model)`), drafts are as long as pays on this machine,
    and a mode that does not pay goes over to full depth for the rest of the call.

    Raises RequestError for an empty prompt, an unknown mode, option or stage, or a mode that needs
    the model's calibration where its file cannot be used; other modes warn about such a file.
    """
    sampling, mode_options = sort_options(options)
    chosen = make_mode(model, mode, mode_options, model.calibration)
    pace = Pace(costs, chosen) if costs else None
    if model.calibration_problem:
        warnings.warn(model.calibration_problem, CalibrationWarning, stacklevel=2)
    tokens = encode_prompt(tokenizer, prompt)
    sequence = DecodingSequence(
        model,
        tokens,
        chosen,
        max_tokens=max_tokens,
        sampler=Sampler(sampling),
        state=state,
        prefill_step_size=prefill_step_size,
        progress=prompt_progress_callback,
        advice=pace,
        fallback=make_mode(model),
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
    """Generate and return the whole text. Takes what `stream_generate` takes."""
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, **options))


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The token ids of a prompt of any kind. RequestError where it is empty or of no such kind."""
    if hasattr(prompt, "tolist"):  # an array, of MLX's or NumPy's
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        kind = type(prompt).__name__
        raise RequestError(f"a prompt is text, token ids or messages in a list, not {kind}")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise RequestError("the prompt is empty; give some text, token ids or messages")
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if isinstance(prompt[0], Mapping):
        return tokenizer.apply_chat_template(prompt)  # type: ignore[arg-type]
    try:
        return [index(token) for token in prompt]  # type: ignore[arg-type]
    except TypeError:
        raise RequestError("a prompt of token ids may hold whole numbers only") from None


def sort_options(options: Mapping[str, Any]) -> tuple[SamplingOptions, ModeOptions]:
    """Sampling options and those of a mode, by name. RequestError for one that is neither."""
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
    """An option as a plain number or list: arrays and NumPy's numbers become Python's."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if name in _TEXT_OPTIONS:
        return value
    if name not in _LIST_OPTIONS:
        return _number(name, value)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} takes a list of numbers, not {value!r}")
    return [_number(name, item.tolist() if hasattr(item, "tolist") else item) for item in value]


def _number(name: str, value: Any) -> int | float:
    whole = name in _WHOLE_OPTIONS
    if isinstance(value, int) or (isinstance(value, float) and not whole):
        return value
    raise RequestError(f"{name} takes {'whole numbers' if whole else 'numbers'}, not {value!r}")
