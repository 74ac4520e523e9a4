"""Which paths a config from the network may name, and what of a config may be shown.

A config names files, models and code; whoever may call the API must not read or run what the operator has not
allowed. It knows the keys that hold paths, and the operator's folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cluster.config.run import RunConfig
from cluster.config.tree import leaves
from cluster.models.object_store import address_problem, is_address, within
from cluster.runs.directory import MERGED
from cluster.service.settings import Settings
from trainers.adapter_folder import find_base, is_adapter
from trainers.errors import Problem, UserError
from trainers.model_folder import is_hub_id, is_path

_WILDCARD = re.compile(r"[*?\[]")
_FILES = ("prompts", "eval_prompts")
_LONGEST_PATH = 4096
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_HIDDEN = re.compile(r"://\*\*\*@|[?&][^=&\s]*=\*\*\*")  # as `redacted` writes it
_SECRET_QUERY = re.compile(r"([?&][^=&\s]*(?:token|key|secret|password|signature|sig)[^=&\s]*=)[^&\s\"']+", re.I)


def vet(config: RunConfig, settings: Settings, *, trusted: Mapping[str, Any] | None = None) -> list[Problem]:
    """What a config names and must not. Values that `trusted`, the config of an existing run, has too may stay."""
    tree = config.model_dump(mode="json")
    known = {value for _, value in leaves(trusted or {}) if isinstance(value, str)}
    problems = []
    for path, value in leaves(tree):
        if isinstance(value, str) and value not in known and (problem := _problem(path, value, settings)):
            problems.append(Problem(path, problem))
    return problems


def _problem(path: str, value: str, settings: Settings) -> str | None:
    if _HIDDEN.search(value):
        return "credentials were hidden here (***): give them again, or clone the run and change only other settings"
    check = _check_for(path)
    return None if check is None else _bad_text(value) or check(value, settings)


def owned(tree: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The tree with the service's own `root`. UserError where it names another."""
    if tree.get("root") not in (None, str(settings.root)):
        raise UserError([Problem("root", f"this service keeps its runs in {settings.root}; leave root out")])
    return {**tree, "root": str(settings.root)}


def _check_for(path: str) -> Callable[[str, Settings], str | None] | None:
    parts = [part for part in path.split(".") if not part.isdecimal()]
    if parts[0] == "data" and len(parts) == 2 and parts[1] in _FILES:
        return _check_file
    if parts[-1] == "model":
        return _check_model
    return _check_function if parts == ["rewards", "path"] else None


def _bad_text(value: str) -> str | None:
    if len(value) > _LONGEST_PATH:
        return f"is longer than any path ({_LONGEST_PATH} characters)"
    if "\0" in value or not value.isprintable():
        return "holds characters that no path has"
    return None


def _check_file(value: str, settings: Settings) -> str | None:
    allowed = [*settings.data_roots, str(settings.datasets)]
    advice = "upload it, or ask the operator to allow its folder (rlhf serve --data)"
    if "://" in value or "::" in value:
        plain = "::" not in value and ".." not in value.split("/")
        inside = plain and any("://" in root and value.startswith(f"{root.rstrip('/')}/") for root in allowed)
        return None if inside else f"this address is not allowed; {advice}"
    fixed = _WILDCARD.split(value)[0]
    folder = value if fixed == value else fixed.rpartition("/")[0] or "/"
    if ".." in value.split("/"):
        return "must not hold .."
    inside = any("://" not in root and _inside(folder, Path(root)) for root in allowed)
    return None if inside else f"is not in a folder that prompts may come from; {advice}"


def _check_model(value: str, settings: Settings) -> str | None:
    return _check_place(value, settings) or _check_base(value, settings)


def vet_bases(
    wanted: Mapping[str, str],
    outlines: Mapping[str, str],
    settings: Settings,
    *,
    trusted: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """What is wrong with the bases of adapters in stores: `wanted` has the addresses by key, `outlines` the folders of
    what is there. The base of an address that `trusted` has too may stay as well."""
    known = {value for _, value in leaves(trusted or {}) if isinstance(value, str)}
    problems = []
    for path, address in wanted.items():
        if address not in known and (problem := _check_base(outlines[address], settings)):
            problems.append(Problem(path, problem.replace(outlines[address], address)))
    return problems


def _check_base(folder: str, settings: Settings) -> str | None:
    """An adapter's folder names a base, which is loaded too, so it must be in a place that models may come from."""
    if not is_adapter(folder):
        return None
    try:
        base = find_base(folder)
    except ValueError as error:
        return str(error)
    problem = _bad_text(base) or _check_place(base, settings)
    return None if problem is None else f"is an adapter whose base {problem}"


def _check_place(value: str, settings: Settings) -> str | None:
    if is_address(value):
        if problem := address_problem(value):
            return f"this address {problem}"
        if any(within(value, root) for root in settings.model_stores):
            return None
        return "this address is not allowed; ask the operator to allow its folder (rlhf serve --models)"
    if not value.startswith("/"):
        if is_hub_id(value) and not is_path(value, Path.cwd()):
            return None
        return "expected the absolute path of a model (GET /models lists them) or a hub id"
    if any(_inside(value, root) for root in settings.model_roots):
        return None
    real = Path(os.path.realpath(value))
    if real.name in ("model", MERGED) and real.parent.parent == settings.root:
        return None
    return "is not in a folder that models may come from; ask the operator to allow it (rlhf serve --models)"


def _check_function(value: str, settings: Settings) -> str | None:
    file = value.rpartition(":")[0]
    if any(_inside(file, root) for root in settings.reward_roots):
        return None
    return "is not in a folder that reward functions may come from; ask the operator (rlhf serve --reward-files)"


def _inside(value: str, root: Path) -> bool:
    """Whether an absolute path is inside a folder once links are followed."""
    return value.startswith("/") and Path(os.path.realpath(value)).is_relative_to(root)


def redacted(node: Any) -> Any:
    """The same tree with the secrets in addresses shown as ***.

    >>> redacted({"url": "https://me:pass@judge/score?api_key=5"})
    {'url': 'https://***@judge/score?api_key=***'}
    """
    if isinstance(node, str):
        return _SECRET_QUERY.sub(r"\1***", _USERINFO.sub("***@", node))
    if isinstance(node, Mapping):
        return {key: redacted(value) for key, value in node.items()}
    return [redacted(item) for item in node] if isinstance(node, list) else node


def short_yaml(config: RunConfig) -> str:
    """The config as a person would write it: only what differs from the defaults."""
    tree = config.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def model_problem(value: str, settings: Settings) -> str | None:
    """Why a model of this path or id may not be used; None: it may."""
    return _bad_text(value) or _check_model(value, settings)
