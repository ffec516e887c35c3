"""A conversation with a model: its turns, settings, and the state carried from turn to turn.

- in: models over one base, and what the user says
- out: replies, token by token; nothing here knows about a terminal
- every reply keeps its exact token ids, so the state already holds the start of the next prompt
  and only the new turn is run
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cognica_mlx.convert.chat_layout import BOS, REPLY_END, REPLY_START, with_system
from cognica_mlx.decoding.json_schema import read_schema
from cognica_mlx.decoding.state import DecodingState, Progress
from cognica_mlx.errors import PoEError, RequestError
from cognica_mlx.network.model import PoEModel
from mlx_poe.chat.saved_chat import SavedChat, read_chat, write_chat
from mlx_poe.chat.turns import Settings, Turn
from mlx_poe.generation.reply_form import make_grammar, with_usual_penalty
from mlx_poe.generation.request import SAMPLING, read_request
from mlx_poe.generation.text import GenerationResponse, stream_generate
from mlx_poe.generation.tools import Functions, read_functions
from mlx_poe.loading.machine_costs import known_costs
from mlx_poe.loading.specialists import Specialists
from mlx_poe.loading.tokenizer import Tokenizer
from mlx_poe.paths import user_path
from mlx_poe.rows import named

__all__ = ["Chat", "Settings", "Turn"]

SLACK = 256  # positions that /undo and /retry can take back without rerunning the conversation


class Chat:
    """A conversation with a model, or with specialists over it.

    `last` holds the responses of the latest reply. With `falls_back`, a mode that does not pay on
    this machine falls back to full depth for the rest of the reply. After an interrupt or an
    error, the conversation is unchanged, or holds the reply up to that point.
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
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.settings = settings or Settings()
        self.falls_back = falls_back
        self.turns: list[Turn] = []
        self.last: list[GenerationResponse] = []
        self.state = self._new_state(model)

    @staticmethod
    def _new_state(model: PoEModel) -> DecodingState:
        # Within this distance, switching specialists runs only the specialist's own layers.
        return DecodingState(model, slack=SLACK, keep_trunk=2 * model.config.sequence_len)

    @property
    def can_chat(self) -> bool:
        """Whether the model was trained to chat; a base model only continues text."""
        return bool(self.model.config.specialist_layers)

    # Settings

    def change(self, **settings: Any) -> None:
        """Replace settings by name. RequestError, changing nothing, if they do not work.

        After a change of the opening, the next reply runs the conversation again.
        """
        changed = replace(self.settings, **settings)
        self._check(self.model, changed)
        self.settings = changed

    def _check(self, model: PoEModel, settings: Settings) -> None:
        read_request(self.tokenizer, [self.tokenizer.token_id(BOS)], settings.asked).on(model)

    def set_mode(self, mode: str, **options: Any) -> None:
        """Change the decoding mode and its options; see `change`."""
        sampling = {k: v for k, v in self.settings.options.items() if k in SAMPLING}
        self.change(mode=mode, options=sampling | options)

    def set_option(self, name: str, value: Any) -> None:
        """Change a sampling option; None restores the default. See `change`."""
        options = {**self.settings.options, name: value}
        self.change(options={k: v for k, v in options.items() if v is not None})

    def set_functions(self, functions: Functions | None) -> None:
        """Offer functions in place of the system text; None brings the system text back.

        RequestError if they are not valid functions, or if their parameters have a schema that
        cannot be enforced.
        """
        if functions:
            make_grammar(self.tokenizer, tools=functions)  # even if a schema comes before them
        self.change(functions=read_functions(functions) if functions else [])

    def set_schema(self, text: str | None) -> None:
        """Reply in JSON that fits the schema in `text`; None turns this off. See `change`."""
        self.change(schema=None if text is None else read_schema(text))

    def use(self, name: str | None) -> None:
        """Switch to another specialist, or with None to the base model, and keep the conversation.

        Raises RequestError if no specialist has that name, or if it does not support the mode.
        """
        model, settings = self.specialists.use(name), replace(self.settings, specialist=name)
        self._check(model, settings)
        state = self.state.switch(model)
        self.model, self.state, self.settings = model, state, settings

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
        prompt = self._read([*turns, Turn(text)])[:-1]  # up to the end of the reply to come
        self.last = []
        stream: Generator[GenerationResponse, None, None] = stream_generate(  # type: ignore
            *(self.model, self.tokenizer, prompt),
            state=self.state,
            prompt_progress_callback=progress,
            costs=known_costs if self.falls_back else None,
            **with_usual_penalty(self.settings.asked, self.can_chat),
        )
        try:
            for response in stream:
                self.last.append(response)
                yield response
        except Exception:
            # We cannot tell how far the state got. The next reply runs the conversation again.
            self.state = self._new_state(self.model)
            raise
        finally:
            try:
                stream.close()
            finally:
                if self.last:
                    reply = "".join(r.text for r in self.last)
                    self.turns = [*turns, Turn(text, reply, self._written(reply))]

    def _written(self, reply: str) -> list[int]:
        """The ids of the last reply, without an end token, or a stop text and other text held back
        when it ended: the model should read what the user sees."""
        ids = [r.token for r in self.last]
        if ids[-1] in self.tokenizer.eos_token_ids:
            ids.pop()
        while not reply.startswith(start := self.tokenizer.decode(ids)):
            ids.pop()
        rest = reply.removeprefix(start)
        return [*ids, *self.tokenizer.encode(rest, add_special_tokens=False)]

    @property
    def tokens(self) -> list[int]:
        """The conversation so far, as the model reads it."""
        return self._read(self.turns)

    def _read(self, turns: Sequence[Turn]) -> list[int]:
        start, end = map(self.tokenizer.token_id, (REPLY_START, REPLY_END))
        tokens, system = [self.tokenizer.token_id(BOS)], self.settings.system_text
        for turn in turns:
            text, system = with_system(system, turn.user) if system else turn.user, ""
            tokens += [*self.tokenizer.encode_turn("user", text), start, *turn.reply_tokens, end]
        return tokens

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
        self.turns, self.last, self.state = [], [], self._new_state(self.model)

    def save(self, path: Path) -> None:
        """Write the conversation and its settings to a JSON file, whole or not at all.

        Raises RequestError for an invalid path, CheckpointError if it cannot be written.
        """
        saved = SavedChat(self.name, self._revisions(self.model), self.settings, self.turns)
        write_chat(user_path(path), saved)

    def _revisions(self, model: PoEModel) -> list[str | None]:
        return [self.specialists.base.revision, model.revision]

    def load(self, path: Path) -> list[str]:
        """Continue a saved conversation. The next reply reads it from the beginning.

        Returns notes for the user: what the file names that is not used, and whether it was saved
        with another model. A reply edited by hand is read as edited. Raises CheckpointError,
        changing nothing, for a file that is not a saved chat, and RequestError for settings that
        this model does not support.
        """
        path = user_path(path)
        saved = read_chat(path)
        with named(str(path)):
            model = self.specialists.use(saved.settings.specialist)
            self._check(model, saved.settings)
        turns = [replace(turn, reply_tokens=self._spelling(turn)) for turn in saved.turns]
        state, revisions = self._new_state(model), self._revisions(model)
        self.settings, self.turns, self.last = saved.settings, turns, []
        self.model, self.state = model, state
        if saved.model and saved.model != self.name:
            return [*saved.notes, f"{path} was saved with {saved.model}; this is {self.name}"]
        return saved.notes + [
            f"{path} was saved with revision {then} of {saved.model} or its specialist, and this "
            f"is another one: start with {then} to continue with it"
            for then in dict.fromkeys(saved.revisions)
            if then and then not in revisions
        ]

    def _spelling(self, turn: Turn) -> list[int]:
        """The ids saved with a reply if they still decode to it, otherwise new ones."""
        try:
            self.model.check_ids(turn.reply_tokens)
            if self.tokenizer.decode(turn.reply_tokens) == turn.reply:
                return turn.reply_tokens
        except PoEError:
            pass
        return self.tokenizer.encode(turn.reply, add_special_tokens=False)
