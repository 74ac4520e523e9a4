"""The `data` section: defaults, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from trainers.data.config import DataConfig


def test_the_smallest_section_is_enough() -> None:
    config = DataConfig(prompts="prompts.jsonl")
    assert (config.max_prompt_tokens, config.overlong, config.shuffle) == (1024, "error", True)
    assert not config.skip_invalid
    assert not config.strip_responses


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"weights": [1.0]}, "1 given for 2 entries"),
        ({"weights": [1.0, 0.0]}, "above 0"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"overlong": "truncate"}, "filter"),
        ({"max_prompt_tokens": 0}, "greater"),
        ({"prompt": "x"}, "Extra"),
    ],
)
def test_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        DataConfig(**({"prompts": ["a.jsonl", "b.jsonl"]} | keys))


def test_every_key_has_a_help_text() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())
