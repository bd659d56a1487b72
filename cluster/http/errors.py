"""Errors in OpenAI's shape. Knows nothing about what went wrong inside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse

from cluster.errors import ServiceError

RETRY_SECONDS = 1.0
_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class HttpError(Exception):
    """An answer that is an error.

    Parameters
    ----------
    status : int
    message : str
    code, param : str, optional
        OpenAI's name of the error, and the field of the request that it is about.
    retry_after_seconds : float, optional
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_seconds = retry_after_seconds

    @classmethod
    def of_service(cls, error: ServiceError) -> HttpError:
        """What an error of the gRPC service means here."""
        status = _STATUSES.get(error.code, 500)
        retry = error.retry_after_seconds
        if retry is None and status in (429, 503):
            retry = RETRY_SECONDS
        return cls(status, str(error), code=error.code.lower(), retry_after_seconds=retry)

    @classmethod
    def of_validation(cls, errors: Sequence[Any]) -> HttpError:
        """What is wrong with a body, by pydantic's list of errors: the first, and how many more."""
        first = errors[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        unknown = first["type"] == "extra_forbidden"
        message = f"{'.'.join(where) or 'the body'}: {first['msg']}"
        if unknown:
            message = f"unknown argument {'.'.join(where)!r}"
        if len(errors) > 1:
            message += f" (and {len(errors) - 1} more)"
        code = "unknown_parameter" if unknown else "invalid_value"
        return cls(400, message, code=code, param=".".join(where) or None)

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status)
        if kind is None:
            kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after_seconds is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_seconds)))
        return JSONResponse(self.body, self.status, headers)
