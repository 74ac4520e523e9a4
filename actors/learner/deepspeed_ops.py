"""DeepSpeed's shared-memory communication op: compiled once in set-up, found again by every learner process.

Compiling takes about 40 s, so it must not happen in a run. Set-up calls `python -m actors.learner.deepspeed_ops`; a
learner calls `use_built_ops` before DeepSpeed starts its communication. It may know DeepSpeed's builder and the
place of the environment, nothing else; DeepSpeed is imported inside the functions, because importing it takes seconds.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import psutil

OP_NAME = "deepspeed_shm_comm"


def extensions_dir() -> Path:
    """Where compiled ops lie: TORCH_EXTENSIONS_DIR if it is set, else a folder of this Python environment."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix) / "torch_extensions")


def is_built() -> bool:
    """True if the op is compiled and ready to load."""
    return (extensions_dir() / OP_NAME / f"{OP_NAME}.so").is_file()


def use_built_ops() -> None:
    """Let this process load the compiled op, or do without it; never compile in a run.

    To be called before DeepSpeed's communication starts. Sets TORCH_EXTENSIONS_DIR and PATH of this process (loading
    needs ninja, which lies beside the Python of the environment). Where set-up could not compile the op (no Python
    headers), DeepSpeed is told to reduce through gloo instead: the same sums, only slower.
    """
    _set_environment()
    _remove_dead_lock()
    if not is_built():
        import deepspeed

        deepspeed.ops.__compatible_ops__[OP_NAME] = False


def build_ops() -> None:
    """Compile the op; at most a second where it is compiled already.

    Raises RuntimeError, with the compiler's words, if it cannot be compiled.
    """
    _set_environment()
    os.environ["DS_ACCELERATOR"] = "cpu"
    _remove_dead_lock()
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)


def has_python_headers() -> bool:
    """True if Python.h is there, without which no extension can be compiled."""
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def _set_environment() -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_dir())
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if programs not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([programs, path])


def _remove_dead_lock() -> None:
    """Remove the lock that a killed process left: torch would wait for it for ever.

    A live owner holds its lock file open, so that one which no process has open is dead.
    """
    lock = extensions_dir() / OP_NAME / "lock"
    if lock.exists() and not _is_open(lock):
        lock.unlink(missing_ok=True)


def _is_open(file: Path) -> bool:
    for process in psutil.process_iter():
        try:
            if any(Path(opened.path) == file.resolve() for opened in process.open_files()):
                return True
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return False


def main() -> int:
    """Compile for set-up; a notice and success where the Python headers are missing."""
    if not has_python_headers():
        print("Python.h not found: DeepSpeed will use gloo, which is slower between ranks (install python3-dev).")
        return 0
    build_ops()
    return 0


if __name__ == "__main__":
    sys.exit(main())
