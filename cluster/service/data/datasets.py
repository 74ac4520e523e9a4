"""The datasets that were uploaded: one folder each, with the file, under an id of the service's making.

It knows the file system and the report's JSON; a user's name for a file is shown and never becomes a path.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.runs.atomic_files import write_atomic
from cluster.service.exceptions import NotFoundError, TooLargeError, UnsupportedFormatError, printable
from cluster.service.schemas import DatasetAnswer, DatasetList

SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet")
LEAST_FREE = 1 << 30  # bytes that uploads leave on the disk: the runs write there too
_ID = re.compile(r"ds-\d{8}-\d{6}-[0-9a-f]{6}")
_LONGEST_NAME = 255
_LONG = {"evidence", "problems"}
_ADVICE: Mapping[str, str] = {
    "sft": "It holds responses: set data.strip_responses to use its prompts only.",
    "preference": "It is offline data (DPO, reward models); online RLHF needs prompts only.",
    "kto": "It is offline data (KTO); online RLHF needs prompts only.",
    "pretrain": "It is plain text; online RLHF needs a field `prompt` or `messages`.",
    "unknown": "Its records are of different formats, or of none; the lines below say which.",
}


class Datasets:
    """All uploads under one folder, which together take at most so many bytes."""

    def __init__(self, folder: Path, *, most: int) -> None:
        self._folder = folder
        self._most = most
        self._coming = 0

    @contextmanager
    def room_for(self, announced: int | None, *, limit: int) -> Iterator[int]:
        """Room set aside for an upload while it comes, so that many at once cannot take more than there is.

        Yields how many bytes may come: `limit`, or less where an upload does not announce its size and there is less.
        Raises TooLargeError.
        """
        taken = sum(map(_size, self._folder.glob("ds-*/prompts*"))) + self._coming
        on_disk = shutil.disk_usage(self._folder.parent).free - self._coming - LEAST_FREE
        size = max(1, min(limit, announced if announced is not None else min(self._most - taken, on_disk)))
        if taken + size > self._most:
            have = f"uploads take {_gb(taken)} of the {_gb(self._most)} GB that they may"
            advice = "delete datasets that no run needs, or ask the operator for more (rlhf serve --max-uploads-gb)"
            raise TooLargeError(f"{have}, and this one would add {_gb(size)}; {advice}")
        if size > on_disk:
            advice = "delete datasets or runs, or ask the operator"
            raise TooLargeError(f"the disk that uploads are stored on is nearly full; {advice}")
        self._coming += size
        try:
            yield limit if announced is not None else size
        finally:
            self._coming -= size

    def begin(self) -> Path:
        """A new folder for an upload; it is not a dataset until `finish`."""
        now = datetime.now(UTC)
        partial = self._folder / f".ds-{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}.partial"
        partial.mkdir(parents=True, mode=0o700)
        return partial

    def name_file(self, partial: Path, upload: Path, name: str) -> Path:
        """Give the uploaded file the suffix that its name promises. Raises UnsupportedFormatError for another one."""
        return upload.rename(partial / f"prompts{suffix_of(name)}")

    def finish(self, partial: Path, file: Path, name: str, report: Mapping[str, Any]) -> DatasetAnswer:
        """Make the upload a dataset, with its report."""
        dataset_id = partial.name.removeprefix(".").removesuffix(".partial")
        final = self._folder / dataset_id
        shown = printable(Path(name.replace("\\", "/")).name)[-_LONGEST_NAME:]
        created = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        record = DatasetAnswer(
            id=dataset_id,
            name=shown,
            path=str(final / file.name),
            bytes=file.stat().st_size,
            created=created,
            **{**report, "file": shown},
        )
        if not record.ready:
            advice = _ADVICE.get(record.format, "The lines below show what is wrong.")
            record = record.model_copy(update={"advice": advice})
        write_atomic(partial / "dataset.json", json.dumps(record.model_dump()))
        partial.rename(final)
        return record

    def get(self, dataset_id: str) -> DatasetAnswer:
        """One dataset. Raises NotFoundError."""
        if _ID.fullmatch(dataset_id):
            try:
                found = DatasetAnswer.model_validate_json((self._folder / dataset_id / "dataset.json").read_bytes())
            except (OSError, ValueError):
                pass
            else:
                return found
        raise NotFoundError(f"there is no dataset {dataset_id}")

    def list(self, *, limit: int, after: str | None) -> DatasetList:
        """Newest first, without problems and evidence."""
        names = sorted((path.parent.name for path in self._folder.glob("ds-*/dataset.json")), reverse=True)
        rest = [name for name in names if after is None or name < after]
        shown = [self._brief(name) for name in rest[:limit]]
        following = rest[limit - 1] if len(rest) > limit else None
        return DatasetList(datasets=shown, total=len(names), next=following)

    def _brief(self, name: str) -> DatasetAnswer:
        return DatasetAnswer.model_validate(self.get(name).model_dump(exclude=_LONG))

    def delete(self, dataset_id: str) -> None:
        """Remove it. Raises NotFoundError."""
        self.get(dataset_id)
        gone = self._folder / f".{dataset_id}.deleted"
        (self._folder / dataset_id).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what uploads that were cut off have left (at the service's start)."""
        for leftover in (*self._folder.glob(".ds-*.partial"), *self._folder.glob(".ds-*.deleted")):
            shutil.rmtree(leftover, ignore_errors=True)


def suffix_of(name: str) -> str:
    """The suffix that says how a file is read. Raises UnsupportedFormatError for a name that ends in none of them."""
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), None)
    if suffix is None:
        raise UnsupportedFormatError(f"expected a file name that ends in {', '.join(SUFFIXES)}")
    return suffix


def _size(file: Path) -> int:
    """0 of one that was deleted just now."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"
