"""Specialists over one base: the base is in memory once, and each specialist adds a stage.

python examples/specialists.py
"""

from cognica_mlx.pricing.costs import nbytes
from mlx_poe import batch_generate, load
from mlx_poe.specialists import Specialists

QUESTIONS = (
    "Tell me about Kenya.",
    "Mia has 9 shells. Mia gives 4 to Tom. How many shells does Mia have left?",
)


def main() -> None:
    base, tokenizer = load("poe-tiny")
    specialists = Specialists(base)
    for name in ("chat", "math"):
        specialists.attach(name, f"poe-tiny-{name}")
    print(f"the base has {nbytes(base) / 1e6:.1f} MB")
    for name in specialists.names:
        print(f"{name} adds {specialists.nbytes(name) / 1e6:.1f} MB")
    models = {name: specialists.use(name) for name in specialists.names}
    models["both"] = specialists.compose(["chat", "math"], weights=[1, 2])
    asked = [(question, name) for question in QUESTIONS for name in models]
    # One batch: rows of all specialists pass through the base's stages together.
    result = batch_generate(
        base,
        tokenizer,
        [[{"role": "user", "content": question}] for question, _ in asked],
        per_prompt=[{"model": models[name]} for _, name in asked],
        max_tokens=40,
    )
    for (question, name), text in zip(asked, result.texts, strict=True):
        if name == specialists.names[0]:
            print(f"\n{question}")
        print(f"  {name}: {text}")


if __name__ == "__main__":
    main()
