"""A real S3 protocol server on loopback, and the same one failing on demand."""

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from s3fs import S3FileSystem
from werkzeug.serving import make_server

SECRET = "a-secret-that-no-message-may-show"
_buckets = count()


@dataclass(frozen=True)
class Server:
    """Where it listens, and as whom to speak to it."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def new_bucket(self) -> str:
        """Make an empty bucket and return its URI."""
        name = f"bucket-{next(_buckets)}"
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def client(self) -> Any:
        """A plain client, to look at the store without our code."""
        return boto3.client("s3", endpoint_url=self.url, aws_access_key_id="testing", aws_secret_access_key=SECRET, region_name="us-east-1")

    def fill(self, bucket_uri: str, keys: Iterable[str]) -> None:
        """Put one byte under each key, past the protocol, which would take 8 ms each."""
        for key in keys:
            s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket_uri.removeprefix("s3://"), key, b"x")

    def keys(self, uri: str) -> list[str]:
        """All keys below a URI, relative to it."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/" if prefix else "")
        return [item["Key"][len(prefix) + bool(prefix) :] for page in pages for item in page.get("Contents", [])]


@contextmanager
def fresh_clients() -> Iterator[None]:
    """Clients made before, perhaps for another server, are not used; those made inside are not kept."""
    S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        S3FileSystem.clear_instance_cache()


def _moto() -> Any:
    return DomainDispatcherApplication(create_backend_app)


@contextmanager
def _listening(application: Callable[..., Iterable[bytes]]) -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving() -> Iterator[Server]:
    """Run the server in threads of this process."""
    with _listening(_moto()) as url:
        yield Server(url)


@dataclass
class FlakyServer:
    """The buckets of `serving`, whose state is shared inside the process, behind a door that fails.

    Attributes
    ----------
    failures : list of str
        What happens to the next requests, in order: "503", "slow down", "drop" (the connection is closed without an answer), "cut" (amid the answer)
        or "lost" (like "drop", but the request has been carried out). When the list is empty requests pass.
    forever : str or None
        What happens to all requests.
    only : callable or None
        Whether a request (its method and path) is meant at all.
    requests : list of str
        Method and path of every request so far.
    """

    url: str = ""
    failures: list[str] = field(default_factory=list)
    forever: str | None = None
    only: Callable[[str, str], bool] | None = None
    requests: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next_failure(self, method: str, path: str) -> str | None:
        """Note a request and return what happens to it."""
        with self._lock:
            self.requests.append(f"{method} {path}")
            if self.only is not None and not self.only(method, path):
                return None
            return self.failures.pop(0) if self.failures else self.forever


@contextmanager
def serving_flaky() -> Iterator[FlakyServer]:
    """Run a second server over the same buckets."""
    moto, state = _moto(), FlakyServer()

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        failure = state.next_failure(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if failure is None:
            return moto(environ, start_response)
        # What was sent is read first: closing a connection with unread data resets it before the answer arrives.
        if failure == "lost":
            list(moto(environ, start_response))
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if failure in ("drop", "lost"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return []
        if failure == "cut":
            start_response("200 OK", [("Content-Length", "1000"), ("ETag", '"0"')])
            return [b"x" * 10]
        code = {"503": "ServiceUnavailable", "slow down": "SlowDown"}[failure]
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        start_response("503 Service Unavailable", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    with _listening(application) as url:
        state.url = url
        yield state
