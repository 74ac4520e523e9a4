"""`/docs`: the API's description as a plain page that loads nothing from elsewhere and needs no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_METHODS = ("get", "post", "put", "delete")


def docs_page(openapi: Mapping[str, Any]) -> str:
    """HTML with every operation of an OpenAPI description."""
    body = "\n".join(_operations(openapi))
    title = escape(f"{openapi['info']['title']} {openapi['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"></head><body>'
        f"<h1>{title}</h1><p>{escape(openapi['info'].get('description', ''))}</p>"
        '<p>For programs: <a href="/openapi.json">/openapi.json</a></p>'
        f"<main>{body}</main></body></html>"
    )


def _operations(openapi: Mapping[str, Any]) -> Iterator[str]:
    for path, item in openapi["paths"].items():
        for method in _METHODS:
            if method in item:
                yield _operation(path, method, item[method])


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    text = escape(operation.get("description") or operation.get("summary", ""))
    rows = "".join(
        f"<tr><td><code>{escape(p['name'])}</code></td><td>{escape(p['in'])}</td>"
        f"<td>{escape(_accepts(p.get('schema', {})))}{', required' if p.get('required') else ''}</td></tr>"
        for p in operation.get("parameters", ())
    )
    table = f"<table><tr><th>parameter</th><th>in</th><th>takes</th></tr>{rows}</table>" if rows else ""
    kinds = ", ".join(operation.get("requestBody", {}).get("content", {}))
    body = f"<p>Body: {escape(kinds)}</p>" if kinds else ""
    return f"<section><h2><code>{method.upper()} {escape(path)}</code></h2><p>{text}</p>{table}{body}</section>"


def _accepts(schema: Mapping[str, Any]) -> str:
    """What a parameter takes, in a few words."""
    if "anyOf" in schema:
        return " or ".join(_accepts(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        return f"several of: {_accepts(schema.get('items', {}))}"
    return str(schema.get("const", schema.get("type", "anything")))
