"""Where the roles run and how long they may take, as arithmetic: nothing here knows Ray.

`split`: every generator replica and every learner rank has GPUs of its own. `colocated`: learner rank i and
generator replica i share GPU i and take turns. Without GPUs both mean processes that share the machine's cores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from actors.config import GeneratorConfig, LearnerConfig, Placement

ROLE_CPUS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Bundles of the placement group, and which of them each actor sits in."""

    bundles: Sequence[dict[str, float]]
    generators: Sequence[int]
    learners: Sequence[int]
    teacher: Sequence[int] = ()
    generator_gpus: float
    learner_gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long each remote phase may take, in seconds."""

    start: float
    generate: float
    update: float
    sync: float
    save: float


def layout(
    placement: Placement, generators: GeneratorConfig, learners: LearnerConfig, *, gpus: bool, teacher: bool = False
) -> Layout:
    """The seats that a run needs; `teacher`: with an engine of GKD's teacher on GPUs of its own.

    >>> layout("split", GeneratorConfig(tensor_parallel=2), LearnerConfig(workers=2), gpus=True).bundles
    [{'CPU': 1.0, 'GPU': 2.0}, {'CPU': 1.0, 'GPU': 1.0}, {'CPU': 1.0, 'GPU': 1.0}]
    """
    per_engine = float(generators.tensor_parallel) if gpus else 0.0
    of_teacher = [_bundle(per_engine)] if teacher else []
    if gpus and placement == "colocated":
        shared = max(generators.replicas, learners.workers)
        return Layout(
            bundles=[{"CPU": 2 * ROLE_CPUS, "GPU": 1.0}] * shared + of_teacher,
            teacher=range(shared, shared + len(of_teacher)),
            generators=range(generators.replicas),
            learners=range(learners.workers),
            generator_gpus=0.5,
            learner_gpus=0.5,
        )
    per_rank = 1.0 if gpus else 0.0
    others = generators.replicas + learners.workers
    return Layout(
        bundles=[_bundle(per_engine)] * generators.replicas + [_bundle(per_rank)] * learners.workers + of_teacher,
        generators=range(generators.replicas),
        learners=range(generators.replicas, others),
        teacher=range(others, others + len(of_teacher)),
        generator_gpus=per_engine,
        learner_gpus=per_rank,
    )


def _bundle(gpus: float) -> dict[str, float]:
    return {"CPU": ROLE_CPUS} | ({"GPU": gpus} if gpus else {})


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))
