"""A training run from its settings to a specialist's folder.

- in: `TrainingSettings`, a folder to write, a `Reporter` that shows progress
- out: the folder, or a checkpoint to resume from if the run ends early
- the base is in memory only while it runs; with a store, training holds only its heads
"""

from __future__ import annotations

import gc
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from cognica_mlx.convert.checkpoint import read_checkpoint
from cognica_mlx.convert.conversion import reference_to
from cognica_mlx.convert.formats.whole_folder import check_target
from cognica_mlx.errors import CheckpointError, RequestError
from cognica_mlx.files.byte_sizes import size_text
from cognica_mlx.files.stored import dtype_named
from cognica_mlx.network.device import prepare
from cognica_mlx.network.model import PoEModel
from cognica_mlx.training.batches import Batch, Batches
from cognica_mlx.training.optimizer import MuonAdamW
from cognica_mlx.training.saved_training import fitted, read_training, save_training
from cognica_mlx.training.stage import NewStage, stacked, stacked_config
from cognica_mlx.training.store import Activations, LiveBase
from cognica_mlx.training.trainer import DivergedError, Trainer, Training
from mlx_poe.loading.load import BUILT_IN, find_model, load
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.training.chat_tokens import word_rows
from mlx_poe.training.data import Split, fingerprint, read_split
from mlx_poe.training.delta import Delta
from mlx_poe.training.reporter import InterruptedTraining, Reporter, Result
from mlx_poe.training.settings import TrainingSettings, resumed
from mlx_poe.training.store_folders import base_fingerprint, stored_activations

# Settings that the specialist's folder names.
DESCRIBED = (
    *("batch_size", "grad_accumulation_steps", "optimizer", "learning_rate"),
    *("max_grad_norm", "pack"),
)


def checkpoint_file(output: Path) -> Path:
    """The checkpoint of a run for the folder `output`, which is next to it."""
    return output.with_name(f"{output.name}.checkpoint.safetensors")


def resumed_settings(output: Path, given: dict[str, Any]) -> TrainingSettings:
    """The settings of an interrupted run; `resumed` checks the changes in `given`.

    Raises CheckpointError if there is no checkpoint.
    """
    return resumed(read_training(checkpoint_file(output))[1]["settings"], given)


def train(
    settings: TrainingSettings,
    output: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    overwrite: bool = False,
    store_path: Path | None = None,
) -> Result:
    """Train a specialist and write its folder, with the weights of the lowest validation loss.

    Every `save_every` iterations, and on an interrupt, the checkpoint next to `output` is
    rewritten; with `resume`, training continues from it as if it had never stopped. The checkpoint
    is removed once the folder is whole. `overwrite` replaces an existing folder and, without
    `resume`, drops an existing checkpoint.

    Raises RequestError for invalid settings, data or output, CheckpointError for damaged files or
    a full disk, DivergedError if the loss is not finite, and InterruptedTraining on Ctrl-C.
    """
    check_target(output, overwrite)
    saved_at = checkpoint_file(output)
    if saved_at.exists() and not resume and not overwrite:
        raise RequestError(
            f"{saved_at} is a checkpoint of an interrupted run: continue it (--resume), or start "
            "over (--overwrite)"
        )
    run = _Run(settings, output, reporter, overwrite, store_path)
    state = run.start
    if resume:
        state, saved = read_training(saved_at)
        state = fitted(state, run.start, saved_at)
        run.check_unchanged(saved)
        if state.iteration > settings.iters:
            raise RequestError(
                f"iters {settings.iters}: the checkpoint is already at iteration {state.iteration}"
            )
        reporter.note(f"resuming after iteration {state.iteration}")
    elif saved_at.exists():
        saved_at.unlink()
    result = run.train(state)
    saved_at.unlink(missing_ok=True)
    return result


