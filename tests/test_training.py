"""The pieces of training: gradients, optimizer, batches, stores, and where a stage starts."""

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, assert_bits_equal, fixture
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_mlx.cache.hidden import Hidden
from cognica_mlx.config import PoEConfig
from cognica_mlx.decoding.choosing import logprob_of
from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.network.model import PoEModel
from cognica_mlx.training.batches import Batches, Text, bucket
from cognica_mlx.training.loss import cross_entropy
from cognica_mlx.training.optimizer import MuonAdamW, rate
from cognica_mlx.training.stage import NewStage, Parameters, stacked, stacked_config
from cognica_mlx.training.store import (
    LiveBase,
    StoredActivations,
    decode,
    encode,
    store_bytes,
    write_store,
)
from cognica_mlx.training.trainer import Trainer

TINY = PoEConfig(
    n_layer=3,
    n_head=4,
    n_kv_head=2,
    n_embd=32,
    vocab_size=70,
    sequence_len=16,
    window_pattern="SL",
    stage_layers=(2, 1),
)


def random_parameters(like: Parameters, seed: int = 0, scale: float = 0.15) -> Parameters:
    """As a stage's in shape, but none of them zero."""
    random = np.random.default_rng(seed)
    found = {}
    for name, array in like.items():
        start = 1.0 if name == "resid_lambdas" else 0.0
        found[name] = mx.array(start + scale * random.standard_normal(array.shape), mx.float32)
    return found


def tiny_stage(layers: int = 2, seed: int = 0, **options: object) -> tuple[NewStage, PoEModel]:
    """A new stage over a random base of three layers, and the model that it is the last of."""
    mx.random.seed(seed)
    base = PoEModel(TINY)
    base.backout_lambda = mx.array([0.3])
    base.smear_lambda = mx.array([0.4])
    mx.eval(base.parameters())
    config = stacked_config(TINY, layers)
    model = stacked(base, config, [], mx.zeros((0, TINY.n_embd)))
    return NewStage(model, mx.float32, **options), model  # type: ignore[arg-type]


def some_texts(count: int = 9, seed: int = 0, most: int = 40) -> list[Text]:
    random = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        length = int(random.integers(3, most))
        counted = random.random(length) < 0.5
        counted[0], counted[-1] = False, True
        tokens = random.integers(0, TINY.vocab_size, length)
        texts.append(Text(tokens.astype(np.int32), counted, int(counted.sum())))
    return texts


def inputs(batch, hidden):
    return hidden, mx.array(batch.rows), mx.array(batch.targets), mx.array(batch.weights)


# --- the loss and its gradient ------------------------------------------------------------------


