"""Storages of tensors moved to host memory and back, in place. It knows torch only.

Whatever an engine makes of its states (flat groups, views into them, fragments linked to parameters), all are views of
a few storages. A storage that is emptied and filled again stays the same object: every view of it is valid again, and
nothing has to be linked again. So one way works for every optimizer of DeepSpeed and for any model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_DEEPSPEED = "deepspeed."


class HostCopies:
    """The storages that are away from their device, and what was in them."""

    def __init__(self) -> None:
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._buffers: dict[int, Tensor] = {}  # by their order: pinning host memory takes longer than to copy

    def take(self, tensors: Iterable[Tensor], *, device: torch.device, keep: Iterable[Tensor] = ()) -> None:
        """Empty the storages of `tensors` that are on `device`, but not those of `keep`; a second time does nothing."""
        if self._away:
            return
        kept = {tensor.untyped_storage().data_ptr() for tensor in keep}
        taken: set[int] = {0}  # of an empty storage
        for tensor in tensors:
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if storage.device.type != device.type or place in kept or place in taken:
                continue
            taken.add(place)
            self._away.append((storage, self._copy(storage)))
        for storage, _ in self._away:
            storage.resize_(0)
        _release_cached(device)

    def restore(self) -> None:
        """Fill them again; nothing if none is away."""
        for storage, copy in self._away:
            storage.resize_(copy.numel())
            _bytes(storage).copy_(copy)
        self._away = []

    def _copy(self, storage: torch.UntypedStorage) -> Tensor:
        number = len(self._away)
        buffer = self._buffers.get(number)
        if buffer is None or buffer.numel() != storage.nbytes():
            buffer = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
            self._buffers[number] = buffer
        return buffer.copy_(_bytes(storage))


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _release_cached(device: torch.device) -> None:
    """What is free goes back to the device: another process wants it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def tensors_of(states: Any) -> Iterator[Tensor]:
    """Every tensor in an optimizer: in its attributes, in containers, in the records and optimizers that it wraps; with
    gradients. Modules are left out: their weights are theirs."""
    seen: set[int] = set()
    waiting = [states]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
            if thing.is_leaf and thing.grad is not None:
                waiting.append(thing.grad)
        elif isinstance(thing, Mapping):
            waiting.extend(thing.values())
        elif isinstance(thing, list | tuple | set):
            waiting.extend(thing)
        elif thing is states or isinstance(thing, torch.optim.Optimizer) or _is_record(thing):
            waiting.extend(vars(thing).values())


def _is_record(thing: Any) -> bool:
    """A dataclass of DeepSpeed's: a bucket of gradients."""
    return type(thing).__module__.startswith(_DEEPSPEED) and hasattr(type(thing), "__dataclass_fields__")


def weights_of(module: torch.nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and the parts that ZeRO-3 keeps of them."""
    for parameter in module.parameters():
        yield parameter.data
        if (part := getattr(parameter, "ds_tensor", None)) is not None:
            yield part
    yield from module.buffers()
