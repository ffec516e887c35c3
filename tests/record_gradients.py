"""Records `fixtures/training/gradients.safetensors`: a stage's loss and gradients by PyTorch.

PyTorch is not needed to run the tests. In an environment that has it, and safetensors:

    python tests/record_gradients.py

The stage is written again here from the architecture's description, in plain operations.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, HEADS, KV_HEADS, VOCAB, PADDED, INNER = 32, 4, 2, 70, 128, 128
FROZEN, LAYERS, TEXTS, LENGTH = 3, 2, 2, 24
# Both layers see as far as sequence_len, which is shorter than the texts.
WINDOWS = {3: 16, 4: 16}
THETA, EPS = 100000.0, 1.1920929e-07


def norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """(B, T, heads, head_dim) by minus theta, halves layout."""
    half = x.shape[-1] // 2
    frequencies = THETA ** -(torch.arange(half) * 2 / x.shape[-1])
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


def block(p: dict[str, torch.Tensor], i: int, x: torch.Tensor) -> torch.Tensor:
    def weight(name: str) -> torch.Tensor:
        return p[f"h.{i}.{name}.weight"]

    batch, length, _ = x.shape
    u = norm(x)
    q = (u @ weight("attn.c_q").T).view(batch, length, HEADS, -1)
    k, v = ((u @ weight(f"attn.c_{one}").T).view(batch, length, KV_HEADS, -1) for one in ("k", "v"))
    q, k = (1.2 * norm(rotate(z)) for z in (q, k))
    k, v = (z.repeat_interleave(HEADS // KV_HEADS, 2) for z in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance > WINDOWS[i])
    scores = scores.masked_fill(hidden, float("-inf"))
    seen = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(batch, length, -1)
    x = x + seen @ weight("attn.c_proj").T
    inner = (norm(x) @ weight("mlp.c_fc").T).relu() ** 2
    return x + inner @ weight("mlp.c_proj").T


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    p: dict[str, torch.Tensor] = {}
    kv = WIDTH // HEADS * KV_HEADS
    for i in range(FROZEN, FROZEN + LAYERS):
        shapes = {"attn.c_q": (WIDTH, WIDTH), "attn.c_k": (kv, WIDTH), "attn.c_v": (kv, WIDTH)}
        shapes |= {"attn.c_proj": (WIDTH, WIDTH), "mlp.c_fc": (INNER, WIDTH)}
        shapes |= {"mlp.c_proj": (WIDTH, INNER)}
        p |= {f"h.{i}.{name}.weight": 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    p["lm_head_specialists.0.weight"] = 0.2 * torch.randn(PADDED, WIDTH)
    p["resid_lambdas"] = 1 + 0.2 * torch.randn(LAYERS)
    p["x0_lambdas"] = 0.2 * torch.randn(LAYERS)
    frozen = {"lm_head": 0.4 * torch.randn(PADDED, WIDTH), "backout_lambda": torch.tensor([0.3])}
    hidden = {n: torch.randn(TEXTS, LENGTH, WIDTH) for n in ("x", "x0", "backout")}
    count = 20
    rows = torch.randperm(TEXTS * LENGTH)[:count]
    targets, weights = torch.randint(0, VOCAB, (count,)), torch.rand(count)
    # As float32 holds them, so that both sides compute from the same numbers.
    for group in (p, frozen, hidden):
        for name, value in group.items():
            group[name] = value.float().double()
    weights = weights.float().double()
    for value in p.values():
        value.requires_grad_(True)

    x = hidden["x"]
    for place, i in enumerate(range(FROZEN, FROZEN + LAYERS)):
        x = block(p, i, p["resid_lambdas"][place] * x + p["x0_lambdas"][place] * hidden["x0"])
    h = norm(x - frozen["backout_lambda"] * hidden["backout"]).reshape(-1, WIDTH)[rows]
    logits = h @ (frozen["lm_head"] + p["lm_head_specialists.0.weight"]).T
    logits = 15 * torch.tanh(logits[:, :VOCAB] / 15)
    loss = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
    loss.backward()

    arrays = {**frozen, **hidden, "weights": weights, "loss": loss.detach()[None]}
    arrays |= {f"value.{name}": value.detach() for name, value in p.items()}
    arrays |= {f"gradient.{name}": value.grad for name, value in p.items()}
    arrays = {name: value.float().contiguous() for name, value in arrays.items()}
    arrays |= {"rows": rows.int(), "targets": targets.int()}
    arrays["tokens"] = torch.zeros(TEXTS, LENGTH, dtype=torch.int32)
    folder = Path(__file__).parent / "fixtures" / "training"
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "gradients.safetensors")


if __name__ == "__main__":
    main()
