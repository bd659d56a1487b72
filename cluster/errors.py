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


class PeerCallError(WorkerCallError):
    """A worker could not get what it needs from another worker; it is well itself.

    `address` is the other worker's, where it is known.
    """

    def __init__(self, message: str, code: str = "UNAVAILABLE", address: str = "") -> None:
        super().__init__(message, code)
        self.address = address


class OverloadedError(HomerError):
    """The service has more to do than it may queue; try again after `retry_after_seconds`."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class NoWorkersError(HomerError):
    """No worker is left to run a request on; try again after `retry_after_seconds`."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class CapacityError(HomerError):
    """A request needs more memory than all workers together have: trying again does not help."""


class NotServingError(HomerError):
    """The service has not loaded its model yet, or is about to end."""


class RequestAbortedError(HomerError):
    """Somebody else than its caller has ended a request."""


class ServiceError(HomerError):
    """A Homer service refused or failed a request; `code` is the gRPC status code's name.

    `retry_after_seconds` is when the service wants to be asked again, where it says so.
    """

    def __init__(self, code: str, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_seconds = retry_after_seconds
