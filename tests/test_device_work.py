"""What a token asks of the device, in counts: waits, kernels, copies. They carry over to a GPU,
where this suite does not run and milliseconds from a CPU mean nothing."""

from __future__ import annotations

import gc
import re
import threading
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import fixture
from mlx.utils import tree_flatten, tree_unflatten

from cognica_mlx.backend import kernels as backend_kernels
from cognica_mlx.backend import traces
from cognica_mlx.cache import stage_cache as cache
from cognica_mlx.config import PoEConfig
from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.choosing import logprob_of
from cognica_mlx.decoding.modes import MODES, ModeOptions, make_mode
from cognica_mlx.decoding.passes import read
from cognica_mlx.decoding.requests import DecodedToken, Read, Request
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import Single, advance_through, drive, prefill
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.network import device, linear, stages
from cognica_mlx.network.model import PoEModel
from cognica_mlx.network.shared_base import PatchedEmbedding
from mlx_poe import load, stream_generate
from mlx_poe.loading.specialists import Specialists

# What only names a part of an array, or an order, and computes nothing.
VIEWS = {
    *("Reshape", "Transpose", "Slice", "Broadcast", "ExpandDims", "Squeeze", "Split", "Flatten"),
    *("Unflatten", "AsStrided", "Depends", "StopGradient"),
}


def small(dtype: mx.Dtype = mx.float32, n_layer: int = 24, width: int = 64, **other) -> PoEModel:
    """A model of random weights with the layers, stages and windows of the 1.3B one."""
    fields = {"n_head": 2, "head_dim": width // 2, "vocab_size": 320, "sequence_len": 2048}
    fields |= {"window_pattern": "SSSL", "poe_every": n_layer // 4, **other}
    model = PoEModel(PoEConfig.from_dict({"n_layer": n_layer, "n_embd": width, **fields}))
    weights = [
        (name, mx.random.normal(p.shape, key=mx.random.key(i)).astype(dtype) * 0.1)
        for i, (name, p) in enumerate(tree_flatten(model.parameters()))
    ]
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


@pytest.fixture
def gpu_paths(monkeypatch):
    """What runs on a GPU, counted on the CPU: compiled chains, sums within products, and each fused
    operation as one primitive instead of the CPU's many."""
    monkeypatch.setattr(backend_kernels, "compiles", lambda: True)
    monkeypatch.setattr(stages, "added", lambda x, m, h: mx.addmm(x, h, m.weight.T))
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, eps: mx.abs(x))
    monkeypatch.setattr(mx.fast, "rope", lambda x, *a, **k: mx.sign(x))

    def attention(q, k, v, *, scale, mask):
        return mx.depends([mx.ceil(q)], [k, v])[0]

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)


def kernels(tmp_path: Path, *outputs: mx.array) -> Counter[str]:
    """The primitives that these arrays still need, by name."""
    file = tmp_path / "graph.dot"
    mx.export_to_dot(str(file), *outputs)
    names = re.findall(r'label ="([^"]+)", shape=rectangle', file.read_text())
    return Counter(name for name in names if name not in VIEWS)


def token_graph(model: PoEModel, state: DecodingState) -> tuple[mx.array, ...]:
    """One more token at full depth, not yet computed, as plain decoding asks for it."""
    last = model.poe_n_stages - 1
    state.next_round()
    state.append(mx.array([[7]]))
    advance_through(state, last)
    hidden = {last: state.boundary(last, state.length - 1, state.length)}
    scores = model.full_scores(hidden)[0]
    chosen = mx.argmax(scores, axis=-1)
    return chosen.astype(mx.int32), logprob_of(scores, chosen)


