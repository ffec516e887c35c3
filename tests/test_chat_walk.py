"""poe-chat walked at random: whatever is typed, broken or interrupted, the conversation stays."""

import json
import os
import random
import tempfile
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import pytest
from chats import FUNCTIONS, TALK, Interrupt, new_chat
from conftest import SOAK
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from cognica_mlx.errors import CheckpointError
from mlx_poe.chat.conversation import Chat
from mlx_poe.chat.repl import Repl
from mlx_poe.chat.saved_chat import read_chat
from mlx_poe.chat.slash_commands import COMMANDS

STEPS = 25
PATHS = ("", "~nosuchuser/x", "a\0b", "/", "/dev/null", "/dev/null/x", "/dev/full", "nowhere/x",
         "saved", "damaged", "functions.json", "schema.json", "link", "a b")  # fmt: skip
NUMBERS = ("", "off", "0", "1", "3", "0.5", "-1", "4", "99", "1e999", "nan", "x", "1 2", "0 4",
           "0 99", "0 -1", "9" * 5000, "\0")  # fmt: skip
NAMES = ("", "chat", "math", "tool", "base", "nobody", "chat math", "\0", "full", "stage",
         "prefix", "compose", "speculative", "wand")  # fmt: skip
ATTACHED = ("", "a", "a nowhere", "a poe-tiny-chat", "b poe-tiny-math", "a ~nosuchuser/x",
            "a a\0b", "chat poe-tiny-chat", "c poe-tiny", "d .", "e functions.json")  # fmt: skip
ARGUMENTS = {
    **dict.fromkeys(("save", "load", "tools", "schema"), PATHS),
    **dict.fromkeys(("use", "mode"), NAMES),
    **dict.fromkeys(("stage", "draft", "temp", "top-p", "top-k", "min-p", "seed"), NUMBERS),
    "repetition-penalty": NUMBERS,
    "max-tokens": ("", "0", "1", "6", "x"),
    "attach": ATTACHED,
    "color": ("", "on", "off", "purple"),
    "system": ("", "off", "Be brief.", "\ud800"),
    "stop": ("", "off", " ", "e", "Rome"),
}
MESSAGES = (
    *TALK,
    "//",
    "/",
    "/bogus",
    "// /help",
    "\0",
    "\ud83d half a pair",
    "<|bos|>",
    "x" * 900,
)

Said = list[tuple[str, str]]
steps = 0


def lines() -> st.SearchStrategy[str]:
    """Anything a person might type."""
    commands = [
        st.sampled_from(ARGUMENTS.get(name, ("", "x"))).map(lambda a, n=name: f"/{n} {a}")
        for name in COMMANDS
    ]
    return st.one_of(*commands, st.sampled_from(MESSAGES), st.text(max_size=9))


def said(chat: Chat) -> Said:
    """What has been said and replied."""
    return [(turn.user, turn.reply) for turn in chat.turns]


class Walk(RuleBasedStateMachine):
    """One poe-chat, and the conversation that it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name)
        (path / "functions.json").write_text(json.dumps(FUNCTIONS))
        (path / "schema.json").write_text(json.dumps({"type": "object", "maxProperties": 2}))
        (path / "link").symlink_to("saved")
        self.repl = Repl(new_chat(max_tokens=6), COMMANDS)
        self.type(TALK[0])
        self.type("/save saved")

    def teardown(self) -> None:
        self.folder.cleanup()

    def type(self, line: str, interrupt_at: int = 0) -> None:
        """Enter a line; the conversation must be one of those that it may lead to."""
        before, errors = said(self.repl.chat), StringIO()
        cwd = Path.cwd()
        os.chdir(self.folder.name)
        try:
            with redirect_stdout(StringIO()), redirect_stderr(errors):
                if interrupt_at:
                    # Just before and after, where obey does not see it, Repl.run does.
                    with suppress(KeyboardInterrupt), Interrupt(interrupt_at):
                        self.repl.obey(line)
                else:
                    done = self.repl.obey(line)
        finally:
            os.chdir(cwd)
        after, told = said(self.repl.chat), errors.getvalue()
        assert not self.repl.traceback, self.repl.traceback
        assert after == before or after == self.outcome(line.strip(), before, after)
        if not interrupt_at and done:
            assert after != before or not self.must_change(line.strip())
        elif not interrupt_at:
            assert after == before
            assert told.startswith("poe-chat: ") and told.count("\n") == 1
        # Whatever has happened, the whole conversation can be read.
        self.repl.chat.tokenizer.decode(self.repl.chat.tokens)
        self.repl.status()

    def outcome(self, line: str, before: Said, after: Said) -> Said | None:
        """The conversation that a line makes of `before`; the reply is taken from `after`."""
        name, argument = [*line[1:].split(maxsplit=1), "", ""][:2]
        if not line.startswith("/") or line.startswith("//"):
            text = line.removeprefix("/") if line.startswith("//") else line
            return [*before, (text, after[-1][1])] if after else None
        if name == "retry" and before and after:
            return [*before[:-1], (before[-1][0], after[-1][1])]
        if name == "load":
            with suppress(CheckpointError):
                saved = read_chat(Path(self.folder.name, argument))
                return [(turn.user, turn.reply) for turn in saved.turns]
        return {"undo": before[:-1], "reset": []}.get(name)

    @staticmethod
    def must_change(line: str) -> bool:
        message = line and (not line.startswith("/") or line.startswith("//"))
        return bool(message) or line.startswith("/undo")

    @rule(line=lines())
    def enter(self, line: str) -> None:
        global steps
        steps += 1
        self.type(line)

    @rule(text=st.sampled_from(TALK))
    def message(self, text: str) -> None:
        """A reply is what a fresh chat with the same past gives."""
        global steps
        steps += 1
        chat = self.repl.chat
        self.type(text)
        if chat.settings.options.get("temp"):
            return
        turns, state = chat.turns, chat.state
        try:
            if chat.last:
                chat.turns, chat.state = turns[:-1], chat._new_state(chat.model)
                list(chat.send(text))
                assert chat.turns == turns
        finally:
            chat.turns, chat.state = turns, state

    @rule(line=lines(), at=st.integers(1, 4000))
    def interrupt(self, line: str, at: int) -> None:
        global steps
        steps += 1
        self.type(line, at)

    @rule(seed=st.integers(0, 2**32), how=st.sampled_from(["flip", "cut"]))
    def damage(self, seed: int, how: str) -> None:
        """Load a saved chat after a few bytes of it have changed, or its end is lost."""
        global steps
        steps += 1
        chance = random.Random(seed)
        content = bytearray(Path(self.folder.name, "saved").read_bytes())
        if how == "cut":
            del content[chance.randrange(len(content)) :]
        else:
            for _ in range(3):
                content[chance.randrange(len(content))] = chance.randrange(256)
        damaged = Path(self.folder.name, "damaged")
        damaged.write_bytes(content)
        self.type("/load damaged")


@pytest.mark.parametrize("walks", [3, pytest.param(15, marks=SOAK)])
def test_a_walk_through_the_commands_never_loses_the_conversation(walks):
    before = steps
    run_state_machine_as_test(
        Walk,
        settings=settings(
            max_examples=walks,
            stateful_step_count=STEPS,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert steps - before >= 20 * walks
