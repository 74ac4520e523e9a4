"""Which run a command continues, and why another one does not fit: configs are compared as this version parses them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from cluster.config.field_errors import FieldError, field_errors
from cluster.config.tree import leaves
from cluster.runs.checkpoint import checkpoint_steps
from cluster.runs.directory import RunDirectory
from cluster.runs.summary import list_runs
from trainers.errors import Problem, UserError

logger = logging.getLogger(__name__)

# What a resume may change; train.steps may grow. Sections, and any key of the name.
_MAY_CHANGE: Final = ("root", "logging", "checkpoint", "eval", "timeouts", "generators")
_MAY_CHANGE_ANYWHERE: Final = "timeout_s"


def find_resumable(root: Path, config: BaseModel) -> RunDirectory | None:
    """The newest run under `root` that `config` continues, for `--resume auto`; None: start a new one.

    It has the same `name` and the same config (except for what a resume may change), has not succeeded (or has fewer
    steps than `config`), and has a checkpoint, whose digests are checked when it is loaded. Newer runs of that name
    that differ are logged, with the keys that differ.
    """
    tree = config.model_dump(mode="json")
    for summary in reversed(list_runs(root) if root.is_dir() else []):
        run, record = RunDirectory(summary.path), summary.record
        if record is None:
            logger.warning("run %s is not resumed: %s", summary.id, summary.unreadable)
            continue
        if record.name != tree["name"] or (record.state == "succeeded" and record.step >= tree["train"]["steps"]):
            continue
        if not checkpoint_steps(run.checkpoints):
            continue
        try:
            differing = resume_differences(run.config(), config)
        except UserError as error:
            logger.warning("run %s is not resumed: %s", record.id, error)
            continue
        if not differing:
            return run
        keys = "; ".join(f"{problem.where}: {problem.message}" for problem in differing)
        logger.warning("run %s is not resumed, its config differs: %s", record.id, keys)
    return None


def resume_differences(saved: Mapping[str, Any], config: BaseModel) -> list[Problem]:
    """The keys for which `config` is another run than the one that was saved as the tree `saved`.

    The saved tree is parsed by `config`'s own class first, so that a key that was added since counts as its default.
    A key that was removed since, or whose value is not accepted any more, is a difference. `train.steps` may grow.

    >>> from trainers.config import SamplingConfig
    >>> resume_differences({"n": 4, "max_tokens": 512}, SamplingConfig(n=8))
    [Problem(where='n', message='4 in the saved run, 8 now')]
    """
    given = config.model_dump(mode="json")
    kept = {key: value for key, value in saved.items() if key not in _MAY_CHANGE}
    changed = {key: given[key] for key in _MAY_CHANGE if key in given}
    try:
        parsed = type(config).model_validate_json(json.dumps({**kept, **changed}), strict=True)
    except ValidationError as error:
        return [_not_accepted(saved, detail) for detail in field_errors(error.errors(include_url=False))]
    old, new = dict(leaves(parsed.model_dump(mode="json"))), dict(leaves(given))
    problems = []
    for key in (*old, *(key for key in new if key not in old)):
        before, now = old.get(key, "absent"), new.get(key, "absent")
        if before == now or key.rpartition(".")[2] == _MAY_CHANGE_ANYWHERE:
            continue
        if key == "train.steps" and now > before:
            continue
        problems.append(Problem(key, f"{before} in the saved run, {now} now"))
    return problems


def _not_accepted(saved: Any, detail: FieldError) -> Problem:
    """A problem of the saved tree in this version; pydantic's place without the tags of unions."""
    node: Any = saved
    parts: list[str] = []
    for part in detail.location:
        known = part in node if isinstance(node, Mapping) else isinstance(node, list) and isinstance(part, int)
        if known:  # else the tag of a union
            node = node[part]
            parts.append(str(part))
    if detail.kind == "missing":
        return Problem(".".join([*parts, str(detail.location[-1])]), "absent in the saved run, required now")
    reason = "is not a key now" if detail.kind == "extra_forbidden" else f"not accepted now ({detail.message})"
    return Problem(".".join(parts), f"{node} in the saved run, {reason}")
