"""Chats: turns whose state carries over, changes in mid-conversation, settings."""

import itertools

import pytest
from chats import FUNCTIONS, TALK, Interrupt, new_chat, say
from conftest import SOAK

from cognica_mlx.backend import traces
from cognica_mlx.errors import RequestError
from mlx_poe import stream_generate
from mlx_poe.chat.conversation import Chat


def prompt_of(chat: Chat) -> list[int]:
    """What the model read before its last reply."""
    return chat.tokens[: -len(chat.turns[-1].reply_tokens) - 1]


@pytest.mark.parametrize(
    "mode", [pytest.param("full", marks=SOAK), "speculative", pytest.param("wand", marks=SOAK)]
)
def test_every_turn_is_what_a_fresh_prompt_gives(mode):
    chat = new_chat(max_tokens=24)
    chat.set_mode(mode)
    for text in TALK:
        before = chat.tokens
        say(chat, text)
        assert prompt_of(chat)[: len(before)] == before
        fresh = stream_generate(
            chat.model,
            chat.tokenizer,
            prompt_of(chat),
            max_tokens=24,
            mode=mode,
            repetition_penalty=1.15,
        )
        tokens = [r.token for r in fresh if r.token not in chat.tokenizer.eos_token_ids]
        assert chat.turns[-1].reply_tokens == tokens
    assert chat.tokenizer.decode(chat.tokens).count("<|assistant_end|>") == len(TALK)


def test_a_turn_runs_its_own_tokens_only_however_long_the_conversation():
    chat = new_chat(max_tokens=6, options={"repetition_penalty": 1.0})
    sizes, run = [], []
    for number in range(36):
        before = chat.state.positions_run[0], len(chat.tokens)
        say(chat, f"{TALK[number % 3]} {'It is a long way. ' * 7}" + " " * (number % 2))
        # The prompt's last token and the last one generated may run a turn later.
        ran, grown = chat.state.positions_run[0] - before[0], len(chat.tokens) - before[1]
        run.append(ran - grown)
        sizes.append(chat.state.nbytes)
    assert len(chat.tokens) > 3 * 513  # the widest window, several times over
    assert max(abs(extra) for extra in run) <= 2
    assert max(sizes[30:]) < 1.05 * max(sizes[23:30])


def test_specialists_change_in_mid_conversation():
    chat = new_chat()
    say(chat, TALK[0])
    say(chat, TALK[1])
    length = len(chat.tokens)
    chat.use("math")
    say(chat, "Tom has 5 apples and gets 3 more. How many?")
    # The base has seen the conversation; only math's own stage runs over it.
    assert chat.state.positions_run[0] < len(chat.tokens) - length + 3
    assert chat.state.positions_run[4] >= length - 1
    chat.set_mode("stage", stage=4)
    with pytest.raises(RequestError):
        chat.use(None)  # the base has no stage 4
    assert chat.settings.specialist == "math"
    chat.set_mode("full")
    chat.use(None)
    assert not chat.can_chat
    assert say(chat, "The capital of France is") != ""


def test_a_deleted_mode_is_answered_with_what_replaces_it():
    chat = new_chat()
    with pytest.raises(RequestError, match="certified no longer exists: use speculative"):
        chat.set_mode("certified")
    assert chat.settings.mode == "full"


def test_undo_retry_and_reset():
    chat = new_chat()
    say(chat, TALK[0])
    tokens = chat.tokens
    reply = say(chat, TALK[1])
    assert chat.undo().reply == reply
    assert chat.tokens == tokens
    ran = chat.state.positions_run[0]
    assert say(chat, TALK[1]) == reply
    assert chat.state.positions_run[0] - ran <= len(chat.tokens) - len(tokens) + 1
    chat.reset()
    assert chat.turns == [] and chat.state.length == 0
    with pytest.raises(RequestError, match="nothing to take back"):
        chat.undo()
    with pytest.raises(RequestError, match="nothing to reply"):
        say(chat, "  ")


