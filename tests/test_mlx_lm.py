"""mlx-lm on a converted model folder: the same numbers, bounded caches, batches that mix."""

import copy
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import FIXTURES, SOAK, fixture, goldens
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, PromptProcessingBatch, generate_step
from mlx_lm.models.cache import (
    ArraysCache,
    BatchRotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.utils import load_model

from cognica_mlx.convert.conversion import SHIM, SHIM_FILE
from cognica_mlx.network.mlx_lm_model import Model
from cognica_mlx.network.model import PoEModel
from mlx_poe import generate, load
from mlx_poe.commands.convert import main as convert

TOLERANCE = 2e-4
QUANTIZATION = {"group_size": 32, "bits": 4}
# Beyond the long window (512) too; the short one is 128.
LENGTH = 700


def write_folder(folder: Path, model: PoEModel, **fields: object) -> Path:
    """A model folder as the converter lays it out, without a tokenizer."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "cognica_poe", "model_file": SHIM_FILE, **model.config.to_dict()}
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    (folder / SHIM_FILE).write_text(SHIM)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def load_by_mlx_lm(folder: Path) -> Model:
    return load_model(folder, trust_remote_code=True)[0]


@pytest.fixture(
    scope="module",
    params=["gqa-logop-d8", *(pytest.param(n, marks=SOAK) for n in ("flat-d8", "stage-on-flat"))],
)
def named(request, tmp_path_factory) -> tuple[str, Model]:
    """A golden model's name, and the model as mlx-lm loads it."""
    folder = tmp_path_factory.mktemp("models") / request.param
    return request.param, load_by_mlx_lm(write_folder(folder, fixture(request.param)[0]))


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("models") / "flat-d8"
    return load_by_mlx_lm(write_folder(folder, fixture("flat-d8")[0]))


def some_tokens(model: PoEModel, length: int = LENGTH, seed: int = 7) -> list[int]:
    key = mx.random.key(seed)
    return mx.random.randint(0, model.config.vocab_size, (length,), key=key).tolist()


def greedy(model: Model, prompt: list[int], count: int, **options: object) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=count, **options)
    return [token for token, _ in steps]


def held_bytes(cache: list) -> int:
    return sum(layer.nbytes for layer in cache)


def test_full_forward_matches_the_goldens(named):
    name, model = named
    assert model.layers == model.h
    for text in ("short", "long"):
        answer = goldens(name)[f"{text}.logits_full"]
        ours = model(goldens(name)[f"{text}.tokens"])[:, -answer.shape[1] :]
        assert mx.abs(ours - answer).max().item() < TOLERANCE


def test_greedy_generation_matches_the_goldens(named):
    name, model = named
    answers = goldens(name)
    prompt, answer = answers["greedy.prompt"].tolist(), answers["greedy.full"].tolist()
    assert greedy(model, prompt, len(answer), prefill_step_size=5) == answer


def test_chunks_and_single_steps_match_the_forward_past_every_window(named):
    _, model = named
    tokens = mx.array([some_tokens(model)])
    whole = model(tokens)
    # The windows are passed in single steps: the short one at 128, the long one at 512.
    for sizes in (
        [120, *[1] * 20, 365, *[1] * 25, 170],
        [300, 1, 1, 1, 200, *[1] * 20, 177],
        [600, *[1] * 20, 80],
    ):
        cache, parts, start = model.make_cache(), [], 0
        for size in sizes:
            parts.append(model(tokens[:, start : start + size], cache))
            mx.eval(parts[-1])
            start += size
        assert start == LENGTH
        assert mx.abs(mx.concatenate(parts, axis=1) - whole).max().item() < TOLERANCE


def test_cache_stays_as_large_as_its_windows(flat):
    cache = flat.make_cache()
    tokens = mx.array([some_tokens(flat, 513)])
    flat(tokens, cache)
    flat(tokens[:, :1], cache)
    full = held_bytes(cache)
    rows = sum(window + 1 for window in flat.config.windows)
    row_bytes = 2 * 4 * flat.config.n_kv_head * flat.config.head_dim
    assert full == rows * row_bytes + 4 * flat.config.n_embd
    for _ in range(100):
        mx.eval(flat(tokens[:, :1], cache))
    assert held_bytes(cache) == full


def test_quantized_folder_runs(tmp_path):
    model = Model(fixture("flat-d8")[0].config)
    model.update(fixture("flat-d8")[0].parameters())
    nn.quantize(
        model, **QUANTIZATION, class_predicate=lambda _, m: fits(m, QUANTIZATION["group_size"])
    )
    folder = write_folder(tmp_path / "4bit", model, quantization=QUANTIZATION)
    loaded = load_by_mlx_lm(folder)
    assert isinstance(loaded.h[0].attn.c_q, nn.QuantizedLinear)
    assert isinstance(loaded.wte, nn.QuantizedEmbedding)
    assert isinstance(loaded.smear_gate, nn.Linear)
    tokens = some_tokens(model, 40)
    assert mx.allclose(loaded(mx.array([tokens])), model(mx.array([tokens])), atol=TOLERANCE)
    assert len(greedy(loaded, tokens, 12)) == 12


def fits(module: nn.Module, group_size: int) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0


def run_batch(generator: BatchGenerator, wanted: dict[int, list[int]], rounds: int = -1) -> None:
    """Generate until all are done, or for some rounds; tokens go to `wanted`."""
    while rounds and (responses := generator.next_generated()):
        for response in responses:
            wanted[response.uid].append(response.token)
        rounds -= 1


