"""Copies between main memory and the model's device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from workers.staging import Places, Staging

DEVICES = [
    "cpu",
    pytest.param(
        "cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_tensors_go_there_and_back_whole(device: str, dtype: torch.dtype) -> None:
    staging = Staging(Places(torch.device(device)))
    given = [torch.arange(n).view(n, 1).expand(n, 3).to(dtype) for n in (0, 1, 5000)]
    there = [staging.to_device("keys.0", tensor) for tensor in given]
    assert all(tensor.device == torch.device(device) for tensor in there)
    back = list(staging.to_host(there))
    assert all(tensor.device.type == "cpu" for tensor in back)
    assert all(torch.equal(a, b) for a, b in zip(given, back, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_sent_is_what_was_computed_before(device: str) -> None:
    where = torch.device(device)
    staging = Staging(Places(where))
    big = torch.full((512, 512), 0.5, device=where)
    for _ in range(20):
        big = big @ big / 128
    assert all(torch.equal(tensor, big.cpu()) for tensor in staging.to_host([big] * 3))


def test_on_the_cpu_nothing_is_copied_and_each_tensor_waits_for_its_turn() -> None:
    made: list[int] = []

    def make() -> Iterator[torch.Tensor]:
        for number in range(3):
            made.append(number)
            yield torch.full((2,), float(number))

    staging = Staging(Places())
    tensor = torch.ones(3)
    assert next(staging.to_host([tensor])) is tensor
    assert staging.to_device("keys.0", tensor) is tensor
    coming = staging.to_host(make())
    next(coming)
    assert made == [0]


@pytest.mark.parametrize("device", DEVICES)
def test_memory_to_receive_into_has_the_shape_and_type(device: str) -> None:
    for shape in ((), (0, 4), (3, 5), (1 << 20,)):
        tensor = Staging(Places(torch.device(device))).allocate(shape, torch.bfloat16)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, torch.bfloat16)
        assert tensor.is_pinned() == (device != "cpu" and tensor.numel() > 0)
