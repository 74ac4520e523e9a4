"""The learners as the driver uses them: the ZeRO ranks as one.

Implements `protocols.Learners` over Ray actors. Work is cut here (which rank computes what) and put together here; the
mathematics of it is in `trainers/packing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ray.util.placement_group import PlacementGroup

from actors.config import LearnerConfig, PolicyConfig
from actors.learner.deepspeed_ops import extensions_dir
from actors.messages import AnnotatedRows, StepReport, UpdateOptions, UpdateReport
from actors.runtime.actor_group import ActorGroup, Seat
from actors.runtime.layout import ROLE_CPUS, Deadlines, Layout, cores
from trainers.adapter_folder import AdapterFolder
from trainers.algorithms.base import Mean, Need
from trainers.config import TrainConfig
from trainers.logprob_gap import gap_quantile
from trainers.packing import pack_samples, pack_updates, unpack_rows
from trainers.types import AnnotatedSample, Float32Array, Sample, TrainSample


def learner_seats(plan: Layout, group: PlacementGroup, config: LearnerConfig, logs: Path) -> list[Seat]:
    """A seat for each rank."""
    threads = str(config.threads or max(1, cores() // config.workers))
    env = {
        "OMP_NUM_THREADS": threads,
        "LOCAL_RANK": "0",
        "DS_ACCELERATOR": "cuda" if plan.learner_gpus else "cpu",
        "TORCH_EXTENSIONS_DIR": str(extensions_dir()),
        "DS_IGNORE_CUDA_DETECTION": "1",
    }
    return [
        Seat(group=group, bundle=b, cpus=ROLE_CPUS, gpus=plan.learner_gpus, env=env, log=logs / f"learner-{i}.log")
        for i, b in enumerate(plan.learners)
    ]


class LearnerGroup:
    """Implements `protocols.Learners`."""

    def __init__(
        self, actors: ActorGroup, train: TrainConfig, deadlines: Deadlines, *, data_parallel_size: int | None = None
    ) -> None:
        """`data_parallel_size` divides the number of ranks; None: each rank has samples of its own. Ranks that follow
        each other share them."""
        ranks = len(actors.actors)
        self._shares = ranks if data_parallel_size is None else data_parallel_size
        if ranks % self._shares:
            raise ValueError(f"{ranks} ranks cannot share {self._shares} parts of the samples evenly")
        self._ranks_per_share = ranks // self._shares
        self.actors = actors
        self._train = train
        self._deadlines = deadlines

    async def start(self) -> None:
        """Join the ranks and load the models."""
        deadline = self._deadlines.start
        host = await self.actors.one(0, "start", lambda a: a.node_ip.remote(), deadline_s=deadline)
        port = await self.actors.one(0, "start", lambda a: a.free_port.remote(), deadline_s=deadline)
        url = f"tcp://{host}:{port}"
        await self.actors.each("start", lambda a, _: a.start.remote(url), deadline_s=deadline)

    async def merge(self, policy: PolicyConfig, adapter: AdapterFolder, directory: str) -> None:
        """The policy with an adapter merged into it, written for all roles to load; before `start`."""
        await self.actors.one(
            0, "merge", lambda a: a.merge.remote(policy, adapter, directory), deadline_s=self._deadlines.start
        )

    async def annotate(self, samples: Sequence[Sample], needs: frozenset[Need]) -> list[AnnotatedSample]:
        """See `protocols.Learners`."""
        if not needs - {"divergence"}:
            return [AnnotatedSample(sample=s) for s in samples]
        shards = pack_samples(samples, shards=self._shares, max_tokens=self._train.max_tokens_per_microbatch)
        results: list[list[AnnotatedRows]] = await self.actors.each(
            "annotate",
            lambda a, rank: a.annotate.remote(shards[self._share(rank)], needs),
            deadline_s=self._deadlines.update,
        )
        found: dict[str, list[Float32Array | None]] = {
            name: [None] * len(samples) for name in ("old_logprobs", "ref_logprobs", "values")
        }
        for batches, rows in zip(shards, results[:: self._ranks_per_share], strict=True):
            for name, into in found.items():
                if name in needs:
                    unpack_rows(batches, [getattr(r, name) for r in rows], into)
        return [
            AnnotatedSample(sample=sample, old_logprobs=old, ref_logprobs=reference, values=values)
            for sample, old, reference, values in zip(samples, *found.values(), strict=True)
        ]

    async def update(self, samples: Sequence[TrainSample], order: UpdateOptions, *, seed: Sequence[int]) -> StepReport:
        """See `protocols.Learners`."""
        shards = pack_updates(
            samples,
            updates=self._train.updates_per_step,
            epochs=self._train.epochs_per_step,
            shards=self._shares,
            max_tokens=self._train.max_tokens_per_microbatch,
            seed=seed,
        )
        reports: list[UpdateReport] = await self.actors.each(
            "update",
            lambda a, rank: a.update.remote(shards[self._share(rank)], order),
            deadline_s=self._deadlines.update,
        )
        return _merge(reports[:: self._ranks_per_share], samples)

    def _share(self, rank: int) -> int:
        return rank // self._ranks_per_share

    async def write_base(self, directory: str) -> None:
        """The quantized base, de-quantized, for the generators to serve."""
        await self.actors.each(
            "write base", lambda a, _: a.write_base.remote(directory), deadline_s=self._deadlines.save
        )

    async def logprobs(self, samples: Sequence[Sample]) -> list[Float32Array]:
        """The policy's log-probabilities of the samples' tokens."""
        annotated = await self.annotate(samples, frozenset({"old_logprobs"}))
        return [a.old_logprobs for a in annotated if a.old_logprobs is not None]

    async def save(self, directory: str) -> None:
        """See `protocols.Learners`."""
        await self.actors.each("save", lambda a, _: a.save.remote(directory), deadline_s=self._deadlines.save)

    async def load(self, directory: str) -> None:
        """See `protocols.Learners`."""
        await self.actors.each("load", lambda a, _: a.load.remote(directory), deadline_s=self._deadlines.save)

    async def export(self, directory: str) -> None:
        """See `protocols.Learners`."""
        await self.actors.each("export", lambda a, _: a.export.remote(directory), deadline_s=self._deadlines.save)


def _merge(reports: Sequence[UpdateReport], samples: Sequence[TrainSample]) -> StepReport:
    metrics: dict[str, Mean] = {}
    for report in reports:
        for name, mean in report.metrics.items():
            metrics[name] = metrics.get(name, Mean(0.0, 0.0)) + mean
    worst = max(reports, key=lambda r: r.gap_max if r.gap_max == r.gap_max else float("inf"))
    steps = len(reports[0].losses)
    norms = reports[0].grad_norms
    return StepReport(
        metrics=metrics,
        loss=sum(sum(r.losses) for r in reports) / steps,
        grad_norm=float(np.mean(norms)) if norms else None,
        learning_rate=reports[0].learning_rate,
        gap_max=worst.gap_max,
        gap_sample=samples[worst.gap_at].sample.id if worst.gap_at >= 0 else "",
        gap_quantile=gap_quantile([gaps for report in reports for gaps in report.gaps]),
    )
