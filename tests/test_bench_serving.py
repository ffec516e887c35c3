"""The benchmark's section `serving`: loads on two servers, servers that fail, the command."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from servers import PATIENCE

from cognica_mlx.bench import servers
from cognica_mlx.bench.sections import serving
from cognica_mlx.bench.sections.serving import Load
from cognica_mlx.bench.sections.stage_speeds import Setup
from cognica_mlx.bench.servers import Outcome, Reply, ServerFailed, ServerProcess, closed_loop
from cognica_mlx.errors import RequestError
from mlx_poe.commands import bench as command

FAKE = Path(__file__).parent / "fake_server.py"
PATH = "/v1/chat/completions"


def fake(kind: str) -> ServerProcess:
    return ServerProcess(f"fake.{kind}", fake_command(kind))


def fake_command(kind: str) -> list[str]:
    return [sys.executable, str(FAKE), kind]


def told_loop(
    server: ServerProcess, path: str, requests: Sequence[bytes], clients: int, patience: float
) -> Outcome:
    """A closed loop whose fake server knows how many clients to expect."""
    server.get("/clients", clients)
    return closed_loop(server, path, requests, clients, patience)


def test_replies_are_counted_and_timed():
    with fake("good") as server:
        outcome = closed_loop(server, PATH, [b"{}"] * 5, 2, PATIENCE)
    assert len(outcome.replies) == 5
    reply = outcome.replies[0]
    assert reply.text == "Hello, you" and reply.usage["completion_tokens"] == 2
    assert 0.02 <= reply.first <= reply.seconds <= outcome.seconds
    assert outcome.rate == 10 / outcome.seconds
    assert not server.running


@pytest.mark.parametrize(
    ("kind", "patience", "reason"),
    [
        ("hangs", 0.5, "hung"),
        ("trickles", 0.5, "hung"),
        ("dies", PATIENCE, "broke the connection"),
        ("stumbles", PATIENCE, "broke the connection"),
    ],
)
def test_a_server_that_fails_is_stopped_and_holds_nobody(kind, patience, reason):
    with fake(kind) as server:
        with pytest.raises(ServerFailed, match=reason):
            told_loop(server, PATH, [b"{}"] * 6, 3, patience)
        assert not server.running


def test_a_whole_reply_is_read_and_has_one_time():
    with fake("good") as server:
        reply = server.ask(PATH, b'{"stream": false}', PATIENCE)
    assert reply.text == "Hello, you" and reply.usage["completion_tokens"] == 2
    assert 0.02 <= reply.first == reply.seconds


def test_a_whole_reply_that_is_cut_short_is_a_failure():
    with fake("stumbles") as server, pytest.raises(ServerFailed, match="broke the connection"):
        server.ask(PATH, b'{"stream": false}', PATIENCE)


def test_a_reset_connection_is_tried_again_and_counted():
    with fake("resets") as server:
        reply = server.ask(PATH, b"{}", PATIENCE)
    assert reply.resets == 1 and reply.text == "Hello, you"
    assert reply.first >= servers.RETRIES[0]


def test_a_server_that_does_not_start_says_why():
    server = ServerProcess("fake", [sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(ServerFailed, match="no such model"):
        server.start()
    assert not server.running


def test_no_server_outlives_a_benchmark_that_is_told_to_end(tmp_path):
    script = f"""
import time
from cognica_mlx.bench.servers import ServerProcess
from mlx_poe.commands.entry import interruptible
with interruptible(), ServerProcess("fake", {fake_command("good")!r}) as server:
    print(server._process.pid, flush=True)
    time.sleep(60)
