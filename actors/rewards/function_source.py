"""The reward source `function`: what can be checked of the user's file, and its replica on Ray Serve.

It parses the file and does not run it. It loads the standard library only until `start`.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING

from actors.rewards.config import FunctionReward
from actors.rewards.function_worker import IMPORT_S, signature_problem
from actors.rewards.near_names import names_in, nearest
from actors.rewards.source import Pace
from trainers.errors import Problem

if TYPE_CHECKING:
    from actors.messages import ScoreRequest
    from actors.rewards.ray_serve import Ask, RewardApps
    from actors.rewards.score import Answer


class FunctionSource:
    """Implements `RewardSource`."""

    def __init__(self, config: FunctionReward, name: str, base_dir: Path) -> None:
        self._config = config
        self._name = name
        self._file = (base_dir / Path(config.file).expanduser()).absolute()
        self._ask: Ask

    @property
    def pace(self) -> Pace:
        """See `RewardSource`; a call may have to wait for the import in a new process."""
        return Pace(parallel=self._config.workers, slack_s=IMPORT_S, per_completion=True)

    def check(self) -> Problem | None:
        """See `RewardSource`."""
        found = _function_problem(self._file, self._config.function)
        return Problem("path", found) if found else None

    async def start(self, apps: RewardApps) -> str | None:
        """See `RewardSource`: the file is imported in every process of the pool."""
        from actors.rewards.function_pool import FunctionReplica, read_function
        from actors.rewards.ray_serve import ServedReward

        spec = read_function(self._file, self._config.function, timeout_s=self._config.timeout_s)
        self._ask, wrong = await apps.deploy(ServedReward(self._name, FunctionReplica, (spec, self._config.workers)))
        return wrong

    async def score(self, request: ScoreRequest) -> list[Answer]:
        """See `RewardSource`."""
        return await self._ask(request.prompt, request.texts)

    async def close(self) -> None:
        """See `RewardSource`."""


def _function_problem(file: Path, name: str) -> str | None:
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except FileNotFoundError:
        return f"no such file: {file}{nearest(file.name, names_in(file.parent, '.py'))}"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte
        line = f":{error.lineno}" if isinstance(error, SyntaxError) else ""
        return f"{file}{line} is not valid Python: {error}"
    defined = _definitions(tree.body)
    if name not in defined:
        functions = [key for key, node in defined.items() if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        return f"{file} has no function {name!r}{nearest(name, functions)}"
    node = defined[name]
    if isinstance(node, ast.Constant | ast.List | ast.Dict | ast.Tuple | ast.Set | ast.JoinedStr):
        return f"{file}:{node.lineno}: {name!r} is not a function"
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
