"""The queue: which run starts when, and what became of the runs that were started.

One object, one loop. What it knows lies in `run.json` and `job.json` of the runs, so that a service that restarts
goes on where it was. Runs start in the order in which they came; the first that does not fit holds the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from cluster.config.run import RunConfig, parse_config
from cluster.jobs.job import Asked, Job, interrupt, is_held, not_started, read_job, record_or_none, vanished, write_job
from cluster.jobs.ray_cluster import ClusterStatus, RayCluster
from cluster.planning.plan import roles
from cluster.runs.atomic_files import RunDirectoryError
from cluster.runs.directory import RunDirectory, RunError
from cluster.service.errors import ApiError
from cluster.service.run_view import QueuePlace, Run, Runs, view
from trainers.errors import UserError

logger = logging.getLogger(__name__)

POLL_S: Final = 1.0
_SETTLED: Final[Mapping[Asked, Literal["paused", "stopped"]]] = {"pause": "paused", "stop": "stopped"}


class Queue:
    """Runs that wait or go, of those that this service was asked to start."""

    def __init__(self, runs: Runs, cluster: RayCluster, *, max_concurrent_runs: int | None) -> None:
        self._runs = runs
        self._cluster = cluster
        self._max_concurrent_runs = max_concurrent_runs
        self._active: dict[str, Job] = {}
        self._reasons: dict[str, str] = {}
        self._told: set[str] = set()
        self._changing = asyncio.Lock()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Look after the runs until cancelled; one bad run's directory never stops the others."""
        await asyncio.to_thread(self._find_active)
        while True:
            try:
                async with self._changing:
                    await self._look_after()
            except Exception:
                logger.exception("the queue could not look after its runs; it tries again")
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S if self._active else None):
                    await self._wake.wait()

    async def _look_after(self) -> None:
        status = await self._cluster.status() if self._active else ClusterStatus("ready")
        for run_id in list(self._active):
            await self._settle(run_id)
        await self._start(status)

    def add(self, directory: RunDirectory) -> None:
        """Put a run, new or resumed, at the end of the queue."""
        job = Job(since=time.time())
        write_job(directory, job)
        directory.update(state="queued", error=None)
        self._active[directory.path.name] = job
        self._wake.set()

    async def ask(self, directory: RunDirectory, what: Asked) -> None:
        """Stop or pause a run that waits or goes. Raises ApiError 409 where that cannot be."""
        async with self._changing:
            run = view(directory)
            if run.state not in ("queued", "running") or run.stopping:
                raise ApiError(409, "conflict", _cannot(what, run))
            job = read_job(directory)
            if job is None:
                if what == "pause":
                    advice = "it can be stopped, and resumed later"
                    raise ApiError(409, "conflict", f"the service did not start this run and cannot pause it; {advice}")
                if not await asyncio.to_thread(interrupt, directory):
                    where = "its process is on another machine, or not the service's to end"
                    raise ApiError(409, "conflict", f"the service did not start this run, and {where}; stop it there")
                return
            job = job.model_copy(update={"asked": what})
            write_job(directory, job)
            self._active[run.id] = job
            if job.submission is not None:
                await self._tell(job)
            else:
                self._end(directory, _SETTLED[what])
        self._wake.set()

    def waiting(self) -> dict[str, QueuePlace]:
        """Every run that waits, in order, and why."""
        ids = [run_id for run_id, job in self._in_order() if job.submission is None]
        return {
            run_id: QueuePlace(position=place, reason=self._reasons.get(run_id, "it has just come"))
            for place, run_id in enumerate(ids, start=1)
        }

    def going(self) -> list[str]:
        """Runs whose process has been started and has not ended."""
        return [run_id for run_id, job in self._in_order() if job.submission is not None]

    def _in_order(self) -> list[tuple[str, Job]]:
        return sorted(self._active.items(), key=lambda item: item[1].since)

    def _find_active(self) -> None:
        for run_id in self._runs.ids():
            directory = RunDirectory(self._runs.root / run_id)
            record, job = record_or_none(directory), read_job(directory)
            if record is None or job is None:
                continue
            if record.state in ("queued", "running") or job.asked is not None:
                self._active[run_id] = job

    async def _settle(self, run_id: str) -> None:
        """Take a run off that has ended, and write down how where its process did not."""
        directory, job = RunDirectory(self._runs.root / run_id), self._active[run_id]
        record = record_or_none(directory)
        if record is None:
            del self._active[run_id]
            return
        if record.state not in ("queued", "running"):
            if job.asked == "pause" and record.state == "stopped":
                self._end(directory, "paused")
            elif not is_held(directory):
                self._end(directory, None)
            return
        if job.submission is None:
            return
        if job.asked is not None:
            await self._tell(job)
        if is_held(directory):
            return
        if await self._cluster.ended(job.submission):
            record = record_or_none(directory)  # it may have written its end just before
            if record is not None and record.state in ("queued", "running"):
                self._lost(directory, job)

    async def _tell(self, job: Job) -> None:
        """Have Ray ask the run's process to stop, once; where Ray does not answer it is tried again."""
        submission = job.submission  # a run that was resumed has another one, which has not been told
        if submission is not None and submission not in self._told and await self._cluster.stop(submission):
            self._told.add(submission)

    def _lost(self, directory: RunDirectory, job: Job) -> None:
        """Its process has ended and has not said how."""
        if job.asked is not None:
            self._end(directory, _SETTLED[job.asked])
            return
        error = vanished(directory)
        if directory.record().state == "queued":
            error = not_started(directory)
        self._end(directory, "failed", error)

    def _end(
        self,
        directory: RunDirectory,
        state: Literal["paused", "stopped", "failed"] | None,
        error: RunError | None = None,
    ) -> None:
        """Off the queue; `state` where nobody else has written one."""
        try:
            if state is not None:
                with directory.locked():
                    directory.update(state=state, error=error)
            if (job := read_job(directory)) is not None:
                write_job(directory, job.model_copy(update={"asked": None, "submission": None}))
        except (UserError, RunDirectoryError) as problem:
            logger.warning("%s: %s", directory.path.name, problem)
            return  # somebody holds it; looked at again
        self._active.pop(directory.path.name, None)
        self._reasons.pop(directory.path.name, None)

    async def _start(self, status: ClusterStatus) -> None:
        """Start what fits, in order; the first that does not holds the others."""
        waiting = [(run_id, job) for run_id, job in self._in_order() if job.submission is None]
        blocked: str | None = None
        for run_id, job in waiting:
            if blocked is not None:
                self._reasons[run_id] = f"behind {blocked}"
                continue
            directories = [RunDirectory(self._runs.root / going) for going in self.going()]
            directory = RunDirectory(self._runs.root / run_id)
            reason = await asyncio.to_thread(
                obstacle, directory, directories, status, max_concurrent_runs=self._max_concurrent_runs
            )
            if reason is None:
                reason = await self._submit(run_id, job)
            if reason is not None:
                self._reasons[run_id] = reason
                blocked = run_id

    async def _submit(self, run_id: str, job: Job) -> str | None:
        """Why it could not be started, or None."""
        directory = RunDirectory(self._runs.root / run_id)
        submission = f"{run_id}-{secrets.token_hex(3)}"
        try:
            # Written first: a service that is killed here finds out from Ray what became of it.
            started = job.model_copy(update={"submission": submission})
            write_job(directory, started)
            await self._cluster.submit(directory, submission)
        except (RuntimeError, OSError, TimeoutError) as error:
            write_job(directory, job)
            logger.warning("%s was not started: %s", run_id, error)
            return f"Ray did not take it: {str(error).splitlines()[0][:300] if str(error) else type(error).__name__}"
        self._active[run_id] = started
        self._reasons.pop(run_id, None)
        return None


