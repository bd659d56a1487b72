"""In which type floating-point tensors travel: as they are, or narrower where a user asks for it.

Narrower costs accuracy (`python -m workers.wire_bench` says how much), and only what travels pays
it: an answer then depends on which worker ran what. Knows nothing about what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from homer.v1 import tensor_pb2
from workers.tensor_stream import DTYPE_OF_WIRE, NamedTensor, Spec

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e4m3fn}
SCALE_SUFFIX = ".scale"


@dataclass(frozen=True)
class WireFormat:
    """Floats wider than `dtype` travel as `dtype`; with None everything travels as it is.

    A float8 tensor has one float32 scale for each row (all dimensions but the last), which travels
    before it under its name and ".scale".
    """

    dtype: torch.dtype | None = None

    @classmethod
    def named(cls, name: str) -> WireFormat:
        """By its name in `workers.options.WIRE_DTYPES`."""
        return cls(_DTYPES.get(name))

    @classmethod
    def asked_for(cls, options: tensor_pb2.TransferOptions) -> WireFormat:
        """The one that a receiver's request names."""
        return cls(DTYPE_OF_WIRE.get(options.wire_dtype))

    def ask(self, options: tensor_pb2.TransferOptions) -> None:
        """Name this format in a request."""
        for number, dtype in DTYPE_OF_WIRE.items():
            if dtype == self.dtype:
                options.wire_dtype = number

    def specs(self, specs: Sequence[Spec]) -> list[Spec]:
        """How tensors of `specs` travel."""
        out: list[Spec] = []
        for spec in specs:
            dtype = self._narrower(spec)
            if dtype is None:
                out.append(spec)
                continue
            if _is_scaled(dtype):
                out.append(Spec(spec.name + SCALE_SUFFIX, torch.float32, spec.shape[:-1]))
            out.append(Spec(spec.name, dtype, spec.shape))
        return out

    def encode(
        self, specs: Sequence[Spec], tensors: Iterable[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """The tensors of `specs(specs)`, each made when its turn comes."""
        for spec, tensor in zip(specs, tensors, strict=True):
            dtype = self._narrower(spec)
            if dtype is None:
                yield tensor
                continue
            largest = torch.finfo(dtype).max
            if _is_scaled(dtype):
                wide = tensor.float()
                scale = wide.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / largest
                yield scale
                tensor = wide / scale.unsqueeze(-1)
            # What is too large for float16 would become infinite.
            yield tensor.clamp(-largest, largest).to(dtype)

    def decoder(self, dtype: torch.dtype) -> Decoder:
        """Turns what travelled back into tensors of `dtype`."""
        return Decoder(self, dtype)

    def _narrower(self, spec: Spec) -> torch.dtype | None:
        """The type in which a tensor travels, where that is not its own."""
        if self.dtype is None or not spec.dtype.is_floating_point or not spec.nbytes:
            return None
        narrower = self.dtype.itemsize < spec.dtype.itemsize and spec.shape
        return self.dtype if narrower else None


class Decoder:
    """Takes the tensors of one stream in their order."""

    def __init__(self, wire: WireFormat, dtype: torch.dtype) -> None:
        self._wire_dtype = wire.dtype
        self._dtype = dtype
        self._scale: torch.Tensor | None = None

    def take(self, named: Sequence[NamedTensor]) -> list[NamedTensor]:
        """The tensors that are whole with these."""
        if self._wire_dtype is None:
            return list(named)
        out: list[NamedTensor] = []
        for name, tensor in named:
            if name.endswith(SCALE_SUFFIX):
                self._scale = tensor
                continue
            if tensor.dtype == self._wire_dtype and tensor.dtype != self._dtype:
                if self._scale is not None:
                    tensor = tensor.float() * self._scale.unsqueeze(-1)
                    self._scale = None
                tensor = tensor.to(self._dtype)
            out.append(NamedTensor(name, tensor))
        return out


def _is_scaled(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 1
