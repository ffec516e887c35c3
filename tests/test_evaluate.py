"""Evaluation: what every predictor says about a text, from one pass, against plain forwards."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, GOLDENS, fixture

from cognica_mlx.decoding import passes
from cognica_mlx.errors import RequestError
from cognica_mlx.network.model import PoEModel, log_op, log_softmax
from cognica_mlx.pricing.costs import bytes_read
from cognica_mlx.pricing.replaying import replay_wand
from mlx_poe import stream_generate
from mlx_poe.commands import evaluate as command
from mlx_poe.evaluation import scoring
from mlx_poe.evaluation.on_text import measure_text
from mlx_poe.evaluation.predictors import Predictors, chosen, full, stage
from mlx_poe.evaluation.scoring import Continuation, score

HELD_OUT = FIXTURES / "heldout.txt"


def plainly(model: PoEModel, tokens: list[int]) -> dict[str, np.ndarray]:
    """Log-probabilities (T, V) of every predictor by its name, from a plain forward."""
    *logits, full_model = model.predictions(mx.array([tokens]))
    found = {"full": full_model, **{f"stage {k}": z for k, z in enumerate(logits)}}
    for k in range(1, len(logits)):
        found[f"stages 0-{k}"] = log_op(logits[: k + 1], [1 / (k + 1)] * (k + 1))
    return {name: np.array(log_softmax(scores)[0]) for name, scores in found.items()}


def some(model: PoEModel, seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, count).tolist()


def calibrated(name: str) -> PoEModel:
    """A fixture model with bounds; random weights disagree so much that these are small."""
    model, known = copy.copy(fixture(name)[0]), fixture("poe-tiny")[0].calibration
    if model.calibration is None:
        assert known
        bounds = (3.0,) * (model.poe_n_stages - 1)
        model.calibration = dataclasses.replace(known, p99_bounds=bounds, options={})
    return model


@pytest.mark.parametrize("name", GOLDENS)
def test_scores_are_those_of_a_plain_forward(name, monkeypatch):
    model = fixture(name)[0]
    monkeypatch.setattr(scoring, "SCORE_BYTES", 4 * 320 * 8 * 3 * 11)  # chunks of about 11 rows
    beginnings = [some(model, 1, 170), some(model, 2, 1), some(model, 3, 7)]
    # Some share a beginning, and one is longer than the short windows, the chunks and the slack.
    ends = [(0, 1), (0, 5), (1, 140), (0, 40), (2, 3), (1, 2)]
    texts = [
        Continuation((*beginnings[b], *some(model, 10 + i, count)), len(beginnings[b]))
        for i, (b, count) in enumerate(ends)
    ]
    predictors = Predictors(model, chosen(model, ["all"]))
    done = dict(score(predictors, texts, batch=2))
    assert sorted(done) == list(range(len(texts)))
    for i, text in enumerate(texts):
        tokens, found = list(text.tokens), predictors.report(done[i])
        plain = {k: z[text.start - 1 : -1] for k, z in plainly(model, tokens).items()}
        came = np.arange(len(tokens) - text.start), tokens[text.start :]
        best = {name: logprobs.argmax(-1) for name, logprobs in plain.items()}
        for row, one in enumerate(predictors.names):
            assert np.abs(found.logprobs[row] - plain[one][came]).max() < 2e-4, one
            assert (found.best[row] == best[one]).all(), one
            assert (found.agrees[row] == (best[one] == best["full"])).all(), one
        top = np.sort(plain["full"])
        margins = done[i].margins[predictors.index["full"]]
        assert np.abs(margins - (top[:, -1] - top[:, -2])).max() < 1e-3


def test_a_common_beginning_runs_once(monkeypatch):
    model = fixture("flat-d8")[0]
    rows = []
    embed = passes.embed

    def counted(models, texts):
        rows.append(sum(text.tokens.shape[1] for text in texts))
        return embed(models, texts)

    monkeypatch.setattr(passes, "embed", counted)
    start = some(model, 1, 60)
    texts = [Continuation((*start, *some(model, i, 4)), 60) for i in range(5)]
    list(score(Predictors(model, [full(model)]), texts))
    # The last token of the beginning is what the first to be scored is predicted from.
    assert sum(rows) == 59 + 5 * 4


def test_what_goes_wrong_in_one_text_is_raised():
    model = fixture("flat-d8")[0]
    texts = [Continuation((1, 2, 3), 1), Continuation((1, model.config.vocab_size, 3), 2)]
    with pytest.raises(RequestError, match="outside the vocabulary"):
        list(score(Predictors(model, [full(model)]), texts))


def test_what_is_asked_for_and_the_full_model_are_computed():
    model = calibrated("gqa-logop-d8")
    predictors = Predictors(model, [stage(model, 1)])
    assert predictors.names == ["stage 1"]
    # Where a stage agrees with the full model has to be known.
    assert [one.name for one in predictors.computed] == ["stage 1", "full"]
    predictors = Predictors(model, [stage(model, 1)], [1.0, 2.0])
    assert predictors.names == ["stage 1", "wand 1", "wand 2"]
    assert list(predictors.index) == ["stage 1", "full", "stage 0", "stages 0-1", "stages 0-2"]


def test_all_names_every_predictor_once():
    def names(folder: str) -> list[str]:
        model = fixture(folder)[0]
        return [one.name for one in chosen(model, ["all"])]

    stages = ["stage 0", "stage 1", "stage 2", "stage 3"]
    assert names("flat-d8") == [*stages, "stages 0-1", "stages 0-2", "stages 0-3", "full"]
    # The Log-OP of all stages is this full model, a specialist's last stage that one.
    assert names("gqa-logop-d8") == [*stages, "stages 0-1", "stages 0-2", "full"]
    mixed = [f"stages 0-{k}" for k in range(1, 5)]
    assert names("stage-on-flat") == [*stages, *mixed, "full"]
    model = fixture("flat-d8")[0]
    some = [one.name for one in chosen(model, ["0-2", "full", "1", "full"])]
    assert some == ["stages 0-2", "full", "stage 1"]


@pytest.mark.parametrize("name", ["9", "0-9", "1-2", "0-0", "deep", "", "-1"])
def test_a_predictor_that_is_not_there_is_refused_by_name(name):
    with pytest.raises(RequestError, match=name.removeprefix("0-") or "''"):
        chosen(fixture("flat-d8")[0], [name])


@pytest.mark.parametrize("name", ["poe-tiny", "gqa-logop-d8", "stage-on-flat"])
def test_wand_leaves_where_decoding_does(name):
    model, tokenizer = calibrated(name), fixture("poe-tiny")[1]
    tokenizer = fixture(name)[1] if name == "poe-tiny" else tokenizer
    prompt = tokenizer.encode("Once upon a time") if name == "poe-tiny" else some(model, 3, 9)
    left = []
    for safety in (0.02, 0.4):
        predictors = Predictors(model, [], [safety])
        made = list(
            stream_generate(
                model, tokenizer, prompt, mode="wand", safety=safety, max_tokens=40, stop=[]
            )
        )
        tokens = [r.token for r in made]
        ((_, facts),) = score(predictors, [Continuation((*prompt, *tokens), len(prompt))])
        found = predictors.report(facts)
        assert found.best[0].tolist() == tokens
        assert (found.depths[0] - 1).tolist() == [r.stage for r in made]
        assert np.abs(found.logprobs[0] - [r.logprob for r in made]).max() < 1e-4
        left += [r.stage for r in made]
    assert len(set(left)) > 1


def test_worth_on_a_text_is_what_plain_forwards_say():
    model, tokenizer = fixture("poe-tiny")
    assert model.calibration
    text = tokenizer.encode(HELD_OUT.read_text())
    chat = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi, I am"}]
    turns = tokenizer.apply_chat_template(chat, add_generation_prompt=False)
    texts, sizes = [text[:120], turns, [text[0]]], tokenizer.token_byte_lengths(2048)
    predictors = Predictors(model, chosen(model, ["all"]), [0.5])
    measured = measure_text(predictors, texts, sizes)
    costs = bytes_read(model)
    assert measured.tokens == 119 + len(turns) - 1
    assert measured.bytes == sum(sizes[t] for t in (*text[1:120], *turns[1:]))
    assert 0 in [sizes[t] for t in turns[1:]]
    plains, best = [plainly(model, t) for t in texts[:2]], {}
    for one in measured.worths[:-1]:
        logprobs = [plain[one.name] for plain in plains]
        came = [np.array(t[1:]) for t in texts[:2]]
        nats = sum(
            -z[np.arange(len(c)), c][np.array([sizes[t] > 0 for t in c])].sum()
            for z, c in zip(logprobs, came, strict=True)
        )
        best[one.name] = np.concatenate([z[:-1].argmax(-1) for z in logprobs])
        assert one.bits_per_byte == pytest.approx(nats / math.log(2) / measured.bytes, rel=1e-4)
        assert one.accuracy == pytest.approx((best[one.name] == np.concatenate(came)).mean())
    for one in measured.worths[:-1]:
        assert one.agreement == pytest.approx((best[one.name] == best["full"]).mean())
    by_name = {one.name: one for one in measured.worths}
    assert by_name["full"].agreement == by_name["full"].weights_read == 1
    assert by_name["stage 1"].mean_depth == 2
    read = costs.lower(1) + costs.head(1)
    assert by_name["stage 1"].weights_read == pytest.approx(read / costs.full_token)
    wand = predictors.shown[-1]
    assert wand.tested
    facts = [f for _, f in score(predictors, [Continuation(tuple(t), 1) for t in texts[:2]])]
    needed = [wand.exits.get(k, math.inf) for k in range(3)]
    traces = [predictors.trace(wand, f) for f in facts]
    replayed = replay_wand(traces, costs, needed, [*wand.exits], False)
    assert by_name["wand 0.5"].agreement == replayed.agreeing / replayed.tokens
    share = replayed.cost / replayed.tokens / costs.full_token
    assert by_name["wand 0.5"].weights_read == pytest.approx(share)


def test_only_counted_tokens_count():
    model, tokenizer = fixture("poe-tiny")
    text = tokenizer.encode("The capital of France is Paris.")
    sizes = tokenizer.token_byte_lengths(2048)
    marks = [False] * (len(text) - 2) + [True, False]
    predictors = Predictors(model, [full(model), stage(model, 0)])
    measured = measure_text(predictors, [text], sizes, counted=[marks])
    logprob = plainly(model, text)["full"][len(text) - 3, text[-2]]
    assert measured.tokens == 1 and measured.bytes == sizes[text[-2]]
    bits = -logprob / math.log(2) / measured.bytes
    assert measured.worths[0].bits_per_byte == pytest.approx(bits, rel=1e-4)
    # Reading the others reads weights too, the same for each position.
    everything = measure_text(predictors, [text], sizes)
    shares = [one.weights_read for one in measured.worths]
    assert shares == [one.weights_read for one in everything.worths] and shares[0] == 1 > shares[1]
    with pytest.raises(RequestError, match="nothing to score"):
        measure_text(Predictors(model, [full(model)]), [text[:1]], sizes)


# The command, on a text


def run(capsys: pytest.CaptureFixture, *flags: Any) -> tuple[int, str, str]:
    status = command.main([*map(str, flags)])
    return status, *capsys.readouterr()


def test_the_command_prints_a_row_for_each_predictor(capsys, tmp_path):
    file = tmp_path / "result.json"
    flags = ("--data", HELD_OUT, "--num-tokens", 200, "--max-length", 64, "--json")
    status, out, err = run(capsys, *flags, file)
    assert status == 0 and not err
    result = json.loads(file.read_text())
    # The beginning of each segment is not scored: 4 of 64 tokens or fewer.
    assert result["tokens"] == 200 - 4
    shown = [one["name"] for one in result["worths"]]
    assert [line.split("│")[1].strip() for line in out.splitlines() if "│" in line] == shown
    assert shown[-3:] == ["wand 0.5", "wand 0.75", "wand 1"]
    assert f"{result['worths'][0]['bits_per_byte']:.6f}" in out
    status, out, err = run(capsys, *flags, "-")
    assert status == 0 and json.loads(out) == result


def test_replies_alone_are_scored_with_a_mask(capsys, tmp_path):
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi there."}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    flags = ("--model", "poe-tiny-chat", "--data", chats, "--stages", "full", "--json", "-")
    everything, masked = (
        json.loads(run(capsys, *flags, *more)[1]) for more in ((), ("--mask-prompt",))
    )
    assert masked["bytes"] == len("Hi there.") < everything["bytes"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), "--data"),
        (("--data", HELD_OUT, "--tasks", "x"), "--data"),
        (("--data", HELD_OUT, "--limit", 3), "--limit"),
        (("--tasks", "x", "--mask-prompt"), "--mask-prompt"),
        (("--tasks", "x", "--num-tokens", 3), "--num-tokens"),
        (("--tasks", "x", "--limit", 0), "--limit"),
        (("--tasks", "x", "--limit", "nan"), "--limit"),
        (("--tasks", "x", "--limit", "inf"), "--limit"),
        (("--tasks", "x", "--num-fewshot", -1), "--num-fewshot"),
        (("--tasks", "x", "--log-samples"), "--log-samples"),
        (("--tasks", "x", "--output", HELD_OUT), "heldout.txt"),
        (("--tasks", "x", "--output", "-"), "- is no folder's name"),
        (("--tasks", "x", "--include-path", HELD_OUT), "heldout.txt"),
        (("--data", HELD_OUT, "--batch-size", 0), "--batch-size"),
        (("--data", HELD_OUT, "--max-length", 1), "--max-length"),
        (("--data", HELD_OUT, "--stages", "7"), "stage 7"),
        (("--data", HELD_OUT, "--safety", "-1"), "safety"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
        (("--data", HELD_OUT, "--json", FIXTURES), "fixtures"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(capsys, flags, named):
    status, out, err = run(capsys, *flags)
    assert status in (1, 2) and not out
    assert named in err and len(err.splitlines()) == 1


def test_a_model_without_bounds_is_evaluated_without_wand(capsys, monkeypatch):
    model, tokenizer = fixture("flat-d8")
    monkeypatch.setattr(model, "calibration", None)
    monkeypatch.setattr(command, "load", lambda *_, **__: (model, tokenizer))
    status, out, err = run(capsys, "--data", HELD_OUT, "--num-tokens", 40)
    assert status == 0 and "wand" not in out and "mlx_poe.calibrate" in err
    status, out, err = run(capsys, "--data", HELD_OUT, "--num-tokens", 40, "--safety", "1")
    assert status == 2 and "mlx_poe.calibrate" in err