def test_the_cross_entropy_is_the_usual_one_and_so_is_its_gradient():
    logits = 6 * mx.random.normal((40, 90), key=mx.random.key(1))
    targets = mx.random.randint(0, 90, (40,), key=mx.random.key(2))
    weights = mx.random.uniform(shape=(40,), key=mx.random.key(3))

    def plain(logits):
        return -(logprob_of(logits, targets) * weights).sum()

    ours = mx.value_and_grad(lambda z: cross_entropy(z, targets, weights))(logits)
    theirs = mx.value_and_grad(plain)(logits)
    for mine, other in zip(ours, theirs, strict=True):
        assert mx.allclose(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_mode", ["dual", "specialist"])
def test_gradients_are_those_of_finite_differences(head_mode):
    stage, model = tiny_stage()
    if head_mode != "dual":
        model.config = replace(model.config, head_mode=head_mode)
        stage = NewStage(model, mx.float32)
    batch = Batches(some_texts(3), 3, seed=0)[0]
    arguments = inputs(batch, LiveBase(model).read(batch))
    parameters = random_parameters(stage.start(model._base, seed=1))
    _, gradients = stage.loss_and_gradient(parameters, *arguments)
    for i, name in enumerate(parameters):
        direction = mx.random.normal(parameters[name].shape, key=mx.random.key(i))
        direction = direction / mx.linalg.norm(direction)
        step = 2e-2
        both = [
            float(stage.loss(parameters | {name: parameters[name] + s * direction}, *arguments))
            for s in (step, -step)
        ]
        measured = (both[0] - both[1]) / (2 * step)
        expected = float((gradients[name] * direction).sum())
        size = float(mx.linalg.norm(gradients[name]))
        assert abs(measured - expected) < 0.01 * size + 2e-3, name


def test_gradients_are_pytorchs():
    """Recorded by `record_gradients.py`, with PyTorch's own attention, rotation and norms."""
    recorded = mx.load(str(FIXTURES / "training" / "gradients.safetensors"))
    stage, _ = tiny_stage()
    parameters = {k[6:]: v for k, v in recorded.items() if k.startswith("value.")}
    stage._model.lm_head.weight = recorded["lm_head"]
    stage._frozen_head = recorded["lm_head"]
    stage._model.backout_lambda = recorded["backout_lambda"]
    hidden = Hidden(*(recorded[name] for name in ("tokens", "x", "x0", "backout")))
    arguments = (hidden, recorded["rows"], recorded["targets"], recorded["weights"])
    loss, gradients = stage.loss_and_gradient(parameters, *arguments)
    assert abs(float(loss) - recorded["loss"].item()) < 1e-4 * recorded["loss"].item()
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        answer = recorded[f"gradient.{name}"]
        error = float(mx.linalg.norm(gradient - answer) / mx.linalg.norm(answer))
        assert error < 1e-4, name


def test_computing_activations_twice_changes_no_gradient():
    plain, model = tiny_stage()
    again = NewStage(model, mx.float32, grad_checkpoint=True)
    parameters = random_parameters(plain.start(model._base, seed=0))
    batch = Batches(some_texts(3), 3, seed=0)[0]
    arguments = inputs(batch, LiveBase(model).read(batch))
    one, other = (s.loss_and_gradient(parameters, *arguments)[1] for s in (plain, again))
    assert all(mx.allclose(one[k], other[k], rtol=1e-5, atol=1e-6) for k in one)


def test_a_batch_is_its_texts_one_by_one():
    stage, model = tiny_stage()
    parameters = random_parameters(stage.start(model._base, seed=0))
    texts = some_texts(5)
    live = LiveBase(model)

    def loss(batch):
        return float(stage.loss(parameters, *inputs(batch, live.read(batch))))

    together = loss(Batches(texts, 8, seed=0)[0])
    alone = [loss(Batches([text], 1, seed=0)[0]) for text in texts]
    assert together == pytest.approx(sum(alone), rel=1e-5)
    # And as the model itself predicts.
    model.update(
        {"resid_lambdas": mx.concatenate([model.resid_lambdas[:3], parameters["resid_lambdas"]])}
    )
    model.update({"x0_lambdas": mx.concatenate([model.x0_lambdas[:3], parameters["x0_lambdas"]])})
    model.load_weights([(k, v) for k, v in parameters.items() if "lambdas" not in k], strict=False)
    for text, expected in zip(texts, alone, strict=True):
        tokens = mx.array(text.tokens)
        logprobs = logprob_of(model(tokens[None])[0, :-1], tokens[1:])
        assert -float(logprobs[mx.array(np.flatnonzero(text.counted[1:]))].sum()) == pytest.approx(
            expected, rel=1e-4
        )


# --- where it starts ----------------------------------------------------------------------------


def stage_over(name: str, layers: int = 2, head_mode: str | None = None):
    base, _ = fixture(name)
    config = stacked_config(base.config, layers, head_mode)
    model = stacked(base, config, [], mx.zeros((0, base.config.n_embd)))
    stage = NewStage(model, mx.float32)
    return base, model, stage, stage.start(base, seed=0)


@pytest.mark.parametrize(
    ("name", "head_mode", "length"),
    [("flat-d8", "dual", 600), ("flat-d8", "base", 600), ("flat-d8", "specialist", 600),
     ("poe-tiny", "dual", 600), ("stage-on-flat", None, 120), ("stage-on-flat", "base", 120),
     ("chain-on-stage", "dual", 120)],
)  # fmt: skip
def test_before_the_first_step_it_predicts_as_its_base_to_the_last_bit(name, head_mode, length):
    """Of a chain within the short window: the last layer of a model sees far, and the stage below
    is no longer the last."""
    base, model, stage, parameters = stage_over(name, 2, head_mode)
    tokens = mx.random.randint(0, 300, (1, length), key=mx.random.key(0))
    hidden = LiveBase(model).read(Batches([_text(tokens)], 1, seed=0)[0])
    rows = mx.arange(length - 1)
    ours, theirs = stage.logits(parameters, hidden, rows), base(tokens[:, :-1])[0]
    assert_bits_equal(ours, theirs)


def _text(tokens: mx.array) -> Text:
    ids = np.array(tokens[0]).astype(np.int32)
    return Text(ids, np.ones(len(ids), bool), 1)


def test_a_head_that_is_to_speak_alone_starts_as_the_sum_of_those_below():
    base, model, stage, parameters = stage_over("stage-on-flat", 1, "specialist")
    tokens = mx.random.randint(0, 300, (1, 60), key=mx.random.key(0))
    hidden = LiveBase(model).read(Batches([_text(tokens)], 1, seed=0)[0])
    ours = stage.logits(parameters, hidden, mx.arange(59))
    assert mx.abs(ours - base(tokens[:, :59])[0]).max().item() < 1e-4


def test_on_a_pooling_base_it_starts_from_the_shared_head():
    """A base with a head a stage pools its stages; a stage on it adds to the shared head."""
    base, model, stage, parameters = stage_over("gqa-logop-d8", 2)
    tokens = mx.random.randint(0, 300, (1, 60), key=mx.random.key(0))
    hidden = LiveBase(model).read(Batches([_text(tokens)], 1, seed=0)[0])
    ours = stage.logits(parameters, hidden, mx.arange(59))
    last = base.boundaries(tokens[:, :59])[-1]
    assert_bits_equal(ours, base.final_logits(last, [base.lm_head])[0])


def test_what_a_stage_cannot_stand_on_is_refused():
    merged = replace(fixture("stage-on-flat")[0].config, head_mode="summed")
    with pytest.raises(RequestError, match="merged specialist"):
        stacked_config(merged, 2)
    alone = replace(fixture("stage-on-flat")[0].config, head_mode="specialist")
    with pytest.raises(RequestError, match="use head_mode specialist"):
        stacked_config(alone, 2, "dual")
    assert stacked_config(alone, 2).head_mode == "specialist"


def test_a_head_that_nothing_reads_is_not_trained():
    _, _, stage, parameters = stage_over("flat-d8", 1, "base")
    optimizer = MuonAdamW("muon", 1.0, 64, stage.untrained)
    state = optimizer.start(parameters)
    gradients = {k: mx.ones_like(v) for k, v in parameters.items()}
    moved, _, _ = optimizer.update(parameters, gradients, state, 0.1)
    same = {k for k in parameters if mx.array_equal(moved[k], parameters[k])}
    assert same == {"lm_head_specialists.0.weight"}


# --- the optimiser ------------------------------------------------------------------------------


def test_rates_rise_and_fall_and_never_stop():
    for steps in (1, 2, 7, 100, 801):
        rates = [rate(i, steps) for i in range(steps)]
        assert min(rates) > 0 and max(rates) <= 1
        top = rates.index(max(rates))
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rate(0, 100) == pytest.approx(0.2) and rate(99, 100) == pytest.approx(1 / 90)


def test_muon_moves_matrices_and_adamw_the_rest():
    stage, model = tiny_stage()
    parameters = random_parameters(stage.start(model._base, seed=0))
    gradients = random_parameters(parameters, seed=5)
    optimizer = MuonAdamW("muon", 0, TINY.n_embd)
    state = optimizer.start(parameters)
    moved, new, size = optimizer.update(parameters, gradients, state, 0.01)
    assert float(size) == pytest.approx(
        sum(float(mx.square(g).sum()) for g in gradients.values()) ** 0.5, rel=1e-5
    )
    for name in parameters:
        step = moved[name] - parameters[name]
        if name.startswith("h."):
            # Newton-Schulz leaves singular values near 1, whatever the gradient's are.
            values = mx.linalg.svd(step, compute_uv=False, stream=mx.cpu) / 0.01
            tall = max(1, step.shape[0] / step.shape[1]) ** 0.5
            assert 0.6 < float(values.mean()) / tall < 1.1, name
            assert float(values.max()) / tall < 1.3, name
            assert new.keys() >= {f"{name}:v"} and f"{name}:m" not in new
        else:
            # AdamW's first step is its rate, by the gradient's sign.
            expected = -0.01 * 0.5 * (128 / TINY.n_embd) ** 0.5 * mx.sign(gradients[name])
            assert mx.allclose(step, expected, rtol=1e-2, atol=1e-6), name
            assert new.keys() >= {f"{name}:v", f"{name}:m"}


def test_the_gradient_is_clipped():
    stage, model = tiny_stage()
    parameters = random_parameters(stage.start(model._base, seed=0))
    gradients = {k: 100 * v for k, v in random_parameters(parameters, seed=5).items()}
    optimizer = MuonAdamW("adamw", 1.0, TINY.n_embd)
    _, state, size = optimizer.update(parameters, gradients, optimizer.start(parameters), 0.01)
    assert float(size) > 100
    # AdamW keeps a fifth of the first gradient as its mean: of one of norm 1.
    means = [array for key, array in state.items() if key.endswith(":m")]
    assert sum(float(mx.square(m).sum()) for m in means) ** 0.5 == pytest.approx(0.2, rel=1e-3)


def test_gradients_that_add_up_are_those_of_one_large_batch():
    stage, model = tiny_stage()
    texts, live = some_texts(8, most=14), LiveBase(model)
    start = random_parameters(stage.start(model._base, seed=0))

    class Recording(MuonAdamW):
        # Muon and AdamW hardly see a gradient's length, so it is looked at itself.
        def update(self, parameters, gradients, state, learning_rate):
            seen.append(gradients)
            return super().update(parameters, gradients, state, learning_rate)

    seen: list[Parameters] = []

    def trained(batch_size, accumulation, iterations):
        trainer = Trainer(
            stage,
            Recording("muon", 1.0, TINY.n_embd),
            Batches(texts, batch_size, seed=3),
            live,
            iterations=iterations,
            learning_rate=0.01,
            accumulation=accumulation,
        )
        state = trainer.start(start)
        for _ in range(iterations):
            state = trainer.step(state)
        assert bool(state.gradients) == (iterations < accumulation)
        state = trainer.finish(state)
        assert state.gradients == {} and state.counted == 0
        return state.parameters

    large = trained(8, 1, 1)
    assert not mx.array_equal(large["resid_lambdas"], start["resid_lambdas"])
    # Whether the update is due or training ends before it is.
    for accumulation in (4, 8):
        small = trained(2, accumulation, 4)
        assert all(mx.allclose(large[k], small[k], rtol=1e-3, atol=1e-5) for k in large)
        assert all(mx.allclose(seen[0][k], seen[-1][k], rtol=1e-3, atol=1e-5) for k in large)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("layers", "count", "length", "share"), [(1, 4, 256, 0.1), (2, 16, 64, 1.0), (3, 2, 32, 0.5)]
)
def test_the_memory_of_an_iteration_is_known_beforehand(layers, count, length, share):
    base, _ = fixture("poe-tiny")
    config = stacked_config(base.config, layers)
    stage = NewStage(stacked(base, config, [], mx.zeros((0, config.n_embd))), mx.float32)
    counted = np.arange(length + 1) > length * (1 - share)
    texts = [Text(np.zeros(length + 1, np.int32), counted, 9) for _ in range(count)]

    class Anything:
        def read(self, batch):
            parts = [mx.random.normal((*batch.tokens.shape, config.n_embd)) for _ in range(3)]
            return Hidden(mx.array(batch.tokens), *parts)

    optimizer = MuonAdamW("muon", 1.0, config.n_embd)
    batches = Batches(texts, count, 0)
    trainer = Trainer(stage, optimizer, batches, Anything(), iterations=9, learning_rate=0.01)
    state = trainer.step(trainer.start(stage.start(base, 0)))
    gc.collect()  # or what other tests have left is freed while this is measured
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    after = trainer.step(state)
    parts = (state.parameters, state.optimizer)
    held = stage.nbytes + sum(a.nbytes for part in parts for a in part.values())
    needed = held + mx.get_peak_memory() - before
    assert after.iteration == 2
    assert needed <= trainer.most_bytes(state) <= 2 * needed


