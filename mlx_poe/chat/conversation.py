"""A conversation with a model: its turns, settings, and the state carried from turn to turn.

- in: models over one base, and what the user says
- out: replies, token by token; nothing here knows about a terminal
- every turn keeps its exact token ids, so the state already holds the start of the next prompt
  and only the new turn is run
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from cognica_mlx.convert.chat_layout import BOS, REPLY_END, REPLY_START, with_system
from cognica_mlx.decoding.json_schema import read_schema
from cognica_mlx.decoding.modes import MODES, ModeOptions, make_mode
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.decoding.saved_state import from_arrays, to_arrays
from cognica_mlx.decoding.state import MAX_PENDING, DecodingState, Progress
from cognica_mlx.errors import CheckpointError, PoEError, PoEWarning, RequestError
from cognica_mlx.network.model import PoEModel
from mlx_poe.chat.saved_chat import SavedChat, read_chat, write_chat
from mlx_poe.chat.turns import Settings, Turn
from mlx_poe.generation.penalty import with_usual_penalty
from mlx_poe.generation.reply_form import make_grammar
from mlx_poe.generation.text import GenerationResponse, stream_generate
from mlx_poe.generation.tools import Functions, read_functions
from mlx_poe.loading.machine_costs import known_costs
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.paths import user_path

__all__ = ["Chat", "Settings", "Turn"]

SLACK = 256  # positions that /undo and /retry can take back without rerunning the conversation


class Chat:
    """A conversation with a model, or with specialists over it.

    The `set_...` methods check their arguments before they change `settings`. `last` holds the
    responses of the latest reply. With `falls_back`, a mode that does not pay on this machine falls
    back to full depth for the rest of the reply. After an interrupt or an error, the conversation
    is unchanged, or holds the reply up to that point.
    """

    def __init__(
        self,
        model: PoEModel,
        tokenizer: Tokenizer,
        name: str,
        settings: Settings | None = None,
        *,
        falls_back: bool = False,
    ) -> None:
        self.specialists = Specialists(model)
        self.tokenizer, self.name = tokenizer, name
        self.settings = settings or Settings()
        self.falls_back = falls_back
        self.turns: list[Turn] = []
        self.last: list[GenerationResponse] = []
        self.model = model
        self.state = self._new_state()

    def _new_state(self, model: PoEModel | None = None) -> DecodingState:
        model = model or self.model
        # Within this distance, switching specialists runs only the specialist's own layers.
        keep_trunk = 2 * model.config.sequence_len
        return DecodingState(model, slack=SLACK, keep_trunk=keep_trunk)

    @property
    def can_chat(self) -> bool:
        """Whether the model was trained to chat; a base model only continues text."""
        return bool(self.model.config.specialist_layers)

    # Settings

    def set_mode(self, mode: str, **options: Any) -> None:
        """Change the decoding mode and its options. Raises RequestError, changing nothing, for
        a mode or options that do not work."""
        if mode not in MODES:
            raise RequestError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        modes = {name for names in MODES.values() for name in names}
        kept = {k: v for k, v in self.settings.options.items() if k not in modes}
        self._check(self.model, mode, kept | options)
        self.settings.mode, self.settings.options = mode, kept | options

    def set_option(self, name: str, value: Any) -> None:
        """Change a sampling option; None restores the default. RequestError for a bad value."""
        options = {k: v for k, v in self.settings.options.items() if k != name}
        if value is not None:
            options[name] = value
        self._check(self.model, self.settings.mode, options)
        self.settings.options = options

    @staticmethod
    def _check(model: PoEModel, mode: str, options: dict[str, Any]) -> None:
        names = ModeOptions.__dataclass_fields__
        sampling = SamplingOptions(**{k: v for k, v in options.items() if k not in names})
        chosen = ModeOptions(**{k: v for k, v in options.items() if k in names})
        Sampler(sampling)
        make_mode(model, mode, chosen, model.calibration)

    def set_max_tokens(self, count: int) -> None:
        """Limit the length of replies. RequestError if `count` is below 1."""
        if count < 1:
            raise RequestError(f"max_tokens {count} must be at least 1")
        self.settings.max_tokens = count

    def set_stop(self, texts: Sequence[str]) -> None:
        """End replies before any of these texts. RequestError if one is empty."""
        if not all(texts):
            raise RequestError("a stop text is empty")
        self.settings.stop = list(texts)

    def set_system(self, text: str) -> None:
        """Change the system text. It replaces any functions offered.

        The next reply runs the conversation again from the beginning.
        """
        self._change_opening(system=text, functions=[])

    def set_functions(self, functions: Functions | None) -> None:
        """Offer functions in place of the system text; None brings the system text back.

        The next reply runs the conversation again. RequestError if they are not valid functions,
        or if their parameters have a schema that cannot be enforced.
        """
        if functions:
            make_grammar(self.tokenizer, tools=functions)
        self._change_opening(functions=read_functions(functions) if functions else [])

    def set_schema(self, text: str | None) -> None:
        """Reply in JSON that fits the schema in `text`; None turns this off. RequestError for a
        schema that cannot be used."""
        schema = None if text is None else read_schema(text)
        make_grammar(self.tokenizer, json_schema=schema)
        self.settings.schema = schema

    def _change_opening(self, **changes: Any) -> None:
        settings, turns = replace(self.settings, **changes), self.turns
        if turns:
            tokens = self._user_tokens(turns[0].user, settings.system_text)
            turns = [replace(turns[0], tokens=tokens), *turns[1:]]
        self.settings, self.turns = settings, turns

    def use(self, name: str | None) -> None:
        """Switch to another specialist, or with None to the base model, and keep the conversation.

        Raises RequestError if no specialist has that name, or if it does not support the mode.
        """
        model = self.specialists.use(name)
        self._check(model, self.settings.mode, self.settings.options)
        state = self.state.switch(model)
        self.model, self.state, self.settings.specialist = model, state, name

    # Replies

    def send(
        self, text: str, progress: Progress | None = None
    ) -> Generator[GenerationResponse, None, None]:
        """Stream the reply to `text`, then add both to the conversation.

        A reply that is cut short is kept up to that point, unless it is empty. Raises
        RequestError for an empty text or invalid settings.
        """
        if not text.strip():
            raise RequestError("there is nothing to reply to")
        yield from self._reply(self.turns, text, progress)

    def retry(self, progress: Progress | None = None) -> Generator[GenerationResponse, None, None]:
        """Stream another reply to the last message. It replaces the old one unless it is empty.

        Raises RequestError if there is no message yet.
        """
        if not self.turns:
            raise RequestError("there is nothing to retry yet")
        yield from self._reply(self.turns[:-1], self.turns[-1].user, progress)

    def _reply(
        self, turns: list[Turn], text: str, progress: Progress | None
    ) -> Generator[GenerationResponse, None, None]:
        """The reply to `text` after `turns`. The conversation changes only at the end, at once."""
        tokens = self._user_tokens(text, "" if turns else self.settings.system_text)
        self.last = []
        stream = self._stream(self._joined(turns) + tokens, progress)
        try:
            for response in stream:
                self.last.append(response)
                yield response
        except Exception:
            # We cannot tell how far the state got. The next reply runs the conversation again.
            self.state = self._new_state()
            raise
        finally:
            try:
                stream.close()
            finally:
                if self.last:
                    self.turns = [*turns, self._turn(text, tokens)]

    def _stream(
        self, prompt: list[int], progress: Progress | None
    ) -> Generator[GenerationResponse, None, None]:
        settings = self.settings
        options: dict[str, Any] = {**settings.options}
        if settings.schema is not None:
            options["json_schema"] = settings.schema
        elif settings.functions:
            options["tools"] = settings.functions
        return stream_generate(  # type: ignore[return-value]
            self.model,
            self.tokenizer,
            prompt,
            max_tokens=settings.max_tokens,
            mode=settings.mode,
            stop=settings.stop,
            state=self.state,
            prompt_progress_callback=progress,
            costs=known_costs if self.falls_back else None,
            **with_usual_penalty(options, self.can_chat),
        )

    def _turn(self, text: str, tokens: list[int]) -> Turn:
        """The turn made of the user's text and the reply in `last`."""
        ids = [r.token for r in self.last]
        reply = "".join(r.text for r in self.last)
        ended = self.last[-1].finish_reason == "stop"
        if ids[-1] in self.tokenizer.eos_token_ids:
            ids.pop()
        elif ended:
            ids = self._shortened(ids, reply)
        return Turn(text, tokens, reply, ids, ended)

    def _shortened(self, ids: list[int], text: str) -> list[int]:
        """Token ids that spell `text`, which is what `ids` spell, cut before a stop text.

        This keeps the stop text out of the conversation that the model reads later.
        """
        while not text.startswith(start := self.tokenizer.decode(ids)):
            ids = ids[:-1]
        rest = text.removeprefix(start)
        return [*ids, *self.tokenizer.encode(rest, add_special_tokens=False)]

    @property
    def tokens(self) -> list[int]:
        """The conversation so far, as the model reads it."""
        return self._joined(self.turns)

    def _joined(self, turns: Sequence[Turn]) -> list[int]:
        end = self.tokenizer.token_id(REPLY_END)
        tokens = [self.tokenizer.token_id(BOS)]
        for turn in turns:
            tokens += [*turn.tokens, *turn.reply_tokens, end]
        return tokens

    def _user_tokens(self, text: str, system_text: str) -> list[int]:
        """A user's turn, up to where the reply begins. The first one includes the system text."""
        if system_text:
            text = with_system(system_text, text)
        tokens = self.tokenizer.encode_turn("user", text)
        return [*tokens, self.tokenizer.token_id(REPLY_START)]

    # The conversation as a whole

    def undo(self) -> Turn:
        """Take back the last exchange and return it. RequestError if there is none."""
        if not self.turns:
            raise RequestError("there is nothing to take back yet")
        turn = self.turns[-1]
        self.turns = self.turns[:-1]
        return turn

    def reset(self) -> None:
        """Forget the conversation; the settings stay."""
        self.turns, self.last, self.state = [], [], self._new_state()

    def save(self, path: Path) -> None:
        """Write conversation, settings and state to one safetensors file, whole or not at all.

        Raises RequestError for an invalid path, CheckpointError if it cannot be written.
        """
        arrays, fields = to_arrays(self.state)
        probe = _probe(self.model)
        revisions = self._revisions(self.model)
        saved = SavedChat(self.name, self.settings, self.turns, revisions, probe, fields, arrays)
        write_chat(user_path(path), saved)

    def _revisions(self, model: PoEModel) -> list[str | None]:
        return [self.specialists.base.revision, model.revision]

    def load(self, path: Path) -> bool:
        """Continue a saved conversation. Returns True if its state fits and nothing is rerun. Warns
        if it was saved with other commits of the models.

        Raises CheckpointError, changing nothing, for a file that is not a saved chat, and
        RequestError for settings that this model does not support.
        """
        path = user_path(path)
        saved = read_chat(path)
        settings = saved.settings
        model = self.specialists.use(settings.specialist)
        self._check(model, settings.mode, settings.options)
        turns: list[Turn] = []
        for number, turn in enumerate(saved.turns, 1):
            try:
                model.check_ids([*turn.tokens, *turn.reply_tokens])
                if not self.tokenizer.decode(turn.reply_tokens).startswith(turn.reply):
                    raise CheckpointError("its reply does not match its tokens")
            except PoEError as error:
                message = f"{path} is a damaged chat, or another model's: turn {number}: {error}"
                raise CheckpointError(message) from None
            # Encode again, so that the model reads what the user sees.
            tokens = self._user_tokens(turn.user, "" if turns else settings.system_text)
            turns.append(replace(turn, tokens=tokens))
        state = self._saved_state(model, saved)
        ready = state is not None
        state = state or self._new_state(model)
        self.settings, self.turns, self.model, self.last = settings, turns, model, []
        self.state = state
        for then, now in zip(saved.revisions, self._revisions(model), strict=True):
            if then and then != now:
                warnings.warn(
                    f"{path} was saved with revision {then} of {saved.model} or its specialist, "
                    f"and this is {now or 'another model'}: start with {then} to continue with it",
                    PoEWarning,
                    stacklevel=2,
                )
        return ready

    def _saved_state(self, model: PoEModel, saved: SavedChat) -> DecodingState | None:
        """The state in a saved chat; None if it does not belong to `model` as configured now."""
        fresh = self._new_state(model)
        sizes = {"slack": SLACK, "max_pending": MAX_PENDING, "keep_trunk": fresh.keep_trunk}
        if saved.revisions != self._revisions(model) and any(saved.revisions):
            return None
        if saved.probe != _probe(model) or any(saved.state.get(k) != v for k, v in sizes.items()):
            return None
        try:
            return from_arrays(model, saved.arrays, saved.state)
        except PoEError:
            return None

    @property
    def nbytes(self) -> int:
        """The state's size in bytes."""
        return self.state.nbytes


def _probe(model: PoEModel) -> list[float]:
    """A few logits, to recognize the model that a saved state belongs to."""
    return [round(z, 2) for z in model(mx.array([[0, 1]]))[0, -1, :8].tolist()]  # type: ignore[arg-type,union-attr]
