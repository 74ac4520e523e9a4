"""Samples of a step: what it costs to show them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np

from cluster.models.export import recorded_sequences
from cluster.runs.directory import RunDirectory
from cluster.runs.recorder import Recorder, RolloutRow
from cluster.service.results.samples import Query, find_samples

SAMPLES, TOKENS = 8, 200_000


def record(folder: Path, step: int) -> None:
    """One group of long completions, of tokens that are each an object of its own in Python."""
    tokens = np.arange(1000, 1000 + TOKENS, dtype=np.int32)
    rows = [
        RolloutRow(
            step=step,
            sample_id=str(index),
            group=0,
            prompt="[]",
            completion="",
            prompt_tokens=tokens[:5],
            tokens=tokens,
            logprobs=np.zeros(TOKENS, np.float32),
            policy_version=0,
            finish_reason="stop",
            rewards={"r": 1.0},
            reward=1.0,
            valid=True,
            advantage=None,
        )
        for index in range(SAMPLES)
    ]
    with Recorder(folder) as recorder:
        recorder.rollouts(step, rows)


def test_counting_tokens_makes_no_python_objects_of_them(tmp_path: Path) -> None:
    """As lists, each token is a pointer and an int of 28 bytes: 8 × 200,000 × 36 bytes = 58 MB."""
    for step in (1, 2):
        record(tmp_path, step)
    find_samples(tmp_path / "rollouts", Query(step=1))  # imports
    tracemalloc.start()
    try:
        found = find_samples(tmp_path / "rollouts", Query(step=2))
        recorded_sequences(RunDirectory(tmp_path))  # of one sample of each group
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [(sample.prompt_tokens, sample.tokens) for sample in found.samples] == [(5, TOKENS)] * SAMPLES
    assert peak < 16e6
