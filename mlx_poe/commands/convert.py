"""mlx_poe.convert: checkpoints of every kind to MLX folders, optionally quantized."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id
from rich.console import Console
from rich.markup import escape
from rich.progress import DownloadColumn
from rich.table import Column, Table

from cognica_mlx.convert.conversion import Conversion, prepare, upload
from cognica_mlx.convert.formats.whole_folder import check_target
from cognica_mlx.convert.quantization import RECIPES, Rule, scheme
from cognica_mlx.errors import RequestError
from cognica_mlx.files.byte_sizes import size_text
from cognica_mlx.files.safetensors_files import nbytes
from cognica_mlx.files.stored import DTYPES
from cognica_mlx.scheme import BITS, DRAFT_BITS, MODES, Scheme
from mlx_poe.commands.entry import interruptible, make_parser, run
from mlx_poe.commands.flags import add_revision_flag, file_path, folder_path, whole
from mlx_poe.commands.measured_texts import Text, read_texts, segments
from mlx_poe.generation.progress import Bars
from mlx_poe.loading.load import find_model, load
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.loading.verify import SAMPLE, compare

VERIFY_TOKENS = 4096

EXAMPLES = """\
  mlx_poe.convert --hf-path path/to/base --mlx-path base-mlx
  mlx_poe.convert --hf-path owner/name -q --mlx-path name-4bit
  mlx_poe.convert --hf-path path/to/base -q --q-bits-for head=8 --q-bits-for stage0=6 --verify
  mlx_poe.convert --hf-path base_checkpoints/d24 --step 5000 --mlx-path d24-mlx
  mlx_poe.convert --hf-path path/to/specialist --mlx-path specialist-mlx
  mlx_poe.convert --hf-path path/to/specialist --base base-mlx --mlx-path specialist-delta-mlx
  mlx_poe.convert --hf-path path/to/base --draft-bits 4 --mlx-path base-mlx
  mlx_poe.convert --hf-path poe-tiny-chat -q --dry-run"""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(
        "mlx_poe.convert",
        "Convert a Cognica-PoE checkpoint to an MLX folder, which mlx_poe and mlx-lm can load. The "
        "checkpoint is a Hugging Face folder or hub id, a nanochat folder, or a converted folder; "
        "a base, or a specialist together with its base.",
        EXAMPLES,
    )
    parser.add_argument(
        "--hf-path",
        "--model",
        required=True,
        metavar="MODEL",
        help="folder, hub id, or built-in poe-tiny, poe-tiny-chat …",
    )
    parser.add_argument(
        "--mlx-path",
        type=folder_path,
        default="mlx_model",
        metavar="FOLDER",
        help="default: %(default)s",
    )
    add_revision_flag(parser)
    parser.add_argument(
        "--step", type=whole(0), help="step of a nanochat folder (default: its latest)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="type of the tensors that are not quantized (default: as stored; a specialist's "
        "summed head is float32)",
    )
    parser.add_argument(
        "--base",
        metavar="FOLDER",
        help="write a specialist as a delta on this converted base, which several specialists can "
        "share (default: merge it with its base into one model)",
    )
    group = parser.add_argument_group("quantization")
    group.add_argument("-q", "--quantize", action="store_true", help="quantize the matrices")
    group.add_argument("--q-bits", type=int, choices=BITS, help="bits per weight (default: 4)")
    group.add_argument(
        "--q-group-size", type=int, help="weights per scale: 32, 64 or 128 (default: 64)"
    )
    group.add_argument("--q-mode", choices=MODES, help="default: affine")
    group.add_argument(
        "--q-bits-for",
        type=_rule,
        action="append",
        default=[],
        metavar="WHAT=BITS",
        help="different bits for head, embed, attn, mlp, a stage (stage0) or layers (layers0-5); "
        "16 leaves them alone; may be repeated, later ones win",
    )
    group.add_argument(
        "--quant-predicate",
        choices=RECIPES,
        help="mixed recipe: fewer bits for most, more for the head and every third layer's values",
    )
    group.add_argument(
        "--draft-bits",
        choices=DRAFT_BITS,
        metavar="BITS",
        help="also store a copy of the drafting stages, quantized to 2, 3, 4, 5, 6 or 8 bits, "
        "mxfp4 or nvfp4, for --draft-bits of the other commands",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--dry-run", action="store_true", help="show what would be read and written, then stop"
    )
    group.add_argument(
        "--verify",
        nargs="?",
        type=file_path,
        const=False,  # a string would be taken for a path
        metavar="FILE",
        help="run a text (FILE, or a built-in one) through source and result, and compare",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    group.add_argument("--upload-repo", metavar="REPO", help="hub repository to upload to")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    with interruptible():
        return run(build_parser(), _convert, argv)


def _rule(text: str) -> Rule:
    what, _, bits = text.partition("=")
    return what, int(bits)


_rule.__name__ = "WHAT=BITS"


def _convert(args: argparse.Namespace) -> int:
    _check(args)
    target, started = args.mlx_path, time.perf_counter()
    check_target(target, args.overwrite)  # before anything is fetched
    data = read_texts(args.verify) if args.verify else [SAMPLE]
    conversion = prepare(
        find_model(args.hf_path, args.revision),
        step=args.step,
        dtype=args.dtype,
        quantization=_scheme(args),
        recipe=args.quant_predicate,
        rules=args.q_bits_for,
        base=find_model(args.base) if args.base else None,
        draft_bits=args.draft_bits,
    )
    if args.upload_repo and conversion.base and not conversion.base.source.from_hub:
        raise RequestError(
            f"--upload-repo: the delta would refer to {args.base}, which is not on the hub; give "
            "--base as a hub id, or merge by leaving it out"
        )
    if args.dry_run:
        _print_plan(conversion, target)
        return 0
    texts = _verify_texts(conversion, data) if args.verify is not None else []
    with Bars(DownloadColumn()) as bars:
        conversion.write(target, args.overwrite, partial(bars, str(target)))
    seconds = time.perf_counter() - started
    _print_summary(conversion)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    print(f"written to {target} in {seconds:.1f} s, peak memory {size_text(peak)}")
    if texts:
        _verify(args, target, texts)
    if args.upload_repo:
        print(f"uploaded to {upload(target, args.upload_repo)}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Reject flags that cannot work, before any work."""
    for name in ("hf_path", "base", "upload_repo"):
        if getattr(args, name) == "":
            raise RequestError(f"--{name.replace('_', '-')} is empty")
    if args.quant_predicate and args.q_bits:
        raise RequestError("--quant-predicate sets its own bits: leave out --q-bits")
    if args.upload_repo:
        try:
            validate_repo_id(args.upload_repo)
        except HFValidationError as error:
            raise RequestError(f"--upload-repo {args.upload_repo}: {error}") from None


