"""The queue: which run starts when, and what became of the runs that were started.

One object, one loop. Its state is in `run.json` and `job.json` of the runs, so that a service that restarts resumes
where it was. Runs start in the order in which they came; the first that does not fit holds the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from cluster.config.run import RunConfig, parse_config
from cluster.jobs.job import (
    Asked,
    Job,
    interrupt,
    is_held,
    new_submission,
    not_started,
    read_job,
    record_or_none,
    vanished,
    write_job,
)
from cluster.jobs.ray_cluster import ClusterStatus, RayCluster
from cluster.planning.plan import roles
from cluster.runs.atomic_files import RunDirectoryError
from cluster.runs.directory import RunDirectory, RunError
from cluster.service.exceptions import ConflictError, NotFoundError
from cluster.service.run_view import QueuePlace, Run, Runs, actions, view
from trainers.errors import UserError

logger = logging.getLogger(__name__)

POLL_S: Final = 1.0
_SETTLED: Final[Mapping[Asked, Literal["paused", "stopped"]]] = {"pause": "paused", "stop": "stopped"}


@dataclass(slots=True)
class _Entries:
    """The runs in the queue, waiting or started, as the service's memory has them; `job.json` has each too."""

    jobs: dict[str, Job] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def in_order(self, *, started: bool) -> list[tuple[str, Job]]:
        """Those that have been started, or those that have not."""
        found = [(run_id, job) for run_id, job in self.jobs.items() if job.started == started]
        return sorted(found, key=lambda item: item[1].since)

    def put(self, directory: RunDirectory, job: Job) -> None:
        """Write the job, then remember it."""
        write_job(directory, job)
        self.jobs[directory.path.name] = job

    def drop(self, run_id: str) -> None:
        """Forget a run."""
        self.jobs.pop(run_id, None)
        self.reasons.pop(run_id, None)

    def confirm(self, directory: RunDirectory, job: Job) -> Job:
        """Ray has accepted the run's submission."""
        job = job.model_copy(update={"unconfirmed": False})
        self.put(directory, job)
        self.reasons.pop(directory.path.name, None)
        return job

    def end(
        self,
        directory: RunDirectory,
        state: Literal["paused", "stopped", "failed"] | None,
        error: RunError | None = None,
    ) -> None:
        """Take a run off the queue; `state` unless the run has recorded one."""
        try:
            if state is not None:
                with directory.locked():
                    directory.update(state=state, error=error)
            if (job := read_job(directory)) is not None:
                write_job(directory, job.model_copy(update={"asked": None, "submission": None, "unconfirmed": False}))
        except (UserError, RunDirectoryError) as problem:
            logger.warning("%s: %s", directory.path.name, problem)
            return  # another process holds it; tried again
        self.drop(directory.path.name)

    def lose(self, directory: RunDirectory, job: Job) -> None:
        """Its process has ended without recording how."""
        if job.asked is not None:
            self.end(directory, _SETTLED[job.asked])
            return
        error = vanished(directory)
        if directory.record().state == "queued":
            error = not_started(directory)
        self.end(directory, "failed", error)