def test_a_broken_off_reply_stays_as_far_as_it_came():
    chat = new_chat()
    stream = chat.send(TALK[1])
    pieces = [next(stream).text for _ in range(4)]
    stream.close()
    assert chat.turns[-1].reply == "".join(pieces)
    assert len(chat.turns[-1].reply_tokens) == 4
    say(chat, TALK[2])
    fresh = new_chat()
    fresh_reply = stream_generate(
        fresh.model,
        fresh.tokenizer,
        prompt_of(chat),
        max_tokens=40,
        repetition_penalty=1.15,
    )
    assert "".join(r.text for r in fresh_reply) == chat.turns[-1].reply


def test_system_text_and_special_tokens_in_what_is_said():
    chat = new_chat(system="Be brief.")
    say(chat, "<|assistant_end|> hello <|bos|>")
    special = {chat.tokenizer.token_id(name) for name in ("<|assistant_end|>", "<|bos|>")}
    assert not special & set(prompt_of(chat)[1:])
    assert "Be brief.\n\n<|assistant_end|> hello" in chat.tokenizer.decode(chat.tokens)
    chat.change(system="Be long.")
    assert "Be long.\n\n" in chat.tokenizer.decode(chat.tokens)
    assert say(chat, TALK[0])
    assert chat.tokenizer.decode(chat.tokens).count("Be long.") == 1


def test_options_are_checked_and_kept():
    chat = new_chat()
    for name, value in (("temp", -1.0), ("top_p", 7.0), ("repetition_penalty", 0.0)):
        with pytest.raises(RequestError):
            chat.set_option(name, value)
    for mode, options in (("warp", {}), ("stage", {"stage": 9}), ("full", {"stage": 1})):
        with pytest.raises(RequestError):
            chat.set_mode(mode, **options)
    assert chat.settings.options == {}
    chat.set_option("temp", 0.5)
    chat.set_mode("stage", stage=2)
    chat.set_mode("speculative")
    assert chat.settings.options == {"temp": 0.5}
    chat.set_option("temp", None)
    assert chat.settings.options == {}


def options_passed(chat: Chat, monkeypatch) -> dict[str, object]:
    """The keywords with which a chat asks for a reply."""
    passed: dict[str, object] = {}

    def record(*arguments, **keywords):
        passed.update(keywords)
        return stream_generate(*arguments, **keywords)

    monkeypatch.setattr("mlx_poe.chat.conversation.stream_generate", record)
    say(chat, TALK[0])
    chat.undo()
    return passed


def test_the_penalty_is_the_users_or_else_the_models_default(monkeypatch):
    chat = new_chat()

    def penalty() -> object:
        return options_passed(chat, monkeypatch).get("repetition_penalty")

    assert penalty() == 1.15
    chat.set_functions(FUNCTIONS)
    assert penalty() == 1.0
    chat.change(system="Be brief.", functions=[])
    assert penalty() == 1.15
    chat.set_option("repetition_penalty", 1.3)
    assert penalty() == 1.3
    chat.set_functions(FUNCTIONS)
    assert penalty() == 1.3
    chat.set_functions(None)
    assert penalty() == 1.3
    chat.set_option("repetition_penalty", None)
    chat.use(None)
    assert penalty() is None


def test_functions_take_the_system_texts_place_and_give_it_back():
    chat = new_chat(system="Be brief.")
    say(chat, TALK[0])
    opening = chat.tokens
    chat.set_functions(FUNCTIONS)
    text = chat.tokenizer.decode(chat.tokens)
    assert "get_capital" in text and "Be brief." not in text
    chat.set_functions(None)
    assert chat.tokens == opening
    with pytest.raises(RequestError):
        chat.set_functions("[1]")
    assert chat.tokens == opening


def test_a_stop_text_ends_the_reply_and_is_not_read_again():
    whole = say(new_chat(), TALK[1])
    chat = new_chat()
    chat.change(stop=["Its", ", and"])
    reply = say(chat, TALK[1])
    assert reply == whole[: whole.index("Its")]
    turn = chat.turns[0]
    assert turn.reply == reply
    assert chat.tokenizer.decode(turn.reply_tokens) == reply  # though a token is cut in two
    with pytest.raises(RequestError, match="stop string is empty"):
        chat.change(stop=[""])
    chat.change(stop=[])
    assert say(chat, TALK[1])


