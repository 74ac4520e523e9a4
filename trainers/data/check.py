"""One file's report, with prompt lengths if a model is given: what `rlhf data check` and uploads show.

It knows the reader and the tokenizer; it prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from trainers.data.chat import ChatEncoder, LengthMemory, Lengths, measure
from trainers.data.detect import Detector
from trainers.data.findings import FileReport
from trainers.data.reader import ScanOptions, scan
from trainers.data.source import UnreadableError, expand
from trainers.data.tally import Tally


@dataclass(frozen=True, slots=True)
class Checked:
    """A report, and the prompt lengths if a model was given."""

    report: FileReport
    lengths: Lengths | None = None

    def as_json(self) -> dict[str, Any]:
        """The public form; `lengths` is there only with a model."""
        if self.lengths is None:
            return self.report.as_json()
        bins = [{"from": low, "to": high, "prompts": n} for low, high, n in self.lengths.histogram()]
        return self.report.as_json() | {
            "lengths": {
                "limit": self.lengths.limit,
                "longest": self.lengths.longest,
                "over_limit": self.lengths.over,
                "histogram": bins,
            }
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions:
    """How files are checked. With an `encoder` prompts are measured against `max_prompt_tokens`."""

    strip_responses: bool = False
    encoder: ChatEncoder | None = None
    memory: LengthMemory | None = None
    max_prompt_tokens: int = 1024
    stdin: BinaryIO | None = None
    on_bytes: Callable[[int], None] | None = None


def check(address: str, options: CheckOptions) -> Checked:
    """Read one file to its end: its format, whether it is ready, and every problem by line. Raises nothing."""
    scanning = ScanOptions(
        strip_responses=options.strip_responses,
        keep=options.encoder is not None,
        on_bytes=options.on_bytes,
        stdin=options.stdin,
    )
    file, tally = scan(address, scanning)
    if options.encoder is None or file is None:
        return Checked(tally.report())
    lengths = Lengths(options.max_prompt_tokens)
    for _, line, finding in measure(file, options.encoder, lengths, memory=options.memory):
        tally.findings.add(line, [finding])
    return Checked(tally.report(), lengths)


def expand_all(entries: list[str]) -> list[str | Checked]:
    """The addresses that paths and globs name; what names none becomes its report."""
    found: list[str | Checked] = []
    for entry in entries:
        try:
            found += expand(entry)
        except UnreadableError as e:
            found.append(Checked(Tally(entry, Detector(), fatal=[e.finding]).report()))
    return found