"""
    bench = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(bench.stdout.readline())
    os.kill(child, 0)  # it is there
    bench.send_signal(signal.SIGTERM)
    bench.communicate(timeout=PATIENCE)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def compared(theirs: str) -> dict[str, serving.Figure]:
    """The figures of a good server beside one of another kind, by name."""
    setup, streamed = Setup(None, None, [[0] * 5], tokens=2, trials=1), set()

    def loop(server, path, requests, clients, patience):
        assert patience >= serving.LEAST_PATIENCE
        streamed.update(json.loads(request).get("stream", False) for request in requests)
        hangs = server is peer and theirs == "hangs" and clients > 1
        return told_loop(server, path, requests, clients, 0.5 if hangs else PATIENCE)

    with (
        pytest.MonkeyPatch.context() as patch,
        fake("good") as ours,
        fake(theirs) as peer,
    ):
        patch.setattr(serving, "closed_loop", loop)
        asking = {
            serving.OURS: serving._Client(ours, 2, chat=True),
            serving.THEIRS: serving._Client(peer, 2, chat=True),
        }
        texts = serving._sentences(ours)
        found = serving._compare(setup, asking, texts, prompt_tokens=30, clients=(1, 2))
    assert streamed == {True, False}
    assert not ours.running and not peer.running
    return {figure.name: figure for figure in found}


def test_every_load_has_its_figures_beside_the_peers():
    found = compared("good")
    loads = ("1 client", "2 clients", "1 client, system prompt", "2 clients, system prompt")
    kinds = ("", ", first token", ", slowest first token")
    streamed = [load + kind for load in loads for kind in kinds]
    assert [*found] == [*streamed, *(f"{load}, whole" for load in loads)]
    for figure in found.values():
        ratio = figure.value / figure.notes["peer"]
        assert figure.speedup == pytest.approx(ratio if figure.unit == "tokens/s" else 1 / ratio)
    for rate in (found["2 clients"], found["2 clients, system prompt, whole"]):
        assert rate.unit == "tokens/s" and rate.notes["agreement"] == 1
        assert rate.notes["goal"] == ">= 1.00x" and rate.notes["reply_tokens"] == 2
        assert "peer_failed" not in rate.notes


@pytest.mark.parametrize("kind", ["hangs", "dies"])
def test_a_peer_that_fails_under_one_load_is_measured_under_the_others(kind):
    found = compared(kind)
    for name in ("1 client", "1 client, system prompt"):
        assert found[name].speedup and "peer_failed" not in found[name].notes
    for name in ("2 clients", "2 clients, system prompt"):
        assert found[name].value > 0 and found[name].speedup is None
        assert found[name].notes["peer_failed"].startswith("2 x, then left out: ")


def test_ratios_leave_out_trials_in_which_the_peer_failed():
    def outcome(seconds: float) -> Outcome:
        usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 6}})
        return Outcome([Reply(seconds / 2, seconds, f"data: {usage}\n\n".encode())], seconds)

    ours, theirs = [outcome(1), outcome(2), outcome(3)], [outcome(1), None, outcome(6)]
    rate, first, _ = serving._figures(Load(1, None, True), ours, theirs, ["hung"])
    assert rate.value == 2.5 and rate.speedup == 2 and rate.notes["peer"] == 1
    assert first.value == 1250 and first.speedup == 2
    assert rate.notes["peer_failed"] == "1 x: hung"


def test_the_command_with_our_own_server(tmp_path, monkeypatch, capsys):
    folders = []

    def their_command(folder: str) -> list[str]:
        folders.append(Path(folder))
        assert (folders[-1] / "config.json").is_file()
        return fake_command("good")

    monkeypatch.setattr(serving, "their_command", their_command)
    flags = ["--dtype", "float32", "--trials", "1", "-m", "3", "--context", "20"]
    flags += ["--prompt-tokens", "60", "--only", "serving", "--json", str(tmp_path / "r.json")]
    flags += ["--clients", "2"]
    assert command.main(flags) == 0
    assert "mlx_lm.server" in capsys.readouterr().out
    kept = json.loads((tmp_path / "r.json").read_text())["figures"]
    found = {figure["name"]: figure for figure in kept}
    assert found["2 clients, system prompt"]["notes"]["prompt_tokens"] > 60
    turns = {name.rpartition(" ")[2]: f for name, f in found.items() if "read before" in name}
    assert [*turns] == ["nobody", "another", "itself"]
    assert all(name.startswith("poe-tiny-math, ") for name in found if "read before" in name)
    # What chat has read is there for math, and all but the last token of it.
    kept = {name: turn["notes"]["cached"] for name, turn in turns.items()}
    assert kept["nobody"] == 0 and kept["another"] == kept["itself"] > 0.95
    # Its own layers, two of ten, are run in any case.
    cold, again = (turns[name]["value"] for name in ("nobody", "itself"))
    predicted = cold / (again + 0.2 * (cold - again))
    assert turns["another"]["predicted"] == pytest.approx(predicted)
    assert not folders[0].exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--only", "serving", "--shape", "tiny"], "needs a real model"),
        (["--only", "rows", "--specialist", "a=b"], "--specialist is for the section serving"),
        (["--only", "serving", "--clients", "0"], "--clients: each must be between 1 and 1000"),
    ],
)
def test_flags_that_do_not_go_with_the_section(flags, named, capsys):
    assert command.main(flags) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "named"),
    [("uvicorn", "pip install 'cognica-mlx\\[server\\]'"), ("mlx_lm.server", "-U mlx-lm")],
)
def test_a_server_that_is_not_installed_is_named(module, named, monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name == module else name)
    with pytest.raises(RequestError, match=named):
        serving.check_installed()
