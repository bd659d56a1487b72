"""Finds workers that are gone: pings at an interval, and at once when a call gives cause.

Knows nothing about jobs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context

from cluster.errors import WorkerLostError
from cluster.members import Member
from cluster.scheduler_options import SchedulerOptions
from homer.errors import HomerError

_log = logging.getLogger(__name__)


class Heartbeat:
    """Watches members; `lose` is called with the name and the reason for each that is gone."""

    def __init__(self, options: SchedulerOptions, lose: Callable[[str, str], None]) -> None:
        self._options = options
        self._lose = lose
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._suspicions: dict[str, asyncio.Task[bool]] = {}

    def watch(self, member: Member, on_info: Callable[[], None]) -> None:
        """Ping a member until it is lost or forgotten; `on_info` is told when it said what it is.

        Needs the running event loop.
        """
        if member.name not in self._watches:
            loop, watch = asyncio.get_running_loop(), self._watch(member, on_info)
            task = loop.create_task(watch, context=Context())
            self._watches[member.name] = task

    def forget(self, member: Member) -> None:
        task = self._watches.pop(member.name, None)
        # A watch that found its own member lost ends by itself.
        if task is not None and task is not _current_task():
            task.cancel()

    async def close(self) -> None:
        """Stop all watches."""
        tasks = [*self._watches.values(), *self._suspicions.values()]
        self._watches.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def suspect(self, member: Member, reason: str) -> bool:
        """Whether a member to which a call failed is lost: it gets one ping to prove otherwise."""
        if member.lost:
            return True
        task = self._suspicions.get(member.name)
        if task is None:
            # Calls of several requests may wait for it, so it is about none of them.
            task = asyncio.create_task(self._suspect(member, reason), context=Context())
            self._suspicions[member.name] = task
            task.add_done_callback(lambda _: self._suspicions.pop(member.name, None))
        return await asyncio.shield(task)

    async def _suspect(self, member: Member, reason: str) -> bool:
        if not await self._ping(member) and not member.lost:
            self._lose(member.name, reason)
        return member.lost

    async def _watch(self, member: Member, on_info: Callable[[], None]) -> None:
        missed = 0
        while not member.lost:
            if member.info is None and await self._ask_info(member):
                on_info()
            if not self._options.heartbeat_seconds:
                return
            await asyncio.sleep(self._options.heartbeat_seconds)
            missed = 0 if await self._ping(member) else missed + 1
            if missed >= self._options.heartbeat_misses and not member.lost:
                self._lose(member.name, f"no answer to {missed} pings in a row")

    async def _ask_info(self, member: Member) -> bool:
        try:
            async with asyncio.timeout(self._options.heartbeat_timeout_seconds):
                member.info = await member.client.info()
        except (HomerError, TimeoutError) as error:
            _log.debug("%s does not say what it is: %r", member.name, error)
            return False
        return True

    async def _ping(self, member: Member) -> bool:
        try:
            async with asyncio.timeout(self._options.heartbeat_timeout_seconds):
                member.stats = await member.client.stats()
        except (WorkerLostError, TimeoutError) as error:
            _log.debug("%s did not answer a ping: %r", member.name, error)
            return False
        except HomerError as error:
            # It answers, if only to say that it cannot.
            _log.debug("%s answered a ping with %r", member.name, error)
        return True


def _current_task() -> asyncio.Task[object] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
