"""Early exit, token by token: `wand` stops at the first stage that is sure enough.

Each token is printed in the column of the stage that emitted it.

    python examples/early_exit.py "Once upon a time"
"""

import sys

from mlx_poe import load, stream_generate

WIDTH = 14


def main(prompt: str = "Once upon a time") -> None:
    model, tokenizer = load()
    counts = [0] * model.poe_n_stages
    print("".join(f"stage {stage}".ljust(WIDTH) for stage in range(len(counts))))
    for response in stream_generate(model, tokenizer, prompt, mode="wand", max_tokens=40):
        counts[response.stage] += 1
        print(" " * WIDTH * response.stage + repr(response.text))
    depth = sum(count * (stage + 1) for stage, count in enumerate(counts)) / sum(counts)
    print(f"{counts[0]} of {sum(counts)} tokens needed only the first stage of the model;")
    print(f"the mean depth is {depth:.2f} of {len(counts)} stages.")


if __name__ == "__main__":
    main(*sys.argv[1:])
