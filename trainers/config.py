"""The base of every config class: frozen, unknown keys refused. It knows pydantic only.

Each layer defines its own config beside what it configures; `cluster/config.py` composes them.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen section of the config tree; validators refuse, they never rewrite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