def _scheme(args: argparse.Namespace) -> Scheme | None:
    if args.quantize:
        return scheme(args.q_bits, args.q_group_size, args.q_mode or "affine")
    for name in ("q_bits", "q_group_size", "q_mode", "q_bits_for", "quant_predicate"):
        if getattr(args, name) not in (None, []):
            raise RequestError(f"--{name.replace('_', '-')} needs -q")
    return None


def _print_plan(conversion: Conversion, target: Path) -> None:
    print("would read")
    for link in conversion.checkpoint.chain:
        own = link.own_weights.values()
        size = sum(tensor.nbytes for tensor in own)
        print(f"  {link.source.folder}: {len(own)} tensors, {size_text(size)}")
    print(f"would write to {target}")
    for file, specs in conversion.layout.items():
        print(f"  {file}: {len(specs)} tensors, {size_text(sum(map(nbytes, specs)))}")
    _print_summary(conversion)


def _print_summary(conversion: Conversion) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in conversion.settings().items():
        table.add_row(key, escape(value))
    table.add_row("parameters", f"{conversion.n_parameters:,}")
    table.add_row("size", f"{size_text(conversion.source_bytes)} -> {size_text(conversion.nbytes)}")
    Console().print(table)


def _verify_texts(conversion: Conversion, data: Sequence[Text]) -> list[list[int]]:
    """The texts to compare on, as tokens. RequestError if there are none."""
    folder, size = conversion.checkpoint.tokenizer_folder, conversion.config.vocab_size
    texts = segments(data, Tokenizer.from_folder(folder, n_vocab=size), VERIFY_TOKENS)
    if not texts:
        raise RequestError("--verify: the text is too short to compare on")
    return texts


def _verify(args: argparse.Namespace, target: Path, texts: Sequence[Sequence[int]]) -> None:
    source, tokenizer = load(args.hf_path, revision=args.revision, step=args.step)
    lengths = tokenizer.token_byte_lengths(source.config.vocab_size)
    differences = compare(source, load(target)[0], texts, lengths)
    headings = ("stage", "max logit difference", "top-1 agreement", "bits per byte")
    columns = (Column(heading, justify="right") for heading in headings)
    table = Table(*columns, title=f"source and result on {sum(map(len, texts))} tokens")
    for stage, difference in enumerate(differences):
        before, after = difference.bits_per_byte
        table.add_row(
            "full" if stage == len(differences) - 1 else str(stage),
            f"{difference.logit_difference:.5f}",
            f"{difference.agreement:.1%}",
            f"{before:.4f} -> {after:.4f}",
        )
    Console().print(table)
