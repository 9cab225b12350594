"""A Redis of its own for a test, with a password, that writes every change to disk."""

import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Redis:
    """A server that runs."""

    address: str
    password: str


@contextmanager
def redis_server() -> Iterator[Redis]:
    """Start a server on a free port of localhost, and end it; the test is skipped where the program is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with tempfile.TemporaryDirectory(prefix="sn-redis-", dir="/tmp") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port, password = probe.getsockname()[1], secrets.token_hex(16)
        probe.close()
        # Told through stdin: arguments are seen by everyone on the machine.
        settings = f"bind 127.0.0.1\nport {port}\nrequirepass {password}\nappendonly yes\nappendfsync always\ndir {folder}\n"
        process = subprocess.Popen([program, "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            assert process.stdin is not None
            process.stdin.write(settings.encode())
            process.stdin.close()
            _wait_until_it_answers(port, password)
            yield Redis(f"127.0.0.1:{port}", password)
        finally:
            process.kill()
            process.wait()


def _wait_until_it_answers(port: int, password: str) -> None:
    end, tick = time.monotonic() + 20, threading.Event()
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
                if connection.recv(64).startswith(b"+OK"):
                    return
        except OSError:
            pass
        assert time.monotonic() < end, "redis-server does not answer"
        tick.wait(0.1)
