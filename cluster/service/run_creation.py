"""From a config tree of the network to a run in the queue: checked, vetted, planned, made once.

It knows what the service is made of (`AppState`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.config.run import RunConfig, parse_config
from cluster.config.tree import leaves, set_path
from cluster.models.remote import addresses
from cluster.runs.atomic_files import write_atomic
from cluster.runs.directory import RunDirectory
from cluster.service.exceptions import ConflictError, InvalidConfigError, InvalidRequestError
from cluster.service.remote_catalog import outlines
from cluster.service.run_view import Run, view
from cluster.service.schemas import Detail, PlanAnswer
from cluster.service.state import AppState
from cluster.service.vetting import owned, redacted, short_yaml, vet
from cluster.service.workers.messages import PlanWork
from trainers.errors import Problem, UserError

PLAN_S = 300.0
_DEEPEST, _MOST_VALUES = 20, 20_000
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
COMMAND = "rlhf train config.yaml"


def check_tree(tree: Any) -> None:
    """Refuse what no config is: too deep for anything that recurses, or too large. Raises InvalidRequestError."""
    level, values = [tree], 0
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for node in level:
            if isinstance(node, Mapping):
                below += node.values()
            elif isinstance(node, list):
                below += node
        values += len(below)
        if not below:
            return
        if values > _MOST_VALUES:
            break
        level = below
    raise InvalidRequestError(f"the body is nested deeper than {_DEEPEST} levels or larger than any config")


async def make_plan(
    parts: AppState, tree: Mapping[str, Any], *, gpus: bool | None, trusted: Mapping[str, Any] | None = None
) -> PlanAnswer:
    """The plan, with everything that is wrong with the config among its problems."""
    try:
        config = parse_config(owned(tree, parts.settings))
    except UserError as error:
        return _no_plan(error.problems)
    try:
        if problems := vet(config, parts.settings, trusted=trusted):
            raise UserError(problems)
        if wanted := addresses(config):
            await outlines(parts.planner, wanted, parts.settings, trusted=trusted)
    except UserError as error:
        return _no_plan(error.problems, config)
    if gpus is None:
        gpus = await _has_gpus(parts)
    asked = PlanWork(config=config.model_dump(mode="json"), gpus=gpus)
    plan: dict[str, Any] = await parts.planner.call(asked, deadline_s=PLAN_S)
    return PlanAnswer(**plan, yaml=short_yaml(config), command=COMMAND)


def _no_plan(problems: Sequence[Problem], config: RunConfig | None = None) -> PlanAnswer:
    return PlanAnswer(
        config=None if config is None else config.model_dump(mode="json"),
        problems=[Detail(path=problem.where, message=problem.message) for problem in problems],
        arithmetic=[],
        gpus=None,
        roles=[],
        memory=[],
        yaml=None if config is None else short_yaml(config),
        command=COMMAND,
    )


async def _has_gpus(parts: AppState) -> bool | None:
    """As the cluster is; None (as this machine is) where it does not say."""
    status = await parts.cluster.status()
    if status.state != "ready":
        return None
    return "GPU" in status.resources and status.resources["GPU"].total > 0


async def create(
    parts: AppState, tree: Mapping[str, Any], *, key: str | None, trusted: Mapping[str, Any] | None = None
) -> tuple[Run, bool]:
    """A run in the queue, and whether it is new.

    Raises InvalidConfigError with every problem, ConflictError for a reused key.
    """
    if key is None:
        return await _create(parts, tree, trusted), True
    if not _KEY.fullmatch(key):
        raise InvalidRequestError("Idempotency-Key: expected 1 to 255 visible ASCII characters")
    file = parts.settings.private / "keys" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    body = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    async with parts.creating:
        if (known := _read_key(file)) is not None:
            if known.body != body:
                raise ConflictError("this Idempotency-Key came with another body before")
            if not (parts.settings.root / known.run).is_dir():
                raise ConflictError("the run of this Idempotency-Key has been deleted")
            return parts.runs.show(known.run), False
        run = await _create(parts, tree, trusted)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, _Key(body=body, run=run.id).model_dump_json())
        return run, True


class _Key(BaseModel):
    """An idempotency key that was used: the digest of the body that came with it, and the run that was made."""

    body: str
    run: str


def _read_key(file: Path) -> _Key | None:
    try:
        return _Key.model_validate_json(file.read_bytes())
    except (OSError, ValueError):
        return None


async def _create(parts: AppState, tree: Mapping[str, Any], trusted: Mapping[str, Any] | None) -> Run:
    plan = await make_plan(parts, tree, gpus=None, trusted=trusted)
    if plan.problems:
        raise InvalidConfigError(Problem(found.path, found.message) for found in plan.problems)
    config = parse_config(owned(tree, parts.settings))
    directory = RunDirectory.create(parts.settings.root, config.name, config)
    await parts.queue.add(directory)
    return view(directory)


def changed_config(parts: AppState, run_id: str, changes: Mapping[str, Any], name: str | None) -> tuple[Any, Any]:
    """The config tree of a run, and the same with changes. UserError for a path that cannot be set."""
    source = parts.runs.directory(run_id).config()
    source["root"] = str(parts.settings.root)
    tree: Any = source
    problems: list[Problem] = []
    known = {path: _with_secrets(value, source) for path, value in changes.items() if path != "name"}
    for path, value in {**changes, **known, **({"name": name} if name is not None else {})}.items():
        try:
            tree = set_path(tree, path, value)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    check_tree(tree)
    return source, tree


def _with_secrets(value: Any, source: Any) -> Any:
    """A change may hold addresses of its run as they are shown: with *** for their secrets, which it cannot know.

    >>> _with_secrets(["https://***@judge/s"], {"url": "https://me:pass@judge/s"})
    ['https://me:pass@judge/s']
    """
    if isinstance(value, Mapping):
        return {key: _with_secrets(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_secrets(item, source) for item in value]
    if not isinstance(value, str) or "***" not in value:
        return value
    meant = {text for _, text in leaves(source) if isinstance(text, str) and redacted(text) == value}
    return meant.pop() if len(meant) == 1 else value  # of several none is sure


def differences(before: Any, after: Any, path: str = "") -> list[dict[str, Any]]:
    """Where two trees differ: {"path", "from", "to"}; null for what is absent."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = dict.fromkeys([*before, *after])
        return [
            d for key in keys for d in differences(before.get(key), after.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [d for i, pair in enumerate(zip(before, after, strict=True)) for d in differences(*pair, f"{path}.{i}")]
    return [] if before == after else [{"path": path, "from": redacted(before), "to": redacted(after)}]


def uses(parts: AppState, path: str) -> str | None:
    """The id of a run that has not ended and reads this file; None: no run does."""
    for run_id in parts.runs.ids():
        directory = RunDirectory(parts.settings.root / run_id)
        if view(directory).state not in ("queued", "running", "paused"):
            continue
        try:
            if path in json.dumps(directory.config(), ensure_ascii=False):
                return run_id
        except UserError:
            continue
    return None


def config_of(directory: RunDirectory) -> tuple[dict[str, Any] | None, RunConfig | None]:
    """A run's config as its file has it, and as this version understands it; None where it does not."""
    try:
        tree = directory.config()
    except UserError:
        return None, None
    try:
        return tree, parse_config(tree)
    except UserError:
        return tree, None
