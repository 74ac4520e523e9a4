"""The models under the operator's roots in stores (s3://…), looked for in the background.

A store may be slow or gone: an answer waits for it a few seconds at most and then says what is known by then. Of a
model it reads what says what it is, never weights, and asks a store again for no more than what has changed.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from cluster.models.catalog import DEPTH, MOST_MODELS, FoundModel, describe, shown_name
from cluster.models.object_store import StoredFolder, StoreError, list_folder, run_with_stall_timeout, within
from cluster.models.remote import CONFIGS, WEIGHTS, model_files, write_outline
from cluster.service.settings import Settings
from cluster.service.vetting import redacted, vet_bases
from cluster.service.workers.messages import OutlineWork
from cluster.service.workers.pool import Helper
from trainers.errors import UserError

OUTLINE_S = 300.0
_FRESH_S, _WAIT_S, _PATIENCE_S = 60.0, 5.0, 60.0
_MOST_FOLDERS = 5_000  # each is a request
_READ = (*CONFIGS, "tokenizer_config.json")  # the other small files need only be there


async def outlines(
    helper: Helper, wanted: Mapping[str, str], settings: Settings, *, trusted: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Local folders that say what the models at these addresses are, by address; `wanted` has them by key.

    UserError where one cannot be had, or is an adapter on a base that is not allowed.
    """
    asked = OutlineWork(models=dict(wanted), root=str(settings.root))
    folders: dict[str, str] = await helper.call(asked, deadline_s=OUTLINE_S)
    if problems := vet_bases(wanted, folders, settings, trusted=trusted):
        raise UserError(problems)
    return folders


class RemoteCatalog:
    """What can be found in stores, remembered for a minute."""

    def __init__(self, roots: Sequence[str], *, wait_s: float = _WAIT_S, fresh_s: float = _FRESH_S) -> None:
        self._searches = [_Search(root, fresh_s) for root in roots]
        self._wait_s = wait_s

    def find(self) -> tuple[list[FoundModel], bool, list[str]]:
        """Every model that is known, whether there are more, and what is wrong with a root."""
        for search in self._searches:
            search.begin()
        until = monotonic() + self._wait_s
        for search in self._searches:
            search.ended.wait(max(0.0, until - monotonic()))
        found = [model for search in self._searches for model in search.found]
        problems = [redacted(problem) for search in self._searches for problem in search.problems()]
        return found[:MOST_MODELS], len(found) > MOST_MODELS or any(s.truncated for s in self._searches), problems


class _Search:
    """One root, searched in a thread of its own at most once in `fresh_s`."""

    def __init__(self, root: str, fresh_s: float) -> None:
        self.root = root
        self.found: tuple[FoundModel, ...] = ()
        self.truncated = False
        self.ended = threading.Event()
        self._fresh_s = fresh_s
        self._lock = threading.Lock()
        self._going = False
        self._next = 0.0
        self._failed: tuple[str, ...] = ()
        self._known: dict[str, tuple[str, FoundModel]] = {}

    def begin(self) -> None:
        """Search, unless that is going on or was done just now."""
        with self._lock:
            if self._going or monotonic() < self._next:
                return
            self._going = True
            self.ended.clear()
        threading.Thread(target=self._run, name="stored models", daemon=True).start()

    def problems(self) -> list[str]:
        """What is wrong with the root, to be shown with the models."""
        unknown = self._going and self._next == 0.0
        return [*self._failed, *([f"{self.root} is still being looked through; ask again"] if unknown else [])]

    def _run(self) -> None:
        try:
            self.found, self.truncated, self._failed = run_with_stall_timeout(
                self._search, what=self.root, patience_s=_PATIENCE_S
            )
        except (StoreError, OSError) as error:  # what was found before may still be there
            self._failed = (str(error),)
        finally:
            self._next = monotonic() + self._fresh_s
            self._going = False
            self.ended.set()

    def _search(self, move: Callable[[], None]) -> tuple[tuple[FoundModel, ...], bool, tuple[str, ...]]:
        found: list[FoundModel] = []
        failed: list[str] = []
        waiting: list[tuple[str, tuple[str, ...]]] = [(self.root, ())]
        listed = 0
        while waiting and listed < _MOST_FOLDERS and len(found) < MOST_MODELS:
            address, parts = waiting.pop()
            listed += 1
            move()
            try:
                folder = list_folder(address)
                if any(file.name in CONFIGS for file in folder.files):
                    found.append(self._described(folder, shown_name(parts, folder.name), move))
                    continue
            except StoreError as error:
                if not parts:
                    raise
                failed.append(str(error))
                continue
            if len(parts) < DEPTH:
                below = [(folder.child(name), (*parts, name)) for name in reversed(folder.folders)]
                waiting += [place for place in below if within(place[0], self.root)]
        return tuple(found), bool(waiting), tuple(failed[:1])

    def _described(self, folder: StoredFolder, name: str, move: Callable[[], None]) -> FoundModel:
        digest = folder.digest(folder.files)
        known = self._known.get(folder.address)
        if known is None or known[0] != digest:
            known = digest, _describe(folder, name, move)
            self._known[folder.address] = known
        return known[1]


def _describe(folder: StoredFolder, name: str, move: Callable[[], None]) -> FoundModel:
    try:
        files = model_files(folder)
    except StoreError as error:
        return FoundModel(name=name, path=folder.address, kind="other", usable=False, problem=str(error))
    with tempfile.TemporaryDirectory() as place:
        here = Path(place) / folder.name
        here.mkdir()
        for file in files:
            if file.name.endswith(WEIGHTS) or file.name in _READ:
                write_outline(folder, file, here)
                move()
            else:
                (here / file.name).touch()
        found = describe(here, name)
    problem = found.problem and found.problem.replace(str(here), folder.address)
    return found.model_copy(update={"path": folder.address, "problem": problem})
