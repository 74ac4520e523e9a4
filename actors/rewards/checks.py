"""What can be said of the rewards before anything is started: files, function names, checkpoints' headers.

It reads files and runs nothing of the user's; the import of a function's file is tried when the service starts. It
knows the standard library and the rewards' config.
"""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any

from actors.rewards.config import FunctionReward, ModelReward, RewardConfig, reward_names
from actors.rewards.function_worker import signature_problem
from trainers.adapter_folder import is_adapter, read_adapter
from trainers.errors import Problem, UserError

DEFAULT_LABELS = 2  # of a config.json that does not say


def validate_rewards(configs: Sequence[RewardConfig], base_dir: Path) -> list[Problem]:
    """Every problem found; paths count from `base_dir`, the config file's folder."""
    problems: list[Problem] = []
    try:
        reward_names(configs)
    except UserError as error:
        problems += error.problems
    for index, config in enumerate(configs):
        if isinstance(config, FunctionReward):
            wrong = _function_problem(config, base_dir)
            problems += [Problem(f"rewards.{index}.path", wrong)] if wrong else []
        elif isinstance(config, ModelReward):
            wrong = _model_problem(config.model, base_dir)
            problems += [Problem(f"rewards.{index}.model", wrong)] if wrong else []
    return problems


def function_file(config: FunctionReward, base_dir: Path) -> Path:
    """Where a function's file is."""
    return (base_dir / Path(config.file).expanduser()).absolute()


def model_name(name: str, base_dir: Path) -> str:
    """The folder of a model, or, where there is none, the hub id that it then must be."""
    folder = base_dir / Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def _function_problem(config: FunctionReward, base_dir: Path) -> str | None:
    file, name = function_file(config, base_dir), config.function
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except FileNotFoundError:
        return f"no such file: {file}{_nearest(file.name, _names_in(file.parent, '.py'))}"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        return f"{file}{line} is no Python: {error}"
    defined = _definitions(tree.body)
    if name not in defined:
        functions = [key for key, node in defined.items() if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        return f"{file} has no function {name!r}{_nearest(name, functions)}"
    node = defined[name]
    if isinstance(node, ast.Constant | ast.List | ast.Dict | ast.Tuple | ast.Set | ast.JoinedStr):
        return f"{file}:{node.lineno}: {name!r} is no function"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list:
        wrong = signature_problem(_parameters(node.args), name)
        return f"{file}:{node.lineno}: {wrong}" if wrong else None
    return None  # imported, decorated or computed: known once it is imported


def _definitions(body: Sequence[ast.stmt]) -> dict[str, ast.AST]:
    """What the top level of a module binds, also under if, try and with: name → definition, or the value assigned."""
    found: dict[str, ast.AST] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
        elif isinstance(node, ast.If | ast.Try | ast.With):
            branches = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            branches += [handler.body for handler in getattr(node, "handlers", [])]
            for branch in branches:
                found |= _definitions(branch)
    return found


def _parameters(arguments: ast.arguments) -> list[Parameter]:
    """As `inspect.signature` would give them; a default is only known to be there."""
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    found: list[Parameter] = []
    for i, argument in enumerate(positional):
        kind = Parameter.POSITIONAL_ONLY if i < len(arguments.posonlyargs) else Parameter.POSITIONAL_OR_KEYWORD
        found.append(Parameter(argument.arg, kind, default=Parameter.empty if i < required else None))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        given = Parameter.empty if default is None else None
        found.append(Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=given))
    return found


def _model_problem(name: str, base_dir: Path) -> str | None:
    folder = Path(model_name(name, base_dir))
    if not folder.is_dir():
        return _missing_model(name, base_dir)
    if is_adapter(folder):
        return _adapter_problem(folder)
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return f"{folder} has no config.json; expected a model in Hugging Face format"
    except (OSError, ValueError) as error:
        return f"{folder / 'config.json'} cannot be read: {error}"
    if not isinstance(config, dict):
        return f"{folder / 'config.json'} is no JSON object"
    return _checkpoint_problem(folder, config)


def _adapter_problem(folder: Path) -> str | None:
    try:
        adapter = read_adapter(folder, where="rewards")
    except UserError as error:
        return error.problems[0].message
    if adapter.config.get("task_type") != "SEQ_CLS" or not adapter.labels:
        task = adapter.config.get("task_type")
        return f"{folder} is an adapter for {task}; a reward model's is for SEQ_CLS and holds its head's weights"
    if adapter.labels != 1:
        return f"{folder} is an adapter of a classifier with {adapter.labels} labels; a reward model has exactly one"
    base = Path(adapter.base)
    if base.is_dir() and not (base / "config.json").is_file():
        return f"the base of {folder} is no model: {base} has no config.json"
    if base.is_dir() and not any(base.glob("*.safetensors")):
        return f"{base}, the base of {folder}, has no *.safetensors; other formats can run code and are refused"
    return None


def _missing_model(name: str, base_dir: Path) -> str | None:
    """A hub id has one slash at most; where its first part is a folder here, a path was meant."""
    path = Path(name).expanduser()
    parent = (base_dir / path).parent
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if is_path or ("/" in name and parent.is_dir()):
        return f"no such folder: {base_dir / path}{_nearest(path.name, _names_in(parent))}"
    return None


def _checkpoint_problem(folder: Path, config: dict[str, Any]) -> str | None:
    architectures = config.get("architectures") or []
    if "auto_map" in config:
        return f"{folder} needs code of its own to be loaded, which is refused; use a model that transformers knows"
    if not any(str(name).endswith("ForSequenceClassification") for name in architectures):
        found = ", ".join(map(str, architectures)) or "nothing"
        return (
            f"{folder} is no sequence-classification checkpoint (its architectures: {found}); "
            "a reward model is one with a single label"
        )
    id2label = config.get("id2label")
    labels = len(id2label) if isinstance(id2label, dict) else config.get("num_labels", DEFAULT_LABELS)
    if labels != 1:
        return f"{folder} is a classifier with {labels} labels; a reward model has exactly one"
    if not any(folder.glob("*.safetensors")):
        return f"{folder} has no *.safetensors; other formats can run code and are refused"
    return None


def _names_in(folder: Path, suffix: str = "") -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(suffix)) if folder.is_dir() else []


def _nearest(name: str, names: Sequence[str]) -> str:
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(map(repr, names[:5]))}" if names else ""