# --- batches ------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(2, 90), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(0, 2),
)
@settings(max_examples=30)
def test_every_epoch_has_every_text_once_in_an_order_of_its_own(lengths, batch_size, seed, epoch):
    texts = [
        Text(np.arange(n, dtype=np.int32) + i, np.arange(n) > n // 2, i)
        for i, n in enumerate(lengths)
    ]
    batches = Batches(texts, batch_size, seed)
    first = epoch * batches.per_epoch
    seen = []
    for position in range(first, first + batches.per_epoch):
        batch = batches[position]
        assert len(batch.which) == batch_size and batch.tokens.shape[0] == batch_size
        assert batch.tokens.shape[1] in {bucket(n) for n in range(1, 100)}
        there = [i for i in batch.which if i >= 0]
        seen += there
        assert batch.n_bytes == sum(there)
        # What is counted is each text's own targets, at the positions before them.
        wanted = []
        for row, i in enumerate(there):
            assert batch.tokens[row, : len(texts[i])].tolist() == texts[i].tokens[:-1].tolist()
            places = np.flatnonzero(texts[i].counted[1:])
            wanted += [(row * batch.tokens.shape[1] + p, texts[i].tokens[p + 1]) for p in places]
        real = batch.weights > 0
        assert list(zip(batch.rows[real], batch.targets[real], strict=True)) == wanted
        assert batch.counted == real.sum() == len(wanted)
        # A position is the same batch however one comes to it.
        again = Batches(texts, batch_size, seed)[position]
        assert np.array_equal(again.which, batch.which)
    assert sorted(seen) == list(range(len(texts)))


def test_orders_depend_on_seed_and_epoch():
    texts = some_texts(40)

    def order(seed, position):
        return Batches(texts, 4, seed).texts_at(position).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, 10 * epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0) != list(range(4))


