"""The other side of `pool.py`: a process that plans, checks files and chats, one request at a time.

Here torch and transformers are imported, each when it is first needed. Requests come as lines on standard input,
answers go as lines to what was standard output; anything else that is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from cluster.service.workers.messages import (
    WORK,
    ChatPiece,
    ChatWork,
    CheckWork,
    LengthsWork,
    OutlineWork,
    PlanWork,
    Reply,
    RowsWork,
)
from trainers.errors import Problem, UserError

_MOST_MEMORY = 16 << 30  # bytes of address space for a file that may unpack to anything
_ROWS_MEMORY = 1 << 30  # the same to show some rows of one, beyond what the process has taken before


def plan(asked: PlanWork) -> dict[str, Any]:
    """`cluster.planning.plan` of a config tree."""
    from cluster.config.run import parse_config
    from cluster.planning.plan import as_json, make_plan

    return as_json(make_plan(parse_config(asked.config), gpus=asked.gpus))


def outline(asked: OutlineWork) -> dict[str, str]:
    """Folders that say what the models at some addresses are."""
    from cluster.models.remote import fetch_all, model_store

    folders = fetch_all(asked.models, model_store(Path(asked.root)), "outline")
    return {address: str(folder) for address, folder in folders.items()}


def check_file(asked: CheckWork) -> dict[str, Any]:
    """The report on one prompt file."""
    from trainers.data.check import CheckOptions, check

    _limit_memory(_MOST_MEMORY)
    try:
        return check(asked.path, CheckOptions()).as_json()
    except MemoryError:
        problem = f"reading it takes more than {_MOST_MEMORY >> 30} GiB; write it again in smaller pieces"
        raise UserError([Problem("file", problem)]) from None


def rows(asked: RowsWork) -> list[dict[str, Any]]:
    """Some rows of a prompt file, for the page."""
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the usual one reserves 1 GiB for its first byte
    import pyarrow as pa

    from cluster.service.workers.preview import read_rows

    _limit_rows_memory()
    path = Path(asked.path)
    try:
        return read_rows(path, count=asked.count, offset=asked.offset)
    except MemoryError:
        problem = f"cannot be shown: these rows take more than {_ROWS_MEMORY >> 30} GiB of memory to read"
        raise UserError([Problem(path.name, problem)]) from None
    except (OSError, ValueError, EOFError, zlib.error, pa.ArrowException) as error:
        raise UserError([Problem(path.name, f"cannot be shown: {error}")]) from error


@cache
def _limit_rows_memory() -> None:
    """From now on this process may take `_ROWS_MEMORY` more: libraries and their threads have taken theirs by then."""
    taken = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    _limit_memory(taken + _ROWS_MEMORY)


def _limit_memory(most: int) -> None:
    """Bound this process's address space, within what the operator has set."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def lengths(asked: LengthsWork) -> dict[str, Any]:
    """The report on one prompt file with its prompts' lengths in a model's tokens."""
    from cluster.runs.prompts_cache import PromptsCache, known_lengths
    from trainers.data.chat import ChatEncoder
    from trainers.data.check import CheckOptions, check

    encoder = ChatEncoder.load(asked.model)
    options = CheckOptions(
        encoder=encoder,
        memory=known_lengths(PromptsCache(Path(asked.root)), asked.model, None),
        max_prompt_tokens=asked.max_prompt_tokens,
        strip_responses=True,
    )
    return check(asked.path, options).as_json()


class Chat:
    """Answers of a trained model and of its base; models stay loaded until others are asked for."""

    def __init__(self) -> None:
        self._models: dict[str, Any] = {}

    def __call__(self, asked: ChatWork) -> Iterator[ChatPiece]:
        """Pieces as they are written. Where the base cannot be loaded the trained model replies alone."""
        from cluster.models.chat import ChatModel, ChatOptions

        options = ChatOptions(max_tokens=asked.max_tokens, temperature=asked.temperature, system=asked.system)
        wanted = {name: asked.models[name] for name in asked.histories}
        self._models = {path: model for path, model in self._models.items() if path in wanted.values()}
        for who, path in wanted.items():
            if path in self._models:
                continue
            yield ChatPiece(kind="state", text="loading the models")
            try:
                self._models[path] = ChatModel(path)
            except UserError as error:
                if who == "trained":
                    raise
                yield ChatPiece(kind="missing", who=who, text=error.problems[0].message)
        for who, history in asked.histories.items():
            if wanted[who] not in self._models:
                continue
            for text in self._models[wanted[who]].stream(history, options):
                if text:
                    yield ChatPiece(kind="text", who=who, text=text)
            yield ChatPiece(kind="end", who=who)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer every request until the input ends."""
    works: dict[str, Callable[[Any], Any]] = {
        "plan": plan,
        "outline": outline,
        "check": check_file,
        "rows": rows,
        "lengths": lengths,
        "chat": Chat(),
    }

    def answer(reply: Reply) -> None:
        answers.write(json.dumps(reply.model_dump()) + "\n")  # a file's text may hold what UTF-8 cannot
        answers.flush()

    for line in requests:
        try:
            asked = WORK.validate_python(json.loads(line))
            result = works[asked.work](asked)
            if isinstance(result, Iterator):
                for piece in result:
                    answer(Reply(kind="piece", value=piece))
                result = None
            answer(Reply(kind="result", value=result))
        except UserError as error:
            problems = [(problem.where, problem.message) for problem in error.problems]
            answer(Reply(kind="problems", value=problems))
        except Exception:  # noqa: BLE001 - the named boundary: the service logs it and answers with an error
            answer(Reply(kind="failed", value=traceback.format_exc()))


def main() -> None:
    """Keep the answers' channel apart from whatever libraries print."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
