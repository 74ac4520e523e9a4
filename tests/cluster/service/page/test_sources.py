"""The page's files against what they must agree with: the API's answers, the config's schema, each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

import cluster.service
from cluster.config.run import RunConfig
from cluster.service.api import datasets, results, runs

PAGE = Path(cluster.service.__file__).parent / "page"
SOURCES = sorted([*PAGE.glob("js/**/*.js"), *PAGE.glob("js/*.ts"), *PAGE.glob("css/*.css"), PAGE / "index.html"])
LINES_OF_A_FILE, LENGTH_OF_A_LINE = 400, 120


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_within_limits(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= LINES_OF_A_FILE
    if path.suffix in (".js", ".ts"):  # their formatter leaves templates and comments as they are
        assert [line for line in lines if len(line) > LENGTH_OF_A_LINE] == []


def answers() -> dict[str, set[str]]:
    """Fields by name of every answer in the OpenAPI."""
    app = FastAPI()
    for router in (datasets.router, runs.router, results.router):
        app.include_router(router)
    schemas = app.openapi()["components"]["schemas"]
    return {name: set(schema.get("properties", {})) for name, schema in schemas.items()}


def interfaces() -> dict[str, set[str]]:
    """Fields by name of the answers that types.d.ts declares."""
    text = (PAGE / "js" / "types.d.ts").read_text().partition("// What the OpenAPI leaves open.")[0]
    found = re.findall(r"^export interface (\w+) \{\n(.*?)^\}", text, flags=re.MULTILINE | re.DOTALL)
    return {name: set(re.findall(r"^  (\w+)\??:", body, flags=re.MULTILINE)) for name, body in found}


def test_the_pages_types_are_those_of_the_api() -> None:
    wanted = answers()
    declared = interfaces()
    assert {"RunDetails", "PlanAnswer", "QueuePlace"} <= set(declared)
    assert set(declared) - set(wanted) == set()
    assert {name: fields - wanted[name] for name, fields in declared.items() if fields - wanted[name]} == {}


def paths(root: dict[str, Any], node: dict[str, Any], at: str = "") -> Iterator[str]:
    """Every path of the config, sections too; of a list its items' without their number."""
    while "$ref" in node:
        node = root["$defs"][node["$ref"].split("/")[-1]]
    yield at
    for key, child in node.get("properties", {}).items():
        yield from paths(root, child, f"{at}.{key}".removeprefix("."))
    for child in [*node.get("anyOf", []), *node.get("oneOf", []), *([node["items"]] if "items" in node else [])]:
        yield from paths(root, child, at)


def test_every_label_is_of_a_setting_that_exists() -> None:
    root = RunConfig.model_json_schema()
    named = re.findall(r'^  (?:"([a-z_.0-9]+)"|(\w+)): "', (PAGE / "js" / "labels.js").read_text(), flags=re.MULTILINE)
    labels = {quoted or bare for quoted, bare in named}
    assert len(labels) > 50
    assert labels - set(paths(root, root)) == set()


def test_the_page_names_no_other_server() -> None:
    for path in SOURCES:
        found = re.findall(r"https?://(?!www\.w3\.org)[\w.-]+", path.read_text())
        assert set(found) <= {"http://judge"}, path.name  # an example in a form


def test_every_file_that_the_index_names_exists() -> None:
    named = re.findall(r'(?:href|src)="((?:vendor|css|js)/[^"]+|icon\.svg)"', (PAGE / "index.html").read_text())
    assert len(named) > 8
    assert [name for name in named if not (PAGE / name).is_file()] == []
