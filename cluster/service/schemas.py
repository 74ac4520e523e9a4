"""The typed answers of the API, for its OpenAPI; what they mean is in docs/service.md."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.jobs.ray_cluster import Resource
from cluster.models.catalog import FoundModel
from cluster.service.run_view import Action, Run


class Detail(BaseModel):
    """One field that is wrong."""

    path: str
    message: str


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str
    message: str
    details: list[Detail] = []


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorBody


class Health(BaseModel):
    """Whether the service is there."""

    status: Literal["ok"] = "ok"
    version: str
    token_required: bool


class RewardFunction(BaseModel):
    """A function that a config may name."""

    path: str
    name: str
    doc: str


class ServiceInfo(BaseModel):
    """What the operator allows."""

    version: str
    root: str
    model_roots: list[str]
    data_roots: list[str]
    upload_limit_bytes: int
    max_concurrent_runs: int | None
    reward_functions: list[RewardFunction]
    chat: bool = True


class Waiting(BaseModel):
    """A run in the queue."""

    id: str
    position: int
    reason: str


class ClusterInfo(BaseModel):
    """The cluster and its queue."""

    state: str
    message: str | None
    address: str | None
    nodes: int
    resources: dict[str, Resource]
    running: list[str]
    queue: list[Waiting]


class PlanAnswer(BaseModel):
    """A run before it starts, and everything that is wrong with it."""

    config: dict[str, Any] | None
    problems: list[Detail]
    warnings: list[Detail] = []
    """What is allowed and probably not intended; empty if there is no plan."""
    arithmetic: list[str]
    gpus: bool | None
    roles: list[dict[str, Any]]
    memory: list[dict[str, Any]]
    yaml: str | None
    command: str
    changes: list[dict[str, Any]] | None = None


class DatasetAnswer(BaseModel):
    """An uploaded file and the report on it."""

    model_config = ConfigDict(extra="allow")

    id: str
    name: str
    path: str
    bytes: int
    created: str
    file: str
    format: str
    ready: bool
    records: int
    duplicates: int
    problems_total: int
    advice: str | None = None


class DatasetList(BaseModel):
    """A page of datasets."""

    datasets: list[DatasetAnswer]
    total: int
    next: str | None


class LengthCounts(BaseModel):
    """A histogram of prompt lengths, chat template included."""

    limit: int
    longest: int
    over_limit: int
    histogram: list[dict[str, int]]


class LengthsReport(BaseModel):
    """The report on a prompts file that was read with a tokenizer; `lengths` is null if it was not read to its end."""

    lengths: LengthCounts | None = None
    problems: list[dict[str, Any]]
    problems_total: int


class LengthsAnswer(BaseModel):
    """Prompt lengths in a model's tokens."""

    limit: int
    longest: int
    over_limit: int
    histogram: list[dict[str, int]]
    problems: list[dict[str, Any]]
    problems_total: int


class ModelList(BaseModel):
    """The models that were found."""

    models: list[FoundModel]
    roots: list[str]
    truncated: bool
    problems: list[str]
    """Of roots in stores that do not answer, or have not yet."""


class RunAnswer(BaseModel):
    """One run."""

    run: Run


class RunList(BaseModel):
    """A page of runs."""

    runs: list[Run]
    total: int
    next: str | None
    counts: dict[str, int]


class CheckpointInfo(BaseModel):
    """A checkpoint that a resume can continue from."""

    step: int
    bytes: int


class ModelFiles(BaseModel):
    """The trained model."""

    bytes: int
    files: int


class RunDetails(BaseModel):
    """A run with the contents of its directory."""

    run: Run
    config: dict[str, Any] | None
    yaml: str | None
    command: str
    actions: list[Action]
    path: str
    steps_recorded: int
    metrics: dict[str, Any] | None
    metrics_problem: str | None
    checkpoints: list[CheckpointInfo]
    model: ModelFiles | None
    step_s: float | None
    remaining_s: float | None
    samples: dict[str, list[int]]


class Clone(BaseModel):
    """How a clone differs."""

    model_config = ConfigDict(extra="forbid")

    changes: dict[str, Any] = Field(default={}, max_length=200)
    name: str | None = None


class Turn(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=100_000)


History = Annotated[list[Turn], Field(min_length=1, max_length=200)]


class ChatRequest(BaseModel):
    """A conversation with a trained model, and another with its base."""

    model_config = ConfigDict(extra="forbid")

    trained: History
    base: History | None = None
    max_tokens: int = Field(default=256, ge=1, le=4096)
    temperature: float = Field(default=1.0, ge=0, le=10, allow_inf_nan=False)
    system: str | None = Field(default=None, max_length=100_000)


class Ticket(BaseModel):
    """A link that downloads the model once."""

    url: str
    seconds: int


class LogEntry(BaseModel):
    """One log file."""

    name: str
    bytes: int
    modified: str


class LogAnswer(BaseModel):
    """The log files, and the end of one where it is asked for."""

    files: list[LogEntry]
    file: str | None = None
    lines: list[str] | None = None
    truncated: bool | None = None
