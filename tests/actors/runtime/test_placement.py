"""Where the roles sit: the arithmetic by hand, and a reservation on a cluster that has no room."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.config import GeneratorConfig, LearnerConfig
from actors.generator.group import generator_seats
from actors.learner.group import learner_seats
from actors.runtime.actor_group import RoleError
from actors.runtime.layout import Layout, layout
from actors.runtime.placement import reserve

GENERATORS, LEARNERS = GeneratorConfig(replicas=2, tensor_parallel=4), LearnerConfig(workers=3)


def test_split_on_gpus() -> None:
    """Two engines of four GPUs each, then three ranks with one each: eleven GPUs."""
    plan = layout("split", GENERATORS, LEARNERS, gpus=True)
    assert plan.bundles == [{"CPU": 1.0, "GPU": 4.0}] * 2 + [{"CPU": 1.0, "GPU": 1.0}] * 3
    assert (list(plan.generators), list(plan.learners)) == ([0, 1], [2, 3, 4])
    assert (plan.generator_gpus, plan.learner_gpus) == (4.0, 1.0)


@pytest.mark.parametrize(("replicas", "workers"), [(2, 4), (4, 2), (3, 3)])
def test_colocated_on_gpus(replicas: int, workers: int) -> None:
    """Rank i and replica i share GPU i, half of it each by name; as many GPUs as the larger role needs."""
    plan = layout("colocated", GeneratorConfig(replicas=replicas), LearnerConfig(workers=workers), gpus=True)
    assert plan.bundles == [{"CPU": 2.0, "GPU": 1.0}] * max(replicas, workers)
    assert (list(plan.generators), list(plan.learners)) == (list(range(replicas)), list(range(workers)))
    assert plan.generator_gpus + plan.learner_gpus == 1.0


@pytest.mark.parametrize("placement", ["split", "colocated"])
def test_without_gpus_both_are_processes(placement: Any) -> None:
    plan = layout(placement, GENERATORS, LEARNERS, gpus=False)
    assert plan.bundles == [{"CPU": 1.0}] * 5
    assert (list(plan.generators), list(plan.learners)) == ([0, 1], [2, 3, 4])
    assert (plan.generator_gpus, plan.learner_gpus) == (0.0, 0.0)


def test_seats_set_threads_on_purpose(tmp_path: Path) -> None:
    """A generator has the machine's cores, ranks share them, unless the config says otherwise; one log each."""
    cores = len(os.sched_getaffinity(0))
    plan = layout("split", GENERATORS, LEARNERS, gpus=True)
    group: Any = object()  # handed on, never looked at
    written = generator_seats(plan, group, GENERATORS, tmp_path)
    learned = learner_seats(plan, group, LEARNERS, tmp_path)
    assert [(s.bundle, s.cpus, s.gpus, s.log.name) for s in [*written, *learned]] == [
        (0, 1.0, 4.0, "generator-0.log"),
        (1, 1.0, 4.0, "generator-1.log"),
        (2, 1.0, 1.0, "learner-0.log"),
        (3, 1.0, 1.0, "learner-1.log"),
        (4, 1.0, 1.0, "learner-2.log"),
    ]
    assert {s.env["OMP_NUM_THREADS"] for s in written} == {str(cores)}
    assert {s.env["OMP_NUM_THREADS"] for s in learned} == {str(max(1, cores // 3))}
    assert {s.env["DS_ACCELERATOR"] for s in learned} == {"cuda"}
    on_cpu = learner_seats(layout("split", GENERATORS, LEARNERS, gpus=False), group, LEARNERS, tmp_path)
    assert {s.env["DS_ACCELERATOR"] for s in on_cpu} == {"cpu"}
    chosen = learner_seats(plan, group, LearnerConfig(workers=3, threads=7), tmp_path)
    assert {s.env["OMP_NUM_THREADS"] for s in chosen} == {"7"}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("bundle", "missing"),
    [
        ({"CPU": 1000.0}, r"CPU: needs 1000, the cluster has \d+, free now \d+$"),
        ({"CPU": 1.0, "GPU": 2.0}, r"CPU: needs 1, .*; GPU: needs 2, the cluster has 0, free now 0$"),
    ],
)
def test_a_cluster_without_room_says_what_is_missing(ray_cluster: None, bundle: dict[str, float], missing: str) -> None:
    plan = Layout(bundles=[bundle], generators=[], learners=[0], generator_gpus=0, learner_gpus=0)
    before = {name for name, group in groups().items() if group["state"] != "REMOVED"}
    with pytest.raises(RoleError, match=missing) as caught:
        reserve(plan, deadline_s=0.5)
    assert (caught.value.role, caught.value.phase, caught.value.kind) == ("cluster", "place", "NoRoom")
    assert {name for name, group in groups().items() if group["state"] != "REMOVED"} == before


def groups() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = ray.util.placement_group_table()
    return table
