"""Devices that are emulated on the CPU: real numbers, and errors where tensors of two devices meet.

A tensor on `emulated:1` is a shell that says so, around one in main memory. Inside of
`emulated_devices()` every operation looks at where its tensors are, refuses what an accelerator
would refuse, and runs on what is inside. Importing this changes torch for the whole process, so
that only processes of their own do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("emulated")

_CPU = torch.device("cpu")
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Shell(torch.Tensor):
    """A tensor that is on an emulated device; `inside` has its numbers."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor, device: torch.device) -> Shell:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=device,
        )
        made.inside = inside
        return made

    def tolist(self) -> Any:
        """torch refuses this to subclasses of its tensors."""
        return self.inside.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def emulated_devices() -> Iterator[None]:
    """Inside, `emulated:N` are devices of their own."""
    before = torch._C._only_lift_cpu_tensors()
    # `torch.tensor(…, device=…)` makes it in main memory, and moves it by way of the mode.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    # In inference mode operations come whole that are made of others.
    with _Mode():
        parts = func.decompose(*args, **kwargs)
    if parts is not NotImplemented:
        return parts
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    device = kwargs.get("device")
    if func in _MOVES and device is None and tensors:
        device = tensors[0].device
    elif device is None:
        device = _common_device(func, tensors)
    if device.type == "emulated":
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
    out = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    if device.type != "emulated":
        return out

    def shell(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        with torch.inference_mode(one.is_inference()):
            return Shell(one, device)

    return tree_map(shell, out)


def _common_device(func: Any, tensors: list[torch.Tensor]) -> torch.device:
    """Where all of `tensors` are; a single number may be in main memory."""
    devices = {one.device for one in tensors if one.dim() or one.device != _CPU}
    if len(devices) > 1:
        where = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"{func} got tensors on {where}")
    return devices.pop() if devices else _CPU


def _inside(one: Any) -> Any:
    return one.inside if isinstance(one, Shell) else one
