"""Tensors between an accelerator and main memory, beside what the model computes.

Copies go through page-locked memory and a stream of their own, so that a transfer does not wait for
the model, nor the model for a transfer. On the CPU nothing is copied. Knows nothing about peers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy
import torch


class Staging:
    """Copies to and from one device.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Main memory for a tensor on its way to the device."""
        if self._stream is not None:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        # numpy asks for huge pages, torch does not: far fewer page faults.
        memory = numpy.empty(nbytes, dtype=numpy.uint8)
        return torch.from_numpy(memory).view(dtype).view(shape)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the device, complete when this returns. Not for the event loop."""
        if self._stream is None:
            return tensor.to(self._device)
        with torch.cuda.stream(self._stream):
            there = tensor.to(self._device, non_blocking=True)
            done = self._stream.record_event()
        done.synchronize()
        # It is used by the model's stream: its memory is not free before that one is done with it.
        there.record_stream(torch.cuda.default_stream(self._device))
        return there

    def to_host(self, tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Each tensor in main memory.

        From an accelerator, the next one is made and copied while the last is being sent. Tensors
        are made from what existed when the first was asked for.
        """
        if self._stream is None:
            yield from tensors
            return
        # What the model's stream was told to do before may be what is sent.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        source = iter(tensors)
        ahead = self._start_copy(source)
        while ahead is not None:
            # Holds the original until its copy is complete.
            (_, copy, done), ahead = ahead, self._start_copy(source)
            done.synchronize()
            yield copy

    def _start_copy(
        self, source: Iterator[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Event] | None:
        with self._on_stream():
            tensor = next(source, None)
            if tensor is None:
                return None
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copy.copy_(tensor, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return tensor, copy, done

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
