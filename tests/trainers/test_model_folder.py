"""What a model's name means and what its folder's small files contain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainers.model_folder import ModelFolder, has_chat_template, is_hub_id, is_path, read_json


@pytest.mark.parametrize(
    ("name", "path", "hub"),
    [
        ("org/model", False, True),
        ("model", False, True),
        ("here", True, True),  # a folder of that name is meant
        ("org/here", False, True),
        ("here/model", True, True),  # its first part is a folder
        ("/models/policy", True, False),
        ("./model", True, False),
        ("../model", True, False),
        ("~/model", True, False),
        ("~nobody/model", True, False),
        ("a/b/c", True, False),
        ("org/mödel", False, False),
        ("x" * 97, False, False),
        ("a\0b", False, False),
    ],
)
def test_a_name_means_a_folder_or_can_be_an_id(tmp_path: Path, name: str, path: bool, hub: bool) -> None:
    (tmp_path / "here").mkdir()
    assert (is_path(name, tmp_path), is_hub_id(name)) == (path, hub)


@pytest.mark.parametrize(
    ("config", "labels", "classifier"),
    [
        ({"architectures": ["A", "QwenForSequenceClassification"], "num_labels": 1}, 1, True),
        ({"architectures": ["QwenForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}, 3, True),
        ({"architectures": ["QwenForCausalLM"]}, 2, False),
        ({"architectures": "none", "num_labels": "many"}, 2, False),
    ],
)
def test_what_a_config_contains(tmp_path: Path, config: dict[str, Any], labels: int, classifier: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = ModelFolder.read(tmp_path)
    assert (folder.labels, folder.is_classifier, folder.needs_own_code) == (labels, classifier, False)


def test_sizes_are_those_of_the_language_model() -> None:
    folder = ModelFolder(Path(), {"hidden_size": 8, "text_config": {"hidden_size": 4, "vocab_size": 2}})
    assert (folder.sizes["hidden_size"], folder.sizes["vocab_size"]) == (4, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "does not hold a JSON object"), ("{", "cannot be read"), ("\xff", "cannot be read"), ("[" * 200_000, "")],
)
def test_a_file_that_is_not_an_object_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=f"config.json {message}"):
        ModelFolder.read(tmp_path)
    with pytest.raises(ValueError, match="larger than any model's"):
        read_json(tmp_path / "config.json", largest=0)


def test_a_folder_without_a_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json, so it is not a Hugging Face model"):
        ModelFolder.read(tmp_path)


def test_a_chat_template_is_a_file_or_in_the_tokenizers_config(tmp_path: Path) -> None:
    assert not has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    assert has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert not has_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x")
    assert has_chat_template(tmp_path)
