"""The Ray cluster that runs go to: found, or started on loopback, and asked over HTTP.

The service never joins it as a driver: jobs and resources are asked of the dashboard, so that a cluster that goes
away takes nothing of the service with it. Ray's own token, where there is one, is sent along.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil
from pydantic import BaseModel

from actors.runtime.patient_ray import AGENT_PATIENCE, free_ports
from cluster.runs.atomic_files import write_atomic
from cluster.runs.directory import RunDirectory
from cluster.training.preloading import ONE_MACHINE
from trainers.errors import Problem, UserError

logger = logging.getLogger(__name__)

START_S = 120.0
RETRY_S = 15.0
ASK_S = 15.0
SUBMIT_S = 60.0  # of a request; the wait for it is longer, so that its own error comes first
STOP_S = 3600  # how long Ray waits for a run to save its checkpoint before it is killed
_POLL_S = 0.5
_TEMPORARY = "rlhf-ray-"  # what the names of Ray's own folders begin with
_SHOWN = ("CPU", "GPU", "memory")
BIN = Path(sys.executable).parent

Found: TypeAlias = Literal["live", "ended", "absent", "unreachable"]
"""What became of a submission: its job has not ended, has ended, Ray knows no such job, or Ray cannot be asked."""


class Resource(BaseModel):
    """So much of a resource is set aside, of so much."""

    used: float
    total: float


class StartedRay(BaseModel):
    """`ray.json`: the Ray that a service started."""

    address: str
    dashboard: str
    pid: int
    temporary: str = ""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What the cluster says of itself; `message` where it cannot be reached."""

    state: str
    message: str | None = None
    nodes: int = 0
    resources: Mapping[str, Resource] = field(default_factory=dict)


class RayCluster:
    """Jobs and resources of one cluster. Blocking calls run in threads; each has a deadline."""

    def __init__(self, private: Path, address: str | None, *, start: bool = True) -> None:
        """The cluster at `address`; without one that which a service started before, or (`start`) a new one."""
        self._start_one = start
        self._file = private / "ray.json"
        self._given = address
        self.address: str | None = None
        self._client: Any = None
        self._problem: str | None = None
        self._starting = False
        self._sending: dict[str, asyncio.Task[None]] = {}

    async def stay_connected(self) -> None:
        """Find the cluster, or start one, and again where it has gone, until cancelled."""
        while True:
            if self._client is None or (await self.status()).state == "unavailable":
                await self.connect()
            await asyncio.sleep(RETRY_S)

    async def connect(self) -> None:
        """Find the cluster at the given address, or the one started before, or start one; what fails is kept."""
        self._starting = True
        try:
            async with asyncio.timeout(START_S + ASK_S):
                await asyncio.to_thread(self._connect)
        except (OSError, RuntimeError, TimeoutError, subprocess.SubprocessError) as error:
            self._problem = f"no Ray cluster: {_first_line(error)}"
            logger.warning("%s", self._problem)
        finally:
            self._starting = False

    def _connect(self) -> None:
        if self._given is not None:
            self._client, self.address = _job_client(self._given), self._given
            return
        started = _read(self._file)
        if started is None or not _is_alive(started):
            if not self._start_one:
                raise RuntimeError("give --address, set RAY_ADDRESS, or start `rlhf serve` with the same root")
            if started is not None:
                _forget(started)
            started = _start(self._file.parent)
            write_atomic(self._file, started.model_dump_json())
        self._client = _job_client(started.dashboard)
        self.address = started.address

    @property
    def problem(self) -> str | None:
        """Why there is no cluster; None where there is one."""
        return None if self._client is not None else self._problem

    async def status(self) -> ClusterStatus:
        """Nodes and resources now."""
        if self._client is None:
            state = "starting" if self._starting else "unavailable"
            return ClusterStatus(state, self._problem or "Ray is being started")
        try:
            async with asyncio.timeout(ASK_S):
                return await asyncio.to_thread(self._status)
        except (OSError, RuntimeError, TimeoutError, ValueError) as error:
            return ClusterStatus("unavailable", f"the Ray cluster does not answer: {_first_line(error)}")

    def _status(self) -> ClusterStatus:
        answer = self._client._do_request("GET", "/api/cluster_status", timeout=ASK_S)  # Ray has no public way
        answer.raise_for_status()
        status = answer.json().get("data", {}).get("clusterStatus") or {}
        usage = status.get("loadMetricsReport", {}).get("usage", {})
        found = {name: Resource(used=pair[0], total=pair[1]) for name, pair in usage.items() if name in _SHOWN}
        nodes = sum(1 for name in usage if name.startswith("node:") and name != "node:InternalHead")
        if not found:
            return ClusterStatus("starting", "Ray has not reported its resources yet")
        return ClusterStatus("ready", None, nodes, found)

    async def submit(self, run: RunDirectory, submission: str) -> None:
        """Start a run's process on the cluster, at most one under one id.

        Raises RuntimeError, OSError or TimeoutError, after which Ray may have accepted it: `find` says.
        """
        if self._client is None:
            raise RuntimeError(self._problem or "Ray is being started")
        sending = self._sending.get(submission)
        if sending is None:
            sending = self._sending[submission] = asyncio.create_task(self._send(run, submission))
            sending.add_done_callback(lambda task: self._sent(submission, task))
        async with asyncio.timeout(SUBMIT_S + ASK_S):
            await asyncio.shield(sending)  # a thread cannot be ended: its request may still arrive

    async def _send(self, run: RunDirectory, submission: str) -> None:
        train = shlex.join([str(BIN / "rlhf"), "train", str(run.path / "config.yaml"), "--resume", str(run.path)])
        log = shlex.quote(str(run.logs / "driver.log"))
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
        if self._given is None:
            environment[ONE_MACHINE] = "1"
        await asyncio.to_thread(
            self._client.submit_job,
            entrypoint=f"exec {train} >> {log} 2>&1",
            submission_id=submission,
            runtime_env={"env_vars": environment},
            metadata={"run": run.path.name},
        )

    def _sent(self, submission: str, task: asyncio.Task[None]) -> None:
        del self._sending[submission]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.info("submission %s: %s", submission, _first_line(error))

    async def find(self, submission: str) -> Found:
        """What became of a submission. While its request is still being sent, its fate is unknown: "unreachable"."""
        if self._client is None or submission in self._sending:
            return "unreachable"
        try:
            async with asyncio.timeout(ASK_S):
                status = await asyncio.to_thread(self._client.get_job_status, submission)
        except RuntimeError as error:
            return "absent" if "status code 404" in str(error) else "unreachable"
        except (OSError, TimeoutError):
            return "unreachable"
        return "ended" if status.is_terminal() else "live"

    async def stop(self, submission: str) -> bool:
        """Ask a job to end (SIGTERM); False where Ray cannot be asked."""
        if self._client is None:
            return False
        try:
            async with asyncio.timeout(ASK_S):
                await asyncio.to_thread(self._client.stop_job, submission)
        except (RuntimeError, OSError, TimeoutError):
            return False
        return True


