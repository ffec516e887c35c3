"""One prompt in, its reply out: `stream_generate` and `generate`.

- in: a loaded model and tokenizer, a prompt, a mode and its options by keyword
- out: one `GenerationResponse` per token, or the whole text
- decoding itself is in `cognica_mlx.decoding`; nothing here knows how deep a token goes
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from cognica_mlx.calibration_file import CalibrationWarning
from cognica_mlx.decoding.single import Single, drive
from cognica_mlx.decoding.state import DecodingState, Progress
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.costs import Costs
from cognica_mlx.pricing.pace import KnownCosts, Metered
from mlx_poe.generation.request import DEFAULT_MAX_TOKENS, Prompt, read_request
from mlx_poe.generation.responses import GenerationResponse, Reply
from mlx_poe.loading.tokenizer import Tokenizer

__all__ = ["GenerationResponse", "generate", "stream_generate"]


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

    One of these options constrains the reply, in any mode: `json_schema` (a schema, or its text;
    {} allows any JSON object), `regex` (Rust syntax), `grammar` (Lark notation), or `tools`,
    functions as `mlx_poe.tools` reads them, with `tool_choice` "auto" (text or a call), "required"
    (a call), "none" or a function's name. If the prompt is messages, `tools` are also added to the
    system text. A reply cut short by `max_tokens` or `stop` may not satisfy the constraint.

    `top_logprobs=n` reports the n best tokens at each position. With `prompt_logprobs=True` the
    prompt's own tokens are scored too, and the first response has the result; the whole prompt is
    then read, whatever `state` holds.

    Generation ends at one of the tokenizer's `eos_token_ids`, before any of the strings in `stop`,
    or after `max_tokens`. A `state` from an earlier call is reused as far as the prompts agree. The
    rest of the prompt is read in chunks of `prefill_step_size` (default: chosen for the device);
    `prompt_progress_callback(done, total)` is called after each.

    With `costs` (`mlx_poe.machine.known_costs`) every round uses the drafter and draft length that
    pay on this machine. A mode that does not pay falls back to full depth: `wand` for the rest of
    the call, drafting modes for a while. `no_fallback=True` keeps the mode and its own options.

    Raises RequestError for an empty prompt, an unknown mode, option or stage, or a mode that needs
    a calibration when the model's file is unusable; other modes warn about such a file.
    """
    options |= {"max_tokens": max_tokens, "mode": mode, "stop": stop, "costs": costs}
    options["prefill_step_size"] = prefill_step_size
    request = read_request(tokenizer, prompt, options).on(model)
    if model.calibration_problem:
        warnings.warn(model.calibration_problem, CalibrationWarning, stacklevel=2)
    reply = Reply(request, state, prompt_progress_callback)
    driver = Metered(Single(), reply.pace) if reply.pace else None
    with closing(drive(reply.sequence.steps(), driver)) as decoded_tokens:
        for decoded in decoded_tokens:
            if response := reply.add(decoded):
                yield response
            if reply.over:
                return


def generate(model: PoEModel, tokenizer: Tokenizer, prompt: Prompt, **options: Any) -> str:
    """Generate and return the whole text. Takes the arguments of `stream_generate`."""
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, **options))
