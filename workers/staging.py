"""Tensors between accelerators and main memory, beside what the model computes.

Copies go through page-locked memory and streams of their own, so that a transfer does not wait for
the model, nor the model for a transfer. On the CPU nothing is copied. Knows nothing about peers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy
import torch

from homer.stack import LayerStack

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Places:
    """On which device each tensor of a stream belongs, by its name.

    Rows of a layer (`keys.3`) are on that layer's device where `layers` says it, all else on
    `home`.
    """

    home: torch.device = _CPU
    layers: tuple[torch.device, ...] = ()

    @classmethod
    def of(cls, stack: LayerStack) -> Places:
        """Where a model's layers are."""
        return cls(stack.device, tuple(stack.layer_devices))

    def __getitem__(self, name: str) -> torch.device:
        kind, _, layer = name.partition(".")
        if not self.layers or not layer or kind == "indices":
            return self.home
        return self.layers[int(layer)]

    @property
    def devices(self) -> list[torch.device]:
        return list(dict.fromkeys((self.home, *self.layers)))


class Staging:
    """Copies to and from the devices of `places`."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._streams = {
            device: torch.cuda.Stream(device) for device in places.devices if device.type == "cuda"
        }

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Main memory for a tensor on its way to a device."""
        if self._streams:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        # numpy asks for huge pages, torch does not: far fewer page faults.
        memory = numpy.empty(nbytes, dtype=numpy.uint8)
        return torch.from_numpy(memory).view(dtype).view(shape)

    def to_device(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor where it belongs, complete when this returns. Not for the event loop."""
        device = self._places[name]
        stream = self._streams.get(device)
        if stream is None:
            return tensor.to(device)
        with torch.cuda.stream(stream):
            there = tensor.to(device, non_blocking=True)
            done = stream.record_event()
        done.synchronize()
        # It is used by the model's stream: its memory is not free before that one is done with it.
        there.record_stream(torch.cuda.default_stream(device))
        return there

    def to_host(self, tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Each tensor in main memory.

        From an accelerator, the next one is made and copied while the last is being sent. Tensors
        are made from what existed when the first was asked for.
        """
        if not self._streams:
            for tensor in tensors:
                yield tensor.cpu()
            return
        for device, stream in self._streams.items():
            # What the model's stream was told to do before may be what is sent.
            stream.wait_stream(torch.cuda.default_stream(device))
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
        with self._on_streams():
            tensor = next(source, None)
            if tensor is None:
                return None
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copy.copy_(tensor, non_blocking=True)
            # A tensor that was in main memory already is copied by then.
            stream = self._streams.get(tensor.device) or next(iter(self._streams.values()))
            done = stream.record_event()
        return tensor, copy, done

    @contextmanager
    def _on_streams(self) -> Iterator[None]:
        """What is made inside, on whichever device, is made on that device's stream."""
        with ExitStack() as entered:
            for stream in self._streams.values():
                entered.enter_context(torch.cuda.stream(stream))
            yield
