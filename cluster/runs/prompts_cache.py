"""What is known about prompts files, kept beside the runs, so that plan, launch and page tokenize a file once.

`<root>/.cache/prompts/` holds small files by key: digests of contents, lengths of prompts in tokens, and whatever a
caller has computed from a file (`cluster/planning/prompts_report.py`). Each is written atomically and carries a digest;
one that is damaged or cannot be read does not exist. The oldest go when they take too much space. An entry is never
needed: where nothing can be written, everything is computed again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, time
from typing import Final

import numpy as np
import numpy.typing as npt

import trainers.data
from cluster.runs.atomic_files import RunDirectoryError, sha256_file, write_atomic
from trainers.adapter_folder import tokenizer_source
from trainers.data.reader import PromptFile

logger = logging.getLogger(__name__)

_MOST_BYTES: Final = 1 << 30
_DIGEST_BYTES: Final = 32
_SETTLED_S: Final = 2.0  # a file that was changed so recently may change again within one tick of its clock
_KEEP_EVERY_S: Final = 20.0
_TOKENIZER_FILES: Final = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
_LIBRARIES: Final = ("transformers", "tokenizers", "jinja2")
_LENGTH: Final = np.dtype("<i4")


class PromptsCache:
    """The entries under one root. Reading and writing never fail: an entry is there or not."""

    def __init__(self, root: Path, *, most_bytes: int = _MOST_BYTES, clock: Callable[[], float] = time) -> None:
        self.folder = root.resolve() / ".cache" / "prompts"
        self._most_bytes = most_bytes
        self._clock = clock

    def read(self, kind: str, key: str) -> bytes | None:
        """The entry; None if there is none, or it is damaged."""
        path = self._path(kind, key)
        try:
            content = path.read_bytes()
            os.utime(path)  # used now
        except OSError:
            return None
        digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        return data if hashlib.sha256(data).digest() == digest else None

    def write(self, kind: str, key: str, data: bytes) -> None:
        """Make or replace an entry; those that were used least recently go if all take more than is allowed."""
        if len(data) + _DIGEST_BYTES > self._most_bytes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path(kind, key), hashlib.sha256(data).digest() + data)
            self._make_room()
        except (OSError, RunDirectoryError) as error:
            logger.info("not cached: %s", error)

    def content_digest(self, address: str) -> str | None:
        """SHA-256 of a local file, read only if its size, times or inode are new; None if it is not a file, or is
        being written."""
        try:
            before = os.stat(address)
            if not stat.S_ISREG(before.st_mode):
                return None
            key = _sha256(os.path.abspath(address), *_identity(before))
            if (known := self.read("content", key)) is not None:
                return known.decode("ascii")
            digest = sha256_file(Path(address))
            if _identity(os.stat(address)) != _identity(before):
                return None
        except OSError:
            return None
        if self._clock() - max(before.st_mtime, before.st_ctime) > _SETTLED_S:
            self.write("content", key, digest.encode("ascii"))
        return digest

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / f"{kind}-{key}"

    def _make_room(self) -> None:
        with os.scandir(self.folder) as entries:
            files = sorted(((e.stat(), e.path) for e in entries), key=lambda file: file[0].st_mtime_ns)
        total = sum(status.st_size for status, _ in files)
        for status, path in files:
            if total <= self._most_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= status.st_size


class KnownLengths:
    """Implements `trainers.data.chat.LengthMemory` for one tokenizer and template."""

    def __init__(self, cache: PromptsCache, tokenizer: str, *, keep_every_s: float = _KEEP_EVERY_S) -> None:
        self._cache = cache
        self._tokenizer = tokenizer
        self._keep_every_s = keep_every_s
        self._kept = monotonic()

    def recall(self, prompts: PromptFile) -> npt.NDArray[np.int32]:
        """See `LengthMemory`."""
        data = self._cache.read("lengths", self._key(prompts)) or b""
        return np.frombuffer(data, dtype=_LENGTH).astype(np.int32)

    def keep(self, prompts: PromptFile, lengths: npt.NDArray[np.int32], *, complete: bool) -> None:
        """See `LengthMemory`; written at the end, and now and then before it."""
        if complete or monotonic() - self._kept >= self._keep_every_s:
            self._cache.write("lengths", self._key(prompts), lengths.astype(_LENGTH).tobytes())
            self._kept = monotonic()

    def _key(self, prompts: PromptFile) -> str:
        return _sha256(prompts.identity(), self._tokenizer)


def known_lengths(cache: PromptsCache, model: str, chat_template: str | None) -> KnownLengths | None:
    """The memory for a model's tokenizer; None if its files are not on this machine yet."""
    tokenizer = tokenizer_digest(model, chat_template)
    return None if tokenizer is None else KnownLengths(cache, tokenizer)


def tokenizer_digest(model: str, chat_template: str | None) -> str | None:
    """Changes with everything that decides which tokens a prompt becomes; None if the files are not here."""
    folder = _tokenizer_folder(tokenizer_source(model))
    if folder is None:
        return None
    files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    try:
        contents = [f"{file.relative_to(folder)} {sha256_file(file)}" for file in files]
    except OSError:
        return None
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES]
    return _sha256(*contents, *versions, repr(chat_template), code_digest())


def code_digest() -> str:
    """Changes with the code that reads prompts files, so that what an older version found is not used."""
    folder = Path(trainers.data.__path__[0])
    return _sha256(*(sha256_file(file) for file in sorted(folder.glob("*.py"))))


def key_of(parts: Sequence[object]) -> str:
    """A key for what was computed from `parts`, plain values."""
    return _sha256(json.dumps(parts, sort_keys=True))


def _tokenizer_folder(name: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "tokenizer_config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _sha256(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
