"""lm-eval's view of a model: one `LM` for each predictor, all from one pass.

- a task's requests are the same for every predictor: the first LM scores them for all predictors,
  and the others reuse its answers
- if a text is too long, the context loses its beginning but keeps BOS; continuations are always
  scored in full, and context tokens never are
- needs the extra `eval`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from cognica_mlx.convert.chat_layout import BOS, REPLY_END
from cognica_mlx.errors import RequestError
from cognica_mlx.files.stored import dtype_name
from cognica_mlx.network.model import PoEModel
from cognica_mlx.pricing.measuring import Progress
from mlx_poe.engine.batch_generate import batch_generate
from mlx_poe.evaluation.answers import Answers, key_of
from mlx_poe.evaluation.predictors import Predictors
from mlx_poe.evaluation.scoring import BATCH, Continuation, score
from mlx_poe.generation.responses import GenerationResponse
from mlx_poe.loading.tokenizer import Tokenizer

MAX_GEN_TOKS = 256
# lm-eval's names for the most tokens of a reply; the first one given counts, as in its own models.
MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# A task's generation settings, and our names for them.
SAMPLING = {
    "temperature": "temp",
    **{name: name for name in ("top_p", "top_k", "min_p", "repetition_penalty")},
}


@dataclass
class Shared:
    """A model with its predictors and their answers so far.

    `fingerprint` distinguishes the answers of different models. `longest` is the most tokens to run
    for a text. With `chat`, contexts are in the chat layout, and the names of special tokens are
    encoded as special tokens. `cut` holds the hashes of contexts that lost their beginning;
    `scored` counts the continuations that had no stored answer.
    """

    model: PoEModel
    tokenizer: Tokenizer
    predictors: Predictors
    longest: int
    answers: Answers = field(default_factory=Answers)
    fingerprint: str = ""
    batch: int = BATCH
    chat: bool = False
    progress: Progress | None = None
    scored: int = 0
    cut: set[int] = field(default_factory=set)

    @property
    def bos(self) -> int:
        """The token that every text begins with."""
        return self.tokenizer.token_id(BOS)

    def keys(self, kind: str, *request: Any) -> list[str]:
        """The keys of a request's answers, one for each predictor."""
        name = key_of(self.fingerprint, kind, *request)
        return [name + way for way in self._ways]

    @cached_property
    def _ways(self) -> list[str]:
        """A suffix for each predictor's keys."""
        shown = self.predictors.shown
        return [key_of(one.name, dict(one.options), dict(one.exits)) for one in shown]

    def fit(self, context: Sequence[int], room: int) -> list[int]:
        """The context's BOS and as many of its last tokens as fit into `room`."""
        if len(context) <= room:
            return list(context)
        self.cut.add(hash(tuple(context)))
        kept = list(context[len(context) - max(room, 1) :])
        return [self.bos, *kept[1:]] if context[0] == self.bos else kept

    def loglikelihoods(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], row: int
    ) -> list[tuple[float, bool]]:
        """For (context, continuation) token ids: the log-probability, in nats, and whether each
        token is the best guess, by the predictor in that row."""
        texts = []
        for context, continuation in pairs:
            kept = self.fit(context, self.longest + 1 - len(continuation))
            texts.append(Continuation((*kept, *continuation), len(kept)))
        keys = {t: self.keys("loglikelihood", t.tokens, t.start) for t in texts}
        new = [text for text, those in keys.items() if self.answers.number(those[row]) is None]
        for done, (i, facts) in enumerate(score(self.predictors, new, self.batch), start=1):
            found = self.predictors.report(facts)
            greedy = (found.best == list(new[i].tokens[new[i].start :])).all(axis=1)
            sums = found.logprobs.sum(axis=1)
            for key, *answer in zip(keys[new[i]], sums.tolist(), greedy.tolist(), strict=True):
                self.answers.put(key, answer)
            self.scored += 1
            if self.progress:
                self.progress("scoring", done, len(new))
        answered = [self.answers.number(keys[text][row]) for text in texts]
        return [answer for answer in answered if answer]

    def generated(
        self, requests: Sequence[tuple[list[int], Mapping[str, Any]]], row: int
    ) -> list[str]:
        """Replies to pairs (prompt, options of `stream_generate`), by the predictor in that row."""
        asked: dict[str, tuple[list[int], dict[str, Any]]] = {}
        keys = [self.keys("generate", prompt, dict(options)) for prompt, options in requests]
        for (prompt, options), those in zip(requests, keys, strict=True):
            # Keep requests with the same prompt together, so that it is read once.
            for one, key in zip(self.predictors.shown, those, strict=True):
                if self.answers.text(key) is None:
                    asked[key] = prompt, {**options, "mode": one.mode, **one.options}
        jobs = list(asked)

        def finished(i: int, responses: list[GenerationResponse]) -> None:
            self.answers.put(jobs[i], "".join(r.text for r in responses))

        if jobs:
            batch_generate(
                self.model,
                self.tokenizer,
                [prompt for prompt, _ in asked.values()],
                per_prompt=[options for _, options in asked.values()],
                max_sequences=self.batch,
                progress=partial(self.progress, "generating") if self.progress else None,
                finished=finished,
            )
        return [self.answers.text(those[row]) or "" for those in keys]


