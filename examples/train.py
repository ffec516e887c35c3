"""Train a specialist on three facts, and ask it: some seconds for two layers on poe-tiny.

python examples/train.py [FOLDER]
"""

import json
import sys
import tempfile
from pathlib import Path

from mlx_poe import generate, load
from mlx_poe.commands.train import main as train

FACTS = {"the sun": "yellow", "the sea": "blue", "a frog": "green"}


def chat(name: str, color: str) -> dict[str, list[dict[str, str]]]:
    question = {"role": "user", "content": f"What color is {name}?"}
    return {"messages": [question, {"role": "assistant", "content": f"It is {color}."}]}


def main(folder: str | Path) -> None:
    folder = Path(folder)
    rows = "".join(json.dumps(chat(name, color)) + "\n" for name, color in FACTS.items())
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    output = folder / "colors"
    settings = ["--iters", "40", "--batch-size", "3", "--steps-per-eval", "20", "--no-store"]
    if train(["--data", str(folder), "--output", str(output), *settings]):
        raise SystemExit(1)
    for name in ("poe-tiny-chat", str(output)):
        model, tokenizer = load(name)
        print(f"\n{name}")
        for one in FACTS:
            question = chat(one, "")["messages"][:1]
            print(" ", question[0]["content"], generate(model, tokenizer, question, max_tokens=12))


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(folder)
