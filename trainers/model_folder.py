"""What a model's name means, and what the small files of its folder contain, before anything is loaded.

It reads `config.json`, the tokenizer's config and names of files; never weights, and it imports neither torch nor
transformers, so that every layer can ask it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
LARGEST_JSON = 16 << 20  # bytes; a configuration has a few thousand
_DEFAULT_LABELS = 2  # transformers' own, for a classifier's config.json without a number
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


def is_hub_id(name: str) -> bool:
    """Whether a name can be the id of a model on the hub.

    >>> is_hub_id("org/model"), is_hub_id("gpt2"), is_hub_id("/models/policy"), is_hub_id("a/b/c")
    (True, True, False, False)
    """
    return _HUB_ID.fullmatch(name) is not None


def is_path(name: str, base: Path) -> bool:
    """Whether a model's name means a folder, counted from `base`, and not a model on the hub.

    It does if it exists, if it is written as a path (/, ./, ../, ~/), or if it cannot be an id on the hub: it has more
    than one slash, or its first part is a folder.

    >>> is_path("./policy", Path()), is_path("a/b/c", Path()), is_path("org/model", Path("/nowhere"))
    (True, True, False)
    """
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        return True
    return os.path.exists(base / name) or ("/" in name and os.path.isdir((base / name).parent))


def read_json(file: Path, *, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """The object in a JSON file. ValueError names the file."""
    try:
        if file.stat().st_size > largest:
            raise ValueError(f"{file} is larger than any model's")
        found = json.loads(file.read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return found


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of its own."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def has_weights(folder: Path) -> bool:
    """Whether a folder has weights in the one format that cannot run code."""
    return any(folder.glob("*.safetensors"))


def has_chat_template(folder: Path) -> bool:
    """Whether a folder's tokenizer has a chat template."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The folder of a complete model, by its `config.json`."""

    path: Path
    config: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> ModelFolder:
        """The folder at `path`. ValueError if it has no config.json that can be read."""
        if not (path / CONFIG).is_file():
            raise ValueError(f"{path} has no {CONFIG}, so it is not a Hugging Face model")
        return cls(path, read_json(path / CONFIG))

    @property
    def architectures(self) -> tuple[str, ...]:
        """The classes that the model was saved from."""
        names = self.config.get("architectures")
        return tuple(map(str, names)) if isinstance(names, list) else ()

    @property
    def sizes(self) -> Mapping[str, Any]:
        """The config with the sizes of the language model; one that sees images too has them in a section."""
        text = self.config.get("text_config")
        return {**self.config, **text} if isinstance(text, dict) else self.config

    @property
    def is_classifier(self) -> bool:
        """Whether it is a sequence-classification checkpoint, as reward models are."""
        return any(name.endswith("ForSequenceClassification") for name in self.architectures)

    @property
    def labels(self) -> int:
        """Outputs of a classifier."""
        id2label, number = self.config.get("id2label"), self.config.get("num_labels")
        if isinstance(id2label, dict):
            return len(id2label)
        return number if isinstance(number, int) else _DEFAULT_LABELS

    @property
    def needs_own_code(self) -> bool:
        """Whether loading it would run code from the folder, which is refused."""
        return "auto_map" in self.config
