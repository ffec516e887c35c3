"""Steps replayed from traces: the same bits as untraced ones, few traces, and none that outlives
what it was made of."""

import gc
import threading
import weakref

import mlx.core as mx
import pytest
from conftest import GOLDENS, fixture

from cognica_mlx.backend import traces
from cognica_mlx.decoding.batch import Batch
from cognica_mlx.decoding.modes import ModeOptions, make_mode
from cognica_mlx.decoding.sampling import Sampler, SamplingOptions
from cognica_mlx.decoding.sequence import DecodingSequence
from cognica_mlx.decoding.single import decode
from cognica_mlx.decoding.state import DecodingState
from cognica_mlx.network.model import PoEModel
from mlx_poe import load

PROMPT = [7, 3, 9, 4, 1, 12, 5, 8, 2, 6]
OPTIONS = {"stage": {"stage": 0}, "speculative": {}, "full": {}, "wand": {}}


def options(model: PoEModel, mode: str) -> ModeOptions:
    bounds = [0.3] * (model.poe_n_stages - 1)
    return ModeOptions(**OPTIONS[mode], **({"p99_bounds": bounds} if mode == "wand" else {}))


def reply(model: PoEModel, mode: str, count: int = 40, **how: object) -> list[tuple]:
    made = decode(
        model, PROMPT, make_mode(model, mode, options(model, mode)), max_tokens=count, **how
    )
    return [(one.token, one.stage, one.logprob) for one in made]


@pytest.mark.parametrize("mode", OPTIONS)
@pytest.mark.parametrize("name", GOLDENS)
def test_a_traced_reply_is_the_untraced_one_to_the_last_bit(name, mode):
    model, _ = fixture(name)
    before = traces.statistics().replays
    traced = reply(model, mode)
    assert traces.statistics().replays > before + 20
    with traces.off():
        assert reply(model, mode) == traced


def test_a_drawn_reply_with_penalties_is_the_untraced_one():
    model, _ = fixture("flat-d8")
    asked = SamplingOptions(
        temp=0.8, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, seed=5
    )
    traced = reply(model, "full", sampler=Sampler(asked))
    with traces.off():
        assert reply(model, "full", sampler=Sampler(asked)) == traced


def batch_of(model: PoEModel, lengths: list[int]) -> dict[int, list[tuple]]:
    batch, found = Batch(), {i: [] for i in range(len(lengths))}
    for i, count in enumerate(lengths):
        prompt = (PROMPT * 3)[: 8 + 2 * i]
        mode = make_mode(model)
        batch.add(i, DecodingSequence(model, prompt, mode, max_tokens=count).steps())
    while len(batch):
        for event in batch.run():
            if event.token:
                found[event.name].append((event.token.token, event.token.logprob))
    return found


def test_a_traced_batch_from_which_sequences_leave_is_the_untraced_one():
    model, _ = fixture("flat-d8")
    lengths = [30, 12, 40, 18, 35]
    traced = batch_of(model, lengths)
    with traces.off():
        assert batch_of(model, lengths) == traced


def test_no_position_is_part_of_a_trace():
    """Over all positions, rollbacks and moves of rows, there are few traces."""
    model, _ = load("poe-tiny", dtype="float32")
    state, mode = DecodingState(model), make_mode(model)
    text = list(PROMPT)
    for _ in range(9):
        made = [one.token for one in decode(model, text, mode, max_tokens=90, state=state)]
        text = [*text, *made[:-7]]  # the next reply begins with a rollback
    assert len(text) > 700
    # A stage's buffers have three sizes, and it sees one of a few stretches of them.
    assert len(model.stages[-1].traces) <= 16
    assert len(model.traces) <= 3


def test_a_shape_that_does_not_come_back_is_not_traced():
    made, owner = [], traces.Traces()
    for n in range(1, 30):
        (out,) = owner.run(n, lambda x: made.append(1) or [x + 1], [mx.zeros((n,))])
        assert out.tolist() == [1.0] * n
    assert len(made) == 29 and len(owner) == 0


def test_a_trace_is_replayed_and_the_least_recently_used_goes_first(monkeypatch):
    monkeypatch.setattr(traces, "MOST", 2)
    made, owner = [], traces.Traces()

    def ask(n: int) -> None:
        (out,) = owner.run(n, lambda x: made.append(n) or [x * n], [mx.array([2.0])])
        assert out.item() == 2 * n

    for n in (1, 2):
        for _ in range(traces.USES + 3):
            ask(n)
    assert made == [1] * traces.USES + [2] * traces.USES
    ask(1)
    for _ in range(traces.USES):
        ask(3)
    before = len(made)
    ask(1)
    assert len(made) == before and len(owner) == 2
    ask(2)
    assert len(made) == before + 1


def test_another_thread_makes_its_own_trace():
    owner, found = traces.Traces(), []

    def ask() -> None:
        for _ in range(traces.USES + 2):
            (out,) = owner.run("key", lambda x: [x + 1], [mx.array([1.0])])
            found.append(out.item())

    def elsewhere() -> None:
        ask()
        mx.clear_streams()

    ask()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [2.0] * 2 * (traces.USES + 2) and len(owner) == 2


def test_an_error_while_tracing_leaves_no_trace_and_no_mode_behind():
    owner, calls = traces.Traces(), []

    def fails(x: mx.array) -> list[mx.array]:
        calls.append(1)
        if len(calls) == traces.USES:
            raise MemoryError
        return [x + 1]

    for _ in range(traces.USES - 1):
        owner.run("key", fails, [mx.array([1.0])])
    with pytest.raises(MemoryError):
        owner.run("key", fails, [mx.array([1.0])])
    assert len(owner) == 0 and not traces._here.tracing
    assert owner.run("key", fails, [mx.array([1.0])])[0].item() == 2


def test_a_replaced_matrix_is_used_from_the_next_reply_on():
    model, _ = load("poe-tiny", dtype="float32")
    before = reply(model, "full")
    for part in (model.h[2].mlp.c_fc, model.lm_head):
        part.weight = part.weight * 0.5
        mx.eval(part.weight)
        traced = reply(model, "full")
        with traces.off():
            assert reply(model, "full") == traced != before
        before = traced


def test_models_come_and_go_and_leave_no_memory():
    def once() -> int:
        model, _ = load("poe-tiny", dtype="float32")
        reply(model, "full", 12)
        assert len(model.stages[-1].traces) and len(model.traces)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        mx.clear_cache()
        return mx.get_active_memory()

    first = once()
    assert max(once() for _ in range(6)) <= first + 100_000


def test_the_variable_turns_it_off(monkeypatch):
    monkeypatch.setenv(traces.VARIABLE, "0")
    made, owner = [], traces.Traces()
    for _ in range(2 * traces.USES):
        owner.run("key", lambda x: made.append(1) or [x], [mx.array([1.0])])
    assert len(made) == 2 * traces.USES and not traces.enabled()


def test_an_owner_that_its_functions_refer_to_ends_when_it_is_let_go():
    """Without waiting for Python to look for cycles: weights are large."""
    owner = traces.Traces()

    def ask(one: traces.Traces) -> None:
        one.run("key", lambda x: [x + len(one)], [mx.array([1.0])])

    for _ in range(traces.USES):
        ask(owner)
    assert len(owner) == 1
    gone = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert gone() is None
    finally:
        gc.enable()
