"""An upload from the network to the disk, as it comes: multipart/form-data with one file, in constant memory.

It knows the form's grammar through python-multipart and a size limit; nothing of who sends it or what the file holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from cluster.service.exceptions import MalformedError, ServiceError, TooLargeError, UnsupportedFormatError

_BLOCK = 1 << 20
_FORM = 1 << 20  # bytes that boundaries and headers may add


@dataclass(slots=True)
class _Form:
    """What the parser has found so far; `data` are the file's bytes not yet taken."""

    check_name: Callable[[str], object]
    headers: dict[bytes, bytes] = field(default_factory=dict)
    header: list[bytes] = field(default_factory=lambda: [b"", b""])
    is_file: bool = False
    files: int = 0
    name: str = ""
    data: bytearray = field(default_factory=bytearray)
    ended: bool = False

    def begin(self) -> None:
        """A part begins."""
        self.headers, self.is_file = {}, False

    def header_field(self, data: bytes, start: int, end: int) -> None:
        """A piece of a header's name."""
        self.header[0] += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        """A piece of a header's value."""
        self.header[1] += data[start:end]

    def header_end(self) -> None:
        """A header is complete."""
        self.headers[self.header[0].lower()] = self.header[1]
        self.header = [b"", b""]

    def headers_finished(self) -> None:
        """The part's content begins."""
        _, options = parse_options_header(self.headers.get(b"content-disposition", b""))
        self.is_file = options.get(b"name") == b"file" and b"filename" in options
        if self.is_file:
            self.files += 1
            self.name = options[b"filename"].decode("utf-8", "replace")
            self.check_name(self.name)

    def content(self, data: bytes, start: int, end: int) -> None:
        """A piece of the part's content."""
        if self.is_file:
            self.data += data[start:end]

    def end(self) -> None:
        """The form is complete."""
        self.ended = True


@dataclass(frozen=True, slots=True)
class Upload:
    """A body that comes in pieces, with what was announced of it: its content type, and its size where it was given."""

    content_type: str
    size: int | None
    chunks: AsyncIterator[bytes]


async def receive_file(
    upload: Upload, path: Path, *, limit: int, check_name: Callable[[str], object]
) -> tuple[str, int]:
    """Write the form's field `file` to `path` as it comes: the name that the client gives it, and its size in bytes.

    The name is for people only; `check_name` may refuse it (ServiceError) before the file's bytes are read.
    Raises ServiceError; what was written is left to the caller to remove.
    """
    kind, options = parse_options_header(upload.content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise UnsupportedFormatError("send multipart/form-data with one field `file`")
    form, size = _Form(check_name), 0
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": form.begin,
            "on_header_field": form.header_field,
            "on_header_value": form.header_value,
            "on_header_end": form.header_end,
            "on_headers_finished": form.headers_finished,
            "on_part_data": form.content,
            "on_end": form.end,
        },
    )
    with path.open("xb") as file:
        async for chunk in _body(upload, limit + _FORM):
            try:
                parser.write(chunk)
            except MultipartParseError as error:
                raise MalformedError(f"no valid multipart form: {error}") from error
            if form.files > 1:
                raise MalformedError("one file at a time; send each with a request of its own")
            if len(form.data) >= _BLOCK:
                size += await _flush(file, form, limit - size)
        size += await _flush(file, form, limit - size)
    if not form.ended or form.files == 0:
        raise MalformedError("the form has no complete field `file` with a file name")
    return form.name, size


async def _flush(file: BinaryIO, form: _Form, room: int) -> int:
    if len(form.data) > room:
        raise _too_large()
    data, form.data = form.data, bytearray()
    try:
        await asyncio.to_thread(file.write, data)
    except OSError as error:
        raise TooLargeError(f"the file cannot be stored: {error.strerror}") from error
    return len(data)


async def _body(upload: Upload, limit: int) -> AsyncIterator[bytes]:
    if (upload.size or 0) > limit:
        raise _too_large()
    received = 0
    async for chunk in upload.chunks:
        received += len(chunk)
        if received > limit:
            raise _too_large()
        yield chunk


def _too_large() -> ServiceError:
    return TooLargeError("the file is larger than this service takes (--max-upload-gb)")
