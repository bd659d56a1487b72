"""An OpenTelemetry collector for tests: keeps the spans that processes send to it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """A span as it arrived; `service` is the process's kind, `instance` its name."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    started: int
    ended: int
    failed: bool
    service: str
    instance: str
    attributes: dict[str, Any]

    @property
    def node(self) -> tuple[int, int]:
        return self.attributes["homer.node.height"], self.attributes["homer.node.index"]


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Answers OTLP over gRPC at `endpoint`."""

    endpoint: str = ""
    spans: list[Span] = field(default_factory=list)

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        for resource in request.resource_spans:
            of = _plain(resource.resource.attributes)
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Span(
                            name=span.name,
                            trace_id=span.trace_id.hex(),
                            span_id=span.span_id.hex(),
                            parent_id=span.parent_span_id.hex(),
                            started=span.start_time_unix_nano,
                            ended=span.end_time_unix_nano,
                            failed=span.status.code == 2,
                            service=of["service.name"],
                            instance=of["service.instance.id"],
                            attributes=_plain(span.attributes),
                        )
                    )
        return trace_service_pb2.ExportTraceServiceResponse()

    def children(self, span: Span) -> list[Span]:
        return [other for other in self.spans if other.parent_id == span.span_id]

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@contextmanager
def running_collector() -> Iterator[Collector]:
    """A collector on a free loopback port."""
    server = grpc.server(ThreadPoolExecutor(4))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


def _plain(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}
