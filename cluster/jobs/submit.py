"""`rlhf submit` and `rlhf runs stop`: a run as a Ray job, started and stopped without the service.

It knows what the service knows of Ray Jobs, so that the service shows such a run and can stop it too.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Final

from cluster.config.run import RunConfig
from cluster.jobs.job import Job, current_state, interrupt, new_submission, not_started, read_job, write_job
from cluster.jobs.ray_cluster import RayCluster, use_rays_token
from cluster.planning.plan import find_problems
from cluster.runs.directory import RunDirectory
from cluster.runs.summary import find_run
from trainers.errors import Problem, UserError

_EXIT: Final = {"succeeded": 0, "failed": 1, "stopped": 130, "paused": 130}
_POLL_S = 0.5


def submit(config: RunConfig, *, address: str | None, follow: bool) -> int:
    """Start the run and print its directory; with `follow` return its exit code. UserError if there is no cluster."""
    if problems := find_problems(config):
        raise UserError(problems)
    root = Path(config.root).resolve()
    cluster = _cluster(root, address)
    run = RunDirectory.create(root, config.name, config.model_copy(update={"root": str(root)}))
    submission = new_submission(run.path.name)
    job = Job(since=time.time(), submission=submission, unconfirmed=True)
    write_job(run, job)
    if asyncio.run(_submit(cluster, run, submission)):
        write_job(run, job.model_copy(update={"unconfirmed": False}))
        print(f"submitted {run.path}", flush=True)
    else:
        print(f"submitted {run.path}; Ray has not confirmed it yet", flush=True)
    return _follow(run, cluster, submission) if follow else 0


async def _submit(cluster: RayCluster, run: RunDirectory, submission: str) -> bool:
    """Whether Ray has confirmed it. UserError where it has refused it, and the run is stopped."""
    try:
        await cluster.submit(run, submission)
    except (RuntimeError, OSError, TimeoutError) as error:
        found = await cluster.find(submission)  # a request that timed out may have arrived
        if found == "absent":
            run.update(state="stopped")
            raise UserError([Problem("--address", f"Ray has not accepted the run: {error}")]) from error
        return found in ("live", "ended")
    return True


def stop(root: Path, run_id: str) -> str:
    """Ask a run to stop; what was done, in words. UserError if it cannot be stopped."""
    found = find_run(root, run_id)
    run = RunDirectory(found.path)
    job = read_job(run)
    state, _ = current_state(run, run.record(), job)
    if state not in ("queued", "running"):
        raise UserError([Problem(found.id, f"the run is {state}; there is nothing to stop")])
    if job is not None and job.submission is None:
        raise UserError([Problem(found.id, "the run waits in the service's queue; stop it there")])
    if not interrupt(run):  # its process is not here
        if job is None or job.submission is None:
            raise UserError([Problem(found.id, "its process is not on this machine; stop it where it was started")])
        write_job(run, job.model_copy(update={"asked": "stop"}))
        cluster = _cluster(root.resolve(), None)
        if not asyncio.run(cluster.stop(job.submission)):
            if asyncio.run(cluster.find(job.submission)) != "absent":
                raise UserError([Problem(found.id, "Ray did not answer; try again")])
            run.update(state="stopped")
            return f"{found.id} is stopped; Ray has no job for it"
    return f"{found.id} was asked to stop; it saves a checkpoint first"


def _cluster(root: Path, address: str | None) -> RayCluster:
    use_rays_token(make=False)
    cluster = RayCluster(root / ".service", address or os.environ.get("RAY_ADDRESS") or None, start=False)
    asyncio.run(cluster.connect())
    if cluster.problem is not None:
        raise UserError([Problem("--address", cluster.problem)])
    return cluster


def _follow(run: RunDirectory, cluster: RayCluster, submission: str) -> int:
    """Show what the run's process writes, until it has ended."""
    log = run.logs / "driver.log"
    shown = 0
    while True:
        gone = asyncio.run(cluster.find(submission)) in ("ended", "absent")
        state, _ = current_state(run, run.record(), read_job(run))  # before the log: what it wrote last is then there
        if gone and state == "queued":
            run.update(state="failed", error=not_started(run))
            state = "failed"
        if log.exists():
            with log.open("rb") as file:
                file.seek(shown)
                text = file.read()
            shown += len(text)
            sys.stdout.write(text.decode("utf-8", "replace"))
            sys.stdout.flush()
        if state in _EXIT:
            return _EXIT[state]
        time.sleep(_POLL_S)
