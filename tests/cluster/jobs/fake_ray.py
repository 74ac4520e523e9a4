"""A Ray that is asked as the Jobs API is: each id names one job; what it answers, and when, is the test's to decide."""

from __future__ import annotations

import threading
from enum import Enum
from pathlib import Path
from typing import Any

from cluster.jobs.ray_cluster import ClusterStatus, RayCluster, Resource

WAIT_S = 10.0


class JobState(Enum):
    """A job's state; `is_terminal` as Ray's has it."""

    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"

    def is_terminal(self) -> bool:
        return self is JobState.SUCCEEDED


class FakeJobs:
    """The client's side of Ray Jobs."""

    def __init__(self) -> None:
        self.jobs: dict[str, JobState] = {}
        self.submissions: list[str] = []
        self.stopped: list[str] = []
        self.accepts = True
        self.times_out = False  # the answer to a submission is lost
        self.reachable = True
        self.gate: threading.Event | None = None  # a question waits for it
        self.asked = threading.Event()

    def submit_job(self, *, submission_id: str, **_: Any) -> str:
        self.submissions.append(submission_id)
        self.wait()
        if submission_id in self.jobs:
            raise RuntimeError(f"Request failed with status code 500: {submission_id} already exists.")
        if self.accepts:
            self.jobs[submission_id] = JobState.RUNNING
        if self.times_out:
            raise TimeoutError("read timed out")
        if not self.accepts:
            raise RuntimeError("Request failed with status code 500: no agent.")
        return submission_id

    def get_job_status(self, submission: str) -> JobState:
        self.wait()
        if not self.reachable:
            raise ConnectionError("connection refused")
        if submission not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {submission} does not exist.")
        return self.jobs[submission]

    def stop_job(self, submission: str) -> bool:
        self.get_job_status(submission)
        self.stopped.append(submission)
        return True

    def wait(self) -> None:
        """Behind the gate, where there is one."""
        self.asked.set()
        if self.gate is not None:
            assert self.gate.wait(WAIT_S)


class FakeRay(RayCluster):
    """A cluster of 16 CPUs whose Jobs API is `jobs`."""

    def __init__(self, private: Path) -> None:
        super().__init__(private, None)
        self.jobs = FakeJobs()
        self._client = self.jobs

    async def status(self) -> ClusterStatus:
        return ClusterStatus("ready", None, 1, {"CPU": Resource(used=0, total=16)})
