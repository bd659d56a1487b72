"""OpenTelemetry spans, where they are asked for and the extra `otel` is installed; else nothing.

Every process has its own tracer; nothing global is set. The context of a trace travels in gRPC
metadata, as `traceparent`. Knows nothing about trees or requests.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from homer.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_log = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str]]

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SCOPE = "homer"

_NOTHING: Mapping[str, Any] = {}

# The span under which the running task works, as an OpenTelemetry context.
_parent: ContextVar[Any] = ContextVar("homer_trace_parent", default=None)


class Tracing:
    """Makes spans with `provider`; without one, all of it does nothing.

    Times are unix seconds, so that a span can be made after what it is about.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer(SCOPE)

    @property
    def on(self) -> bool:
        """Whether spans are made."""
        return self._tracer is not None

    def follow(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
        """From here to its end this task, and what it starts, works under the caller's span."""
        if self._tracer is None:
            return
        carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
        _parent.set(_propagator().extract(carrier))

    def start(
        self,
        name: str,
        parent: Span | None,
        attributes: Mapping[str, Any],
        started: float | None = None,
    ) -> Span | None:
        """A span below `parent`, or below what this task follows; end it with `end`."""
        if self._tracer is None:
            return None
        return self._tracer.start_span(
            name,
            context=_parent.get() if parent is None else _context(parent),
            start_time=None if started is None else _nanoseconds(started),
            attributes=_names(attributes),
        )

    def end(
        self,
        span: Span | None,
        attributes: Mapping[str, Any] = _NOTHING,
        *,
        ended: float | None = None,
        error: str | None = None,
    ) -> None:
        """End a span now or at `ended`, well or with what went wrong."""
        if span is None:
            return
        span.set_attributes(_names(attributes))
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            span.set_status(Status(StatusCode.ERROR, error))
        span.end(None if ended is None else _nanoseconds(ended))

    def record(
        self,
        name: str,
        started: float,
        seconds: float,
        parent: Span | None = None,
        attributes: Mapping[str, Any] = _NOTHING,
    ) -> None:
        """A span of something that is over."""
        self.end(self.start(name, parent, attributes, started), ended=started + seconds)

    def metadata(self, parent: Span | None) -> Metadata:
        """What a gRPC call under `parent` carries."""
        if parent is None:
            return ()
        carrier: dict[str, str] = {}
        _propagator().inject(carrier, _context(parent))
        return tuple(carrier.items())

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def connect_tracing(endpoint: str, **resource: str) -> Tracing:
    """Spans for the OTLP collector at `endpoint`, like http://collector:4317.

    Without an endpoint, the one that OpenTelemetry's own environment variables name; without those
    no spans are made. `resource` says what this process is: service.name and so on, with _ for the
    dot.

    Raises
    ------
    ConfigError
        When an endpoint is given, but the extra is not installed.
    """
    variable = next(filter(os.environ.get, ENDPOINT_VARIABLES), None)
    if not endpoint and variable is None:
        return Tracing()
    if not _installed():
        missing = "OpenTelemetry is not installed: pip install 'homer-context[otel]'"
        if endpoint:
            raise ConfigError(f"spans are to go to {endpoint}, but {missing}")
        _log.warning("%s is set, but %s", variable, missing)
        return Tracing()
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(
        resource=Resource.create({key.replace("_", "."): text for key, text in resource.items()})
    )
    exporter = OTLPSpanExporter(endpoint=endpoint or None)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def caller_metadata() -> Metadata:
    """What a client's call carries: the span that its own program is in, if there is one."""
    # A program that makes spans has imported this; others are not kept waiting for it.
    import sys

    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple(carrier.items())


def _installed() -> bool:
    # The parents of a missing package are missing too, and then asking for it fails.
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.grpc")
    except ModuleNotFoundError:
        return False
    return found is not None and importlib.util.find_spec("opentelemetry.sdk") is not None


def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


def _context(span: Span) -> Context:
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span)


def _names(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"homer.{name}": value for name, value in attributes.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
