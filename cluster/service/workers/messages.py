"""What the service and its worker processes send each other: one JSON line each, both ends with these types."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanWork(_Message):
    """The plan of a config."""

    work: Literal["plan"] = "plan"
    config: dict[str, Any]
    gpus: bool | None


class OutlineWork(_Message):
    """Folders that say what the models at some addresses are; `models` has the addresses by config key."""

    work: Literal["outline"] = "outline"
    models: dict[str, str]
    root: str


class CheckWork(_Message):
    """The report on one prompts file."""

    work: Literal["check"] = "check"
    path: str


class RowsWork(_Message):
    """Some rows of a prompts file."""

    work: Literal["rows"] = "rows"
    path: str
    count: int
    offset: int


class LengthsWork(_Message):
    """The report on a prompts file with its prompts' lengths in a model's tokens."""

    work: Literal["lengths"] = "lengths"
    path: str
    model: str
    root: str
    max_prompt_tokens: int


class ChatWork(_Message):
    """Replies to each history by the model of the same name: `trained`, `base`."""

    work: Literal["chat"] = "chat"
    models: dict[str, str]
    histories: dict[str, list[dict[str, str]]]
    max_tokens: int
    temperature: float
    system: str | None


Work: TypeAlias = PlanWork | OutlineWork | CheckWork | RowsWork | LengthsWork | ChatWork
WORK: TypeAdapter[Work] = TypeAdapter(Annotated[Work, Field(discriminator="work")])


class ChatPiece(_Message):
    """One event of a chat: a state while models are loaded, a piece of a reply, its end, or a model that is missing."""

    kind: Literal["state", "text", "end", "missing"]
    who: str = ""
    text: str = ""


class Reply(_Message):
    """One line of an answer: any number of pieces, then a result, problems of the user, or a failure of ours."""

    kind: Literal["piece", "result", "problems", "failed"]
    value: Any = None
