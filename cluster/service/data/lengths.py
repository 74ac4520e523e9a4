"""The lengths of an upload's prompts in a model's tokens: counted once, by a process that nothing else waits for.

Counting a large file takes minutes, and the page asks each time it is opened.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from pathlib import Path

from cluster.service.exceptions import DeadlineError
from cluster.service.schemas import LengthsReport
from cluster.service.workers.messages import LengthsWork
from cluster.service.workers.pool import Helper

LENGTHS_S = 600.0
_KEPT = 256  # reports, of a few hundred bytes each
_Key = tuple[str, str, int, tuple[int, ...]]


class Lengths:
    """Reports by file, model and limit; the last ones stay in memory."""

    def __init__(self, root: Path) -> None:
        """`root`: of the runs, beside which counts of tokens are kept for their plans."""
        self._root = root
        self._helper = Helper()
        self._turn = asyncio.Lock()
        self._reports: OrderedDict[_Key, LengthsReport] = OrderedDict()

    async def count(self, path: str, *, model: str, max_prompt_tokens: int) -> LengthsReport:
        """The report on an upload, whose file never changes. Raises UserError, and ServiceError past the deadline."""
        key = (path, model, max_prompt_tokens, _versions(Path(model)))
        try:
            async with asyncio.timeout(LENGTHS_S), self._turn:  # who asks for the same meanwhile finds it
                if key not in self._reports:
                    asked = LengthsWork(
                        path=path, model=model, root=str(self._root), max_prompt_tokens=max_prompt_tokens
                    )
                    report = await self._helper.call(asked, deadline_s=LENGTHS_S)
                    self._reports[key] = LengthsReport.model_validate(report)
        except TimeoutError:  # the wait for others' counts
            raise DeadlineError(f"lengths took longer than {LENGTHS_S:g} s and was ended") from None
        found = self._reports[key]
        self._reports.move_to_end(key)
        while len(self._reports) > _KEPT:
            self._reports.popitem(last=False)
        return found

    async def close(self) -> None:
        """End the process, if there is one."""
        await self._helper.close()


def _versions(model: Path) -> tuple[int, ...]:
    """When the files of a model's folder that make tokens were written; nothing for one on the hub."""
    files = sorted({*model.glob("tokenizer*"), *model.glob("chat_template*")}) if model.is_absolute() else []
    return tuple(file.stat().st_mtime_ns for file in files)
