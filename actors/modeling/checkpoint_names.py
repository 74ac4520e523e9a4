"""A model's tensors under the names, and in the shapes, of its checkpoint. It knows transformers, no engine.

transformers 5 renames, joins and cuts weights as it loads them (a mixture's experts become one tensor), so that a
module's names are not those of the file. vLLM's loaders know the file's, so these are what travels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)


class CheckpointNames:
    """What loading did to a model's weights, undone: what `save_pretrained` would write."""

    def __init__(self, model: Any) -> None:
        loaded = vars(model).get("_weight_conversions")
        if loaded is None:  # not made by `from_pretrained`: what would have been done, see `revert_weight_conversion`
            mapping = get_model_conversion_mapping(model, add_legacy=False)
            used = [conversion for conversion in mapping if not isinstance(conversion, PrefixChange)]
        else:  # under ZeRO-3 transformers also keeps those that no tensor met, and would revert them
            used = [conversion for conversion in loaded if conversion.was_used()]
        model._weight_conversions = used
        self._model = model
        reverse = [conversion.reverse_transform() for conversion in used[::-1]]
        self._renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]

    def together(self, names: Iterable[str]) -> list[list[str]]:
        """The module's names in groups: the tensors of a group are converted together, independently of all others."""
        groups: dict[str, list[str]] = {}
        for name in names:
            target, _ = rename_source_key(name, self._renamings, self._converters, reverse=True)
            groups.setdefault(target, []).append(name)
        return list(groups.values())

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors of a group's, which share their memory where that is possible; on any device, also
        `meta`, for names and shapes alone."""
        return dict(revert_weight_conversion(self._model, dict(tensors)))
