"""Spans are optional: without the extra everything works, and says so where spans are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from homer.errors import ConfigError
from workers.logs import JsonFormatter, TextFormatter, log_about, logging_about, make_formatter
from workers.tracing import ENDPOINT_VARIABLES, Tracing, connect_tracing

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
"""


def run_without_opentelemetry(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return done.stdout + done.stderr


def test_without_the_extra_a_worker_and_a_client_can_be_made() -> None:
    said = run_without_opentelemetry(
        "import workers.server, workers.tracing, cluster.client, cluster.seeing\n"
        "seeing = cluster.seeing.Seeing()\n"
        "print(seeing.spans('r', None), workers.tracing.caller_metadata())\n"
    )
    assert said.strip() == "None ()"


def test_without_the_extra_an_endpoint_is_a_mistake_that_says_what_to_install() -> None:
    said = run_without_opentelemetry(
        "from workers.tracing import connect_tracing\n"
        "from homer.errors import ConfigError\n"
        "try: connect_tracing('http://127.0.0.1:4317')\n"
        "except ConfigError as error: print(error)\n"
    )
    assert "pip install 'homer-context[otel]'" in said


def test_without_the_extra_the_environment_of_others_does_no_harm() -> None:
    said = run_without_opentelemetry(
        "import logging, os\n"
        "logging.basicConfig()\n"
        "os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = 'http://127.0.0.1:4317'\n"
        "from workers.tracing import connect_tracing\n"
        "print(connect_tracing('').on)\n"
    )
    assert "False" in said
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry is not installed" in said


def test_no_endpoint_no_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ENDPOINT_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    tracing = connect_tracing("")
    assert not tracing.on
    tracing.follow([("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")])
    span = tracing.start("request", None, {})
    assert span is None
    assert tracing.metadata(span) == ()
    tracing.record("leaf", 0.0, 1.0)
    tracing.close()


def test_broken_metadata_starts_a_trace_of_its_own() -> None:
    from opentelemetry.sdk.trace import TracerProvider

    tracing = Tracing(TracerProvider())
    tracing.follow([("traceparent", "nonsense"), ("binary-bin", b"\0")])
    span = tracing.start("request", None, {})
    assert span is not None
    assert span.get_span_context().is_valid


def test_a_log_format_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="use text or json"):
        make_formatter("xml")


@pytest.mark.parametrize("kind", ["text", "json"])
def test_lines_have_the_fields_and_tracebacks_too(kind: str) -> None:
    import json
    import logging

    formatter = make_formatter(kind, worker="w 1", empty="")
    assert type(formatter) is (TextFormatter if kind == "text" else JsonFormatter)
    log_about(request_id="outer", node="0/0")
    with logging_about(request_id='in"ner', attempt="a" * 9999):
        try:
            raise ValueError("two\n2026-01-01 INFO a.b: forged \x1b[2J\rlines")
        except ValueError:
            record = logging.LogRecord("x", 40, "", 0, "%s failed", ("it",), sys.exc_info())
        lines = formatter.format(record).splitlines()
    if kind == "text":
        assert len(lines) > 3
        # Nobody takes for a record what was in a message.
        assert [line[:4] for line in lines[1:]] == ["    "] * (len(lines) - 1)
        assert any(line.startswith("    2026-01-01 INFO a.b: forged ?[2J ") for line in lines)
        fields = r' worker="w 1" request_id="in\"ner" attempt=' + "a" * 256
        assert all(line.endswith(fields) for line in lines)
        assert "it failed" in lines[0]
    else:
        (line,) = (json.loads(one) for one in lines)
        assert (line["worker"], line["request_id"]) == ("w 1", 'in"ner')
        assert line["message"] == "it failed"
        assert "ValueError: two\n2026-01-01 INFO" in line["exception"]
        assert "node" not in line
    after = make_formatter("text").format(logging.LogRecord("x", 20, "", 0, "after", None, None))
    assert after.endswith("after request_id=outer node=0/0")
