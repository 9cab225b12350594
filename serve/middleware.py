"""What happens to every request before a route sees it: request id, deadline, log line, API key, body limit; and what becomes of unread bodies.

Plain ASGI, so that a body is refused before it is read and a streamed one while it is read.
"""

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.auth import is_known_key, offered_key
from serve.measures import measures
from serve.problems import ProblemError, problem_response

# A child of Serve's logger: in a replica it reaches Serve's handlers (JSON lines, see serve/app.py), elsewhere it is an ordinary logger.
logger = logging.getLogger("ray.serve.sentinode")

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CLIENT_WENT_AWAY = 499
# Of what a refused caller still sends. Short: the caller holds a place in the replica meanwhile, and need not have a key.
_DRAIN_BYTES = 32 * 1024 * 1024
_DRAIN_TIMEOUT_S, _DRAIN_IDLE_S = 2.0, 0.25
# A body that may take longer than `body_timeout_s` must come at least so fast.
_SLOWEST_BYTES_PER_S = 16 * 1024


def request_id_of(scope: Scope) -> str:
    """Return the id that RequestContext gave this request."""
    request_id: str = scope["state"]["request_id"]
    return request_id


class RequestContext:
    """Gives each request an id and a deadline, turns what nothing else caught into a 500, and writes one log line.

    Parameters
    ----------
    app : ASGI application
    route_of : callable
        Scope -> the route, one of ours, that the path is; else "unmatched". For the log and the measures.
    timeout_s_of : callable
        Scope -> seconds after which a request that has not begun to answer is answered 504.
    echo_request_id : bool
        Put `X-Request-ID` on responses. False behind Ray's proxy, which adds the header itself: twice would be two values.
    """

    def __init__(self, app: ASGIApp, *, route_of: Callable[[Scope], str], timeout_s_of: Callable[[Scope], float], echo_request_id: bool) -> None:
        self._app = app
        self._route_of = route_of
        self._timeout_s_of = timeout_s_of
        self._echo_request_id = echo_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, timeout_s = time.perf_counter(), self._timeout_s_of(scope)
        offered = Headers(scope=scope).get(REQUEST_ID_HEADER)
        valid = offered is None or _REQUEST_ID.fullmatch(offered) is not None
        request_id = offered if offered and valid else str(uuid.uuid4())
        scope.setdefault("state", {})["request_id"] = request_id
        status: int | None = None

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                # Predictions belong to the caller, not to caches on the way.
                headers["Cache-Control"] = "no-store"
                if self._echo_request_id:
                    headers[REQUEST_ID_HEADER] = request_id
            await send(message)
            if message["type"] == "http.response.start":
                # After it: the deadline may fall before anything was sent.
                status = message["status"]

        try:
            if valid:
                async with asyncio.timeout(timeout_s):
                    await self._app(scope, receive, send_and_note)
            else:
                refusal = problem_response("invalid_request_id", "X-Request-ID must be 1 to 128 of A-Z a-z 0-9 . _ -", request_id)
                await refusal(scope, receive, send_and_note)
        except TimeoutError:
            if status is None:
                detail = f"no answer within {timeout_s:g} s; try again"
                await problem_response("timeout", detail, request_id, {"Retry-After": "1"})(scope, receive, send_and_note)
        except asyncio.CancelledError:
            status = status or _CLIENT_WENT_AWAY
            raise
        except ClientDisconnect:
            status = status or _CLIENT_WENT_AWAY
        except Exception:
            logger.exception("unexpected error", extra={"request_id": request_id})
            if status is not None:
                raise
            await problem_response("internal", "an unexpected error; it was logged under this request id", request_id)(scope, receive, send_and_note)
        finally:
            # Neither path nor query: they are the caller's and may name a patient. The route is ours.
            route = self._route_of(scope)
            seconds = time.perf_counter() - started
            measures().ended(route, scope["method"], status or 500, seconds)
            latency_ms = round(seconds * 1000, 3)
            fields = {"method": scope["method"], "route": route, "status": status, "latency_ms": latency_ms, "request_id": request_id}
            # Twice: as fields for Serve's JSON log files, and as the message for its console, which prints nothing else.
            logger.info(json.dumps(fields), extra=fields)


