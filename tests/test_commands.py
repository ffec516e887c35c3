"""The commands as a user meets them: what is on which stream, how they end, what they survive."""

import io
import json
import os
import pickle
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from conftest import FIXTURES, SOAK, fixture
from pickles import Calls
from reference import write_checkpoint

from mlx_poe import GenerationResponse, generate, load, stream_generate
from mlx_poe.commands import entry
from mlx_poe.commands import generate as generate_command
from mlx_poe.generation.progress import Bars

PROMPT = "The capital of France is"
COMMAND = (sys.executable, "-m", "mlx_poe", "generate", "--dtype", "float32")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
# What the surroundings of the tests may have set, and a user's need not.
FOREIGN = {"PYTHONUNBUFFERED", "PYTHONIOENCODING", "PYTHONUTF8", "FORCE_COLOR", "NO_COLOR", "TERM"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in FOREIGN}


def run(
    *args: str | bytes, command: tuple[str, ...] = COMMAND, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end; whatever it does, it leaves no traceback."""
    result = subprocess.run(
        [*command, *args], input=stdin, capture_output=True, env=ENVIRONMENT | environment
    )
    assert b"Traceback" not in result.stderr, result.stderr.decode()
    assert b"Exception ignored" not in result.stderr, result.stderr.decode()
    return result


@pytest.fixture
def run_here(monkeypatch, capfdbinary) -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """`run` without a process of its own, for what does not depend on one."""

    def run_main(
        *args: str, stdin: bytes = b"", **environment: str
    ) -> subprocess.CompletedProcess[bytes]:
        with monkeypatch.context() as patch:
            for name in FOREIGN:
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            status = generate_command.main([*COMMAND[4:], *args])
        out, error = capfdbinary.readouterr()
        assert b"Traceback" not in error, error.decode()
        return subprocess.CompletedProcess(args, status, out, error)

    return run_main


def start(*args: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *args],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        # Tests started in the background would hand down an ignored Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def assert_one_line(result: subprocess.CompletedProcess[bytes], status: int, named: str) -> None:
    """One line on stderr that names the matter, nothing on stdout."""
    message = result.stderr.decode()
    assert message.startswith("mlx_poe.generate: error: "), message
    assert message.count("\n") == 1 and message.endswith("\n"), message
    assert named in message
    assert result.returncode == status
    assert result.stdout == b""


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    """A random model of single bytes, without a special token to stop at."""
    folder = tmp_path_factory.mktemp("endless")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "sequence_len": 128, "vocab_size": 256}
    write_checkpoint(folder, 5, **shape)
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}
    )
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    return folder


@cache
def text_of(prompt: Any, name: str = "poe-tiny", **options: Any) -> str:
    """What the library gives for the same request."""
    return generate(*fixture(name), prompt, **options)


# --- output ---------------------------------------------------------------------------------------


def test_text_goes_to_stdout_and_nothing_else_anywhere():
    result = run("--prompt", PROMPT, "--max-tokens", "30")
    assert result.stdout.decode() == text_of(PROMPT, max_tokens=30) + "\n"
    assert result.stderr == b""
    assert result.returncode == 0


def test_the_installed_script_reads_stdin():
    script = str(Path(sys.executable).parent / "mlx_poe.generate")
    flags = ("--dtype", "float32", "--prompt", "-", "--max-tokens", "12")
    result = run(*flags, command=(script,), stdin=PROMPT.encode())
    assert result.stdout.decode() == text_of(PROMPT, max_tokens=12) + "\n"
    assert (result.stderr, result.returncode) == (b"", 0)


def test_json_is_all_that_stdout_holds(run_here):
    flags = ("--json", "--verbose", "--mode", "speculative", "--num-draft-tokens", "4")
    flags += ("--no-fallback",)
    result = run_here("--prompt", "\u00c0 Paris,", "--max-tokens", "16", *flags)
    assert result.stdout.count(b"\n") == 1
    answer = json.loads(result.stdout)
    assert answer["prompt"] == "\u00c0 Paris,"
    assert answer["text"] == text_of("\u00c0 Paris,", max_tokens=16)
    assert (answer["model"], answer["mode"]) == ("poe-tiny", "speculative")
    assert "".join(token["text"] for token in answer["tokens"]) == answer["text"]
    assert len(answer["tokens"]) == answer["generation_tokens"] == 16
    assert answer["finish_reason"] == "length"
    drafted = [token for token in answer["tokens"] if token["from_draft"]]
    assert 0 < len(drafted) <= answer["drafted_tokens"]
    assert {token["stage"] for token in drafted} == {0}
    assert answer["prompt_tps"] > 0 and answer["generation_tps"] > 0
    assert result.returncode == 0


def test_json_has_null_for_what_is_not_a_number(monkeypatch, capsys):
    def broken(*args: Any, **options: Any) -> Iterator[GenerationResponse]:
        for response in stream_generate(*args, **options):
            yield replace(response, logprob=float("nan"), peak_memory=float("inf"))

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    monkeypatch.setattr(generate_command, "stream_generate", broken)
    flags = ["--json", "--prompt", PROMPT, "-m", "2", "--dtype", "float32"]
    assert generate_command.main(flags) == 0
    answer = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [token["logprob"] for token in answer["tokens"]] == [None, None]
    assert answer["peak_memory"] is None and answer["generation_tokens"] == 2


def test_statistics_go_to_stderr(run_here):
    flags = ("--verbose", "--mode", "speculative", "--no-fallback")
    result = run_here("--prompt", PROMPT, "--max-tokens", "12", *flags)
    assert result.stdout.decode() == text_of(PROMPT, max_tokens=12) + "\n"
    lines = result.stderr.decode().splitlines()
    assert lines[1].startswith("Prompt: 6 tokens, ")
    assert lines[2].startswith("Generation: 12 tokens, ")
    assert re.fullmatch(r"Peak memory: \d+\.\d+ GB", lines[3])
    assert re.fullmatch(r"Stages: 0: \d+, 3: \d+ \(mean depth [1-4]\.\d\d of 4\)", lines[4])
    assert re.fullmatch(
        r"Acceptance: (\d+ of \d+) draft tokens \(\d+\.\d%\): quantized stages \1", lines[5]
    )


def test_text_ends_before_any_of_the_stop_strings(run_here):
    result = run_here("--prompt", PROMPT, "--stop", "no such text", "--stop", " French")
    text = text_of(PROMPT, max_tokens=40)
    assert result.stdout.decode() == text[: text.index(" French")] + "\n"


@pytest.mark.parametrize(
    ("flags", "prompt"),
    [
        ((), [{"role": "user", "content": "Say hello."}]),
        (
            ("--system-prompt", "Be kind."),
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say hello."}],
        ),
        (("--ignore-chat-template",), "Say hello."),
    ],
    ids=["chat", "system", "bare"],
)
def test_a_specialist_is_spoken_to_in_turns(run_here, flags, prompt):
    model = ("--model", "poe-tiny-chat", "--max-tokens", "12", "--repetition-penalty", "1")
    result = run_here("--prompt", "Say hello.", *model, *flags)
    model_and_tokenizer = fixture("poe-tiny-chat")
    assert result.stdout.decode() == generate(*model_and_tokenizer, prompt, max_tokens=12) + "\n"


@pytest.mark.parametrize(
    ("flags", "penalty"),
    [
        (("--model", "poe-tiny-chat"), 1.15),
        (("--specialists", "poe-tiny-chat"), 1.15),
        (("--specialists", "poe-tiny-chat,poe-tiny-math"), 1.15),
        (("--model", "poe-tiny-chat", "--repetition-penalty", "1.3"), 1.3),
        (("--model", "poe-tiny-chat", "--ignore-chat-template"), None),
        ((), None),
    ],
    ids=str,
)
def test_a_specialist_spoken_to_has_its_penalty(monkeypatch, capsys, flags, penalty):
    given: dict[str, Any] = {}

    def record(*args: Any, **options: Any) -> Iterator[GenerationResponse]:
        given.update(options)
        return stream_generate(*args, **options)

    monkeypatch.setattr(generate_command, "stream_generate", record)
    flags = ["--prompt", "Hello!", "-m", "2", "--dtype", "float32", *flags]
    assert generate_command.main(flags) == 0
    assert given.get("repetition_penalty") == penalty
    assert capsys.readouterr().err == ""


def test_help_shows_examples(run_here):
    result = run_here("--help", LC_ALL="C")
    text = result.stdout.decode()
    assert (result.stderr, result.returncode) == (b"", 0)
    examples = text[text.index("examples:") :]
    assert examples.count("mlx_poe.generate --") >= 3
    for flag in ("--model", "--prompt", "--max-tokens", "--mode", "--num-draft-tokens", "--stop"):
        assert flag in text


# --- color ---------------------------------------------------------------------------------------


def test_colors_are_for_terminals_unless_forced(run_here):
    plain = text_of(PROMPT, max_tokens=30, mode="wand", safety=0.3) + "\n"
    flags = ("--prompt", PROMPT, "--max-tokens", "30", "--mode", "wand", "--safety", "0.3")
    flags += ("--no-fallback",)
    piped = run_here(*flags, "--color-stages", TERM="xterm")
    assert piped.stdout.decode() == plain
    forced = run_here(*flags, "--color-stages", FORCE_COLOR="1", TERM="xterm").stdout.decode()
    assert ANSI.sub("", forced) == plain
    assert len(set(ANSI.findall(forced)) - {"\x1b[0m"}) >= 2  # a color for each depth
    refused = run_here(*flags, "--color-stages", FORCE_COLOR="1", NO_COLOR="1", TERM="xterm")
    assert refused.stdout.decode() == plain
    unasked = run_here(*flags, FORCE_COLOR="1", TERM="xterm")
    assert unasked.stdout.decode() == plain


def read_terminal(descriptor: int) -> str:
    """A piece of what has been written, as the kernel passes it on; nothing at the end."""
    try:
        return os.read(descriptor, 1000).decode()
    except OSError:  # Linux's way to say that nobody holds the other side
        return ""


def test_colors_show_on_a_terminal():
    ours, theirs = pty.openpty()
    subprocess.run(
        [*COMMAND, "--prompt", PROMPT, "--max-tokens", "3", "--color-stages"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | {"TERM": "xterm"},
    )
    os.close(theirs)
    shown = "".join(iter(lambda: read_terminal(ours), ""))
    os.close(ours)
    assert ANSI.sub("", shown).strip() == text_of(PROMPT, max_tokens=3).strip()
    assert "\x1b[" in shown


def test_colors_leave_the_text_alone(run_here, endless):
    expected = generate(*load(endless, dtype="float32"), "Once", max_tokens=60)
    assert "\r" in expected and "\v" in expected
    flags = ("--model", str(endless), "--prompt", "Once", "--max-tokens", "60", "--color-stages")
    colored = run_here(*flags, FORCE_COLOR="1", TERM="xterm")
    assert ANSI.sub("", colored.stdout.decode()) == expected + "\n"


# --- requests that make no sense ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ((), "--prompt"),
        (("--prompt", "x", "--deep"), "--deep"),
        (("--prompt", "x", "--max-tokens", "many"), "--max-tokens"),
        (("--prompt", "x", "--mode", "deep"), "--mode"),
        (("--prompt", "x", "--mode", "certified"), "certified no longer exists: use speculative"),
        (("--prompt", "x", "--draft-rank", "16"), "draft-rank no longer exists: use draft-bits"),
        (("--draft-margin=0.4",), "draft-margin no longer exists: use num-draft-tokens"),
        (("--prompt", "x", "--mode", "compose", "--stages", "0,,1"), "--stages"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "-"), "the prompt is empty"),
        (("--prompt", "x", "--mode", "stage", "--stage", "9"), "stage 9"),
        (("--prompt", "x", "--stage", "0"), "stage belongs to mode stage, not to full"),
        (("--prompt", "x", "--max-tokens", "0"), "max_tokens 0"),
        (("--prompt", "x", "--temp", "-1"), "temp -1.0"),
        (("--prompt", "x", "--system-prompt", "y"), "--system-prompt needs a specialist"),
        (("--prompt", "x", "--specialists", ""), "--specialists: '' has an empty name"),
        (("--prompt", "x", "--specialists", "poe-tiny-chat,"), "'poe-tiny-chat,' has an empty"),
    ],
    ids=str,
)
def test_usage_errors_are_one_line_and_status_2(run_here, flags, named):
    assert_one_line(run_here(*flags), 2, named)


@pytest.mark.parametrize("verb", [(), ("dance",), ("two\nlines",)], ids=str)
def test_an_unknown_verb_is_answered_with_those_there_are(verb):
    result = run(*verb, command=(sys.executable, "-m", "mlx_poe"))
    message = result.stderr.decode()
    assert message.startswith("mlx_poe: error: ")
    assert message.count("\n") == 1
    assert "generate" in message and repr("".join(verb))[1:-1] in message
    assert (result.stdout, result.returncode) == (b"", 2)


def test_the_verbs_are_listed():
    result = run("--help", command=(sys.executable, "-m", "mlx_poe"))
    assert b"generate" in result.stdout
    assert (result.stderr, result.returncode) == (b"", 0)


# --- work that fails ------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def booby_trap(folder: Path) -> None:
    (folder / "tokenizer.pkl").write_bytes(
        pickle.dumps(Calls(os.system, f"touch '{folder / 'ran'}'"))
    )


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (shutil.rmtree, "no such folder"),
        (truncate, "model.safetensors is damaged or incomplete"),
        (booby_trap, "system': refused, nothing was run"),
    ],
)
def test_failed_work_is_one_line_and_status_1(run_here, tmp_path, damage, named):
    # A name over two lines is still one line of error.
    folder = Path(shutil.copytree(FIXTURES / "flat-d8", tmp_path / "a\nmodel"))
    damage(folder)
    result = run_here("--prompt", "x", "--json", "--model", str(folder))
    assert_one_line(result, 1, named)
    assert not (folder / "ran").exists()


# --- interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [pytest.param((), marks=SOAK), ("--verbose",)], ids=str)
def test_ctrl_c_keeps_what_there_is(endless, flags):
    forever = ("--prompt", "hello", "--max-tokens", str(10**9))
    running = start("--model", str(endless), *forever, *flags, stdout=subprocess.PIPE, bufsize=0)
    assert running.stdout is not None
    begun = running.stdout.read(8192)
    assert len(begun) < 8192  # it streams: a piece, not a bufferful
    running.send_signal(signal.SIGINT)
    rest, errors = running.communicate(timeout=300)
    assert running.returncode == 130
    assert b"Traceback" not in errors
    assert (b"Generation: " in errors) == bool(flags)
    text = (begun + rest).decode()
    assert len(text) > 1 and text.endswith("\n")
    expected = generate(*load(endless, dtype="float32"), "hello", max_tokens=len(text) + 100)
    assert expected.startswith(text[: min(len(text) - 1, 100)])


def test_ctrl_c_under_json_is_json_still(monkeypatch, capsys):
    def interrupted(*args: Any, **options: Any) -> Iterator[GenerationResponse]:
        yield from islice(stream_generate(*args, **options), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_command, "stream_generate", interrupted)
    assert generate_command.main(["--json", "--prompt", PROMPT, "--dtype", "float32"]) == 130
    output, errors = capsys.readouterr()
    assert json.loads(output)["text"] == text_of(PROMPT, max_tokens=3)
    assert errors == ""


def test_a_reader_that_leaves_ends_it_quietly(endless):
    flags = ("--prompt", "hello", "--max-tokens", str(10**9))
    running = start("--model", str(endless), *flags, stdout=subprocess.PIPE)
    assert running.stdout is not None and running.stderr is not None
    assert len(running.stdout.read(10)) == 10
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait() == 0
    running.stderr.close()


@pytest.mark.parametrize(
    "flags",
    [
        ("--json",),
        pytest.param(("--help",), marks=SOAK),
        pytest.param(("--color-stages", "--verbose"), marks=SOAK),
        (),
    ],
    ids=str,
)
def test_a_reader_that_has_left_already(flags):
    theirs, ours = os.pipe()
    os.close(theirs)
    running = start("--prompt", PROMPT, "--max-tokens", "3", *flags, stdout=ours)
    os.close(ours)
    _, errors = running.communicate()
    assert errors == b""
    assert running.returncode == 0


def test_a_closed_stdin_is_an_empty_prompt():
    shell = ("sh", "-c", 'exec "$0" "$@" <&-', *COMMAND)
    assert_one_line(run("--prompt", "-", command=shell), 2, "the prompt is empty")


SCRIPT = (str(Path(sys.executable).parent / "mlx_poe.generate"),)


@pytest.mark.parametrize(
    "command", [pytest.param(COMMAND[:4], marks=SOAK), SCRIPT], ids=["module", "script"]
)
def test_a_closed_stdin_takes_nothing_from_the_model(command):
    shell = ("sh", "-c", 'exec "$0" "$@" <&-', *command)
    result = run("--prompt", PROMPT, "-m", "12", "--dtype", "float32", command=shell)
    assert (result.stderr, result.returncode) == (b"", 0)
    assert result.stdout.decode() == text_of(PROMPT, max_tokens=12) + "\n"


def test_a_forked_worker_is_ended_by_its_pool_without_a_word():
    """lm-eval forks workers for its bootstrap; SIGTERM is Ctrl-C to the command alone."""
    script = (
        "import os, signal\n"
        "from mlx_poe.commands.entry import interruptible\n"
        "with interruptible():\n"
        "    if not (child := os.fork()):\n"
        "        signal.pause()\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted')\n"
    )
    result = run(command=(sys.executable, "-c", script))
    assert result.stdout.split() == [b"-15", b"interrupted"]


@pytest.mark.parametrize("closed", ["0 1 2", *(pytest.param(n, marks=SOAK) for n in "12")])
def test_closed_streams_are_the_null_device(closed):
    """Seen from within: every descriptor is open, and none leads to another file."""
    script = (
        "import os, sys\n"
        f"for number in map(int, '{closed}'.split()): os.close(number)\n"
        "if '1' in sys.argv[1]: sys.stdout = None\n"
        "from mlx_poe.commands.entry import open_missing_streams\n"
        "open_missing_streams()\n"
        "null = os.stat(os.devnull).st_rdev\n"
        f"assert all(os.fstat(n).st_rdev == null for n in map(int, '{closed}'.split()))\n"
        "assert all(os.get_inheritable(n) for n in range(3))\n"
        "print('to stdout', flush=True)\n"
    )
    result = run(closed, command=(sys.executable, "-c", script))
    assert (result.stderr, result.returncode) == (b"", 0)
    assert result.stdout == (b"" if "1" in closed else b"to stdout\n")


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", pytest.param("2>&-", marks=SOAK)])
def test_a_failure_with_closed_streams_is_a_failure_still(closed):
    calibrate = (*COMMAND[:3], "calibrate", "--data", "nosuch")
    result = run(command=("sh", "-c", f'exec "$0" "$@" {closed}', *calibrate))
    assert (result.stdout, result.returncode) == (b"", 2)
    assert (b"nosuch" in result.stderr) == ("2" not in closed)


def test_a_full_disk_is_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    shell = ("sh", "-c", 'exec "$0" "$@" >/dev/full', *COMMAND)
    assert_one_line(run("--prompt", PROMPT, "--json", command=shell), 1, "No space left")


# --- bytes that are no text -----------------------------------------------------------------------

LOCALES = [
    pytest.param({"LC_ALL": "C"}, marks=SOAK),
    pytest.param({"PYTHONIOENCODING": "utf-8"}, marks=SOAK),
    {"PYTHONIOENCODING": "ascii"},
]


@pytest.mark.parametrize("environment", LOCALES, ids=str)
def test_stdin_that_is_no_text(environment):
    result = run(
        "--prompt", "-", "--json", "--max-tokens", "4", stdin=b"caf\xff\xc3 x", **environment
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert re.fullmatch(r"caf[\ufffd?]+ x", answer["prompt"])
    assert len(answer["tokens"]) == 4


def test_a_prompt_argument_that_is_no_text():
    result = run("--prompt", b"caf\xff", "--json", "--max-tokens", "4", PYTHONIOENCODING="utf-8")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["tokens"]) == 4


@pytest.mark.parametrize("environment", LOCALES, ids=str)
def test_text_that_the_locale_cannot_write(endless, environment):
    expected = generate(*load(endless, dtype="float32"), "Once", max_tokens=20) + "\n"
    assert not expected.isascii()
    flags = ("--model", str(endless), "--prompt", "Once", "--max-tokens", "20")
    result = run(*flags, **environment)
    assert result.returncode == 0
    shown = result.stdout.decode()
    assert shown in (expected, expected.encode("ascii", "replace").decode())


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00008:k)"),
            "out of memory; try --quantize 4 ([METAL] Command buffer",
        ),
        (
            RuntimeError("[malloc] Unable to allocate 9 bytes.\n"),
            "out of memory; try --quantize 4 (",
        ),
        (RuntimeError("[read] Unable to read from file"), "MLX failed: [read] Unable to read"),
        (MemoryError(), "out of memory; try --quantize 4\n"),
        (RuntimeError("[eval] Attempting to eval an array without a primitive"), None),
        (RuntimeError("a bug"), None),
        (RecursionError("[malloc"), None),
    ],
)
def test_what_a_machine_lacks_takes_one_line_and_a_bug_stays_a_traceback(error, shown, capsys):
    def fail(_: object) -> int:
        raise error

    if shown is None:
        with pytest.raises(type(error), match=re.escape(str(error))):
            entry.run(entry.make_parser("tried", "", ""), fail, [])
        return
    assert entry.run(entry.make_parser("tried", "", ""), fail, []) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"tried: error: {shown}") and said.count("\n") == 1


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_bars_appear_on_a_terminal_while_something_is_left_to_do(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with Bars() as bars:
            bars("prompt", 5, 5)
            assert stream.getvalue() == ""
            bars("training [1]", 2, 8, "loss 1.5")
            print("a result")
            bars("training [1]", 8, 8, "loss 1.0")
            bars.close()
            after = stream.getvalue()
            for part in ("training [1]", "8/8", "loss 1.0") if shown else ():
                assert part in after, part
            assert "a result" not in after and "prompt" not in after
            assert bool(after) is shown
    assert capsys.readouterr().out == "a result\n" * 2


def test_a_count_that_is_too_small_or_no_number_is_refused_by_its_flag(capsys):
    from mlx_poe.commands.flags import whole

    assert [whole(least)(text) for least, text in ((0, "0"), (1, "1"), (2, "15"))] == [0, 1, 15]
    parser = entry.make_parser("count", "Count.", "  count")
    parser.add_argument("--number", type=whole(2))
    for text in ("1", "-3", "2.5", "x", "9" * 16):
        assert entry.run(parser, lambda _: 0, ["--number", text]) == 2
        said = f"argument --number: {text!r} is not a whole number of at least 2"
        assert said in capsys.readouterr().err
