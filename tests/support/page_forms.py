"""What tests do with the form of a new run again and again."""

from __future__ import annotations

import json
from pathlib import Path

from playwright.sync_api import Page

PROMPTS = "".join(json.dumps({"prompt": f"Write haiku number {i}."}) + "\n" for i in range(30))


def file(tmp_path: Path, name: str, content: str) -> Path:
    path = tmp_path / name
    path.write_text(content)
    return path


def upload(page: Page, path: Path) -> None:
    page.locator("input[type=file]").set_input_files(path)


def drafted(page: Page, section: str, wanted: object) -> None:
    """Wait until the draft's section is this; it is stored after it is shown."""
    same = """([name, text]) => JSON.stringify(JSON.parse(sessionStorage.getItem("rlhf-draft")).tree[name]) === text"""
    page.wait_for_function(same, arg=[section, json.dumps(wanted, separators=(",", ":"))])
