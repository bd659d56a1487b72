from __future__ import annotations

import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter

from homer.errors import ConfigError
from tests.certificates import Authority
from workers.metrics_port import MetricsPort
from workers.security import Security

TOKEN = "prometheus-has-this-token"


@contextmanager
def metrics(security: Security) -> Iterator[MetricsPort]:
    registry = CollectorRegistry()
    Counter("seen", "Something.", registry=registry).inc()
    port = MetricsPort(registry, "127.0.0.1", 0, lambda: ["a:1"], security)
    try:
        yield port
    finally:
        port.close()


def get(url: str, token: str | None, context: ssl.SSLContext | None = None) -> int:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        asked = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(asked, timeout=30, context=context) as answer:
            assert answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_metrics_and_targets_need_a_token_where_there_are_some() -> None:
    with metrics(Security(tokens=f"prometheus={TOKEN}")) as port:
        for path in ("/metrics", "/", "/targets"):
            url = f"http://{port.address}{path}"
            assert [get(url, token) for token in (None, TOKEN[:-1], TOKEN)] == [401, 401, 200]


def test_metrics_come_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    server = authority.issue("server", "127.0.0.1")
    client: Any = authority.issue("client")
    with metrics(Security(tls=server)) as port:
        url = f"https://{port.address}/metrics"
        context = ssl.create_default_context(cafile=authority.file)
        # It wants a certificate of its callers, too.
        with pytest.raises((urllib.error.URLError, OSError)):
            get(url, None, context)
        context.load_cert_chain(client.cert, client.key)
        assert get(url, None, context) == 200
        with pytest.raises((urllib.error.URLError, OSError)):
            get(f"http://{port.address}/metrics", None)
        # The same files, renewed: here by one that is too old, so that it is seen.
        authority.issue("server", "127.0.0.1", days=-1)
        with pytest.raises(urllib.error.URLError, match="certificate has expired"):
            get(url, None, context)
        authority.issue("server", "127.0.0.1")
        assert get(url, None, context) == 200


def test_beyond_the_loopback_metrics_need_a_token() -> None:
    with pytest.raises(ConfigError, match="everybody who reaches"):
        MetricsPort(CollectorRegistry(), "0.0.0.0", 0)
