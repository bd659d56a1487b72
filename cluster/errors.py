"""Errors of the cluster: placing workers, calling them, and reaching a service.

Knows nothing about transports or Ray.
"""

from __future__ import annotations

from homer.errors import HomerError


class PlacementError(HomerError):
    """The Ray cluster has no room for the workers, or cannot start them."""


class WorkerLostError(HomerError):
    """A worker does not answer; what it held is gone."""


class WorkerCallError(HomerError):
    """A worker answered a call with a fault of its own; `code` is the gRPC status code's name."""

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        super().__init__(message)
        self.code = code


class ServiceError(HomerError):
    """A Homer service refused or failed a request; `code` is the gRPC status code's name."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
