"""The driver for many sequences: requests for the same stage become one pass.

- sequences join, finish and are removed at any time; each keeps its own mode, sampler and model
- a *sweep* takes every sequence to its next token: passes from the shallowest stage up, with the
  rows of all sequences at a stage packed into one pass, and one wait for all numbers
- prompts are read in chunks alongside the others' tokens, a limited number of rows per sweep
- a pass that fails is retried for each sequence alone, so that only the one at fault ends; if it
  failed on another machine, that is known too late to retry, and all its sequences end
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from cognica_mlx.decoding.advice import Meter
from cognica_mlx.decoding.passes import course, read, run_stages, score, submit
from cognica_mlx.decoding.requests import (
    Advance,
    DecodedToken,
    Read,
    Request,
    Resumable,
    Score,
    Steps,
    Submit,
)
from cognica_mlx.decoding.sequence import prefill_step_size_here
from cognica_mlx.errors import RankError, RankLostError
from cognica_mlx.network.stages import Stage


@dataclass(frozen=True)
class Event:
    """News of the sequence `name`: a token, as `Batch.add` says, or its end, with an `error` if it
    failed."""

    name: Hashable
    token: Any = None
    error: Exception | None = None


@dataclass(eq=False)
class _Job:
    name: Hashable
    steps: Steps
    pace: Meter | None
    tell: Callable[[DecodedToken], Any] | None
    request: Request | None = None
    # Positions that the request runs or scores.
    rows: int = 0
    answer: Any = None
    # Machines that it had asked were lost.
    lost: RankLostError | None = None
    # It has had its turn in this sweep.
    had_turn: bool = False
    # It was left out of the last sweep's pass because the pass was full.
    deferred: bool = False
    # The last layer that it reached in this sweep.
    depth: int = -1
    submitted: list[mx.array] = field(default_factory=list)


class Batch:
    """Sequences that are decoded together.

    `prompt_rows` limits the rows that prompts add to a sweep; two chunks by default.
    """

    def __init__(self, prompt_rows: int | None = None):
        self.prompt_rows = prompt_rows or 2 * prefill_step_size_here()
        self._jobs: dict[Hashable, _Job] = {}
        # Kept from call to call: an interruption must not lose any.
        self._events: list[Event] = []
        # Statistics: passes made, and rows run in them.
        self.passes = self.rows = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(
        self,
        name: Hashable,
        steps: Steps,
        pace: Meter | None = None,
        tell: Callable[[DecodedToken], Any] | None = None,
    ) -> None:
        """Add a sequence's `steps`, starting with the next sweep; `pace` records its costs.

        `tell` makes what an event says of a token, before the steps go on, because they may plan
        the next round before the event is read; by default it is the token itself.
        """
        if name in self._jobs:
            raise ValueError(f"there is already a sequence {name!r}")
        self._jobs[name] = _Job(name, steps, pace, tell, had_turn=True)

    def remove(self, name: Hashable) -> None:
        """End a sequence, if it has not ended; its state is rolled back to the tokens emitted."""
        if job := self._jobs.pop(name, None):
            job.steps.close()

    def close(self) -> None:
        for name in list(self._jobs):
            self.remove(name)

    def run(self) -> list[Event]:
        """Work until there are tokens to return or sequences that ended, for at most one sweep, so
        that sequences can be added and removed between two chunks of a long prompt.

        An interruption loses nothing: the next call continues. Sequences whose own code it hits
        go on after their last token, if their steps are `Resumable`.
        """
        worked = False
        while self._jobs and not self._events:
            for job in list(self._jobs.values()):
                if job.request is None:
                    self._resume(job)
            waiting = [job for job in self._jobs.values() if not job.had_turn]
            if not waiting:
                if worked:
                    break
                for job in self._jobs.values():
                    job.had_turn, job.depth = False, -1
            elif not self._events:
                self._work(waiting)
                worked = True
        events, self._events = self._events, []
        return events

    def _work(self, waiting: Sequence[_Job]) -> None:
        """Carry out the next group of requests."""
        asked: dict[type, list[_Job]] = {}
        for job in waiting:
            asked.setdefault(type(job.request), []).append(job)
        if Submit in asked:
            job = asked[Submit][0]
            job.submitted = submit(job.request.state, job.submitted)  # type: ignore[union-attr]
            job.had_turn = True
            self._resume(job)
            return
        if scores := asked.get(Score):
            kind = scores[0].request.kind  # type: ignore[union-attr]
            group = [job for job in scores if job.request.kind == kind]  # type: ignore[union-attr]
            self._together(group, score)
            return
        reads = asked.get(Read, [])
        if advances := asked.get(Advance):
            stages: dict[Stage, list[_Job]] = {}
            for job in advances:
                stages.setdefault(job.request.stage, []).append(job)  # type: ignore[union-attr]
            stage = min(stages, key=lambda stage: stage.layers[0])
            # Answer reads from shallower stages first: their sequences may then join this pass.
            early = [job for job in reads if job.depth < stage.layers[0]]
            if not early:
                self._advance(stages, stage)
                return
            reads = early
        for job in reads:
            # A read of nothing only starts work; its results are read in the next sweep.
            job.had_turn |= not job.request.arrays  # type: ignore[union-attr]
        self._together(reads, read)

    def _advance(self, asked: Mapping[Stage, list[_Job]], stage: Stage) -> None:
        """One pass through a stage, the shallowest `asked` for, for as many of its jobs as fit; it
        goes on through the next stages until others may join."""
        jobs = asked[stage]
        total = sum(job.rows for job in jobs)
        if total > len(jobs):
            jobs, total = self._choose(jobs)
        others = [other for other in asked if other is not stage]
        if len(jobs) < len(asked[stage]):
            length = 1
        else:
            until = min(others, key=lambda other: other.layers[0], default=None)
            length = course([job.request for job in jobs], until)  # type: ignore[misc]
        self.passes += length
        self.rows += total * length
        for job in jobs:
            request = job.request
            assert isinstance(request, Advance)
            job.depth = request.state.stages[request.index + length - 1].layers[-1]
        self._together(jobs, partial(run_stages, length=length), length=length)

    def _choose(self, jobs: list[_Job]) -> tuple[list[_Job], int]:
        """The jobs that fit in a pass, in their order in it, and their total rows."""
        # Deferred jobs first, then short ones, so that no prompt holds up the others; single rows
        # are adjacent, which makes them cheaper to embed.
        jobs.sort(key=lambda job: (not job.deferred, job.rows))
        chosen: list[_Job] = []
        total = 0
        for job in jobs:
            job.deferred = bool(chosen) and job.rows > 1 and total + job.rows > self.prompt_rows
            if job.deferred:
                job.had_turn = True
            else:
                chosen.append(job)
                total += job.rows
        return chosen, total

    def _together(
        self,
        jobs: Sequence[_Job],
        work: Any,
        cause: RankError | None = None,
        length: int = 1,
    ) -> None:
        """Do the same work for several jobs at once, and give each its answer. On a retry for a
        single job, `cause` is the remote error of the shared pass, reported if the job fails too:
        the retry's own error would hide it."""
        paced = [job for job in jobs if job.pace and job.request]
        if paced:
            total = sum(job.rows for job in jobs)
            for job in paced:
                job.pace.spent += job.pace.price(job.request, total, length)  # type: ignore
        try:
            answers = work([job.request for job in jobs])
        except RankLostError as error:
            for job in jobs:
                job.request, job.lost = None, error
            for job in jobs:
                self._resume(job)  # it may be able to go on
            return
        except Exception as error:
            if len(jobs) == 1:
                self._end(jobs[0], cause or error)
            else:
                cause = error if isinstance(error, RankError) else None
                for job in jobs:
                    self._together([job], work, cause, length)
            return
        # Store all answers before any job continues: an interruption loses none.
        for job, answer in zip(jobs, answers, strict=True):
            rest = job.request.rest() if isinstance(job.request, Advance) else None
            job.request, job.answer = rest, answer
            if rest:
                job.rows = rest.count
        for job in jobs:
            if job.request is None:
                self._resume(job)

    def _resume(self, job: _Job) -> None:
        """Run a job to its next request; throw an error into it if a machine was lost."""
        answer, lost, job.answer, job.lost = job.answer, job.lost, None, None
        telling = False
        if job.pace:
            job.pace.others = len(self._jobs) - 1
        try:
            while True:
                step = job.steps.throw(lost) if lost else job.steps.send(answer)
                if not isinstance(step, DecodedToken):
                    job.request, job.rows = step, _rows(step)
                    return
                answer, lost, job.had_turn = None, None, True
                telling = True
                self._events.append(Event(job.name, job.tell(step) if job.tell else step))
                telling = False
        except StopIteration:
            self._end(job)
        except Exception as error:
            self._end(job, error)
        except BaseException:
            if telling:  # the token is emitted and cannot be told again
                self._end(job, RuntimeError("interrupted while a token was handed on"))
            elif isinstance(job.steps, Resumable):
                job.request = None
                job.steps.restart()
            raise

    def _end(self, job: _Job, error: Exception | None = None) -> None:
        self._jobs.pop(job.name, None)
        job.steps.close()
        self._events.append(Event(job.name, error=error))


def _rows(request: Request) -> int:
    if isinstance(request, Advance):
        return request.count
    return request.rows if isinstance(request, Score) else 1
