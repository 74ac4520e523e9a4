"""`rlhf data check`: the report on prompt files, for people and for programs. It knows the reader and rich."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from trainers.data.chat import ChatEncoder, Lengths
from trainers.data.check import Checked, CheckOptions, check, expand_all
from trainers.data.config import DataConfig
from trainers.data.findings import FileReport, plural, printable
from trainers.data.source import STDIN, UnreadableError, source
from trainers.errors import UserError

READY, NOT_READY = 0, 2
_LARGE = 2**23  # bytes from which a progress bar is shown
_STRIDE = 2**28  # bytes between two progress lines without a terminal
_WIDTH = 160  # characters, if the output is not a terminal
_BAR = 40


def data_check(files: list[str], *, model: str | None, strip_responses: bool, as_json: bool) -> int:
    """Report on every file; 0 only if each is ready (with `strip_responses`: as it is used then), else 2."""
    errors = Console(stderr=True, markup=False, highlight=False)
    try:
        encoder = None if model is None else ChatEncoder.load(model)
    except UserError as e:
        errors.print(str(e), style="red", soft_wrap=True)
        return NOT_READY
    limit = int(DataConfig.model_fields["max_prompt_tokens"].default)
    checked = []
    for entry in expand_all(files):
        if isinstance(entry, str):
            with _progress(entry, errors) as on_bytes:
                options = CheckOptions(
                    strip_responses=strip_responses,
                    encoder=encoder,
                    max_prompt_tokens=limit,
                    stdin=sys.stdin.buffer if entry == STDIN else None,
                    on_bytes=on_bytes,
                )
                checked.append(check(entry, options))
        else:
            checked.append(entry)
        if not as_json:
            _print(checked[-1])
    if as_json:
        print(json.dumps({"files": [c.as_json() for c in checked]}, indent=2))
    return READY if all(c.report.ready for c in checked) else NOT_READY


@contextmanager
def _progress(address: str, console: Console) -> Iterator[Callable[[int], None] | None]:
    """A bar over the stored bytes of a large file; without a terminal, a line for every `_STRIDE` bytes."""
    size = _size(address)
    if size is not None and size < _LARGE:
        yield None
        return
    if not console.is_terminal:
        yield _lines(address, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(printable(address), total=size)
        yield lambda n: progress.advance(task, n)


def _lines(address: str, console: Console) -> Callable[[int], None]:
    read = 0

    def count(n: int) -> None:
        nonlocal read
        if (read + n) // _STRIDE > read // _STRIDE:
            console.print(f"{printable(address)}: {(read + n) / 1e6:,.0f} MB read", soft_wrap=True)
        read += n

    return count


def _size(address: str) -> int | None:
    if address == STDIN:
        return None
    try:
        return source(address).size()
    except UnreadableError:
        return 0  # the report shows why


def _print(checked: Checked) -> None:
    out = Console(markup=False, highlight=False)
    if not out.is_terminal:
        out = Console(markup=False, highlight=False, width=_WIDTH)
    report = checked.report
    verdict = Text.assemble(
        ("standard input" if report.file == STDIN else printable(report.file), "bold"),
        f": {report.format}, ",
        ("ready", "green") if report.ready else ("not ready", "red"),
    )
    out.print(verdict, soft_wrap=True)
    counts = f"  {plural(report.records, 'valid record')}, {plural(report.duplicates, 'repeated prompt')}"
    out.print(f"{counts}, {plural(report.problems_total, 'problem')}", soft_wrap=True)
    for e in report.evidence:
        out.print(
            f"  {e.format}: {plural(e.records, 'record')} with {e.shape} (first: line {e.first_line:,})", soft_wrap=True
        )
    if checked.lengths is not None:
        _print_lengths(out, checked.lengths)
    if report.problems:
        out.print(_problem_table(report))
    if rest := report.problems_total - len(report.problems):
        out.print(f"  and {plural(rest, 'more problem')}, counted but not shown")
    out.print()


def _problem_table(report: FileReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    table.add_column("line", justify="right", no_wrap=True)
    for name in ("severity", "field", "found", "expected"):
        table.add_column(name, overflow="fold")
    for problem in report.problems:
        f = problem.finding
        line = "file" if problem.line is None else f"{problem.line}"
        style = "yellow" if f.severity == "warning" else "red"
        table.add_row(line, Text(f.severity, style), f.field or "", f.found, f.expected)
    return table


def _print_lengths(out: Console, lengths: Lengths) -> None:
    """The histogram of prompt lengths in tokens, chat template included."""
    rows = lengths.histogram()
    most = max((n for _, _, n in rows), default=0) or 1
    out.print(f"  prompt lengths in tokens (longest {lengths.longest:,}, limit {lengths.limit:,}):")
    for low, high, n in rows:
        out.print(f"  {low:>7,} … {high:>7,} {n:>11,} {'█' * -(-_BAR * n // most)}", soft_wrap=True)
    if lengths.over:
        out.print(f"  over the limit    {lengths.over:>11,}", style="red")
