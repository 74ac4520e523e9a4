"""What several tests do with the form of a new run."""

from __future__ import annotations

import json
from pathlib import Path

from playwright.sync_api import Page

PROMPTS = "".join(json.dumps({"prompt": f"Write haiku number {i}."}) + "\n" for i in range(30))
# 24 MB in few lines: more than a socket's buffers take in at once, and checked in half a second.
LARGE = "".join(json.dumps({"prompt": f"{i} {'x' * 40_000}"}) + "\n" for i in range(600))


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