class PredictorLM(TemplateLM):
    """One predictor, with lm-eval's interface."""

    def __init__(self, shared: Shared, row: int):
        super().__init__()
        self.shared, self.row = shared, row

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text: in training, the next text's BOS."""
        return self.shared.bos

    @property
    def max_length(self) -> int:
        """The most tokens in a text."""
        return self.shared.longest

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's own cache of requests."""
        return "cognica-poe"

    def get_model_info(self) -> dict[str, Any]:
        """What a result file says about the model, besides its name."""
        model = self.shared.model
        dtype = dtype_name(model.resid_lambdas.dtype)
        predictor = self.shared.predictors.names[self.row]
        return {"predictor": predictor, "model_dtype": dtype, "max_length": self.max_length}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, after BOS unless told otherwise."""
        return self.shared.tokenizer.encode(
            string, add_special_tokens is not False, allow_special=self.shared.chat
        )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """See `LM`."""
        return self._loglikelihood_tokens(
            [(request.args, *self.encode_pair(*request.args)) for request in requests]
        )

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The token ids of both. Trailing spaces of the context move to the continuation, as in
        lm-eval. If the two would share a token, the continuation is encoded by itself, so that
        exactly the continuation is scored. RequestError if it is empty."""
        words = context.rstrip(" ")
        continuation = context[len(words) :] + continuation
        before, whole = self.tok_encode(words), self.tok_encode(words + continuation)
        after = whole[len(before) :]
        if whole[: len(before)] != before or not after:
            after = self.tok_encode(continuation, add_special_tokens=False)
        if not after:
            raise RequestError(f"after {context[-40:]!r}: the text to score is empty")
        return before, after

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self.shared.loglikelihoods(pairs, self.row)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """See `LM`. Windows are lm-eval's; each begins with BOS, without which the models fail."""
        bos, pairs, ends = self.shared.bos, [], []
        for request in requests:
            tokens = self.shared.tokenizer.encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, bos, self.max_length - 1, 1)
            for before, after in map(make_disjoint_window, windows):
                pairs.append((before if before[0] == bos else [bos, *before], after))
            ends.append(len(pairs))
        found = self.shared.loglikelihoods(pairs, self.row)
        starts = [0, *ends[:-1]]
        return [sum(t for t, _ in found[a:b]) for a, b in zip(starts, ends, strict=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM`."""
        asked, repeats = [], Counter[str]()
        for request in requests:
            context, given = request.args
            options = generation_options(given)
            if options.get("temp"):
                # Repeats differ, and later runs reproduce them, also among other tasks.
                same = key_of(context, options)
                options["seed"] = repeats[same]
                repeats[same] += 1
            room = self.max_length - options["max_tokens"]
            if room < 1:
                raise RequestError(
                    f"max_gen_toks {options['max_tokens']} leaves no room for a prompt in "
                    f"{self.max_length} tokens; raise --max-length"
                )
            asked.append((self.shared.fit(self.tok_encode(context), room), options))
        return self.shared.generated(asked, self.row)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the specialists' layout, with special tokens as text.

        Raises RequestError if a message contains such a text itself.
        """
        tokenizer = self.shared.tokenizer
        for message in chat_history:
            for name in tokenizer.special_tokens:
                if name in message["content"]:
                    raise RequestError(
                        f"a message contains {name!r}, which would be read as a special token"
                    )
        tokens = tokenizer.apply_chat_template(chat_history, add_generation_prompt)
        text = tokenizer.decode(tokens)
        # The model continues this reply, so do not close it.
        return text if add_generation_prompt else text.removesuffix(REPLY_END)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The layout of one turn, for result files."""
        return self.apply_chat_template([{"role": "user", "content": "{{ content }}"}])


def generation_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert lm-eval's options to `stream_generate`'s. RequestError for one that we lack."""
    rest = dict(given)
    until = rest.pop("until", None) or []
    most = [count for name in MOST if (count := rest.pop(name, None)) is not None]
    options: dict[str, Any] = {"max_tokens": int(most[0] if most else MAX_GEN_TOKS)}
    options["stop"] = [until] if isinstance(until, str) else list(until)
    if rest.get("num_beams") == 1:
        del rest["num_beams"]  # no beam search
    sampled = rest.pop("do_sample", None)
    for name, value in rest.items():
        if name not in SAMPLING:
            raise RequestError(f"a task sets {name} for generation, which is not supported here")
        options[SAMPLING[name]] = value
    if sampled is False:
        options.pop("temp", None)
    return options