def test_a_token_takes_at_most_420_kernels_on_a_gpu(gpu_paths, tmp_path):
    """1.3B's layers, stages and windows. `-n 0 -s` prints the figure in docs/measured.md."""
    model = small()
    model.stack()
    state = DecodingState(model)
    prefill(state, list(range(40)), 3)
    found = kernels(tmp_path, *token_graph(model, state))
    print(f"{sum(found.values())} kernels:", dict(found.most_common()))
    assert sum(found.values()) <= 420
    # Scalars are views, not gathers; one is for the embedding, twelve for value embeddings.
    assert found["Gather"] <= 14
    assert found["Concatenate"] <= 2


def test_nothing_turns_into_float32_in_half_precision(tmp_path):
    """But the logits, on purpose."""
    for dtype in (mx.float16, mx.bfloat16):
        model = small(dtype, n_layer=8)
        state = DecodingState(model)
        prefill(state, list(range(9)), 3)
        assert {array.dtype for array in state.arrays()} == {dtype, mx.int32}


def held() -> int:
    """Bytes of all arrays that are alive."""
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


@pytest.mark.parametrize("quantize", [None, 8])
def test_stacked_matrices_predict_the_same_and_take_no_memory(quantize):
    plain, _ = load("poe-tiny", dtype="float32", quantize=quantize)
    stacked, _ = load("poe-tiny", dtype="float32", quantize=quantize)
    names = set(dict(tree_flatten(stacked.parameters())))
    before = held()
    stacked.stack()
    assert held() <= before + 4096
    assert set(dict(tree_flatten(stacked.parameters()))) == names
    assert all(block.attn._qkv is not None for block in stacked.h)
    tokens = mx.array([[5, 9, 1, 7]])
    difference = mx.abs(plain(tokens) - stacked(tokens)).max().item()
    assert difference < 1e-4


def test_matrices_rounded_in_different_ways_stay_apart():
    model, _ = load("poe-tiny", dtype="float32", quantize=8)
    other, _ = load("poe-tiny", dtype="float32", quantize=4)
    attention = model.h[0].attn
    attention.c_v = other.h[0].attn.c_v
    attention.stack()
    assert attention._qkv is None


class Watching:
    """A driver that notes what is waited for, and whether work was left when a token came."""

    def __init__(self) -> None:
        self.inner = Single()
        self.waits = 0
        self.ahead = False

    def answer(self, request: Request):
        if isinstance(request, Read):
            self.waits += bool(request.arrays)
            self.ahead = bool(request.ahead)
        return self.inner.answer(request)


@pytest.fixture
def evaluations(monkeypatch):
    """Counts every call that makes MLX compute; only drivers make any."""
    counted = Counter()
    for name in ("eval", "async_eval"):
        real = getattr(mx, name)

        def call(*arrays, name=name, real=real):
            counted[name] += 1
            return real(*arrays)

        monkeypatch.setattr(mx, name, call)
    return counted


@pytest.mark.parametrize("mode", MODES)
def test_the_host_waits_once_a_token_or_once_a_round(mode, evaluations):
    model, tokenizer = fixture("poe-tiny")
    drafts = {"draft_stage": 0, "num_draft_tokens": 4}
    options = drafts if "num_draft_tokens" in MODES[mode] else {}
    chosen = make_mode(model, mode, ModeOptions(**options), model.calibration)
    prompt = tokenizer.encode("Once upon a time")
    for _ in drive(DecodingSequence(model, prompt, chosen, max_tokens=48).steps()):
        pass  # what is made once for all sequences is there, traces too
    sequence = DecodingSequence(model, prompt, chosen, max_tokens=48)
    driver = Watching()
    evaluations.clear()
    # Traces are made as passes come back, and what is constant in them is computed then.
    with traces.off() if mode in ("wand", "speculative") else nullcontext():
        made = list(drive(sequence.steps(), driver))
    rounds = sum(not token.from_draft for token in made)
    if mode in ("full", "stage", "prefix", "compose"):
        assert driver.waits == len(made)
    elif mode == "speculative":
        assert driver.waits == rounds
    else:
        tested = len(chosen.exits) + 1
        assert len(made) <= driver.waits <= tested * len(made)
    # Reading numbers of arrays that are there costs nothing, and nobody else evaluates.
    assert evaluations["eval"] == driver.waits


