"""Which run starts when, and what is said of one that waits; resources by hand."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from cluster.config.run import parse_config
from cluster.jobs import ray_cluster
from cluster.jobs.job import Job, read_job, write_job
from cluster.jobs.ray_cluster import ClusterStatus, Resource
from cluster.runs.directory import RunDirectory
from cluster.service.queue import Queue, demand, obstacle
from cluster.service.run_view import Runs
from tests.cluster.jobs.fake_ray import WAIT_S, FakeRay, JobState
from tests.support.served import TREE

MakeRun = Callable[..., RunDirectory]


def cluster(cpus: float, gpus: float = 0, *, used_cpus: float = 0, used_gpus: float = 0) -> ClusterStatus:
    resources = {"CPU": Resource(used=used_cpus, total=cpus), "GPU": Resource(used=used_gpus, total=gpus)}
    return ClusterStatus("ready", None, 1, resources)


def test_a_runs_demand_is_that_of_its_roles() -> None:
    """Generator with 2 GPUs × 2 replicas, 3 ranks, a reward model on half a GPU twice; each role takes one CPU."""
    tree = {
        **TREE,
        "generators": {"replicas": 2, "tensor_parallel": 2},
        "learners": {"workers": 3},
        "rewards": [{"type": "model", "model": "org/reward", "gpus": 0.5, "replicas": 2}],
    }
    assert demand(parse_config(tree), gpus=True) == {"CPU": pytest.approx(2 + 3 + 2 * 0.1), "GPU": 2 * 2 + 3 + 1.0}
    assert demand(parse_config(TREE), gpus=False) == {"CPU": 2.0}


def test_without_gpus_one_at_a_time_unless_the_operator_says_more(make_run: MakeRun) -> None:
    first, second = make_run("first"), make_run("second")
    assert obstacle(first, [], cluster(16), max_concurrent_runs=None) is None
    reason = obstacle(second, [first], cluster(16), max_concurrent_runs=None)
    assert reason == f"1 run at a time (rlhf serve --max-concurrent-runs): waits for {first.path.name}"
    assert obstacle(second, [first], cluster(16), max_concurrent_runs=2) is None
    assert str(obstacle(make_run("third"), [first, second], cluster(16), max_concurrent_runs=2)).startswith(
        "2 runs at a time"
    )


def test_with_gpus_what_fits(make_run: MakeRun) -> None:
    """Each run takes one GPU for its generator and one for its learner."""
    first, second = make_run("first"), make_run("second")
    assert obstacle(second, [first], cluster(16, 4), max_concurrent_runs=None) is None
    assert obstacle(second, [first], cluster(16, 3), max_concurrent_runs=None) == "needs 2 GPUs, 1 of 3 is free"
    assert obstacle(first, [], cluster(16, 1), max_concurrent_runs=None) == "needs 2 GPUs, 1 of 1 is free"
    others = cluster(16, 4, used_gpus=3)
    assert obstacle(first, [], others, max_concurrent_runs=None) == "needs 2 GPUs, 1 of 4 is free"
    started = cluster(16, 4, used_gpus=2)  # the first run's own
    assert obstacle(second, [first], started, max_concurrent_runs=None) is None
    assert obstacle(first, [], cluster(1), max_concurrent_runs=None) == "needs 2 CPUs, 1 of 1 is free"


def test_a_cluster_that_is_not_there_says_so(make_run: MakeRun) -> None:
    status = ClusterStatus("unavailable", "no Ray cluster: connection refused")
    assert obstacle(make_run(), [], status, max_concurrent_runs=None) == "no Ray cluster: connection refused"


def test_a_run_whose_last_process_still_ends_waits_for_it(make_run: MakeRun) -> None:
    run = make_run()
    with run.locked():
        assert obstacle(run, [], cluster(16), max_concurrent_runs=None) == "its last process has not ended yet"
    assert obstacle(run, [], cluster(16), max_concurrent_runs=None) is None


@pytest.fixture
def ray(root: Path) -> FakeRay:
    return FakeRay(root / ".service")


@pytest.fixture
def queue(root: Path, ray: FakeRay) -> Queue:
    return Queue(Runs(root), ray, max_concurrent_runs=None)


def started(run: RunDirectory) -> str:
    """A run that was started and whose process has gone: the submission."""
    run.update(state="running")
    write_job(run, Job(since=1.0, submission="first"))
    return run.path.name


async def until(ray: FakeRay) -> None:
    assert await asyncio.to_thread(ray.jobs.asked.wait, WAIT_S)


async def looking_after(queue: Queue) -> AsyncIterator[None]:
    """The queue's own loop, while the test goes on."""
    task = asyncio.create_task(queue.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_resume_while_ray_is_asked_about_the_last_process_is_kept(
    queue: Queue, ray: FakeRay, make_run: MakeRun
) -> None:
    """The queue asks Ray what became of the process; the resume comes before the answer."""
    run = make_run()
    run_id = started(run)
    ray.jobs.jobs["first"] = JobState.SUCCEEDED
    ray.jobs.gate = threading.Event()
    async with contextlib.aclosing(looking_after(queue)) as loop:
        await anext(loop)
        await until(ray)
        resuming = asyncio.create_task(queue.resume(run))
        for _ in range(5):  # turns in which a resume without the lock would be done
            await asyncio.sleep(0)
        ray.jobs.gate.set()
        await resuming
        await queue.look_after()  # waits for what the loop has begun
        assert run.record().state == "queued"
        assert queue.going() == [run_id]


async def test_of_two_resumes_one_is_refused(queue: Queue, make_run: MakeRun) -> None:
    run = make_run()
    run.update(state="stopped")
    answers = await asyncio.gather(queue.resume(run), queue.resume(run), return_exceptions=True)
    assert [type(answer).__name__ for answer in answers] == ["NoneType", "ConflictError"]


async def test_a_run_that_is_resumed_is_not_deleted(queue: Queue, make_run: MakeRun) -> None:
    run = make_run()
    run.update(state="stopped")
    _, deleted = await asyncio.gather(queue.resume(run), queue.delete(run), return_exceptions=True)
    assert "stop it first" in str(deleted)
    assert run.record().state == "queued"


async def test_a_submission_whose_answer_was_lost_is_not_repeated(
    queue: Queue, ray: FakeRay, make_run: MakeRun
) -> None:
    run = make_run()
    await queue.add(run)
    ray.jobs.times_out = True
    await queue.look_after()
    await queue.look_after()
    assert queue.going() == [run.path.name]
    assert len(ray.jobs.submissions) == 1
    await queue.ask(run, "stop")
    assert ray.jobs.stopped == ray.jobs.submissions


async def test_a_submission_that_did_not_arrive_is_repeated_under_its_id(
    queue: Queue, ray: FakeRay, make_run: MakeRun
) -> None:
    run = make_run()
    await queue.add(run)
    ray.jobs.accepts = False
    await queue.look_after()
    reason = queue.waiting()[run.path.name].reason
    assert reason == "Ray has not accepted the run: Request failed with status code 500: no agent."
    ray.jobs.accepts = True
    await queue.look_after()
    assert queue.going() == [run.path.name]
    assert len(set(ray.jobs.submissions)) == 1


async def test_while_nobody_knows_whether_it_arrived_no_other_run_starts(
    queue: Queue, ray: FakeRay, make_run: MakeRun
) -> None:
    run, next_run = make_run("one"), make_run("two")
    await queue.add(run)
    await queue.add(next_run)
    ray.jobs.times_out, ray.jobs.reachable = True, False
    await queue.look_after()
    await queue.look_after()
    assert queue.going() == []
    assert len(ray.jobs.jobs) == 1
    ray.jobs.reachable = True
    await queue.look_after()
    assert queue.going() == [run.path.name]
    assert len(ray.jobs.jobs) == 1


async def test_a_request_that_is_still_on_its_way_is_waited_for(
    queue: Queue, ray: FakeRay, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that sends it cannot be ended, so that its job may come at any time."""
    monkeypatch.setattr(ray_cluster, "SUBMIT_S", 0.0)
    monkeypatch.setattr(ray_cluster, "ASK_S", 0.05)
    run = make_run()
    await queue.add(run)
    ray.jobs.gate = threading.Event()
    await queue.look_after()
    await queue.look_after()
    assert queue.going() == []
    assert len(ray.jobs.submissions) == 1
    ray.jobs.gate.set()
    while not queue.going():
        await queue.look_after()
    assert ray.jobs.jobs.keys() == set(ray.jobs.submissions)
    assert len(ray.jobs.jobs) == 1


async def test_a_stop_of_a_run_that_never_arrived(queue: Queue, ray: FakeRay, make_run: MakeRun) -> None:
    run = make_run()
    await queue.add(run)
    ray.jobs.accepts = False
    await queue.look_after()
    await queue.ask(run, "stop")
    await queue.look_after()
    assert run.record().state == "stopped"
    assert queue.waiting() == {}


async def test_a_service_that_was_killed_while_submitting_finds_the_job(
    root: Path, ray: FakeRay, make_run: MakeRun
) -> None:
    run = make_run()
    write_job(run, Job(since=1.0, submission="written-first", unconfirmed=True))
    ray.jobs.jobs["written-first"] = JobState.RUNNING
    queue = Queue(Runs(root), ray, max_concurrent_runs=None)
    async with contextlib.aclosing(looking_after(queue)) as loop:
        await anext(loop)
        async with asyncio.timeout(WAIT_S):
            while not queue.going():  # noqa: ASYNC110 - what the loop has seen can only be looked for
                await asyncio.sleep(0.01)
    assert ray.jobs.submissions == []
    job = read_job(run)
    assert job is not None
    assert job.started


async def test_a_request_that_comes_while_the_service_starts_counts(
    root: Path, ray: FakeRay, make_run: MakeRun
) -> None:
    """What the start finds on the disk is older than what a request has changed since."""

    class Slow(Runs):
        def ids(self) -> list[str]:
            def until_asked_to_end() -> Iterator[str]:
                yield from Runs.ids(self)
                ray.jobs.wait()

            return cast(list[str], until_asked_to_end())

    run = make_run()
    started(run)
    ray.jobs.jobs["first"] = JobState.SUCCEEDED
    queue = Queue(Slow(root), ray, max_concurrent_runs=None)
    ray.jobs.gate = threading.Event()
    async with contextlib.aclosing(looking_after(queue)) as loop:
        await anext(loop)
        await until(ray)
        await queue.resume(run)
        ray.jobs.gate.set()
        async with asyncio.timeout(WAIT_S):
            while not queue.going():  # noqa: ASYNC110 - what the loop has seen can only be looked for
                await asyncio.sleep(0.01)
    assert run.record().state == "queued"
