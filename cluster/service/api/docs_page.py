"""`/docs`: the API's description as a plain page that loads nothing from elsewhere and needs no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from pydantic import BaseModel, Field

_METHODS = ("get", "post", "put", "delete")


class _Schema(BaseModel):
    """What a parameter takes, as far as the page shows it."""

    any_of: list[_Schema] = Field(default=[], alias="anyOf")
    enum: list[Any] = []
    type: str | None = None
    const: Any = None
    items: _Schema | None = None


class _Parameter(BaseModel):
    name: str
    place: str = Field(alias="in")
    required: bool = False
    takes: _Schema = Field(default=_Schema(), alias="schema")


class _Body(BaseModel):
    content: dict[str, Any] = {}


class _Operation(BaseModel):
    summary: str = ""
    description: str = ""
    parameters: list[_Parameter] = []
    body: _Body = Field(default=_Body(), alias="requestBody")


class _Info(BaseModel):
    title: str
    version: str
    description: str = ""


class _OpenApi(BaseModel):
    info: _Info
    paths: dict[str, dict[str, Any]]


def docs_page(openapi: Mapping[str, Any]) -> str:
    """HTML with every operation of an OpenAPI description."""
    api = _OpenApi.model_validate(openapi)
    body = "\n".join(_operations(api.paths))
    title = escape(f"{api.info.title} {api.info.version}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"></head><body>'
        f"<h1>{title}</h1><p>{escape(api.info.description)}</p>"
        '<p>For programs: <a href="/openapi.json">/openapi.json</a></p>'
        f"<main>{body}</main></body></html>"
    )


def _operations(paths: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for path, item in paths.items():
        for method in _METHODS:
            if method in item:
                yield _operation(path, method, _Operation.model_validate(item[method]))


def _operation(path: str, method: str, operation: _Operation) -> str:
    text = escape(operation.description or operation.summary)
    rows = "".join(
        f"<tr><td><code>{escape(p.name)}</code></td><td>{escape(p.place)}</td>"
        f"<td>{escape(_accepts(p.takes))}{', required' if p.required else ''}</td></tr>"
        for p in operation.parameters
    )
    table = f"<table><tr><th>parameter</th><th>in</th><th>takes</th></tr>{rows}</table>" if rows else ""
    kinds = ", ".join(operation.body.content)
    body = f"<p>Body: {escape(kinds)}</p>" if kinds else ""
    return f"<section><h2><code>{method.upper()} {escape(path)}</code></h2><p>{text}</p>{table}{body}</section>"


def _accepts(schema: _Schema) -> str:
    """What a parameter takes, in a few words."""
    if schema.any_of:
        return " or ".join(_accepts(part) for part in schema.any_of if part.type != "null")
    if schema.enum:
        return ", ".join(map(str, schema.enum))
    if schema.type == "array":
        return f"several of: {_accepts(schema.items or _Schema())}"
    return str(schema.const if schema.const is not None else schema.type or "anything")
