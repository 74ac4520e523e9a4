"""The chat's work, with a real model: what is said, and what where the base is not there any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.service.workers.main import Chat
from cluster.service.workers.messages import ChatPiece, ChatWork
from trainers.errors import UserError
from trainers.tiny_models import make_random_policy

SAID = [{"role": "user", "content": "1+1="}]


def ask(chat: Chat, trained: Path, base: Path) -> list[ChatPiece]:
    models = {"trained": str(trained), "base": str(base)}
    histories = dict.fromkeys(models, SAID)
    return list(chat(ChatWork(models=models, histories=histories, max_tokens=3, temperature=0.0, system=None)))


def text(pieces: list[ChatPiece], who: str) -> str:
    return "".join(piece.text for piece in pieces if (piece.kind, piece.who) == ("text", who))


def test_the_trained_model_answers_alone_where_its_base_is_gone(tmp_path: Path) -> None:
    make_random_policy(tmp_path / "model", layers=1, hidden=64)
    chat, gone = Chat(), tmp_path / "gone"
    pieces = ask(chat, tmp_path / "model", gone)
    (missing,) = [piece for piece in pieces if piece.kind == "missing"]
    assert missing.who == "base"
    assert "no model to chat with could be loaded" in missing.text
    assert [piece.who for piece in pieces if piece.kind == "end"] == ["trained"]
    both = ask(chat, tmp_path / "model", tmp_path / "model")
    assert [piece.who for piece in both if piece.kind == "end"] == ["trained", "base"]
    assert text(both, "trained") == text(both, "base") == text(pieces, "trained") != ""


def test_without_the_trained_model_there_is_nothing_to_talk_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model to chat with"):
        ask(Chat(), tmp_path / "gone", tmp_path / "gone")