class Queue:
    """Runs that wait or run, of those that this service was asked to start.

    Whatever changes one run holds that run's lock, so that no decision rests on what was true before a wait.
    """

    def __init__(self, runs: Runs, cluster: RayCluster, *, max_concurrent_runs: int | None) -> None:
        self._runs = runs
        self._cluster = cluster
        self._max_concurrent_runs = max_concurrent_runs
        self._entries = _Entries()
        self._stop_sent: set[str] = set()
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Look after the runs until cancelled; one bad run's directory never stops the others."""
        for run_id, job in (await asyncio.to_thread(_find_active, self._runs)).items():
            self._entries.jobs.setdefault(run_id, job)  # a request may have come first
        while True:
            try:
                await self.look_after()
            except Exception:
                logger.exception("the queue could not look after its runs; it tries again")
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S if self._entries.jobs else None):
                    await self._wake.wait()

    async def look_after(self) -> None:
        """Look once at every run that waits or runs."""
        status = await self._cluster.status() if self._entries.jobs else ClusterStatus("ready")
        for run_id in list(self._entries.jobs):
            async with self._locks[run_id]:
                if run_id in self._entries.jobs:
                    await self._settle(run_id)
        await self._start(status)

    async def add(self, directory: RunDirectory) -> None:
        """Put a new run at the end of the queue."""
        async with self._locks[directory.path.name]:
            self._append(directory)

    async def resume(self, directory: RunDirectory) -> None:
        """Put a run that ended before its last step at the end of the queue. Raises ConflictError for another one."""
        async with self._locks[directory.path.name]:
            run = view(directory)
            if "resume" not in actions(run, directory):
                raise ConflictError(f"a run that is {run.state} cannot be resumed")
            self._append(directory)

    async def delete(self, directory: RunDirectory) -> None:
        """Remove a run's directory. Raises ConflictError while it waits or runs."""
        async with self._locks[directory.path.name]:
            await asyncio.to_thread(_delete, directory)
            self._entries.drop(directory.path.name)

    def _append(self, directory: RunDirectory) -> None:
        self._entries.put(directory, Job(since=time.time()))
        directory.update(state="queued", error=None)
        self._wake.set()

    async def ask(self, directory: RunDirectory, what: Asked) -> None:
        """Stop or pause a run that waits or runs. Raises ConflictError where that cannot be."""
        async with self._locks[directory.path.name]:
            run = view(directory)
            if run.state not in ("queued", "running") or run.stopping:
                raise ConflictError(_cannot(what, run))
            job = read_job(directory)
            if job is None:
                if what == "pause":
                    advice = "it can be stopped, and resumed later"
                    raise ConflictError(f"the service did not start this run and cannot pause it; {advice}")
                if not await asyncio.to_thread(interrupt, directory):
                    where = "its process is on another machine, or not the service's to end"
                    raise ConflictError(f"the service did not start this run, and {where}; stop it there")
                return
            job = job.model_copy(update={"asked": what})
            self._entries.put(directory, job)
            if job.submission is not None:
                await self._send_stop(job)
            else:
                self._entries.end(directory, _SETTLED[what])
        self._wake.set()

    def waiting(self) -> dict[str, QueuePlace]:
        """Every run that waits, in order, and why."""
        return {
            run_id: QueuePlace(position=place, reason=self._entries.reasons.get(run_id, "just added"))
            for place, (run_id, _) in enumerate(self._entries.in_order(started=False), start=1)
        }

    def going(self) -> list[str]:
        """Runs whose process has been started and has not ended."""
        return [run_id for run_id, _ in self._entries.in_order(started=True)]

    async def _settle(self, run_id: str) -> None:
        """Take a run off the queue that has ended, and write down how if its process did not."""
        directory, job = RunDirectory(self._runs.root / run_id), self._entries.jobs[run_id]
        record = record_or_none(directory)
        if record is None:
            self._entries.drop(run_id)
        elif record.state in ("queued", "running"):
            if job.submission is not None:
                await self._find(directory, job, job.submission)
        elif job.asked == "pause" and record.state == "stopped":
            self._entries.end(directory, "paused")
        elif not is_held(directory):
            self._entries.end(directory, None)

    async def _find(self, directory: RunDirectory, job: Job, submission: str) -> None:
        """See what became of a submission whose run has not recorded an end."""
        if job.asked is not None:
            await self._send_stop(job)
        found = "live" if is_held(directory) else await self._cluster.find(submission)
        if job.unconfirmed and found in ("live", "ended"):
            job = self._entries.confirm(directory, job)
        if job.unconfirmed and found == "absent" and job.asked is not None:
            self._entries.end(directory, _SETTLED[job.asked])
        elif job.started and found in ("ended", "absent"):
            record = record_or_none(directory)  # it may have written its end just before
            if record is not None and record.state in ("queued", "running"):
                self._entries.lose(directory, job)

    async def _send_stop(self, job: Job) -> None:
        """Have Ray ask the run's process to stop, once; tried again until Ray answers."""
        submission = job.submission  # a run that was resumed has another one
        if submission is not None and submission not in self._stop_sent and await self._cluster.stop(submission):
            self._stop_sent.add(submission)

    async def _start(self, status: ClusterStatus) -> None:
        """Start what fits, in order; the first that does not holds the others."""
        waiting = self._entries.in_order(started=False)
        blocked: str | None = None
        for run_id, job in waiting:
            if blocked is not None:
                self._entries.reasons[run_id] = f"behind {blocked}"
                continue
            directories = [RunDirectory(self._runs.root / going) for going in self.going()]
            directory = RunDirectory(self._runs.root / run_id)
            reason = await asyncio.to_thread(
                obstacle, directory, directories, status, max_concurrent_runs=self._max_concurrent_runs
            )
            async with self._locks[run_id]:
                if self._entries.jobs.get(run_id) is not job:
                    continue  # stopped, or deleted, meanwhile
                if reason is None:
                    reason = await self._submit(directory, job)
            if reason is not None:
                self._entries.reasons[run_id] = reason
                blocked = run_id

    async def _submit(self, directory: RunDirectory, job: Job) -> str | None:
        """Why it could not be started, or None. The id is written first: whatever happens then, Ray knows its fate."""
        submission = job.submission or new_submission(directory.path.name)
        tried = job.model_copy(update={"submission": submission, "unconfirmed": True})
        try:
            self._entries.put(directory, tried)
            await self._cluster.submit(directory, submission)
        except (RuntimeError, OSError, TimeoutError) as error:
            # A request that timed out may have arrived; a second job under another id could run beside the first.
            if await self._cluster.find(submission) not in ("live", "ended"):
                logger.warning("%s was not started: %s", directory.path.name, error)
                cause = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
                return f"Ray has not accepted the run: {cause}"
        self._entries.confirm(directory, tried)
        return None


def _find_active(runs: Runs) -> dict[str, Job]:
    """The jobs on the disk of runs that have not ended."""
    found: dict[str, Job] = {}
    for run_id in runs.ids():
        directory = RunDirectory(runs.root / run_id)
        record, job = record_or_none(directory), read_job(directory)
        if record is None or job is None:
            continue
        if record.state in ("queued", "running") or job.asked is not None:
            found[run_id] = job
    return found


def _delete(directory: RunDirectory) -> None:
    if not directory.path.is_dir():
        raise NotFoundError(f"there is no run {directory.path.name}")
    run = view(directory)
    if "delete" not in actions(run, directory):
        raise ConflictError(f"the run is {run.state}; stop it first")
    with directory.locked():
        gone = directory.path.with_name(f".{directory.path.name}.deleted")
        directory.path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


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
