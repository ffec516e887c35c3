"""Extraction from a file: every line becomes a record that fits a schema.

The schema is enforced token by token: a record has these fields and no others. What they
say is up to the model, and the built-in one knows questions like those in extract.txt.

    python examples/extract.py [FILE]
"""

import json
import sys
from pathlib import Path

from mlx_poe import batch_generate, load
from mlx_poe.tools import ToolCallParser

LINES = Path(__file__).with_name("extract.txt")
FUNCTION = {
    "name": "get_capital",
    "description": "Look up the capital of a country",
    "parameters": {
        "type": "object",
        "properties": {"country": {"type": "string", "description": "Country name"}},
        "required": ["country"],
    },
}


def main(file: str | Path = LINES) -> None:
    lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line]
    model, tokenizer = load("poe-tiny-tool")
    prompts = [[{"role": "user", "content": line}] for line in lines]
    result = batch_generate(model, tokenizer, prompts, tools=FUNCTION, tool_choice="required")
    for line, text in zip(lines, result.texts, strict=True):
        parser = ToolCallParser()
        parser.feed(text)
        # A reply that was cut off at `max_tokens` has no whole call.
        record = parser.call.arguments if parser.call else None
        print(json.dumps({"line": line, "record": record}))


if __name__ == "__main__":
    main(*sys.argv[1:])
