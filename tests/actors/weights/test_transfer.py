"""Digests, their comparison, and the packing of tensors for the object store."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.weights import transfer as weights
from actors.weights.transfer import WeightSyncError, compare_digests, pack_chunk, tensor_digest, unpack_chunk

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """All bit patterns, NaN and infinities included."""
    size = torch.empty((), dtype=dtype).element_size()
    count = int(np.prod(shape, dtype=int))
    raw = np.random.default_rng(seed).integers(0, 256, size * count, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def exact_digest(tensor: torch.Tensor) -> tuple[int, int]:
    """Both sums in Python's unbounded integers, of the elements' bits as signed integers (one byte: unsigned)."""
    size = tensor.element_size()
    raw = bytes(bits(tensor))
    elements = [int.from_bytes(raw[i : i + size], "little", signed=size > 1) for i in range(0, len(raw), size)]
    return sum(elements) % 2**64, sum(i * e for i, e in enumerate(elements, 1)) % 2**64


@pytest.mark.parametrize("dtype", DTYPES)
def test_digest_is_the_sum_and_the_weighted_sum_of_the_bits(dtype: torch.dtype) -> None:
    tensor = random_tensor(dtype, (5, 7), seed=1)
    kind, plain, weighted = tensor_digest(tensor).split(":")
    assert kind == f"{str(dtype)[6:]}[5x7]"
    assert (int(plain, 16), int(weighted, 16)) == exact_digest(tensor)


@settings(deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_digest_sees_any_changed_bit(data: st.DataObject, dtype: torch.dtype, rows: int, columns: int) -> None:
    tensor = random_tensor(dtype, (rows, columns), seed=data.draw(st.integers(0, 99)))
    changed = tensor.clone()
    raw = changed.view(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    assert tensor_digest(changed) != tensor_digest(tensor)


@settings(deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), count=st.integers(2, 40))
def test_digest_sees_any_swap(data: st.DataObject, dtype: torch.dtype, count: int) -> None:
    tensor = random_tensor(dtype, (count,), seed=data.draw(st.integers(0, 99)))
    i = data.draw(st.integers(0, count - 1))
    j = data.draw(st.integers(0, count - 1))
    swapped = tensor.clone()
    swapped[i], swapped[j] = tensor[j], tensor[i]
    assert (tensor_digest(swapped) == tensor_digest(tensor)) == (bits(swapped) == bits(tensor))


def test_digest_sees_shape_and_type() -> None:
    zeros = torch.zeros(2, 6)
    others = [torch.zeros(6, 2), torch.zeros(12), torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, 6).bfloat16()]
    others += [torch.zeros(2, 6).half(), torch.zeros(2, 6, dtype=torch.int8), torch.zeros(0)]
    assert len({tensor_digest(t) for t in (zeros, *others)}) == 8


def test_digest_reads_values_not_memory() -> None:
    """A transposed view has the digest of its contiguous copy; gradients and neighbours don't matter."""
    tensor = torch.randn(4, 6, requires_grad=True)
    assert tensor_digest(tensor.T) == tensor_digest(tensor.T.contiguous()) != tensor_digest(tensor)
    assert tensor_digest(tensor[1:3, ::2]) == tensor_digest(tensor[1:3, ::2].detach().clone())


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_digest_is_independent_of_its_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    tensor = random_tensor(torch.bfloat16, (8, 8), seed=2)
    whole = tensor_digest(tensor)
    monkeypatch.setattr(weights, "_DIGEST_CHUNK", chunk)
    assert tensor_digest(tensor) == whole


def test_digest_of_a_tensor_of_several_chunks() -> None:
    """5 · 2^20 ones of int8 in chunks of 2^22: the sums are n and n(n+1)/2."""
    n = 5 << 20
    assert tensor_digest(torch.ones(n, dtype=torch.int8)) == f"int8[{n}]:{n:x}:{n * (n + 1) // 2:x}"


def test_compare_names_what_is_wrong() -> None:
    sent = {"a": "1", "b": "2"}
    compare_digests(sent, dict(sent), replica="generator 0")
    for received, message in (
        ({"a": "1"}, "generator 1 never received tensor 'b'"),
        ({"a": "1", "b": "3"}, "generator 1 loaded a tensor 'b' that differs .*sent 2, received 3"),
        ({"a": "1", "b": "2", "c": "4"}, "generator 1 received tensor 'c', which was never sent"),
    ):
        with pytest.raises(WeightSyncError, match=message):
            compare_digests(sent, received, replica="generator 1")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_round_trip(dtype: torch.dtype) -> None:
    """Bit for bit, for scalars and views; in memory of its own."""
    sent = [
        ("matrix", random_tensor(dtype, (3, 5), seed=3)),
        ("scalar", random_tensor(dtype, (), seed=4)),
        ("transposed", random_tensor(dtype, (4, 3), seed=6).T),
        ("parameter", random_tensor(dtype, (2,), seed=7)),
    ]
    packed = pack_chunk(sent)
    for buffer in packed["buffers"]:
        buffer.setflags(write=False)  # as Ray hands it over
    received = unpack_chunk(**packed)
    assert [name for name, _ in received] == [name for name, _ in sent]
    for (_, before), (_, after) in zip(sent, received, strict=True):
        assert after.dtype == before.dtype
        assert after.shape == before.shape
        assert bits(after) == bits(before)
        after.zero_()  # its own memory
    assert copy.deepcopy(packed)["names"] == packed["names"]
    assert bits(unpack_chunk(**packed)[0][1]) == bits(sent[0][1])
