"""What is refused before the local endpoint starts."""

import socket
from pathlib import Path

import pytest

from sentinode.errors import UsageError
from serve.local import _require_haproxy_can_run, usable_port


def test_a_port_that_haproxy_needs_is_named_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT"):
        monkeypatch.setenv(variable, str(usable_port("127.0.0.1", 0)))
    _require_haproxy_can_run(None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", str(port))
        with pytest.raises(UsageError, match=f"port {port}, which Serve's HAProxy needs, is taken.*RAY_SERVE_HAPROXY_STATS_PORT"):
            _require_haproxy_can_run(None)


def test_a_certificate_that_haproxy_would_ignore_is_refused() -> None:
    with pytest.raises(UsageError, match="does no TLS"):
        _require_haproxy_can_run((Path("tls.crt"), Path("tls.key")))
