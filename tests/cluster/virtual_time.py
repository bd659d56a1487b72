"""Tests in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from cluster.sim.loop import run_virtual as run_without_limit

T = TypeVar("T")


def run_virtual(work: Coroutine[Any, Any, T], limit_seconds: float = 1e6) -> T:
    """Run `work`; what takes `limit_seconds` of virtual time is a failure, not a hang."""
    return run_without_limit(asyncio.wait_for(work, limit_seconds))