@pytest.mark.parametrize("mode", ["full", "stage"])
def test_plain_decoding_has_a_token_under_way_while_one_is_handed_out(mode):
    model, tokenizer = fixture("poe-tiny")
    prompt = tokenizer.encode("Once upon a time")
    sequence = DecodingSequence(model, prompt, make_mode(model, mode), max_tokens=12)
    driver, under_way = Watching(), []
    for token in drive(sequence.steps(), driver):
        assert isinstance(token, DecodedToken)
        under_way.append(driver.ahead)
    # The first is handed out at once, the last has none after it.
    assert under_way == [False, *[True] * 10, False]


@lru_cache
def long_text() -> tuple[PoEModel, DecodingState]:
    """A model whose buffers are too large to copy, behind a text beyond every window."""
    model = small(n_layer=4, width=128, n_head=8, head_dim=64, window_pattern="L")
    state = DecodingState(model)
    prefill(state, [t % 300 for t in range(2300)], 3)
    return model, state


@pytest.mark.parametrize("mode", MODES)
def test_a_large_buffer_is_written_once_between_two_waits(mode, monkeypatch):
    """What is written while earlier work on it is not done is copied whole on a GPU. The CPU's
    short queue hides that, so writes are counted."""
    model, held = long_text()
    writes: Counter[int] = Counter()
    most = []
    real = cache._View.attend

    def attend(self, layer, *args):
        after, out = real(self, layer, *args)
        if after.keys is not layer.keys:
            assert layer.keys.nbytes > 4 << 20
            # A write gives a new array, by which the next one is known.
            writes[id(after.keys)] = writes.pop(id(layer.keys), 0) + 1
            most.append(writes[id(after.keys)])
        return after, out

    monkeypatch.setattr(cache._View, "attend", attend)

    class Rounds(Watching):
        def answer(self, request: Request):
            answer = super().answer(request)
            if isinstance(request, Read):
                writes.clear()
            return answer

    options = {"p99_bounds": [0.5] * 3} if "p99_bounds" in MODES[mode] else {}
    if "num_draft_tokens" in MODES[mode]:
        options["num_draft_tokens"] = 4
    chosen = make_mode(model, mode, ModeOptions(**options))
    prompt = [*held.tokens, 5]
    sequence = DecodingSequence(model, prompt, chosen, max_tokens=16, state=held.fork())
    list(drive(sequence.steps(), Rounds()))
    assert set(most) == {1}


