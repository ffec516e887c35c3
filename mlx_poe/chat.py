"""A conversation with a model: turns, settings and the state that carries over between them.

- in: models over one base, what the user says
- out: replies token by token; nothing here knows a terminal
- every turn keeps its own token ids, as they were said and generated, so that the text of the next
  prompt is what the state holds and only the new turn is run
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from cognica_mlx.decoding.modes import MODES, PACED_MODES, ModeOptions, make_mode
from cognica_mlx.errors import CheckpointError, PoEError, RequestError
from cognica_mlx.model import PoEModel
from cognica_mlx.sampling import Sampler, SamplingOptions
from cognica_mlx.saved_state import from_arrays, to_arrays
from cognica_mlx.state import DecodingState, Progress
from mlx_poe.generate import GenerationResponse, stream_generate
from mlx_poe.machine import known_costs
from mlx_poe.specialists import Specialists
from mlx_poe.tokenizer import BOS, Tokenizer

# Greedy decoding of the specialists loops at this scale without one.
SPECIALIST_PENALTY = 1.15
SLACK = 256  # positions that /undo and /retry take back without reading the talk again
_FORMAT = "cognica-mlx chat 1"


@dataclass
class Settings:
    """How replies are made. `options` are sampling options and those of `mode`, by name."""

    mode: str = "full"
    options: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    max_tokens: int = 512
    specialist: str | None = None


@dataclass(frozen=True)
class Turn:
    """What the user said and the reply, with the token ids of both; `ended` if it came to an end
    by itself."""

    user: str
    tokens: list[int]
    reply: str
    reply_tokens: list[int]
    ended: bool


class Chat:
    """A talk with a model, or with the specialists over it.

    `settings` may be changed between replies; `set_option` and `set_mode` check what they are
    given. `last` holds the responses of the latest reply. With `parks` a mode that does not pay on
    this machine goes over to full depth for the rest of a reply.
    """

    def __init__(
        self,
        model: PoEModel,
        tokenizer: Tokenizer,
        name: str,
        settings: Settings | None = None,
        *,
        parks: bool = False,
    ) -> None:
        self.specialists = Specialists(model)
        self.tokenizer, self.name = tokenizer, name
        self.settings = settings or Settings()
        self.parks = parks
        self.turns: list[Turn] = []
        self.last: list[GenerationResponse] = []
        self.model = model
        self.state = self._new_state()

    def _new_state(self) -> DecodingState:
        # So far back a change of specialist runs only the specialist's own layers.
        keep_trunk = 2 * self.model.config.sequence_len
        return DecodingState(self.model, slack=SLACK, keep_trunk=keep_trunk)

    @property
    def can_chat(self) -> bool:
        """Whether the model has been trained to talk: a base only continues texts."""
        return bool(self.model.config.specialist_layers)

    def set_mode(self, mode: str, **options: Any) -> None:
        """Change the decoding mode and its options. RequestError, changing nothing, if it can't."""
        if mode not in MODES:
            raise RequestError(f"mode {mode!r} is none of {', '.join(MODES)}")
        modes = {name for names in MODES.values() for name in names}
        kept = {k: v for k, v in self.settings.options.items() if k not in modes}
        self._check(self.model, mode, kept | options)
        self.settings.mode, self.settings.options = mode, kept | options

    def set_option(self, name: str, value: Any) -> None:
        """Change a sampling option; None returns to the default. RequestError for a bad value."""
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

    def use(self, name: str | None) -> None:
        """Go on with another specialist, or with None the model itself; the talk stays.

        Raises RequestError where nothing of that name is attached, or the mode does not suit it.
        """
        model = self.specialists.use(name)
        self._check(model, self.settings.mode, self.settings.options)
        self.state = self.state.switch(model)
        self.model, self.settings.specialist = model, name

    def send(
        self, text: str, progress: Progress | None = None
    ) -> Generator[GenerationResponse, None, None]:
        """The reply to `text`, token by token; then both belong to the talk.

        A reply that is broken off stays as far as it came, if it came to anything. Raises
        RequestError for an empty text or settings that make no sense.
        """
        if not text.strip():
            raise RequestError("there is nothing to reply to")
        tokens = self._user_tokens(text, first=not self.turns)
        settings = self.settings
        options = dict(settings.options)
        if self.can_chat:
            options.setdefault("repetition_penalty", SPECIALIST_PENALTY)
        paced = self.parks and settings.mode in PACED_MODES
        self.last, ended = [], False
        stream = stream_generate(
            self.model,
            self.tokenizer,
            self.tokens + tokens,
            max_tokens=settings.max_tokens,
            mode=settings.mode,
            state=self.state,
            prompt_progress_callback=progress,
            costs=known_costs(self.model) if paced else None,
            **options,
        )
        try:
            for response in stream:
                self.last.append(response)
                ended = response.finish_reason == "stop"
                yield response
        finally:
            stream.close()  # type: ignore[attr-defined]
            if self.last:
                ids = [r.token for r in self.last]
                if ids[-1] in self.tokenizer.eos_token_ids:
                    ids.pop()
                reply = "".join(r.text for r in self.last)
                self.turns.append(Turn(text, tokens, reply, ids, ended))

    @property
    def tokens(self) -> list[int]:
        """The talk so far, as the model reads it."""
        end = self.tokenizer.token_id("<|assistant_end|>")
        tokens = [self.tokenizer.token_id(BOS)]
        for turn in self.turns:
            tokens += [*turn.tokens, *turn.reply_tokens, end]
        return tokens

    def _user_tokens(self, text: str, first: bool) -> list[int]:
        """A user's turn up to where the reply begins; the system text goes before the first."""
        if first and self.settings.system:
            text = f"{self.settings.system}\n\n{text}"
        name = self.tokenizer.token_id
        words = self.tokenizer.encode(text, add_special_tokens=False)
        return [name("<|user_start|>"), *words, name("<|user_end|>"), name("<|assistant_start|>")]

    def set_system(self, text: str) -> None:
        """Change the system text; the next reply reads the talk again from the beginning."""
        self.settings.system = text
        if self.turns:
            first = self.turns[0]
            tokens = self._user_tokens(first.user, first=True)
            self.turns[0] = Turn(first.user, tokens, first.reply, first.reply_tokens, first.ended)

    def undo(self) -> Turn:
        """Take back the last exchange, and give it. RequestError where there is none."""
        if not self.turns:
            raise RequestError("there is nothing to take back yet")
        return self.turns.pop()

    def reset(self) -> None:
        """Forget the talk; the settings stay."""
        self.turns, self.last = [], []
        self.state = self._new_state()

    def save(self, path: Path) -> None:
        """Write talk, settings and state to one safetensors file, whole or not at all."""
        arrays, fields = to_arrays(self.state)
        content = {
            "format": _FORMAT,
            "model": self.name,
            "settings": asdict(self.settings),
            "turns": [asdict(turn) for turn in self.turns],
            "probe": _probe(self.model),
            "state": fields,
        }
        path = path.expanduser()
        # MLX appends .safetensors to any other name.
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.safetensors")
        try:
            metadata = {"chat": json.dumps(content, ensure_ascii=False)}
            mx.save_safetensors(str(partial), arrays or {"empty": mx.zeros((1,))}, metadata)
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be written: {_first_line(error)}") from None
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: Path) -> bool:
        """Go on with a talk that was saved; True if its state fits too, and needs no new reading.

        Raises CheckpointError, changing nothing, for a file that is no talk, and RequestError for
        settings that this model does not take.
        """
        path = path.expanduser()
        arrays, content = _read(path)
        try:
            settings = Settings(**content["settings"])
            turns = [Turn(**turn) for turn in content["turns"]]
            for turn in turns:
                self.state.check_ids([*turn.tokens, *turn.reply_tokens])
                self.tokenizer.decode([*turn.tokens, *turn.reply_tokens])
                if not isinstance(turn.user, str) or not isinstance(turn.reply, str):
                    raise TypeError("a turn that is no text")
            model = self.specialists.use(settings.specialist)
            self._check(model, settings.mode, settings.options)
        except PoEError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} holds a damaged talk ({_first_line(error)})") from None
        state = None
        if content.get("probe") == _probe(model):
            try:
                state = from_arrays(model, arrays, content["state"])
            except (PoEError, KeyError, TypeError, AttributeError):
                state = None  # the talk itself is whole: it is read again
        self.settings, self.turns, self.model, self.last = settings, turns, model, []
        self.state = state or self._new_state()
        return state is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return self.state.nbytes


def _probe(model: PoEModel) -> list[float]:
    """A few of the model's own figures, by which a state is known to be its."""
    return [round(z, 2) for z in model(mx.array([[0, 1]]))[0, -1, :8].tolist()]  # type: ignore[arg-type,union-attr]


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        content = json.loads(metadata["chat"])
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r:.40}")
        mx.eval(arrays)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no saved talk ({_first_line(error)})") from None
    return arrays, content


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
