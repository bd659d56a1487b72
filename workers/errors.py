"""The errors of a worker, and which gRPC status each error means.

Knows nothing about what a worker computes.
"""

from __future__ import annotations

import grpc

from homer.errors import (
    BiasError,
    Cancelled,
    ConfigError,
    HomerError,
    ModelError,
    PlanError,
    PromptError,
    StateError,
)


class TensorStreamError(HomerError):
    """A tensor stream is damaged, cut short, or not what was asked for."""


class TensorLimitError(TensorStreamError):
    """A tensor stream announces more than its receiver accepts."""


class DamagedStreamError(TensorStreamError):
    """A tensor stream was damaged or cut short on its way: it may be asked for again."""


class UnknownStateError(HomerError, LookupError):
    """The worker holds nothing for this request or node."""


class StaleCallError(HomerError):
    """A newer attempt of this call is known, or its request was released."""


class MemoryBudgetError(HomerError):
    """Work does not fit into the worker's memory budget beside what is there."""


class NotReadyError(HomerError):
    """The worker is loading or draining and takes no new work."""


class PeerError(HomerError):
    """Another worker could not give what this one needs from it.

    Parameters
    ----------
    code : grpc.StatusCode
        The status that the peer answered, passed on to the caller.
    address : str
        The peer's.
    """

    def __init__(self, message: str, code: grpc.StatusCode, address: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.address = address


class BrokenStreamError(PeerError):
    """A peer stopped in the middle of a tensor stream: it may be asked for again."""


_CODES: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (UnknownStateError, grpc.StatusCode.NOT_FOUND),
    (StaleCallError, grpc.StatusCode.ABORTED),
    (Cancelled, grpc.StatusCode.CANCELLED),
    (NotReadyError, grpc.StatusCode.UNAVAILABLE),
    (MemoryBudgetError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TensorLimitError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TensorStreamError, grpc.StatusCode.DATA_LOSS),
    (ConfigError, grpc.StatusCode.INVALID_ARGUMENT),
    (PlanError, grpc.StatusCode.INVALID_ARGUMENT),
    (PromptError, grpc.StatusCode.INVALID_ARGUMENT),
    (BiasError, grpc.StatusCode.FAILED_PRECONDITION),
    (ModelError, grpc.StatusCode.FAILED_PRECONDITION),
    (StateError, grpc.StatusCode.FAILED_PRECONDITION),
)


ERROR_KEY = "homer-error"
PEER_KEY = "homer-peer"


def error_metadata(error: BaseException) -> tuple[tuple[str, str], ...]:
    """Trailing metadata of a failed call: which error it was, and which peer's fault.

    A status alone does not tell a worker that cannot reach its peer from one that is gone itself.
    """
    kind = (ERROR_KEY, type(error).__name__)
    return (kind, (PEER_KEY, error.address)) if isinstance(error, PeerError) else (kind,)


def status_code(error: BaseException) -> grpc.StatusCode:
    """The gRPC status that an error means; INTERNAL for what we did not foresee."""
    if isinstance(error, PeerError):
        return error.code
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    if is_out_of_memory(error):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    return grpc.StatusCode.INTERNAL


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused by the system: about a call's size, not about our code.

    torch raises OutOfMemoryError on accelerators, and on the CPU a RuntimeError that says so.
    """
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
