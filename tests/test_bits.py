"""Equal to the last bit: with the BLAS in MLX's wheel, what a row gives does not depend on the rows
beside it. With OpenBLAS it does, so these tests run in a process of their own without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import FIXTURES, GOLDENS, fixture, goldens

from cognica_mlx.backend import blas
from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.choosing import logprob_of
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.requests import DecodedToken
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import decode

WITHOUT = {**os.environ, blas.VARIABLE: "0"}
TINY = json.loads((FIXTURES / "poe-tiny-goldens.json").read_text())["base"]
MODES = {
    "full": {},
    "stage": {"stage": 0},
    "wand": {},
    "speculative": {"num_draft_tokens": 4},
}
by_rows = pytest.mark.skipif(blas.is_openblas(), reason="OpenBLAS: bits depend on the rows")


@pytest.mark.skipif(not blas.is_openblas(), reason="compares bits in this process")
def test_bits_agree_with_the_blas_in_the_wheel():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "bits", __file__]
    done = subprocess.run(
        command, capture_output=True, text=True, env=WITHOUT, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
    assert "failed" not in done.stdout and "skipped" not in done.stdout, done.stdout


def decoded(name: str, mode: str, start: int) -> tuple[DecodingSequence, list[DecodedToken]]:
    """A sequence, and its tokens when it decodes alone."""
    model = fixture(name)[0]
    prompt = goldens("flat-d8")["long.tokens"][0, start : start + 24].tolist()
    if name == "poe-tiny":
        prompt = TINY[start]["prompt"]
    made = make_mode(model, mode, ModeOptions(**MODES[mode]), model.calibration)
    found = list(decode(model, prompt, made, max_tokens=16))
    return DecodingSequence(model, prompt, made, max_tokens=16), found


@pytest.mark.bits
@by_rows
@pytest.mark.parametrize("name", GOLDENS)
def test_a_text_in_pieces_gives_the_bits_of_one_forward(name):
    model, tokens = fixture(name)[0], goldens(name)["short.tokens"][:, :24]
    prompt = tokens[0].tolist()
    found = list(decode(model, prompt, make_mode(model), max_tokens=8, prefill_step_size=5))
    text = prompt + [one.token for one in found]
    scores = model.full_scores(
        {k: hidden[23:] for k, hidden in enumerate(model.boundaries(mx.array([text[:-1]])))}
    )
    expected = logprob_of(scores[0], mx.array(text[24:])).tolist()
    assert [one.logprob for one in found] == expected


@pytest.mark.bits
@by_rows
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_gives_the_bits_of_one_forward(mode):
    model = fixture("poe-tiny")[0]
    sequence, found = decoded("poe-tiny", mode, 0)
    text = sequence.text + [one.token for one in found]
    last = model.poe_n_stages - 1
    predictions = model.predictions(mx.array([text[:-1]]))
    assert len({one.stage for one in found}) > (mode == "wand")
    for i, one in enumerate(found):
        # An accepted draft carries the full model's log-probability.
        which = -1 if one.from_draft or one.stage == last else one.stage
        scores = predictions[which][0, len(sequence.text) + i - 1]
        assert one.logprob == logprob_of(scores[None], mx.array([one.token])).item()


@pytest.mark.bits
@by_rows
@pytest.mark.parametrize("name", ["poe-tiny", "gqa-logop-d8"])
def test_a_batch_gives_the_bits_of_each_sequence_alone(name):
    modes = [mode for mode in MODES if mode != "wand" or fixture(name)[0].calibration]
    pairs = [decoded(name, mode, i) for i, mode in enumerate(modes)]
    batch, together = Batch(prompt_rows=16), {i: [] for i in range(len(pairs))}
    for i, (sequence, _) in enumerate(pairs):
        batch.add(i, sequence.steps())
    while len(batch):
        for event in batch.run():
            assert event.error is None
            together[event.name] += [event.token] if event.token else []
    for i, (_, found) in enumerate(pairs):
        assert [(t.token, t.logprob) for t in together[i]] == [(t.token, t.logprob) for t in found]
