"""`rlhf submit`: a run that reached Ray is kept and followed, whatever became of the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config.run import RunConfig, parse_config
from cluster.jobs import submit as submitting
from cluster.jobs.job import read_job
from cluster.runs.directory import RunDirectory
from tests.cluster.jobs.fake_ray import FakeRay, JobState
from tests.support.served import TREE
from trainers.errors import UserError


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """The cluster that the command finds; the config's files need not exist."""
    found = FakeRay(tmp_path)
    monkeypatch.setattr(submitting, "_cluster", lambda *_: found)
    monkeypatch.setattr(submitting, "find_problems", lambda _: [])
    return found


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return parse_config({**TREE, "root": str(tmp_path / "runs")})


def only_run(config: RunConfig) -> RunDirectory:
    (path,) = Path(config.root).glob("*/run.json")
    return RunDirectory(path.parent)


def test_a_run_whose_answer_was_lost_is_kept(ray: FakeRay, config: RunConfig) -> None:
    ray.jobs.times_out = True
    assert submitting.submit(config, address=None, follow=False) == 0
    run = only_run(config)
    job = read_job(run)
    assert job is not None
    assert (run.record().state, job.started, [job.submission]) == ("queued", True, list(ray.jobs.jobs))


def test_a_run_whose_answer_was_lost_is_followed(
    ray: FakeRay, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.jobs.times_out = True
    accept = ray.jobs.submit_job

    def train(**request: Any) -> str:
        """The run ends before the answer would have come."""
        only_run(config).update(state="succeeded")
        try:
            return accept(**request)
        finally:
            ray.jobs.jobs[request["submission_id"]] = JobState.SUCCEEDED

    monkeypatch.setattr(ray.jobs, "submit_job", train)
    assert submitting.submit(config, address=None, follow=True) == 0
    assert only_run(config).record().state == "succeeded"


def test_a_run_that_ray_refuses_is_stopped(ray: FakeRay, config: RunConfig) -> None:
    ray.jobs.accepts = False
    with pytest.raises(UserError, match=r"not accepted the run: .*no agent"):
        submitting.submit(config, address=None, follow=False)
    assert only_run(config).record().state == "stopped"


def test_a_run_of_which_ray_says_nothing_may_live_and_is_kept(
    ray: FakeRay, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    ray.jobs.times_out, ray.jobs.reachable = True, False
    assert submitting.submit(config, address=None, follow=False) == 0
    assert "Ray has not confirmed it yet" in capsys.readouterr().out
    run = only_run(config)
    job = read_job(run)
    assert job is not None
    assert (run.record().state, job.unconfirmed) == ("queued", True)


def test_stop_of_a_run_that_never_reached_ray(ray: FakeRay, config: RunConfig) -> None:
    ray.jobs.accepts, ray.jobs.times_out, ray.jobs.reachable = False, True, False
    submitting.submit(config, address=None, follow=False)
    run = only_run(config)
    with pytest.raises(UserError, match="Ray did not answer"):
        submitting.stop(Path(config.root), run.path.name)
    ray.jobs.reachable = True
    assert "is stopped" in submitting.stop(Path(config.root), run.path.name)
    assert run.record().state == "stopped"
