"""Every answer that is not a success: one form, whatever went wrong, and the one place where errors get their status.

`{"error": {"code", "message", "details": [{"path", "message"}]}}`; causes that are ours are logged and never shown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from cluster.config.field_errors import field_errors
from cluster.config.run import problems_as_json
from cluster.runs.atomic_files import RunDirectoryError
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
    printable,
)
from trainers.errors import Problem, UserError

logger = logging.getLogger(__name__)

_CODES = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
}


_STATUS: Mapping[type[ServiceError], int] = {
    MalformedError: 400,
    NotFoundError: 404,
    ConflictError: 409,
    TooLargeError: 413,
    UnsupportedFormatError: 415,
    InvalidRequestError: 422,
    InvalidConfigError: 422,
    BusyError: 429,
    InternalError: 500,
    StorageError: 500,
    DeadlineError: 503,
}


class ApiError(HTTPException):
    """An answer that is not a success, of a check that is about HTTP itself."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code

    def answer(self) -> JSONResponse:
        """As it is sent."""
        return _answer(self.status_code, self.code, str(self.detail), headers=self.headers)


def _answer(
    status: int,
    code: str,
    message: str,
    details: Iterable[Problem] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    body = {"error": {"code": code, "message": printable(message), "details": _printable(details)}}
    return JSONResponse(body, status, dict(headers or {}))


def _printable(details: Iterable[Problem]) -> list[dict[str, str]]:
    return [{key: printable(value) for key, value in one.items()} for one in problems_as_json(details)]


async def _http(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, ApiError):
        return error.answer()
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "bad_request" if error.status_code < 500 else "internal")
    return _answer(error.status_code, code, str(error.detail), headers=error.headers)


async def _service(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return _answer(_STATUS[type(error)], error.code, error.message, error.details)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [Problem(item.path, item.message) for item in field_errors(error.errors())]
    return _answer(422, "invalid_request", "the request's parameters or body are not as expected", found)


async def _user(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UserError)
    return await _service(request, InvalidConfigError(error.problems))


async def _storage(request: Request, error: Exception) -> JSONResponse:
    logger.error("storage: %s", error)
    return await _service(request, StorageError(str(error)))


async def _internal(request: Request, _: Exception) -> JSONResponse:
    return await _service(request, InternalError())


def install(app: FastAPI) -> None:
    """Make every failure of the app come out in the one form."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ServiceError, _service)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(UserError, _user)
    app.add_exception_handler(RunDirectoryError, _storage)
    app.add_exception_handler(Exception, _internal)