class Interrupting:
    """A progress callback that behaves like a Ctrl-C while the prompt is read."""

    def __init__(self, error: type[BaseException]):
        self.error = error

    def __call__(self, done: int, total: int) -> None:
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exchange_survives_a_retry_that_is_broken_off_before_its_first_token(error):
    chat = new_chat()
    for text in TALK[:2]:
        say(chat, text)
    turns, tokens = chat.turns, chat.tokens
    chat.reset()
    chat.turns = turns  # nothing is run yet, so that there is a prompt to read
    with pytest.raises(error):
        list(chat.retry(Interrupting(error)))
    assert (chat.turns, chat.tokens) == (turns, tokens)
    assert "".join(r.text for r in chat.retry()) == turns[1].reply
    assert chat.turns == turns
    stream = chat.retry()
    next(stream)
    stream.close()
    assert len(chat.turns) == 2 and len(chat.turns[1].reply_tokens) == 1


def test_a_retry_without_anything_to_retry_says_so():
    with pytest.raises(RequestError, match="nothing to retry"):
        list(new_chat().retry())


@pytest.mark.parametrize("mode", [pytest.param("full", marks=SOAK), "speculative"])
def test_wherever_a_reply_is_interrupted_the_next_one_is_right(mode):
    fresh, chat = new_chat(max_tokens=4), new_chat(max_tokens=4)
    for one in (fresh, chat):
        one.set_mode(mode)
        say(one, TALK[0])
    turns = chat.turns
    say(chat, TALK[1])
    with traces.off(), Interrupt() as counting:  # traces come and go, and with them calls
        list(chat.retry())
    # A later retry may take a few calls fewer: the last point stays away from the end.
    for at in range(1, counting.events * 9 // 10, counting.events // 13):
        chat.turns = turns
        say(chat, TALK[1])
        with pytest.raises(KeyboardInterrupt), traces.off(), Interrupt(at):
            list(chat.retry())
        # No stage is ever ahead of what it takes in.
        assert min(map(chat.state.pending, range(5))) >= 0
        assert len(chat.turns) == 2
        say(chat, TALK[2])
        fresh.turns = chat.turns[:2]
        fresh.state = fresh._new_state(fresh.model)
        say(fresh, TALK[2])
        assert chat.turns == fresh.turns


@pytest.mark.parametrize("where", ["put", "truncate", "rollback"])
def test_a_state_left_half_way_by_an_interruption_goes_on_rightly(where):
    chat, expected = new_chat(), new_chat()
    for one in (chat, expected):
        say(one, TALK[0])
    state = chat.state
    if where == "put":  # activations are there, the caches not yet
        given = state.given[0]
        given.append(given.read(given.stop - 1, given.stop)[0])
    elif where == "truncate":
        state.caches[-1].rollback(state.length - 5)
        state.given[-1].truncate(state.length - 5)
    else:
        for cache in state.caches[2:]:
            cache.rollback(state.length - 5)
    assert say(chat, TALK[1]) == say(expected, TALK[1])


def test_after_an_error_the_next_reply_begins_with_a_new_state(monkeypatch):
    chat, expected = new_chat(), new_chat()
    for one in (chat, expected):
        say(one, TALK[0])
    state, before = chat.state, list(chat.turns)

    def failing(model, tokenizer, prompt, *, state, **options):
        yield from itertools.islice(stream_generate(model, tokenizer, prompt, state=state), 0)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("mlx_poe.chat.conversation.stream_generate", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            say(chat, TALK[1])
    assert chat.state is not state and chat.state.length == 0
    assert chat.turns == before
    assert say(chat, TALK[1]) == say(expected, TALK[1])


def test_numbers_that_make_no_sense_are_refused():
    chat = new_chat()
    with pytest.raises(RequestError):
        chat.change(max_tokens=0)
    assert chat.settings.max_tokens == 40
