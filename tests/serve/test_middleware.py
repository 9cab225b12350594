"""The middlewares as bare ASGI applications, fed message by message."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import middleware
from serve.middleware import BodyLimit, DrainRefused, Limits, RequestContext

TEN_BYTES = Limits(max_bytes=10, idle_timeout_s=5, body_timeout_s=5, request_timeout_s=30)


class Exchange:
    """One request: hands out body chunks and counts them, keeps what is answered."""

    def __init__(self, chunks: Iterator[bytes], headers: dict[str, str]) -> None:
        self._chunks = chunks
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/predict",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "state": {"request_id": "r1"},
        }
        self.bytes_read = 0
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        chunk = next(self._chunks, None)
        if chunk is None:
            return {"type": "http.request", "body": b"", "more_body": False}
        self.bytes_read += len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def run(self, app: ASGIApp) -> int:
        asyncio.run(asyncio.wait_for(app(self.scope, self.receive, self.send), timeout=20))
        return int(self.sent[0]["status"])


def exchange(*chunks: bytes, **headers: str) -> Exchange:
    return Exchange(iter(chunks), {name.replace("_", "-"): value for name, value in headers.items()})


async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


async def answer_404_unread(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_a_body_announced_too_large_is_refused_unread() -> None:
    request = exchange(b"x" * 11, content_length="11")
    assert request.run(BodyLimit(read_all, limits_of=lambda scope: TEN_BYTES)) == 413
    assert request.bytes_read == 0


def test_a_body_of_exactly_the_limit_passes() -> None:
    assert exchange(b"x" * 10, content_length="10").run(BodyLimit(read_all, limits_of=lambda scope: TEN_BYTES)) == 200
    assert exchange(b"x" * 4, b"x" * 6).run(BodyLimit(read_all, limits_of=lambda scope: TEN_BYTES)) == 200


@pytest.mark.parametrize("headers", [{}, {"content_length": "5"}, {"content_length": "abc"}, {"content_length": "\u0662"}])
def test_a_streamed_body_is_refused_as_soon_as_it_is_too_large(headers: dict[str, str]) -> None:
    request = exchange(*[b"x" * 4] * 1000, **headers)
    with pytest.raises(HTTPException) as caught:
        request.run(BodyLimit(read_all, limits_of=lambda scope: TEN_BYTES))
    assert caught.value.status_code == 413
    assert request.bytes_read == 12


@pytest.mark.parametrize("limits", [Limits(10, 0.05, None, 30), Limits(10, 5, 0.05, 30)])
def test_a_body_that_stops_coming_or_comes_too_slowly_is_refused(limits: Limits) -> None:
    request = exchange(b"x")

    async def receive() -> Message:
        if request.bytes_read:
            await asyncio.Event().wait()
        return await Exchange.receive(request)

    request.receive = receive  # type: ignore[method-assign]
    with pytest.raises(HTTPException) as caught:
        request.run(BodyLimit(read_all, limits_of=lambda scope: limits))
    assert caught.value.status_code == 408


def test_who_waits_for_the_end_of_the_connection_may_wait() -> None:
    async def wait_for_disconnect(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    request = exchange(b"x")

    async def receive() -> Message:
        if not request.bytes_read:
            request.bytes_read = 1
            return {"type": "http.request", "body": b"x", "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    request.receive = receive  # type: ignore[method-assign]
    assert request.run(BodyLimit(wait_for_disconnect, limits_of=lambda scope: Limits(10, 0.05, 0.05, 30))) == 200


def test_an_unread_body_is_drained_before_an_error_is_answered() -> None:
    request = exchange(*[b"x" * 1000] * 50)
    assert request.run(DrainRefused(answer_404_unread)) == 404
    assert request.bytes_read == 50_000


def test_draining_an_endless_body_ends() -> None:
    request = Exchange(iter(lambda: b"x" * 1_000_000, None), {})
    assert request.run(DrainRefused(answer_404_unread)) == 404
    assert request.bytes_read < 50_000_000


def test_a_client_that_asked_before_sending_is_answered_at_once() -> None:
    request = exchange(b"x" * 1000, expect="100-continue")
    assert request.run(DrainRefused(answer_404_unread)) == 404
    assert request.bytes_read == 0


def test_a_request_that_hangs_gets_504_and_is_cancelled() -> None:
    cancelled = []

    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    request = exchange()
    assert request.run(RequestContext(hang, route_of=lambda scope: "/predict", timeout_s_of=lambda scope: 0.05, echo_request_id=True)) == 504
    assert cancelled == [True]


def test_an_unexpected_error_is_500_without_its_message(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret inside")

    request = exchange(x_request_id="abc")
    assert request.run(RequestContext(fail, route_of=lambda scope: "/predict", timeout_s_of=lambda scope: 5, echo_request_id=True)) == 500
    body: Any = request.sent[1]["body"]
    assert b"secret" not in body
    assert b"Traceback" not in body
    assert b"abc" in body


def test_a_client_that_goes_away_is_logged_as_499(caplog: pytest.LogCaptureFixture) -> None:
    async def go_away(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    request = exchange()
    with caplog.at_level("INFO", logger="ray.serve.sentinode"), pytest.raises(asyncio.CancelledError):
        asyncio.run(
            RequestContext(go_away, route_of=lambda scope: "/predict", timeout_s_of=lambda scope: 5, echo_request_id=True)(
                request.scope, request.receive, request.send
            )
        )
    assert [record.__dict__["status"] for record in caplog.records] == [499]


def test_a_body_that_drips_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(middleware, "time", SimpleNamespace(monotonic=lambda: now))
    request = exchange(*[b"x" * 50_000] * 100)

    async def receive() -> Message:
        nonlocal now
        now += 4
        return await Exchange.receive(request)

    request.receive = receive  # type: ignore[method-assign]
    with pytest.raises(HTTPException) as caught:
        request.run(BodyLimit(read_all, limits_of=lambda scope: Limits(10_000_000, 10, None, 300)))
    assert caught.value.status_code == 408
    assert now == 12


def test_a_body_must_announce_its_length_where_that_is_asked_for() -> None:
    limits = Limits(10, 5, 5, 30, needs_length=True)
    for headers, status in (({}, 411), ({"content_length": "abc"}, 411), ({"content_length": "3"}, 200), ({"content_length": "11"}, 413)):
        assert exchange(b"xxx", **headers).run(BodyLimit(read_all, limits_of=lambda scope: limits)) == status


def test_a_refused_caller_who_sends_nothing_holds_no_place_for_long() -> None:
    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    request = exchange()
    request.receive = receive  # type: ignore[method-assign]
    started = time.monotonic()
    assert request.run(DrainRefused(answer_404_unread)) == 404
    assert time.monotonic() - started < 1.5


def test_an_answer_that_the_deadline_catches_in_the_drain_is_sent_all_the_same() -> None:
    async def refuse_late(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.1)
        await answer_404_unread(scope, receive, send)

    async def receive() -> Message:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    request = exchange()
    request.receive = receive  # type: ignore[method-assign]
    assert (
        request.run(
            DrainRefused(RequestContext(refuse_late, route_of=lambda scope: "/predict", timeout_s_of=lambda scope: 0.2, echo_request_id=True))
        )
        == 504
    )


def test_a_client_that_goes_away_while_it_sends_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        raise ClientDisconnect

    request = exchange()
    with caplog.at_level("INFO", logger="ray.serve.sentinode"):
        asyncio.run(
            RequestContext(read, route_of=lambda scope: "/predict", timeout_s_of=lambda scope: 5, echo_request_id=True)(
                request.scope, request.receive, request.send
            )
        )
    assert [(record.__dict__["status"], record.levelname) for record in caplog.records] == [(499, "INFO")]
    assert request.sent == []
