"""What all tests share: no network, quick tests first, GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

# Before any test module imports an engine; Ray hands these on to its workers.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_worker_niceness": "0",  # beside other work of the machine, deadlines would pass
}
os.environ.update(OFFLINE)


_ALL_INTEGRATION = re.compile(r"^pytestmark = .*\bintegration\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files without any quick test are not imported for the quick part."""
    if collection_path.suffix == ".py" and config.option.markexpr.startswith("not integration"):
        return bool(_ALL_INTEGRATION.search(collection_path.read_text(encoding="utf-8"))) or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests before those that start engines; GPU tests are skipped, with the reason, where there is no GPU."""
    items.sort(key=lambda item: any(item.iter_markers("integration")) or any(item.iter_markers("gpu")))
    gpu_items = [item for item in items if any(item.iter_markers("gpu"))]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
