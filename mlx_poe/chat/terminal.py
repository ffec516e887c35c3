"""What poe-chat adds to the terminal's line editing: history, and a key for a new line."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from cognica_mlx.errors import PoEError
from cognica_mlx.files.whole_file import private_folder
from mlx_poe.paths import user_path


class ChatHistory(FileHistory):
    """Earlier input, kept in a file as long as the file works, then in memory.

    `problem` says why the file is no longer used; None while it works.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        super().__init__(os.devnull)
        try:
            self.filename = _history_file()
            # Open it now, so that the user sees a problem before the first prompt. Mode "ab+"
            # fails on a pipe, where opening it to read would wait forever.
            with self.filename.open("ab+") as file:
                # Private before anything is in it. It may be a link to the null device.
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    os.fchmod(file.fileno(), 0o600)
        except (OSError, PoEError) as error:
            self._give_up(error)

    def load_history_strings(self) -> Iterable[str]:
        try:
            return [] if self.problem else list(super().load_history_strings())
        except OSError as error:
            self._give_up(error)
            return []

    def store_string(self, string: str) -> None:
        try:
            if not self.problem:
                super().store_string(string)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.problem = f"input history will not be saved: {error}"


def _history_file() -> Path:
    folder = user_path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "cognica-mlx"
    private_folder(folder)
    return folder / "chat_history"


def key_bindings() -> KeyBindings:
    """Esc Enter starts a new line."""
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
