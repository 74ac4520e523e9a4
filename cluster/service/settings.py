"""What the operator decides when the service starts. It knows only paths and numbers."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

PREFIX = "/api/v1"
PAGE = Path(__file__).with_name("page")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where everything is and what is allowed. Local folders are absolute, symbolic links followed."""

    root: Path
    model_roots: tuple[Path, ...] = ()
    model_stores: tuple[str, ...] = ()  # beginnings of remote addresses such as s3://bucket/models
    data_roots: tuple[str, ...] = ()  # folders, or beginnings of remote addresses such as s3://bucket/prompts
    reward_roots: tuple[Path, ...] = ()
    max_concurrent_runs: int | None = None  # runs at the same time; None: as many as the resources hold
    max_upload_bytes: int = 10 << 30
    max_uploads_bytes: int = 100 << 30  # of all together
    token_sha256: bytes | None = None
    page: Path = PAGE

    @property
    def private(self) -> Path:
        """The service's own files: datasets, idempotency keys, the Ray that it started."""
        return self.root / ".service"

    @property
    def datasets(self) -> Path:
        """Uploaded prompt files, each in a folder of its own."""
        return self.private / "datasets"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
