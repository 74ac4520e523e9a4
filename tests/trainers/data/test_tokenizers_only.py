"""A process without torch in transformers: the same tokens, and no torch until somebody asks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.tiny_models import make_tokenizer

pytestmark = pytest.mark.integration

ENCODE = """
import json, os, sys
from trainers.data.chat import ChatEncoder
from trainers.types import Prompt
encoder = ChatEncoder.load(sys.argv[1])
prompts = [Prompt(messages=({"role": "user", "content": text},), source="t", line=1) for text in ("1+1=", "é ↯", "")]
tokens = [encoder.encode(prompt) for prompt in prompts] + [encoder.encode_response("2")]
loaded = "torch" in sys.modules
import torch
quiet = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
print(json.dumps([tokens, loaded, int(torch.tensor([1, 2]).sum()), quiet]))
"""


def encode(folder: Path, *, first: str = "") -> tuple[list[object], str]:
    environment = {name: v for name, v in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    done = subprocess.run(
        [sys.executable, "-c", first + ENCODE, str(folder)], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout), done.stderr


def test_the_tokens_are_those_of_a_process_with_torch(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    light, told = encode(tmp_path, first="from trainers.data.tokenizers_only import import_tokenizers as f; f(); f()\n")
    full, _ = encode(tmp_path)
    assert light == [full[0], False, 3, None]
    assert full[1] is True
    assert "PyTorch" not in told
