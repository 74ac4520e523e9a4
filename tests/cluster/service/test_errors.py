"""Every domain error comes out with its status and code, in the one form."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from cluster.runs.atomic_files import RunDirectoryError
from cluster.service import errors
from cluster.service.exceptions import (
    BusyError,
    ConflictError,
    DeadlineError,
    InternalError,
    InvalidConfigError,
    InvalidRequestError,
    MalformedError,
    NotFoundError,
    ServiceError,
    StorageError,
    TooLargeError,
    UnsupportedFormatError,
)
from trainers.errors import Problem, UserError

EXPECTED: list[tuple[Exception, int, str, str]] = [
    (MalformedError("m"), 400, "bad_request", "m"),
    (NotFoundError("m"), 404, "not_found", "m"),
    (ConflictError("m"), 409, "conflict", "m"),
    (TooLargeError("m"), 413, "too_large", "m"),
    (UnsupportedFormatError("m"), 415, "unsupported_media_type", "m"),
    (InvalidRequestError("m"), 422, "invalid_request", "m"),
    (InvalidConfigError([Problem("a", "b")]), 422, "invalid_config", "1 problem found"),
    (BusyError("m"), 429, "busy", "m"),
    (InternalError(), 500, "internal", "something is wrong with the service itself; its log says what"),
    (StorageError("m"), 500, "storage", "m"),
    (DeadlineError("m"), 503, "deadline", "m"),
    (UserError([Problem("a", "b"), Problem("c", "d")]), 422, "invalid_config", "2 problems found"),
    (RunDirectoryError("m"), 500, "storage", "m"),
    (KeyError("secret"), 500, "internal", "something is wrong with the service itself; its log says what"),
]


@pytest.mark.parametrize(("error", "status", "code", "message"), EXPECTED, ids=lambda value: type(value).__name__)
def test_an_error_has_one_status(error: Exception, status: int, code: str, message: str) -> None:
    app = FastAPI()
    errors.install(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    answer = TestClient(app, raise_server_exceptions=False).get("/")
    details = [
        {"path": p.where, "message": p.message} for p in getattr(error, "details", getattr(error, "problems", ()))
    ]
    assert answer.status_code == status
    assert answer.json() == {"error": {"code": code, "message": message, "details": details}}


def test_every_error_has_one() -> None:
    assert set(ServiceError.__subclasses__()) == {type(e) for e, *_ in EXPECTED if isinstance(e, ServiceError)}
