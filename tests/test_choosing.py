"""Choosing from rows of scores: each rule from scratch, and rows together as each alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from cognica_mlx.decoding.choosing import (
    DRAFT,
    MARGIN,
    TOKEN,
    VERDICT,
    Choice,
    choose,
    choose_from,
)
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.network.model import log_softmax

SIZE = 300
ALL = {
    "temp": 0.7,
    "top_p": 0.8,
    "top_k": 40,
    "min_p": 0.02,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
    "logit_bias": {3: 1.0, 7: -2.0},
    "top_logprobs": 4,
}
HIGHEST = 1 - 2**-24


def scores(rows: int, seed: int = 0, scale: float = 3.0) -> mx.array:
    return mx.random.normal((rows, SIZE), key=mx.random.key(seed)) * scale


def choice(sampler: Sampler, goal: str, position: int, rows: int = 1, masked: bool = False):
    """One with all operands that the options need."""
    context = sampler.context([5, 9, 5, position], 1, SIZE, 50)
    drafts = None
    if goal == VERDICT:
        drafts = {"drafted": mx.array([[11 * i] for i in range(rows - 1)] + [[-1]])}
        if not sampler.greedy:
            q = mx.softmax(scores(rows, position + 1), axis=-1)
            drafts["q"] = q * (drafts["drafted"] >= 0)
    masks = mx.full((rows, SIZE // 32 + 1), 0xFFFFFF0F, mx.uint32) if masked else None
    context = {name: mx.repeat(array, rows, axis=0) for name, array in context.items()}
    return sampler.choice(goal, position, context, masks, drafts, rows)


def distribution(rows: mx.array, **options: Any) -> mx.array:
    choices = [Sampler(SamplingOptions(**options)).choice(DRAFT, i, {}) for i in range(len(rows))]
    return choose_from(rows, choices)["q"]


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.05},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_k": 7},
        {"top_k": SIZE},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_p": 0.7, "top_k": 30},
        {"top_p": 0.9, "top_k": 5, "min_p": 0.2},
    ],
    ids=str,
)
def test_the_filters_keep_what_mlx_lms_keep(options, scale):
    rows = scores(6, scale=scale)
    logprobs = log_softmax(rows)
    if "top_p" in options:
        logprobs = apply_top_p(logprobs, options["top_p"])
    if "min_p" in options:
        logprobs = apply_min_p(logprobs, options["min_p"])
    if options.get("top_k", SIZE) < SIZE:
        logprobs = apply_top_k(logprobs, options["top_k"])
    expected = np.array(mx.softmax(logprobs / 0.8, axis=-1))
    found = np.array(distribution(rows, temp=0.8, **options))
    assert ((found > 0) == (expected > 0)).all()
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_tokens_that_tie_at_a_filters_edge_are_all_kept():
    rows = mx.array([[4.0, 1.0, 3.0, 3.0, 3.0, 0.0]])
    for options in ({"top_k": 2}, {"top_p": 0.5}):
        kept = distribution(rows, temp=1, **options) > 0
        assert kept.tolist() == [[True, False, True, True, True, False]]


@pytest.mark.parametrize("temp", [1e-6, 1e6])
def test_the_most_extreme_temperatures_are_argmax_and_uniform(temp):
    rows = mx.concatenate([scores(2), mx.array([[-200.0, 0.0] * (SIZE // 2)])])
    found = np.array(distribution(rows, temp=temp))
    if temp < 1:
        best = np.array(rows) == np.array(rows).max(-1, keepdims=True)
        np.testing.assert_allclose(found, best / best.sum(-1, keepdims=True))
    else:
        np.testing.assert_allclose(found, 1 / SIZE, rtol=1e-3)


@pytest.mark.parametrize("goal", [TOKEN, MARGIN, DRAFT, VERDICT])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {**ALL, "temp": 0.0}, {"temp": 1.0}, ALL], ids=len)
def test_rows_together_are_what_each_is_alone_and_in_a_replayed_graph(
    goal, options, masked, tmp_path
):
    """Also where the numbers of the options differ."""
    rows = [1, 1, 1, 1] if goal != VERDICT else [1, 3, 2, 4]
    choices = []
    for i, count in enumerate(rows):
        own = dict(options)
        for name in {"temp", "top_p", "repetition_penalty", "presence_penalty"} & {*own}:
            own[name] *= 1 + i / 16
        sampler = Sampler(SamplingOptions(seed=i, **own))
        choices.append(choice(sampler, goal, 20 + i, count, masked))
    assert len({one.how for one in choices}) == 1
    parts = [scores(count, i) for i, count in enumerate(rows)]
    alone = [choose_from(*pair) for pair in zip(parts, ([one] for one in choices), strict=True)]
    together = choose_from(mx.concatenate(parts), choices)
    for name, array in together.items():
        assert mx.array_equal(array, mx.concatenate([one[name] for one in alone])), name
    how, given = choices[-1].how, dict(choices[-1].operands)
    if how.numbers:
        given["numbers"] = mx.array(choices[-1].numbers)
    path = str(tmp_path / "choose.mlxfn")
    mx.export_function(path, lambda s, **g: [*choose(how, s, **g).values()], parts[-1], **given)
    replayed = mx.import_function(path)(parts[-1], **given)
    for array, expected in zip(replayed, alone[-1].values(), strict=True):
        assert mx.array_equal(array, expected)


def drawn(row: mx.array, numbers: list[float], **options: Any) -> list[int]:
    """The tokens that random numbers draw from one row."""
    made = Sampler(SamplingOptions(**options)).choice(TOKEN, 0, {})
    fixed = made.numbers[0][:-1]
    many = Choice(made.how, {}, [(*fixed, number) for number in numbers])
    rows = mx.broadcast_to(row, (len(numbers), row.shape[-1]))
    return choose_from(rows, [many])["token"][:, 0].tolist()


def test_evenly_spaced_numbers_draw_each_token_as_often_as_it_is_probable():
    row, count = scores(1, scale=1.0), 4000
    tokens = drawn(row, [i / count for i in range(count)], temp=0.9, top_p=0.8)
    expected = np.array(distribution(row, temp=0.9, top_p=0.8))[0] * count
    assert np.abs(np.bincount(tokens, minlength=SIZE) - expected).max() < 1.5


def test_no_number_draws_a_token_of_no_probability():
    row = mx.full((1, 12), -mx.inf)
    row[0, 3], row[0, 8] = 1.0, 0.0
    assert drawn(row, [0.0, HIGHEST], temp=1.0) == [3, 8]
    assert drawn(row, [0.0, HIGHEST], temp=1.0, top_k=5) == [3, 8]
    assert drawn(row, [0.0, HIGHEST], temp=1e-6) == [3, 3]


def test_sums_that_are_not_flat_over_tokens_of_no_probability_draw_none(monkeypatch):
    """As where a GPU adds up parts in another order; here by more."""
    row, flat = mx.array([[-mx.inf, 0.0, -mx.inf, -mx.inf, 0.0, -mx.inf]]), mx.cumsum
    noise = mx.array([[0.1, 0.0, 0.1, 0.2, 0.0, 0.1]])
    monkeypatch.setattr(mx, "cumsum", lambda *args, **options: flat(*args, **options) + noise)
    tokens = drawn(row, [0.0, 0.02, 0.52, 0.55, HIGHEST], temp=1.0)
    assert tokens == [1, 1, 4, 4, 4]


def test_drafts_are_judged_by_the_rule_of_speculative_sampling():
    count, options = 64, {"temp": 0.8, "top_k": 5}
    p_rows, q_rows = scores(count, 1), scores(count, 1) + scores(count, 2, 0.5)
    p_rows[-1, -1] = 8.0  # the place of the last row's -1
    q = distribution(q_rows, **options)
    drafts = [int(np.argsort(row)[-1 - i % 5]) for i, row in enumerate(np.array(q))]
    drafted = mx.array([[token] for token in drafts[:-1]] + [[-1]])
    q = q * (drafted >= 0)
    sampler = Sampler(SamplingOptions(seed=3, **options))
    made = sampler.choice(VERDICT, 10, {}, None, {"drafted": drafted, "q": q}, count)
    verdict = choose_from(p_rows, [made])
    tokens, accepted = verdict["token"].tolist(), verdict["accepted"].tolist()
    seen = set()
    for row, p in enumerate(np.array(distribution(p_rows, **options), np.float64)):
        own, x = np.array(q[row], np.float64), drafts[row]
        keep = row < count - 1 and sampler.number(10 + row, 2) * own[x] < p[x]
        rest = np.maximum(p - own, 0).cumsum()
        other = int((rest > sampler.number(10 + row, 0) * rest[-1]).argmax())
        assert (accepted[row], tokens[row]) == ([keep], [x if keep else other])
        seen.add((keep, row < count - 1))
    assert seen == {(True, True), (False, True), (False, False)}


def test_random_numbers_depend_on_seed_position_and_purpose_only():
    def numbers(seed: int | None) -> list[float]:
        sampler = Sampler(SamplingOptions(temp=1.0, seed=seed))
        return [sampler.number(position, purpose) for position in range(400) for purpose in (0, 1)]

    assert numbers(5) == numbers(5)
    assert len({n for seed in (5, 6, None, None, 2**64 - 1) for n in numbers(seed)}) > 3990
    assert all(0 <= number < 1 for number in numbers(5))
    assert abs(np.mean(numbers(5)) - 0.5) < 0.04


def test_a_penalty_over_a_long_stretch_is_no_wider_than_the_text():
    sampler = Sampler(SamplingOptions(repetition_penalty=1.2, repetition_context_size=10**9))
    recent = sampler.context([4, 5, 6], 1, SIZE, 100)["recent"]
    assert recent.tolist() == [[4] * 125 + [4, 5, 6]]
