"""The chat's work, with a real model: what is said, and what where the base is not there any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.service.workers.main import Chat
from trainers.errors import UserError
from trainers.tiny_models import make_random_policy

SAID = [{"role": "user", "content": "1+1="}]


def ask(chat: Chat, trained: Path, base: Path) -> list[dict[str, Any]]:
    models = {"trained": str(trained), "base": str(base)}
    options = {"max_tokens": 3, "temperature": 0.0, "system": None}
    return list(chat({"models": models, "histories": dict.fromkeys(models, SAID), **options}))


def test_the_trained_model_answers_alone_where_its_base_is_gone(tmp_path: Path) -> None:
    make_random_policy(tmp_path / "model", layers=1, hidden=64)
    chat, gone = Chat(), tmp_path / "gone"
    pieces = ask(chat, tmp_path / "model", gone)
    (missing,) = [piece for piece in pieces if "missing" in piece]
    assert missing["who"] == "base"
    assert "no model to chat with could be loaded" in missing["missing"]
    assert [piece["who"] for piece in pieces if piece.get("end")] == ["trained"]
    both = ask(chat, tmp_path / "model", tmp_path / "model")
    assert [piece["who"] for piece in both if piece.get("end")] == ["trained", "base"]
    said = {who: "".join(p["text"] for p in both if p["who"] == who and "text" in p) for who in ("trained", "base")}
    assert said["trained"] == said["base"] == "".join(p["text"] for p in pieces if "text" in p)
    assert said["trained"]


def test_without_the_trained_model_there_is_nothing_to_talk_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model to chat with"):
        ask(Chat(), tmp_path / "gone", tmp_path / "gone")
