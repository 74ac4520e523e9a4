"""The metrics sink `tensorboard`: scalars by name. TensorBoard (and torch with it) is imported at the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.runs.atomic_files import explained
from cluster.runs.daemon_threads import start

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


logger = logging.getLogger(__name__)

_CLOSE_S = 60.0


class TensorboardSink:
    """Implements `MetricsSink`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "tensorboard"
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None

    def truncate_after(self, step: int) -> None:
        """See `MetricsSink`: TensorBoard hides what an earlier file of the run holds from `purge_step` on."""
        assert self._writer is None, "truncate_after comes before the first step"
        self._purge_step = step + 1

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """See `MetricsSink`."""
        with explained(self._directory):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._directory), purge_step=self._purge_step)
            for key, value in values.items():
                if key not in ("step", "time") and value is not None:
                    self._writer.add_scalar(key, value, step)
            self._writer.flush()

    def close(self) -> None:
        """See `MetricsSink`."""
        if self._writer is not None:
            try:
                start(self._writer.close).result(timeout=_CLOSE_S)
            except TimeoutError:
                logger.warning("%s was not closed within %g s; is its file system hung?", self._directory, _CLOSE_S)
            self._writer = None
