"""`rlhf serve`: checks what the operator asks for, then serves until it is stopped.

The app runs in this process under uvicorn and not behind Ray Serve's proxy: the proxy takes a request's body in as fast
as it comes and holds it (an upload of 2 GB would be 2 GB of memory), its address is shared by the cluster, and
runs end and start Ray Serve for their rewards. Runs are jobs on the cluster, which does not need this process.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from cluster.jobs.ray_cluster import RayCluster, use_rays_token
from cluster.models.object_store import address_problem, is_address
from cluster.runs.atomic_files import write_atomic
from cluster.service.app import make_app
from cluster.service.security import sha256
from cluster.service.settings import Settings, is_loopback
from trainers.errors import Problem, UserError

LEAST_TOKEN = 16  # characters
_GRACE_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The command's options."""

    host: str
    port: int
    root: Path
    models: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    reward_files: tuple[Path, ...] = ()
    proxies: tuple[str, ...] = ()
    max_concurrent_runs: int | None = None
    max_upload_gb: float = 10.0
    max_uploads_gb: float = 100.0


def run_service(options: ServeOptions) -> None:
    """Serve until interrupted. UserError for what the operator must fix first."""
    settings = make_settings(options)
    proxies = check_proxies(options.proxies)
    if settings.token_sha256 is None and not is_loopback(options.host):
        advice = "make one with `rlhf serve --new-token`, or set RLHF_TOKEN"
        raise UserError([Problem("--host", f"{options.host} can be reached by others, so a token is needed: {advice}")])
    listening = _listen(options.host, options.port)
    address = os.environ.get("RAY_ADDRESS") or None
    use_rays_token(make=address is None)
    app = make_app(settings, RayCluster(settings.private, address))
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # links carry tickets
        server_header=False,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=proxies,  # without proxies not asked, whatever the environment says
        timeout_graceful_shutdown=_GRACE_S,
    )
    shown = f"[{options.host}]" if ":" in options.host else options.host
    print(f"rlhf-online: http://{shown}:{listening.getsockname()[1]}  (runs in {settings.root})", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


def check_proxies(entries: tuple[str, ...]) -> list[str]:
    """Addresses and networks whose word on who the client is counts. UserError for what is none, or is everybody."""
    problems = []
    for entry in entries:
        try:
            if ipaddress.ip_network(entry).prefixlen == 0:
                problems.append(
                    Problem("--proxy", f"{entry} is every address, so that anyone could pose as any client")
                )
        except ValueError:
            advice = "expected the IP address of a reverse proxy, or a network such as 10.1.0.0/16"
            problems.append(Problem("--proxy", f"{advice}, found {entry!r}"))
    if problems:
        raise UserError(problems)
    return list(entries)


def make_settings(options: ServeOptions) -> Settings:
    """Folders made absolute, with links followed. UserError naming each that is not there."""
    stores = [entry for entry in options.models if is_address(entry)]
    models = [Path(entry) for entry in options.models if not is_address(entry)]
    data = [Path(entry) for entry in options.data if not is_address(entry)]
    problems = [
        Problem(name, f"no such folder: {folder}")
        for name, folders in (("--models", models), ("--reward-files", options.reward_files), ("--data", data))
        for folder in folders
        if not folder.is_dir()
    ]
    problems += [Problem("--models", f"an address {wrong}") for entry in stores if (wrong := address_problem(entry))]
    if problems:
        raise UserError(problems)
    root = options.root.resolve()
    try:
        (root / ".service").mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError([Problem("--root", f"cannot be used: {error.strerror}: {root}")]) from error
    return Settings(
        root=root,
        model_roots=tuple(folder.resolve() for folder in models),
        model_stores=tuple(entry.rstrip("/") for entry in stores),
        data_roots=tuple(entry if is_address(entry) else str(Path(entry).resolve()) for entry in options.data),
        reward_roots=tuple(folder.resolve() for folder in options.reward_files),
        max_concurrent_runs=options.max_concurrent_runs,
        max_upload_bytes=int(options.max_upload_gb * 1e9),
        max_uploads_bytes=int(options.max_uploads_gb * 1e9),
        token_sha256=_token(root),
    )


def new_token(root: Path) -> str:
    """A new token, of which only the hash is kept; the old one ends."""
    token = secrets.token_urlsafe(32)
    file = root.resolve() / ".service" / "token"
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomic(file, sha256(token).hex() + "\n")
    file.chmod(0o600)
    return token


def _token(root: Path) -> bytes | None:
    """The hash of the token: of RLHF_TOKEN, else what `--new-token` wrote; None where there is none."""
    given = os.environ.get("RLHF_TOKEN")
    if given is not None:
        if len(given) < LEAST_TOKEN or not given.isascii() or not given.isprintable() or " " in given:
            raise UserError([Problem("RLHF_TOKEN", f"expected {LEAST_TOKEN} or more visible ASCII characters")])
        return sha256(given)
    file = root / ".service" / "token"
    try:
        written = bytes.fromhex(file.read_text(encoding="ascii").strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError([Problem(str(file), f"cannot be read ({error}); make a new token")]) from error
    if len(written) != len(sha256("")):
        raise UserError([Problem(str(file), "holds no token's hash; make a new one with --new-token")])
    return written


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError([Problem("--port", f"cannot listen on {host}:{port}: {reason}; choose another")]) from error
