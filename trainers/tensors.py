"""What the mathematics modules share: argument checks, masking without the 0 · NaN trap, and bounded blocks.

It knows torch only. Per-token quantities are computed in float64: `[T]` is small beside the `[T, V]` of the
logits, and sums then do not depend on the order of samples or on where a micro-batch ends. What is as wide as the
vocabulary is computed in `compute_dtype`, one block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of the vocabulary-wide arrays held at once: 16 MiB of float32. Small enough that a handful of temporaries
# vanish beside any model, large enough that a GPU kernel over them outlasts its launch (28 rows of a 150k vocabulary).
BLOCK_ELEMENTS = 1 << 22


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_same_shape(**tensors: Tensor) -> None:
    """Raises ValueError, naming every argument and its shape, unless all shapes are equal (no broadcasting)."""
    if len({t.shape for t in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"shapes differ: {shapes}; give all the same shape (nothing is broadcast)")


def as_mask(mask: Tensor, *, name: str = "mask") -> Tensor:
    """The mask as booleans; integers count as True where not 0, floating point is refused (it may be weights)."""
    require(not mask.is_floating_point() and not mask.is_complex(), f"{name} is {mask.dtype}; give booleans")
    return mask.bool()


def require_ids(ids: Tensor, *, name: str, size: int | None = None) -> None:
    """Raises ValueError unless `ids` are integers and, where `size` is given, in 0 … size − 1."""
    integers = not ids.is_floating_point() and not ids.is_complex() and ids.dtype != torch.bool
    require(integers, f"{name} is {ids.dtype}; give integers (int64)")
    if size is not None and ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        require(low >= 0 and high < size, f"{name} ranges from {low} to {high}; must be in 0 … {size - 1}")


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in float64 with 0 under False; as the first operation it keeps NaN there out of values and gradients."""
    return torch.where(mask, x.double(), 0.0)


def without_gradient_beside_nonfinite(x: Tensor, *others: Tensor) -> Tensor:
    """`x` in float64, its gradient 0 wherever it or another argument is NaN or infinite.

    The values stay, so that a NaN under True shows in the loss. What an aggregation masks out sends back a gradient
    of 0, and without this 0 · NaN would reach the model's weights.
    """
    x = x.double()
    finite = torch.isfinite(x)
    for other in others:
        finite = finite & torch.isfinite(other)
    return torch.where(finite, x, x.detach())


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any argument is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def log_softmax(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """The log-softmax over the last dimension of logits / temperature, computed and returned in `dtype`."""
    scaled = logits.to(dtype) if temperature == 1 else logits.to(dtype) / temperature
    return scaled.log_softmax(dim=-1)


def blocks(shape: torch.Size, width: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cover the leading dimensions `shape` in blocks of at most BLOCK_ELEMENTS, `width` a position.

    Each indexes a view of a tensor `[*shape, width]`, whatever its strides, so that nothing is copied to be flattened.
    A block holds at least one position.
    """
    if not shape:
        yield ()
        return
    size = math.prod(shape[1:]) * width
    if size <= BLOCK_ELEMENTS or len(shape) == 1:
        step = max(1, BLOCK_ELEMENTS // max(size, 1))
        yield from ((slice(start, start + step),) for start in range(0, shape[0], step))
    else:
        yield from ((i, *rest) for i in range(shape[0]) for rest in blocks(shape[1:], width))
