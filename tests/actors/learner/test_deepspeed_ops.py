"""DeepSpeed's compiled op: found where set-up put it, the same sums with and without it, no wait for a dead lock."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from actors.learner import deepspeed_ops

SUM = """
import os, torch
from actors.learner import deepspeed_ops
deepspeed_ops.use_built_ops()
import deepspeed
deepspeed.init_distributed("gloo")
values = torch.arange(1000, dtype=torch.float32) * (int(os.environ["RANK"]) + 1)
deepspeed.comm.all_reduce(values)
assert torch.equal(values, torch.arange(1000, dtype=torch.float32) * 3)
print("op loaded:", deepspeed.comm.comm.cdb.shm_comm_op is not None)
deepspeed.comm.destroy_process_group()
"""


def test_extensions_lie_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert deepspeed_ops.extensions_dir() == Path(sys.prefix) / "torch_extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert deepspeed_ops.extensions_dir() == tmp_path
    assert not deepspeed_ops.is_built()


def test_only_a_dead_lock_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / deepspeed_ops.OP_NAME / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        deepspeed_ops._remove_dead_lock()
        assert lock.exists()
    deepspeed_ops._remove_dead_lock()
    assert not lock.exists()


@pytest.mark.integration
@pytest.mark.parametrize("built", [True, False])
def test_two_ranks_sum_with_and_without_the_op(built: bool, tmp_path: Path) -> None:
    """0·3, 1·3, …: rank 0 has k, rank 1 has 2k."""
    if built and not deepspeed_ops.is_built():
        pytest.skip("the op is not compiled here (make setup; it needs the Python headers)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    extensions = deepspeed_ops.extensions_dir() if built else tmp_path
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SUM],
            cwd=Path(__file__).resolve().parents[3],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output
            assert f"op loaded: {built}" in output, output
    finally:
        for process in ranks:
            process.kill()
    assert not any(tmp_path.rglob("*.so"))  # nothing is compiled in a run
