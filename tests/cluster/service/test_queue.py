"""Which run starts when, and what is said of one that waits; resources by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.config.run import parse_config
from cluster.jobs.ray_cluster import ClusterStatus, Resource
from cluster.runs.directory import RunDirectory
from cluster.service.queue import demand, obstacle
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