class _Run:
    """What the phases of a run share. After construction, the base is not read again."""

    def __init__(
        self,
        settings: TrainingSettings,
        output: Path,
        reporter: Reporter,
        overwrite: bool,
        store_path: Path | None,
    ):
        self.settings, self.output, self.reporter = settings, output, reporter
        self.overwrite = overwrite
        self.checkpoint = read_checkpoint(find_model(settings.model, settings.revision))
        check_target(output, overwrite, [link.source.folder for link in self.checkpoint.chain])
        self.config = stacked_config(self.checkpoint.config, settings.layers, settings.head_mode)
        folder = self.checkpoint.tokenizer_folder
        self.tokenizer = Tokenizer.from_folder(folder, n_vocab=self.config.vocab_size)
        self.train_split, self.valid_split = (self._read(name) for name in ("train", "valid"))
        # Read it now, so that errors in it are reported before training.
        self.test_split = self._read("test") if settings.test else None
        self.dtype = dtype_named(settings.dtype)
        prepare(self.dtype)
        self.base = base_fingerprint(self.checkpoint)
        base, model = self._load()
        self.stage = NewStage(model, self.dtype, grad_checkpoint=settings.grad_checkpoint)
        parameters = self.stage.start(base, settings.seed)
        activations, self.valid_activations = self._activations(model, store_path)
        del base, model
        gc.collect()  # a model and its stages refer to each other
        self.batches = Batches(self.train_split.texts, settings.batch_size, settings.seed)
        self.valid_batches = self._validation()
        self.trainer = Trainer(
            self.stage,
            MuonAdamW(
                settings.optimizer, settings.max_grad_norm, self.config.n_embd, self.stage.untrained
            ),
            self.batches,
            activations,
            iterations=settings.iters,
            learning_rate=settings.learning_rate,
            accumulation=settings.grad_accumulation_steps,
        )
        self.start = self.trainer.start(parameters)
        reporter.note(
            f"training needs at most {size_text(self.trainer.most_bytes(self.start))} of memory"
        )

    def _read(self, name: str) -> Split:
        settings = self.settings
        longest = settings.max_seq_length or self.config.sequence_len
        split = read_split(
            Path(settings.data) / f"{name}.jsonl",
            self.tokenizer,
            longest=longest,
            mask_prompt=settings.mask_prompt,
            pack=settings.pack and name == "train",
        )
        self.reporter.note(
            f"{name}: {split.rows} rows, {split.tokens} tokens, of which {split.counted} count"
        )
        if split.cut:
            text = f"{name}: {split.cut} rows are longer than {longest} tokens and are cut"
            if split.emptied:
                text += f"; {split.emptied} of them are left out, as no counted tokens remain"
            self.reporter.note(text)
        return split

    def _validation(self) -> list[Batch]:
        batches = Batches(self.valid_split.texts, self.settings.batch_size, 0).in_order()
        count = self.settings.val_batches
        if count == -1 or count >= len(batches):
            return batches
        # Spread over all lengths; the batches are sorted by length.
        return [batches[i * len(batches) // count] for i in range(count)]

    def _load(self) -> tuple[PoEModel, PoEModel]:
        """The base, and a model with the new stage on top. No weights are read yet."""
        settings = self.settings
        base, _ = load(settings.model, dtype=settings.dtype, revision=settings.revision, lazy=True)
        self.embeddings = word_rows(base, self.tokenizer, settings.chat_tokens)
        rows, values = [], mx.zeros((0, self.config.n_embd))
        if self.embeddings:
            rows = list(self.embeddings)
            values = base.wte(mx.array(list(self.embeddings.values())))
            shown = ", ".join(self.tokenizer.decode([token]) for token in rows)
            self.reporter.note(f"chat tokens that start as words: {shown}")
        return base, stacked(base, self.config, rows, values)

    def _activations(self, model: PoEModel, parent: Path | None) -> tuple[Activations, Activations]:
        """The activations of the training rows and of the validation rows."""
        if not self.settings.store:
            live = LiveBase(model)
            return live, live
        texts = [self.train_split.texts, self.valid_split.texts]
        frozen = self.checkpoint.config.n_layer
        about = {
            "base": self.base,
            "windows": list(self.config.windows[:frozen]),  # which a stage on top may change
            "embeddings": sorted(self.embeddings.items()),
            "bits": self.settings.store_bits,
        }
        train, valid = stored_activations(texts, model, self.dtype, about, parent, self.reporter)
        return train, valid

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint must have in common with the run that resumes from it."""
        splits = {"train": self.train_split, "valid": self.valid_split}
        hashes = {name: fingerprint(split.texts, counted=True) for name, split in splits.items()}
        return {"base": self.base, **hashes}

    def check_unchanged(self, saved: dict[str, Any]) -> None:
        """Raise CheckpointError if base or data have changed since the checkpoint."""
        for name, value in self.identity.items():
            if saved.get("identity", {}).get(name) != value:
                what = f"{name}.jsonl" if name != "base" else f"the model {self.settings.model}"
                raise CheckpointError(
                    f"{what} has changed since the checkpoint was written: restore it, or start "
                    "over (--overwrite)"
                )

    def save(self, state: Training) -> None:
        """Write the checkpoint. If it cannot be written, CheckpointError says what is kept."""
        saved = {"settings": self.settings.to_dict(), "identity": self.identity}
        try:
            save_training(checkpoint_file(self.output), state, saved)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._kept()}") from None

    def train(self, state: Training) -> Result:
        """Run the remaining iterations, then write the folder."""
        mx.clear_cache()
        mx.reset_peak_memory()
        started, first = time.perf_counter(), state.iteration
        positions = 0
        try:
            self._progress(state)
            if not state.curve:
                state = self._evaluate(state)
            while state.iteration < self.settings.iters:
                texts = self.batches.texts_at(state.iteration)
                positions += sum(len(self.batches.texts[i]) for i in texts)
                state = self._next(state)
            state = self.trainer.finish(state)
            # Not yet, if the run was interrupted here and is told to stop here.
            if state.curve[-1].iteration < state.iteration:
                state = self._evaluate(state)
            seconds = time.perf_counter() - started
            # Until the folder is whole, the checkpoint holds everything.
            with suppress(CheckpointError):  # there may be room for the folder, which is smaller
                self.save(state)
            self._write(state)
        except KeyboardInterrupt:
            self.save(state)
            raise InterruptedTraining(state.iteration) from None
        except DivergedError as error:
            remedy = "a lower --learning-rate may help"
            raise DivergedError(f"{error}: {self._kept()}; {remedy}") from None
        except Exception:  # a disk that is full, memory that is short
            self.save(state)
            self.reporter.note(self._kept())
            raise
        rate = positions / seconds if state.iteration > first else 0.0
        return Result(
            curve=state.curve,
            best=state.best_evaluation,
            seconds=seconds,
            tokens_per_second=rate,
            peak_memory=mx.get_peak_memory(),
            valid=self.valid_split.texts,
            test=self.test_split.texts if self.test_split else None,
        )

    def _progress(self, state: Training, status: str = "") -> None:
        self.reporter.progress("training", state.iteration, self.settings.iters, status)

    def _next(self, state: Training) -> Training:
        settings = self.settings
        state = self.trainer.step(state)
        self._progress(state, f"loss {state.loss / max(state.loss_tokens, 1):.4f}")
        if state.iteration < settings.iters:
            if state.iteration % settings.steps_per_eval == 0:
                state = self._evaluate(state)
            if state.iteration % settings.save_every == 0:
                self.save(state)
        return state

    def _evaluate(self, state: Training) -> Training:
        state = self.trainer.evaluate(state, self.valid_batches, self.valid_activations)
        rate = self.trainer.rate(max(state.iteration - 1, 0))
        self.reporter.evaluated(state.curve[-1], rate)
        return state

    def _kept(self) -> str:
        file = checkpoint_file(self.output)
        if not file.is_file():
            return "there was no checkpoint yet"
        kept, _ = read_training(file)
        return f"the checkpoint of iteration {kept.iteration} is kept; continue it with --resume"

    def _write(self, state: Training) -> None:
        settings, source = self.settings, self.checkpoint.source
        best = state.best_evaluation
        described = {
            "data": Path(settings.data).resolve().name,
            "rows": f"{self.train_split.rows} to learn from, {self.valid_split.rows} to measure on",
            "layers": settings.layers,
            "head_mode": self.config.head_mode,
            "iterations": state.iteration,
            **{name: getattr(settings, name) for name in DESCRIBED},
            "mask_prompt": settings.mask_prompt is not False,
            "seed": settings.seed,
            "validation loss": round(best.valid_loss, 6),
            "validation bits per byte": round(best.bits_per_byte, 6),
        }
        # Moving the specialist's folder does not move a built-in model, so the path is absolute.
        built_in = BUILT_IN.resolve() in source.folder.resolve().parents
        reference = str(source.folder.resolve()) if built_in else reference_to(source, self.output)
        name = source.name if source.from_hub or built_in else source.folder.resolve().name
        Delta(
            base=self.checkpoint,
            config=self.config,
            state=state,
            embeddings=self.embeddings,
            base_name=name,
            reference=reference,
            training=described,
        ).write(self.output, self.overwrite)
