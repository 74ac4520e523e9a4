"""Models in stores that are really fsspec's, and a store that breaks off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import save

CAUSAL = {"architectures": ["Qwen3ForCausalLM"], "dtype": "float32", "vocab_size": 257, "max_position_embeddings": 128}
TENSORS = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float32)}


class Torn(MemoryFileSystem):
    """A store whose large files break off while they are read, as long as `broken` is set."""

    protocol = "torn"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    broken = True

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("torn://", "memory://")))

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "r" in mode and path.endswith(".safetensors") and type(self).broken:
            raise ConnectionResetError("the store hung up")
        return super().open(path, mode, **options)


class Refusing(MemoryFileSystem):
    """A store that refuses, as drivers do, with an error of its own kind."""

    protocol = "refusing"

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        raise PermissionError("403 Forbidden")


fsspec.register_implementation("torn", Torn, clobber=True)
fsspec.register_implementation("refusing", Refusing, clobber=True)


def put(address: str, files: dict[str, bytes | str | dict[str, Any]]) -> str:
    """Files in a folder of a store; a dict is JSON."""
    filesystem, path = fsspec.core.url_to_fs(address)
    filesystem.makedirs(path, exist_ok=True)
    for name, content in files.items():
        text = json.dumps(content) if isinstance(content, dict) else content
        filesystem.pipe_file(f"{path}/{name}", text.encode() if isinstance(text, str) else text)
    return address


def put_model(address: str, **changes: Any) -> str:
    """A small model with weights and no tokenizer that could be loaded."""
    files = {"config.json": {**CAUSAL, **changes}, "model.safetensors": save(TENSORS), "tokenizer.json": "{}"}
    return put(address, {**files, "tokenizer_config.json": {"chat_template": "{{ messages }}"}})


def upload(folder: Path, address: str) -> str:
    """A local folder's files, in a store."""
    return put(address, {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()})