def test_batches_of_unequal_prompts_match_one_by_one(named):
    _, model = named
    lengths, count = (3, 200, 131, 1, 600), 10
    prompts = [some_tokens(model, length, seed=length) for length in lengths]
    alone = [greedy(model, prompt, count) for prompt in prompts]
    generator = BatchGenerator(model, max_tokens=count, prefill_step_size=64, prefill_batch_size=3)
    got: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts[:3])}
    run_batch(generator, got, rounds=4)
    # Two join while the others are generating: one of a single token, and a long one.
    late = generator.insert(prompts[3:])
    got.update({uid: [] for uid in late})
    run_batch(generator, got)
    assert list(got.values()) == alone


def test_padded_prompts_in_several_chunks_match_one_by_one(flat):
    prompts = [some_tokens(flat, length, seed=length) for length in (200, 70, 64, 1)]
    batch = PromptProcessingBatch(
        flat, list(range(4)), [flat.make_cache() for _ in prompts], prefill_step_size=64
    )
    batch.prompt(prompts)
    last = mx.array([[5]] * len(prompts))
    logits = flat(last, batch.prompt_cache)
    for row, prompt in enumerate(prompts):
        alone = flat(mx.array([[*prompt, 5]]))[0, -1]
        assert mx.abs(logits[row, -1] - alone).max().item() < TOLERANCE


def test_left_padding_stays_out_of_the_text(flat):
    # As older mlx-lm lays out a batch.
    prompt, padding = some_tokens(flat, 20), [0, 4]
    layers = [BatchRotatingKVCache(window + 1, padding) for window in flat.config.windows]
    cache = [ArraysCache(1, left_padding=padding), *layers]
    logits = flat(mx.array([prompt, [0] * 4 + prompt[:16]]), cache)
    alone = flat(mx.array([prompt]))[0]
    assert mx.abs(logits[0] - alone).max().item() < TOLERANCE
    assert mx.abs(logits[1, 4:] - alone[:16]).max().item() < TOLERANCE


def test_sequence_joins_a_batch_with_a_prompt_cache(flat):
    prompt, count = some_tokens(flat, 300), 20
    cache = flat.make_cache()
    flat(mx.array([prompt[:250]]), cache)
    other = some_tokens(flat, 9, seed=1)
    generator = BatchGenerator(flat, max_tokens=count)
    uids = generator.insert([prompt[250:], other], caches=[copy.deepcopy(cache), flat.make_cache()])
    got: dict[int, list[int]] = {uid: [] for uid in uids}
    run_batch(generator, got)
    assert list(got.values()) == [greedy(flat, prompt, count), greedy(flat, other, count)]


def test_prompt_cache_survives_a_file(flat, tmp_path):
    prompt = some_tokens(flat, 300)
    cache = flat.make_cache()
    flat(mx.array([prompt[:200]]), cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    stored = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert greedy(flat, prompt[200:], 12, prompt_cache=stored) == greedy(flat, prompt, 12)


# Its commands, on what the converter writes


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    for name, flags in (("poe-tiny", []), ("poe-tiny-chat", ["-q"])):
        target = str(folder / name)
        assert convert(["--hf-path", name, "--mlx-path", target, "--dtype", "float32", *flags]) == 0
    return {name: folder / name for name in ("poe-tiny", "poe-tiny-chat")}


def mlx_lm(command: str, folder: Path, *flags: str) -> str:
    argv = [sys.executable, "-m", "mlx_lm", command, "--model", str(folder), "--trust-remote-code"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "hub")}
    done = subprocess.run([*argv, *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["poe-tiny-chat", pytest.param("poe-tiny", marks=SOAK)])
def test_mlx_lm_generate_writes_what_ours_writes(converted, name):
    model, tokenizer = load(converted[name], dtype="float32")
    question = "What is the capital of Italy?"
    prompt = [{"role": "user", "content": question}] if name == "poe-tiny-chat" else question
    ours = generate(model, tokenizer, prompt, max_tokens=20)
    flags = ("--prompt", question, "--max-tokens", "20", "--verbose", "False")
    assert mlx_lm("generate", converted[name], *flags).strip() == ours.strip()


@SOAK
def test_mlx_lm_perplexity(converted, tmp_path):
    text = (FIXTURES / "heldout.txt").read_text()
    lines = [json.dumps({"text": text[i : i + 400]}) for i in range(0, len(text), 400)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    flags = ("--data-path", str(tmp_path), "--sequence-length", "64", "--num-samples", "4")
    printed = mlx_lm("perplexity", converted["poe-tiny"], *flags)
    (line,) = (line for line in printed.splitlines() if line.startswith("Perplexity"))
    # Of its vocabulary of 2048 tokens it would be 2048, had it learnt nothing.
    assert 1 < float(line.split()[1]) < 300


@SOAK
def test_mlx_lm_server_answers(converted):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    argv = [sys.executable, "-m", "mlx_lm", "server", "--trust-remote-code", "--port", port]
    model, tokenizer = load(converted["poe-tiny"], dtype="float32")
    prompt = "The capital of France is"
    body = json.dumps({"prompt": prompt, "max_tokens": 16}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    server = subprocess.Popen(
        [*argv, "--model", str(converted["poe-tiny"])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        answer = None
        while answer is None:
            assert server.poll() is None, "the server has ended"
            try:
                with urllib.request.urlopen(request) as response:
                    answer = json.load(response)
            except urllib.error.URLError:
                time.sleep(0.2)  # not listening yet
    finally:
        server.kill()
        server.wait()
    ours = generate(model, tokenizer, prompt, max_tokens=16)
    assert answer["choices"][0]["text"].strip() == ours.strip()