# --- the store ----------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([16, 8]), st.sampled_from([24, 64, 128, 192]))
@settings(max_examples=20)
def test_a_stored_value_is_within_half_a_step(seed, bits, width):
    random = np.random.default_rng(seed)
    values = mx.array(
        random.standard_cauchy((3, 5, width)) * 10 ** random.uniform(-3, 5), mx.float32
    )
    integers, scales = encode(values, bits)
    back = decode(integers, scales, mx.float32)
    group = 64 if width % 64 == 0 else width
    most = mx.abs(values.reshape(3, 5, -1, group)).max(axis=-1, keepdims=True)
    error = mx.abs(back - values).reshape(3, 5, -1, group)
    # 32767 times a float32 scale is off by a few thousandths of a step.
    assert bool((error <= most * (0.51 / (2 ** (bits - 1) - 1)) + 1e-30).all())
    assert mx.array_equal(
        decode(*encode(mx.zeros((1, width)), bits), mx.float32), mx.zeros((1, width))
    )


@pytest.mark.parametrize(("bits", "error"), [(16, 1e-4), (8, 0.02)])
def test_a_store_gives_what_the_base_gives(tmp_path, bits, error):
    _, model = tiny_stage()
    texts = some_texts(7)
    done = []
    write_store(tmp_path, model, texts, bits, done.append)
    assert sum(done) == sum(map(len, texts))
    stored = StoredActivations(tmp_path, texts, TINY.n_embd, bits, mx.float32)
    assert {type(array) for array in stored._arrays.values()} == {np.ndarray}
    batch = Batches(texts, 3, seed=0)[1]
    ours, theirs = stored.read(batch), LiveBase(model).read(batch)
    assert mx.array_equal(ours.tokens, theirs.tokens)
    there = [(row, i) for row, i in enumerate(batch.which) if i >= 0]
    for row, i in there:
        for name in ("x", "x0", "backout"):
            a, b = (getattr(h, name)[row, : len(texts[i])] for h in (ours, theirs))
            assert mx.abs(a - b).max().item() <= error * mx.abs(b).max().item()
    on_disk = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert store_bytes(texts, TINY.n_embd, bits) <= on_disk
    assert on_disk <= store_bytes(texts, TINY.n_embd, bits) + 4096