@pytest.mark.parametrize("mode", ["full", "speculative"])
def test_a_token_takes_little_memory_beside_what_is_held(mode):
    """`-n 0 -s` prints the figures in docs/measured.md."""
    model, held = long_text()
    least = min(a.nbytes for stage in held.caches for a in stage.arrays())
    chosen = make_mode(model, mode)
    prompt = [*held.tokens, 5]
    sequence = DecodingSequence(model, prompt, chosen, max_tokens=24, state=held.fork())
    grown: list[int] = []
    active = 0
    old = mx.set_cache_limit(0)
    try:
        for i, _ in enumerate(drive(sequence.steps())):
            if i >= 12:  # after the first write, which parts from the fork's
                grown.append(mx.get_peak_memory() - active)
            mx.reset_peak_memory()
            active = mx.get_active_memory()
    finally:
        mx.set_cache_limit(old)
    grown.sort()
    print(f"{mode}: {grown[len(grown) // 2] / 1e6:.2f} MB beside {least / 1e6:.1f} MB a buffer")
    assert grown[len(grown) // 2] < least / 2


def test_a_sequence_that_joins_a_batch_adds_no_kernels(tmp_path, monkeypatch):
    model, _ = fixture("poe-tiny")
    # With OpenBLAS some numbers of rows are padded.
    monkeypatch.setattr(linear, "ON_OPENBLAS", False)
    found: list[Counter[str]] = []
    real = mx.async_eval
    for count in (2, 6):
        batch = Batch()
        for i in range(count):
            prompt = [2039, *range(20 + i)]
            batch.add(i, DecodingSequence(model, prompt, make_mode(model), max_tokens=40).steps())
        graphs: list[Counter[str]] = []

        def counted(ahead, graphs=graphs):
            graphs.append(kernels(tmp_path, *(array for arrays in ahead for array in arrays)))
            return real(ahead)

        with traces.off(), monkeypatch.context() as patch:  # others' traces have padded rows
            for _ in range(12):
                batch.run()
            patch.setattr(mx, "async_eval", counted)
            batch.run()
        batch.close()
        assert len(graphs) == 1
        found += graphs
    assert found[0] == found[1]


def test_what_is_ahead_is_begun_after_the_wait(monkeypatch):
    calls = []
    state = DecodingState(fixture("flat-d8")[0])
    for name in ("eval", "async_eval"):
        monkeypatch.setattr(mx, name, lambda *arrays, name=name: calls.append(name))
    read([Read(state, (mx.array(1),), (mx.array(2),))])
    assert calls == ["eval", "async_eval"]


def test_a_model_loaded_in_one_thread_generates_in_another():
    loaded, said = [], []

    def generate_there() -> None:
        model, tokenizer = loaded[0]
        for mode in ("full", "speculative", "wand"):
            responses = stream_generate(model, tokenizer, "The capital of France is", mode=mode)
            said.append("".join(r.text for r in responses))

        for model in loaded[1:]:
            question = [{"role": "user", "content": "What is the capital of France?"}]
            said.append("".join(r.text for r in stream_generate(model, tokenizer, question)))

    def load_here() -> None:
        loaded.append(load("poe-tiny"))
        specialists = Specialists(loaded[0][0])
        for name in ("chat", "math"):
            loaded.append(specialists.attach(name, f"poe-tiny-{name}"))
        loaded.append(specialists.compose(["chat", "math"], [2, 1]))

    for work in (load_here, generate_there):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(said) == 6 and all("Paris" in text for text in (*said[:4], said[5]))


@pytest.mark.parametrize("part", ["lambdas", "slots"])
def test_what_parameters_do_not_show_is_computed_where_it_is_made(part):
    """A thread that has ended leaves nothing that only its own stream could finish."""
    model, made = small(mx.float32), []

    def make() -> None:
        if part == "lambdas":
            model.resid_lambdas = model.resid_lambdas * 2
            made.extend(pair[0] for pair in model.stages[1].lambdas())
        else:
            made.append(PatchedEmbedding(model.wte, [3], mx.zeros((1, 8)), 16)._slots)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert made and all(array.tolist() for array in made)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_float16_stays_float16_with_every_rounding(mode):
    model = small(mx.float16, n_layer=8, width=128)
    for block in model.h:
        if "value_embed" in block.attn:
            table = block.attn.value_embed
            block.attn.value_embed = table.to_quantized(mode=mode)
    state = DecodingState(model)
    prefill(state, list(range(9)), 3)
    assert {array.dtype for array in state.arrays()} == {mx.float16, mx.int32}


def test_a_gpu_is_told_what_exactness_needs(monkeypatch):
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    monkeypatch.delenv("MLX_CUDA_USE_CUDNN_SDPA", raising=False)
    device.prepare(mx.float32)
    assert "MLX_ENABLE_TF32" not in device.os.environ
    monkeypatch.setattr(device.mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(device.mx.cuda, "is_available", lambda: True)
    device.prepare(mx.bfloat16)
    assert "MLX_ENABLE_TF32" not in device.os.environ
    assert device.os.environ["MLX_CUDA_USE_CUDNN_SDPA"] == "0"
    device.prepare(mx.float32)
    assert device.os.environ["MLX_ENABLE_TF32"] == "0"
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    device.prepare(mx.float32)
    assert device.os.environ["MLX_ENABLE_TF32"] == "1"
