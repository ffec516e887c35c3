"""Models split over several processes: the checks are `split_checks`'s, here they are started.

One group of processes makes many checks, as starting them takes longer than they do.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SOAK

from mlx_poe.commands.bench import main as bench
from mlx_poe.commands.generate import main

CHECKS = Path(__file__).parent / "split_checks.py"
SECONDS = 600  # after which the ranks hang, however busy the machine is
NO_MPIRUN = shutil.which("mpirun") is None


def with_mpi(test: Callable[..., None]) -> Callable[..., None]:
    """For tests that start processes with mpirun."""
    skipped = pytest.mark.skipif(NO_MPIRUN, reason="no mpirun: install Open MPI to run these")
    return pytest.mark.mpi(skipped(test))


def environment() -> dict[str, str]:
    # More processes than cores, each waiting for another: threads of their own would only wait.
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def results(folder: Path, err: str) -> list[str]:
    """The names of the checks made; fails for one that has gone wrong."""
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    found = [json.loads(line) for line in lines]
    wrong = [check for check in found if check["wrong"]]
    assert found and not wrong, (wrong, err[-2000:])
    return [check["check"] for check in found]


def by_mpi(count: int, *cases: str, folder: Path) -> list[str]:
    flags = ["--allow-run-as-root", "--oversubscribe", "--mca", "mpi_yield_when_idle", "1"]
    run = subprocess.run(
        ["mpirun", *flags, "-n", str(count), sys.executable, str(CHECKS), str(folder), *cases],
        capture_output=True, text=True, timeout=SECONDS, env=environment(),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return results(folder, run.stderr)


def by_ring(count: int, *cases: str, folder: Path) -> list[str]:
    status, err = ring(count, *cases, ends=True, folder=folder)
    assert status == 0, err[-2000:]
    return results(folder, err)


def ring(count: int, *cases: str, ends: bool, folder: Path) -> tuple[int, str]:
    """As `mlx.launch` starts a ring, which would end all ranks if one dies: rank 0's status, and
    what it says. With `ends` the others must end well."""
    with_ports = [socket.socket() for _ in range(count)]
    for one in with_ports:
        # Held until the end, so that nobody else is given the port; the ring shares it.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.bind(("127.0.0.1", 0))
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{one.getsockname()[1]}"] for one in with_ports]))
    ranks: list[subprocess.Popen[str]] = []
    try:
        for rank in reversed(range(count)):
            env = {**environment(), "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            if ranks:
                env["RANK_1"] = str(ranks[-1].pid)
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(CHECKS), str(folder), *cases],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=env,
                )
            )
        _, err = ranks[-1].communicate(timeout=SECONDS)
        if ends:
            for one in ranks[:-1]:
                one.communicate(timeout=SECONDS)
                assert one.returncode == 0
        return ranks[-1].returncode, err
    finally:
        for one in ranks:
            one.kill()
            one.communicate()
        for one in with_ports:
            one.close()


@with_mpi
def test_two_machines_decode_in_every_mode_as_one_does(tmp_path):
    cases = "gqa-logop-d8:0,1|2,3", "drafting:0|1,2,3", "failing:0,1|2,3"
    done = by_mpi(2, *cases, folder=tmp_path)
    assert len(done) == 8 + 4 + 4 + 3  # and an owner's word for each that it holds nothing


@SOAK
@with_mpi
def test_activations_go_from_machine_to_machine_and_specialists_work_side_by_side(tmp_path):
    cases = "chain-on-stage:0|1|2,3|4,5", "siblings:stages", "passing:0|1|2|3"
    done = by_mpi(4, *cases, folder=tmp_path)
    assert len(done) == 8 + 6 + 2 + 3 * 3


@SOAK
def test_a_ring_passes_messages_on(tmp_path):
    assert len(by_ring(4, "some:stage-on-flat:0,1|2|3|4", folder=tmp_path)) == 3 + 3


@pytest.mark.parametrize(("how", "ends"), [("kill", 7), pytest.param("stop", 130, marks=SOAK)])
def test_a_rank_that_is_lost_is_named_and_done_without(how, ends, tmp_path):
    status, err = ring(2, f"lost:{how}", ends=False, folder=tmp_path)
    assert status == ends, err[-2000:]
    assert len(results(tmp_path, err)) == 4
    went_on = "went on without the others: " in err
    assert went_on == (ends == 7)


@SOAK
def test_a_rank_that_never_loads_its_part_is_named(tmp_path):
    status, err = ring(2, "late", ends=False, folder=tmp_path)
    assert (status, err) == (1, "error: rank 1 has not loaded its part for 0.5 seconds\n")


MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe", "--mca", "mpi_yield_when_idle", "1")
GENERATE = ("-m", "mlx_poe", "generate", "--max-tokens", "8")


def command(*args: str, count: int = 0) -> subprocess.CompletedProcess[str]:
    """`mlx_poe.generate`, on so many machines."""
    start = [*MPIRUN, "-n", str(count)] if count else []
    return subprocess.run(
        [*start, sys.executable, *GENERATE, *args],
        capture_output=True, text=True, timeout=SECONDS, env=environment(),
    )  # fmt: skip


@with_mpi
def test_the_command_says_what_each_machine_holds_and_replies_as_on_one():
    prompt = "--prompt", "Once there was a", "--quantize", "4"
    split = command("--split", "0|1,2,3", "--json", *prompt, count=2)
    assert split.returncode == 0, split.stderr
    assert "rank 0 holds stage 0: 0.7 MB" in split.stderr
    assert "rank 1 holds stage 1, stage 2, stage 3: 1.2 MB" in split.stderr
    one = command("--json", *prompt)
    assert json.loads(split.stdout)["tokens"] == json.loads(one.stdout)["tokens"]


@with_mpi
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--split", "0|1"), "give each of the stages 0 to 3 once, in order"),
        pytest.param(
            *(("--split", "stages", "--model", "nowhere"), "nowhere: no such folder"), marks=SOAK
        ),
    ],
)
def test_a_split_that_cannot_be_ends_every_rank_with_one_line(flags, said):
    run = command(*flags, "--prompt", "x", count=2)
    assert run.returncode in (1, 2)
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_a_split_needs_several_machines(capsys):
    assert main(["--split", "stages", "--prompt", "x"]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert "start the command on each machine with mlx.launch" in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--degrade",), "--degrade and --rank-timeout need --split"),
        (("--split", "stages", "--rank-timeout", "0"), "--rank-timeout 0.0 is not above 0"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, said, capsys):
    assert main([*flags, "--prompt", "x"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--siblings 2", "--siblings needs --split"),
        ("--split stages --shape tiny", "--split, --shape and --only machines together"),
        ("--only machines", "--split, --shape and --only machines together"),
        ("--quantize 4", "leave out --quantize and --degrade"),
        ("--degrade", "leave out --quantize and --degrade"),
        ("--siblings 2 --agreement 0.9", "--siblings and --agreement measure different things"),
        ("--siblings -1", "--siblings -1 is below 0"),
    ],
)
def test_flags_of_the_benchmark_that_make_no_sense_are_refused(flags, said, capsys):
    whole = "--split", "stages", "--shape", "tiny", "--only", "machines"
    mixed = flags.split() if "--split" in said else [*whole, *flags.split()]
    assert bench(mixed) == 2
    assert said in capsys.readouterr().err


@with_mpi
@pytest.mark.parametrize(
    "more", [(), pytest.param(("--siblings", "2"), marks=SOAK)], ids=["prompt", "siblings"]
)
def test_bench_measures_several_machines_against_one(more, tmp_path):
    out = tmp_path / "machines.json"
    flags = ["--only", "machines", "--split", "stages", "--trials", "1", "--json", str(out)]
    sizes = ["--shape", "tiny", "--prompt-tokens", "300", "--context", "16", "-m", "4"]
    run = subprocess.run(
        [*MPIRUN, "-n", "2", sys.executable, "-m", "mlx_poe", "bench", *flags, *sizes, *more],
        capture_output=True, text=True, timeout=SECONDS, env=environment(),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    one, many = json.loads(out.read_text())["figures"]
    assert one["speedup"] == 1.0
    assert many["predicted"] > 1
    assert many["notes"]["of_ceiling"] == many["speedup"] / many["predicted"]