@pytest.mark.parametrize(
    "damage", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:99])]
)
def test_a_damaged_store_is_named(tmp_path, damage):
    _, model = tiny_stage()
    texts = some_texts(3)
    write_store(tmp_path, model, texts, 16)
    damage(tmp_path / "x0.npy")
    with pytest.raises(CheckpointError, match=r"x0\.npy"):
        StoredActivations(tmp_path, texts, TINY.n_embd, 16, mx.float32)


def test_another_texts_store_is_refused(tmp_path: Path):
    _, model = tiny_stage()
    write_store(tmp_path, model, some_texts(3), 16)
    with pytest.raises(CheckpointError, match="not int16"):
        StoredActivations(tmp_path, some_texts(4), TINY.n_embd, 16, mx.float32)


def test_a_base_that_gives_no_numbers_makes_no_store(tmp_path):
    _, model = tiny_stage()
    model.h[0].mlp.c_fc.weight = mx.full(model.h[0].mlp.c_fc.weight.shape, mx.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        write_store(tmp_path, model, some_texts(3), 16)


FULL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_training import some_texts, tiny_stage, write_store
try:
    write_store(Path(sys.argv[1]), tiny_stage()[1], some_texts(400), 16)
except OSError as error:
    print(error.strerror)
"""


def test_a_disk_that_fills_up_is_an_error_and_does_not_kill(tmp_path):
    mount = 'mount -t tmpfs -o size=1m none "$1" && exec "$0" -c "$3" "$1" "$2"'
    alone = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    if subprocess.run([*alone, 'mount -t tmpfs none "$0"', str(tmp_path)]).returncode:
        pytest.skip("needs a file system of its own")
    arguments = (sys.executable, str(tmp_path), str(Path(__file__).parent), FULL)
    done = subprocess.run([*alone, mount, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "No space left on device\n"), done.stderr
