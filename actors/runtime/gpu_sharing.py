"""Who has the GPUs: generators and learners each their own, or in turn the same ones.

Implements `protocols.GpuSharing`.
"""

from __future__ import annotations

from actors.runtime.actor_group import ActorGroup
from actors.runtime.layout import Deadlines


class DedicatedGpus:
    """Implements `protocols.GpuSharing` for split placement, and for the CPU: nobody waits for anybody."""

    shared = False

    async def acquire_for_training(self) -> None:
        """Nothing to do."""

    async def acquire_for_generation(self) -> None:
        """Nothing to do."""


class ColocatedGpus:
    """Implements `protocols.GpuSharing` for colocated placement on GPUs."""

    shared = True

    def __init__(self, learners: ActorGroup, generators: ActorGroup, deadlines: Deadlines) -> None:
        self._learners = learners
        self._generators = generators
        self._deadline = deadlines.sync

    async def acquire_for_training(self) -> None:
        """See `protocols.GpuSharing`."""
        await self._generators.each("sleep", lambda a, _: a.sleep.remote(), deadline_s=self._deadline)
        await self._learners.each("reload", lambda a, _: a.reload.remote(), deadline_s=self._deadline)

    async def acquire_for_generation(self) -> None:
        """See `protocols.GpuSharing`."""
        await self._learners.each("offload", lambda a, _: a.offload.remote(), deadline_s=self._deadline)
        await self._generators.each("wake up", lambda a, _: a.wake_up.remote(), deadline_s=self._deadline)
