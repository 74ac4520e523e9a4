"""Every answer that is no success: one form, whatever went wrong.

`{"error": {"code", "message", "details": [{"path", "message"}]}}`; causes that are ours are logged and never shown.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from cluster.config.run import problems_as_json
from cluster.runs.atomic_files import RunDirectoryError
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
    """Every answer that is no success."""

    error: ErrorBody


class ApiError(HTTPException):
    """An answer that is no success, raised where it is found."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: Iterable[Problem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.details = tuple(details)

    def answer(self) -> JSONResponse:
        """As it is sent."""
        return _answer(self.status_code, self.code, str(self.detail), self.details, self.headers)


def not_found(what: str) -> ApiError:
    """404, naming what there is not."""
    return ApiError(404, "not_found", what)


def invalid_config(problems: Iterable[Problem]) -> ApiError:
    """422 with every problem of a config."""
    found = tuple(problems)
    return ApiError(422, "invalid_config", f"{len(found)} problem{'' if len(found) == 1 else 's'} found", details=found)


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


def printable(text: str) -> str:
    """Text that UTF-8 can hold: a lone surrogate from a client's JSON is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


async def _http(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, ApiError):
        return error.answer()
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "bad_request" if error.status_code < 500 else "internal")
    return _answer(error.status_code, code, str(error.detail), headers=error.headers)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [Problem(".".join(str(part) for part in item["loc"]), str(item["msg"])) for item in error.errors()]
    return _answer(422, "invalid_request", "the request's parameters or body are not as expected", found)


async def _user(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, UserError)
    return invalid_config(error.problems).answer()


async def _storage(_: Request, error: Exception) -> JSONResponse:
    logger.error("storage: %s", error)
    return _answer(500, "storage", str(error))


async def _internal(_: Request, error: Exception) -> JSONResponse:
    return _answer(500, "internal", "something is wrong with the service itself; its log says what")


def install(app: FastAPI) -> None:
    """Make every failure of the app come out in the one form."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(UserError, _user)
    app.add_exception_handler(RunDirectoryError, _storage)
    app.add_exception_handler(Exception, _internal)
