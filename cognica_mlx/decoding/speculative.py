"""Self-speculation: the first stages draft, the full model verifies the drafts in one batch.

The drafter is the model's own prefix, so its keys, values and activations are the real ones: a
round runs the drafted positions through the draft stages once, through the others once, and rolls
back what was refused. Greedy output is the full model's. With a temperature a draft x is kept
with probability min(1, p(x) / q(x)) and a refused one replaced by a draw from max(p - q, 0)
(Leviathan et al. 2023, Chen et al. 2023), so the output has the full model's distribution; p and
q pass through the same penalties and filters.

The host waits once a round, or once a draft where drafting stops by confidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from cognica_mlx.decoding.loop import DecodedToken, advance_through, as_row, number
from cognica_mlx.decoding.pace import Pace
from cognica_mlx.decoding.plain import Plain
from cognica_mlx.decoding.targets import draft_target, full_target
from cognica_mlx.errors import RequestError
from cognica_mlx.model import PoEModel
from cognica_mlx.sampling import Sampler, logprob_of, margin
from cognica_mlx.state import DecodingState


@dataclass
class Draft:
    """Drafted tokens, unevaluated: each list holds one entry a token.

    tokens (1, 1) int; log_probs (1, V), what each was drawn from, empty when greedy; logprobs (1,)
    of the tokens; margins (1,) by which the draft's best score led. `first` is the position of the
    token before them, `context` what the repetition penalty looked back on at that position;
    `stopped` says that the next draft was too weak to be one.
    """

    first: int
    context: mx.array | None
    tokens: list[mx.array] = field(default_factory=list)
    log_probs: list[mx.array] = field(default_factory=list)
    logprobs: list[mx.array] = field(default_factory=list)
    margins: list[mx.array] = field(default_factory=list)
    stopped: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def joined(self) -> mx.array:
        """The drafted tokens, (n,) int32."""
        empty = mx.zeros((0,), mx.int32)
        return mx.concatenate([t.reshape(-1) for t in self.tokens]) if self.tokens else empty


class Speculative:
    """Draft with the stages up to `draft_stage`, verify with all of them.

    `num_draft_tokens` is the most that a round drafts; with `draft_margin` drafting stops where
    the draft's two best scores are closer than that, and that draft is not used. `draft_head`
    says what drafts for a specialist, `draft_vocab` and `draft_rank` how much of the head is read:
    see `draft_target`. `pace` shortens drafts, and ends them where they do not pay.
    """

    def __init__(
        self,
        model: PoEModel,
        sampler: Sampler,
        draft_stage: int = 0,
        num_draft_tokens: int = 3,
        draft_margin: float | None = None,
        draft_head: str = "summed",
        draft_vocab: int | None = None,
        draft_rank: int | None = None,
        pace: Pace | None = None,
    ):
        model.check_stage(draft_stage, "draft_stage")
        if not 1 <= num_draft_tokens <= 64:
            raise RequestError(f"num_draft_tokens {num_draft_tokens} is not between 1 and 64")
        if draft_margin is not None and not draft_margin >= 0:
            raise RequestError(f"draft_margin {draft_margin} is below 0")
        self.sampler = sampler
        self.draft_stage, self.num_draft_tokens = draft_stage, num_draft_tokens
        self.draft_margin = draft_margin
        self.drafted = 0
        self.depth = self.prefill_stage = model.poe_n_stages - 1
        self.target = full_target(model)
        self.drafter = draft_target(model, draft_stage, draft_head, draft_vocab, draft_rank)
        self.pace = pace
        if pace:
            summed = draft_head == "summed" and bool(model.config.specialist_layers)
            share = 1.0
            if draft_vocab:
                share = draft_vocab / model.config.vocab_size
            elif draft_rank:
                share = draft_rank / model.config.n_embd
            self._lower = pace.costs.lower(draft_stage)
            head = pace.costs.draft_head(draft_stage, summed, share, draft_rank)
            self._draft_step = self._lower + head

    def run(self, state: DecodingState, token: int, budget: int) -> Iterator[DecodedToken]:
        """Emit at least `budget` tokens, a round at a time."""
        tokens = [*state.tokens, token]
        emitted = 0
        while emitted < budget:
            if not self.pays():
                yield from self.plainly(state, tokens[-1], budget - emitted)
                return
            count = min(self.draft_length(), budget - emitted - 1)
            draft = self.draft(state, tokens, count, self.draft_margin)
            for decoded in self.emitted(self.verify(state, tokens[-1], draft)):
                yield decoded
                tokens.append(decoded.token)
                emitted += 1

    def pays(self) -> bool:
        """Whether it is worth while to go on drafting."""
        if self.pace is None or self.pace.tokens:
            return self.pace is None or self.pace.pays()
        return self.pace.can_draft(self.num_draft_tokens, self.draft_stage, self._draft_step)

    def draft_length(self) -> int:
        """How many drafts the next round makes at most."""
        if self.pace is None or self.draft_margin is not None:
            return self.num_draft_tokens
        return self.pace.draft_length(self.num_draft_tokens, self.draft_stage, self._draft_step)

    def plainly(self, state: DecodingState, token: int, budget: int) -> Iterator[DecodedToken]:
        """Emit `budget` tokens without drafting."""
        return Plain(self.target, self.sampler).run(state, token, budget)

    def emitted(self, decoded: list[DecodedToken]) -> list[DecodedToken]:
        """The same tokens, counted."""
        if self.pace:
            self.pace.tokens += len(decoded)
        return decoded

    def draft(
        self, state: DecodingState, tokens: list[int], count: int, stop_below: float | None = None
    ) -> Draft:
        """Draft up to `count` tokens after `tokens`, the last of which the state does not hold.

        Appends it and the drafts but the last, and runs them through the draft stages. Nothing is
        waited for, unless `stop_below` asks for each margin.
        """
        if count > state.slack:
            raise RequestError(
                f"num_draft_tokens {count} is more than the {state.slack} positions that this "
                "state can roll back"
            )
        draft = Draft(state.length, self.sampler.context(tokens))
        context, token = draft.context, as_row(tokens[-1])
        for _ in range(count):
            state.append(token)
            scores = self.drafter.scores(advance_through(state, self.draft_stage))[:, -1]
            scores = self.sampler.process(scores, context)
            lead = margin(scores)
            if self.pace:
                self.pace.spent += self._draft_step
            if stop_below is not None and number(lead) < stop_below:
                draft.stopped = True
                break
            if self.sampler.greedy:
                chosen = mx.argmax(scores, axis=-1)
            else:
                draft.log_probs.append(self.sampler.log_probs(scores))
                chosen = self.sampler.draw(draft.log_probs[-1])
            token = as_row(chosen)
            draft.tokens.append(token)
            draft.logprobs.append(logprob_of(scores, chosen))
            draft.margins.append(lead)
            context = self.sampler.extend(context, token)
        return draft

    def verify(
        self,
        state: DecodingState,
        token: int,
        draft: Draft,
        certified: list[bool] | None = None,
    ) -> list[DecodedToken]:
        """Verify a draft made after `token` and roll back what is refused.

        Returns the kept drafts and one token of the full model's own. Drafts that are `certified`
        are kept whatever the full model says.
        """
        end = draft.first + len(draft) + 1
        if state.length < end:
            # What the full model predicts after the last draft comes with the same batch.
            state.append(draft.tokens[-1] if len(draft) else as_row(token))
            if self.pace:
                self.pace.spent += self._lower
        if self.pace:
            waiting = end - state.filled[-1]
            self.pace.spent += self.pace.costs.upper(self.draft_stage, waiting)
        for stage in range(self.depth + 1):
            state.advance(stage)
        hidden = {k: state.boundary(k, draft.first, end) for k in self.target.boundaries}
        drafted = draft.joined()
        scores = self.sampler.process(
            self.target.scores(hidden)[0], self.sampler.extend(draft.context, drafted)
        )
        agree, chosen = self._judge(scores, drafted, draft)
        if certified is not None:
            agree = agree | mx.array(certified, dtype=mx.bool_)
        kept = mx.cumprod(agree.astype(mx.int32)).sum() if len(draft) else mx.array(0)
        chosen_logprobs = logprob_of(scores, chosen)
        drafted_logprobs = logprob_of(scores, mx.concatenate([drafted, chosen[-1:]]))
        mx.eval(kept, chosen, chosen_logprobs, drafted, drafted_logprobs)
        accepted = int(number(kept))
        self.drafted += len(draft)
        if self.pace:
            self.pace.judged(accepted, len(draft))
        state.rollback(draft.first + 1 + accepted)
        decoded = [
            DecodedToken.read(drafted[i], drafted_logprobs[i], self.draft_stage, from_draft=True)
            for i in range(accepted)
        ]
        own = DecodedToken.read(chosen[accepted], chosen_logprobs[accepted], self.depth)
        return [*decoded, own]

    def _judge(
        self, scores: mx.array, drafted: mx.array, draft: Draft
    ) -> tuple[mx.array, mx.array]:
        """Which drafts (n,) the full model's scores (n + 1, V) keep, and for every row the token
        (n + 1,) that follows if it is the first refused (or, in the last row, if none is)."""
        if self.sampler.greedy:
            best = mx.argmax(scores, axis=-1)
            return best[:-1] == drafted, best
        p = self.sampler.log_probs(scores)
        if not len(draft):
            return mx.zeros((0,), mx.bool_), self.sampler.draw(p)
        q = mx.concatenate(draft.log_probs)
        picked = drafted[:, None]
        ratio = mx.take_along_axis(p[:-1], picked, axis=-1) - mx.take_along_axis(q, picked, axis=-1)
        agree = mx.log(self.sampler.uniform(len(draft))) < ratio[:, 0]
        residual = mx.log(mx.maximum(mx.exp(p[:-1]) - mx.exp(q), 0))
        return agree, self.sampler.draw(mx.concatenate([residual, p[-1:]]))
