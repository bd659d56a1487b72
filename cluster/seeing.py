"""Everything that looks at a service: metrics, log, spans, timelines, and who asks the workers.

Put together in one place, so that a coordinator starts and stops one thing. Knows nothing about Ray
or gRPC.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cluster.clocks import Clocks
from cluster.metrics import ServiceMetrics
from cluster.observer import Observer, Observers
from cluster.request_log import RequestLog
from cluster.request_spans import RequestSpans, SpanObserver
from cluster.timeline import Timelines
from cluster.watch import WorkerWatch
from homer.plan import MergePlan
from workers.metrics_port import OPEN, MetricsPort
from workers.security import Security
from workers.tracing import Tracing

_log = logging.getLogger(__name__)


class Seeing:
    """What looks at one service.

    Parameters
    ----------
    tracing : Tracing, optional
        Makes the spans; by default there are none.
    more : sequence of Observer
        Who else wants to hear of everything.

    Attributes
    ----------
    observer : Observer
        For the scheduler.
    """

    def __init__(self, tracing: Tracing | None = None, more: Sequence[Observer] = ()) -> None:
        self.tracing = tracing or Tracing()
        self.clocks = Clocks()
        self.watch = WorkerWatch(self.clocks)
        self.timelines = Timelines(self.clocks)
        self.metrics = ServiceMetrics(self.watch)
        self.observer: Observer = Observers(
            RequestLog(), self.metrics, self.timelines, SpanObserver(), *more
        )
        self._port: MetricsPort | None = None

    def spans(self, request_id: str, plan: MergePlan) -> RequestSpans | None:
        """The spans of a new request, where spans are made."""
        return RequestSpans(self.tracing, request_id, plan) if self.tracing.on else None

    def start(self, host: str, metrics_port: int | None, security: Security = OPEN) -> None:
        """Watch the workers from now on, and serve metrics where there is a port for them.

        Raises
        ------
        ConfigError
            When the port cannot be listened on.
        """
        self.watch.start()
        if metrics_port is not None:
            self._port = MetricsPort(
                self.metrics.registry, host, metrics_port, self.watch.metrics_addresses, security
            )
            _log.info("metrics at %s, path /metrics", self._port.address)

    @property
    def metrics_address(self) -> str:
        """host:port of the metrics; empty where they are not served."""
        return "" if self._port is None else self._port.address

    async def stop(self) -> None:
        """Look no more, and send the last spans."""
        await self.watch.stop()
        if self._port is not None:
            self._port.close()
        self.tracing.close()
