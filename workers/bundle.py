"""Reports of finished nodes, several in a message where they come fast.

A pool of a thousand workers finishes thousands of nodes a second; a message for each would take
more than the coordinator's one core. Knows nothing about what the nodes are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from homer.v1 import worker_pb2


async def bundled(
    events: AsyncIterator[worker_pb2.RunSubtreeResponse],
    last: worker_pb2.NodeId,
    seconds: float,
) -> AsyncIterator[worker_pb2.RunSubtreeResponse]:
    """Pass `events` on, at most one message in `seconds`, and the one of the node `last` at once.

    What came between two messages travels in the `before` of the second, in order.
    """
    loop = asyncio.get_running_loop()
    sent = loop.time()
    waiting: list[worker_pb2.RunSubtreeResponse] = []
    async for event in events:
        now = loop.time()
        if event.node != last and now - sent < seconds:
            waiting.append(event)
            continue
        if waiting:
            # The event belongs to its job, whose other followers read it too.
            bundle = worker_pb2.RunSubtreeResponse()
            bundle.CopyFrom(event)
            bundle.before.extend(waiting)
            event, waiting = bundle, []
        sent = now
        yield event