def use_rays_token(*, make: bool) -> None:
    """Have this process and its children use Ray's token; without one, anyone who reaches its ports could run code.

    For commands to call before Ray is imported: the mode must be in the environment then, else the Jobs API
    answers 401. `make`: make a token where there is none. UserError where Ray cannot.
    """
    if not (Path.home() / ".ray" / "auth_token").is_file() and "RAY_AUTH_TOKEN" not in os.environ:
        if not make:
            return
        command = [str(BIN / "ray"), "get-auth-token", "--generate"]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=4 * ASK_S)
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError([Problem("RAY_AUTH_TOKEN", f"Ray could not make a token: {_first_line(error)}")]) from error
    os.environ.setdefault("RAY_AUTH_MODE", "token")


def _start(private: Path) -> StartedRay:
    """A head node on loopback with a token, in a session of its own: it outlives the service, for the runs' sake."""
    private.mkdir(parents=True, exist_ok=True)
    gcs, dashboard, client, agent, grpc, metrics, environments = free_ports(7)
    temporary = tempfile.mkdtemp(prefix=_TEMPORARY)
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--ray-client-server-port={client}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--dashboard-agent-grpc-port={grpc}", f"--metrics-export-port={metrics}"),
        f"--runtime-env-agent-port={environments}",  # Ray's node waits 15 seconds for agents that choose their ports
        *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={temporary}"),
        f"--num-cpus={max(len(os.sched_getaffinity(0)), 16)}",  # logical: the roles set their threads themselves
    ]
    with (private / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | AGENT_PATIENCE,
        )
    url = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + START_S
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise RuntimeError(f"Ray did not start; {private / 'ray.log'} says why")
        time.sleep(_POLL_S)
    return StartedRay(address=f"127.0.0.1:{gcs}", dashboard=url, pid=process.pid, temporary=temporary)


def _is_alive(started: StartedRay) -> bool:
    """Whether the Ray that was started still runs; one that is only slow to answer must not get a second beside it."""
    try:
        return "start" in psutil.Process(started.pid).cmdline()
    except (psutil.Error, ValueError):
        return False


def _forget(started: StartedRay) -> None:
    """Remove the logs and sockets of a Ray that has ended."""
    folder = Path(started.temporary)
    if folder.name.startswith(_TEMPORARY) and folder.parent == Path(tempfile.gettempdir()):
        shutil.rmtree(folder, ignore_errors=True)


def _job_client(address: str) -> Any:
    """A client of Ray Jobs whose requests end; Ray's own wait for an answer without limit."""
    from ray.job_submission import JobSubmissionClient  # not before `use_rays_token`

    client = JobSubmissionClient(address)
    client._do_request = partial(client._do_request, timeout=SUBMIT_S)  # Ray has no public way
    return client


def _answers(dashboard: str) -> bool:
    """Whether a dashboard's Jobs API takes requests."""
    try:
        _job_client(dashboard).list_jobs()
    except (OSError, RuntimeError):
        return False
    return True


def _read(file: Path) -> StartedRay | None:
    try:
        return StartedRay.model_validate_json(file.read_bytes())
    except (OSError, ValueError):
        return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