def obstacle(
    directory: RunDirectory, going: Sequence[RunDirectory], status: ClusterStatus, *, max_concurrent_runs: int | None
) -> str | None:
    """Why a run cannot start beside those that go; None: it can."""
    if status.state != "ready":
        return status.message or "the cluster is not ready"
    if is_held(directory):
        return "its last process has not ended yet"
    gpus = status.resources["GPU"].total if "GPU" in status.resources else 0.0
    most = max_concurrent_runs if max_concurrent_runs is not None else (None if gpus else 1)
    if most is not None and len(going) >= most:
        runs = "1 run" if most == 1 else f"{most} runs"
        return f"{runs} at a time (rlhf serve --max-concurrent-runs): waits for {going[0].path.name}"
    taken = [_demand_of(other, gpus=bool(gpus)) for other in going]
    for name, amount in _demand_of(directory, gpus=bool(gpus)).items():
        there = status.resources.get(name)
        total, used = (there.total, there.used) if there else (0.0, 0.0)
        # What has been started may not have taken its place yet, and others use the cluster too.
        free = max(0.0, total - max(used, sum(needed.get(name, 0.0) for needed in taken)))
        if amount > free:
            return f"needs {_plural(amount, name)}, {free:g} of {total:g} {'is' if free == 1 else 'are'} free"
    return None


def _plural(amount: float, name: str) -> str:
    return f"{amount:g} {name}{'' if amount == 1 else 's'}"


def _demand_of(directory: RunDirectory, *, gpus: bool) -> dict[str, float]:
    try:
        return demand(parse_config(directory.config()), gpus=gpus)
    except UserError:
        return {}


def demand(config: RunConfig, *, gpus: bool) -> dict[str, float]:
    """The CPUs and GPUs that a run's roles ask of the cluster."""
    found = roles(config, gpus=gpus)
    needed = {
        "CPU": sum(role.count * role.cpus for role in found),
        "GPU": sum(role.count * role.gpus for role in found),
    }
    return {name: amount for name, amount in needed.items() if amount > 0}


def placed(run: Run, waiting: Mapping[str, QueuePlace]) -> Run:
    """The run with its place in the queue."""
    return run.model_copy(update={"queue": waiting[run.id]}) if run.id in waiting and run.state == "queued" else run


def _cannot(what: Asked, run: Run) -> str:
    state = "stopping" if run.stopping else run.state
    return f"a run that is {state} cannot be {'paused' if what == 'pause' else 'stopped'}"
