"""The layers: import contracts over all modules, and what a fresh process has really imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINES = {"ray", "vllm", "deepspeed"}
HEAVY = ENGINES | {"torch", "transformers", "peft", "bitsandbytes", "pyarrow", "scipy", "pandas"}
PURE = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "trainers").rglob("*.py")
)


def imported_by(*modules: str) -> set[str]:
    """Top-level names in `sys.modules` of a fresh process that has imported these modules."""
    code = (
        f"import sys, json, {', '.join(modules)}; print(json.dumps(sorted(n.partition('.')[0] for n in sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 kept, 0 broken" in done.stdout


def test_contracts_see_offences(tmp_path: Path) -> None:
    """The contracts bite: two offending imports, one of them late, break three contracts in a copy."""
    for layer in ("trainers", "actors", "cluster"):
        for path in (ROOT / layer).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    with (tmp_path / "trainers" / "types.py").open("a") as file:
        file.write("\n\nimport ray\n\n\ndef late():\n    import cluster.config.run\n")
    with (tmp_path / "actors" / "config.py").open("a") as file:
        file.write("\n\nfrom vllm import LLM\n")
    code = (
        "import sys; from importlinter.cli import lint_imports;"
        "sys.path.insert(0, '.'); sys.exit(lint_imports(no_cache=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "6 kept, 4 broken" in done.stdout


@pytest.mark.integration  # imports torch and transformers: seconds
def test_trainers_load_no_engine() -> None:
    assert imported_by(*PURE) & ENGINES == set()


@pytest.mark.parametrize(
    "module", ["cluster.service.serve", "cluster.service.workers.main", "cluster.jobs.ray_cluster"]
)
def test_the_service_loads_no_torch(module: str) -> None:
    assert imported_by(module) & (HEAVY - {"ray", "pyarrow"}) == set()


@pytest.mark.parametrize("module", ["actors.messages", "cluster.training.run_spec"])
def test_what_the_roles_are_told_loads_nothing_heavy(module: str) -> None:
    assert imported_by(module) & HEAVY == set()


@pytest.mark.parametrize("module", ["cluster.config.run", "cluster.cli.main"])
def test_config_and_cli_load_nothing_heavy(module: str) -> None:
    assert imported_by(module) & HEAVY == set()