class ApiKeys:
    """Lets a request through to a protected route only with a known key, before its body is read.

    Parameters
    ----------
    app : ASGI application
    digests : sequence of str
        SHA-256 of every admitted key.
    is_protected : callable
        Scope -> whether the request needs a key.
    """

    def __init__(self, app: ASGIApp, *, digests: Sequence[str], is_protected: Callable[[Scope], bool]) -> None:
        self._app = app
        self._digests = tuple(digests)
        self._is_protected = is_protected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._is_protected(scope):
            key = offered_key(scope["headers"])
            if key is None or not is_known_key(key, self._digests):
                detail = "send an API key as X-API-Key or Authorization: Bearer" if key is None else "the API key is not known here"
                refusal = problem_response("unauthorized", detail, request_id_of(scope), {"WWW-Authenticate": 'Bearer realm="sentinode"'})
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


@dataclass(frozen=True)
class Limits:
    """What a route allows."""

    max_bytes: int
    """Of a body."""
    idle_timeout_s: float
    """Longest pause of a body."""
    body_timeout_s: float | None
    """Longest time until a body is whole; None = as long as the request may take."""
    request_timeout_s: float
    """Longest time until an answer begins."""
    needs_length: bool = False
    """Whether a body must announce its length. Ray reads bodies ahead of us, so a large one must be refused before it comes."""


class BodyLimit:
    """Refuses bodies above a size, by their announced length before anything is read, else as soon as that many bytes have come; and slow ones.

    Parameters
    ----------
    app : ASGI application
    limits_of : callable
        Scope -> `Limits`.
    """

    def __init__(self, app: ASGIApp, *, limits_of: Callable[[Scope], Limits]) -> None:
        self._app = app
        self._limits_of = limits_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limits = self._limits_of(scope)
        too_large = f"a request body may have {limits.max_bytes} bytes at most"
        announced = Headers(scope=scope).get("content-length", "")
        # `isdecimal` alone admits other scripts' digits, which int() reads too; a length that is not a number is counted instead.
        is_number = announced.isascii() and announced.isdecimal()
        if is_number and int(announced) > limits.max_bytes:
            await problem_response("body_too_large", too_large, request_id_of(scope))(scope, receive, send)
            return
        if limits.needs_length and not is_number and scope["method"] == "POST":
            await problem_response("length_required", "send the body's Content-Length", request_id_of(scope))(scope, receive, send)
            return
        received, whole, began = 0, False, time.monotonic()

        async def receive_and_count() -> Message:
            nonlocal received, whole
            if whole:  # what comes now is the end of the connection, which may be long in coming
                return await receive()
            patience_s = limits.idle_timeout_s
            if limits.body_timeout_s is not None:
                patience_s = min(patience_s, began + limits.body_timeout_s - time.monotonic())
            try:
                async with asyncio.timeout(patience_s):
                    message = await receive()
            except TimeoutError as error:
                raise ProblemError("body_timeout", "the body did not come in time; try again", {"Retry-After": "1"}) from error
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limits.max_bytes:
                    raise ProblemError("body_too_large", too_large)
                taken_s = time.monotonic() - began
                if not whole and taken_s > limits.idle_timeout_s and received < taken_s * _SLOWEST_BYTES_PER_S:
                    raise ProblemError("body_timeout", "the body comes too slowly; try again", {"Retry-After": "1"})
            return message

        await self._app(scope, receive_and_count, send)


class DrainRefused:
    """Reads what is left of a body, within bounds, before an error is answered.

    A server that closes a connection with unread bytes resets it, and the client, still sending, never sees why.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        finished = False

        async def receive_and_note() -> Message:
            nonlocal finished
            message = await receive()
            finished = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def drain() -> None:
            left = _DRAIN_BYTES
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                    while not finished and left > 0:
                        async with asyncio.timeout(_DRAIN_IDLE_S):
                            left -= len((await receive_and_note()).get("body", b""))

        async def send_after_draining(message: Message) -> None:
            # A client that asked first (Expect: 100-continue) has sent nothing yet and needs no more than the answer.
            if message["type"] == "http.response.start" and message["status"] >= 400 and "expect" not in Headers(scope=scope):
                await drain()
            await send(message)

        await self._app(scope, receive_and_note, send_after_draining)
