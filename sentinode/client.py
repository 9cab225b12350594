"""Clients of the endpoint, for threads and for asyncio, that lose no patch while replicas come and go.

    with Client("http://127.0.0.1:8000", api_key=os.environ["SENTINODE_API_KEY"]) as client:
        print(client.predict("patch.tif").probabilities.Metastatic)
        for path, answer in client.predict_folder("patches/"):
            print(path.name, answer.prediction if isinstance(answer, Prediction) else answer.detail)

What may succeed when it is asked again is asked again: equal patches get equal answers, so nothing is done twice. File names are not sent.
"""

import asyncio
import math
import random
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np

from sentinode.answers import BATCH, ModelCard, Prediction, Problem
from sentinode.errors import SentinodeError, UsageError
from sentinode.images import IMAGE_SUFFIXES, UInt8Array

RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""What a later attempt may not meet: a busy or leaving replica, a proxy that has lost one."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 10.0

# A proxy that has just started knows no routes yet, and says 404 where the endpoint would say a problem; an address that is wrong says it for ever.
_STRANGE_404S = 5
# Of a request with several files.
_BYTES_PER_REQUEST = 32 * 1024 * 1024
# Never repeated: they would fail again.
_OUR_FAULTS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)

Image = bytes | str | Path | UInt8Array
"""One patch: the bytes of an image file, the path of one, or pixels, uint8 (side, side, 3), RGB."""


class RequestRefusedError(SentinodeError):
    """The endpoint will not answer this request, however often it is asked.

    Attributes
    ----------
    problem : Problem
        Why; branch on its `type`.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.status} {problem.title}: {problem.detail}")
        self.problem = problem


class UnavailableError(SentinodeError):
    """No answer in the time allowed, though the request was repeated."""


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    params: dict[str, Any]
    content: bytes | None = None
    files: list[tuple[str, tuple[str, bytes]]] | None = None
    content_type: str | None = None
    is_batch: bool = False

    def options(self) -> dict[str, Any]:
        """Arguments of httpx beside method and path."""
        headers = {"Content-Type": self.content_type} if self.content_type else None
        given = {"params": self.params or None, "content": self.content, "files": self.files, "headers": headers}
        return {name: value for name, value in given.items() if value is not None}


class _Attempts:
    """Whether, and when, one request is sent again."""

    def __init__(self, url: str, give_up_after_s: float) -> None:
        self._url, self._give_up_after_s = url, give_up_after_s
        self._until = time.monotonic() + give_up_after_s
        self._wait_s = FIRST_WAIT_S
        self._strange_404s = 0

    def is_answer(self, met: httpx.Response | httpx.TransportError) -> bool:
        """Tell whether nothing else is to be had by asking again; raises UsageError for what cannot be sent at all."""
        if isinstance(met, httpx.Response):
            if met.status_code == 404 and not met.headers.get("content-type", "").startswith("application/problem+json"):
                self._strange_404s += 1
                return self._strange_404s > _STRANGE_404S
            return met.status_code not in RETRIED_STATUSES
        is_distrusted = isinstance(_root(met), ssl.SSLCertVerificationError)
        if isinstance(met, _OUR_FAULTS) or is_distrusted:
            hint = "; a certificate of your own: Client(verify=FILE)" if is_distrusted else ""
            raise UsageError(f"the endpoint cannot be asked: {_root(met)}{hint}") from met
        return False

    def wait_s(self, met: httpx.Response | httpx.TransportError) -> float:
        """Return how long to wait before the next attempt; raises UnavailableError where there is no time for one."""
        asked_s = 0.0
        if isinstance(met, httpx.Response):
            asked_s = _retry_after_s(met.headers.get("Retry-After", "0"))
        # Spread, so that callers who were refused together do not come back together.
        wait_s = max(asked_s, self._wait_s) * random.uniform(1.0, 1.5)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        if time.monotonic() + wait_s > self._until:
            what = f"status {met.status_code}" if isinstance(met, httpx.Response) else f"{type(met).__name__}: {met}"
            raise UnavailableError(f"{self._url} gave no answer within {self._give_up_after_s:g} s; the last attempt met {what}")
        return wait_s


def _retry_after_s(value: str) -> float:
    """Read a Retry-After header, seconds or a date (RFC 9110, section 10.2.3); 0 for what is neither."""
    with suppress(ValueError):
        seconds = float(value)
        return seconds if math.isfinite(seconds) else 0.0
    with suppress(ValueError, TypeError):  # a date may come without its zone
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return 0.0


def _root(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _checked(response: httpx.Response) -> httpx.Response:
    """Return an answer that is one; raises RequestRefusedError."""
    if response.is_success:
        return response
    try:
        problem = Problem(**response.json())
    except (ValueError, TypeError):
        # Not from our code: a proxy's own.
        title = HTTPStatus(response.status_code).phrase if response.status_code in HTTPStatus._value2member_map_ else "unknown status"
        problem = Problem(type="about:blank", title=title, status=response.status_code, detail=response.text[:200], request_id="")
    raise RequestRefusedError(problem)


def _file_of(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise UsageError(f"{image}: cannot be read ({error.strerror})") from error
    from PIL import Image as Pillow

    buffer = BytesIO()
    Pillow.fromarray(_patches(image[np.newaxis])[0]).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _patches(patches: UInt8Array) -> UInt8Array:
    if patches.dtype != np.uint8 or patches.ndim != 4 or patches.shape[1] != patches.shape[2] or patches.shape[3] != 3:
        raise UsageError(f"patches: got {patches.dtype} {patches.shape}; expected uint8 (n, side, side, 3)")
    return patches


def _spacing(spacing_um_px: float | None) -> dict[str, Any]:
    return {} if spacing_um_px is None else {"spacing_um_px": spacing_um_px}


def _one(image: Image, path: str, params: dict[str, Any]) -> _Request:
    return _Request("POST", path, params, files=[("file", ("patch", _file_of(image)))])


def _several(files: Sequence[bytes], spacing_um_px: float | None) -> _Request:
    parts = [("files", ("patch", data)) for data in files]
    return _Request("POST", "/v1/predict/batch", _spacing(spacing_um_px), files=parts, is_batch=True)


def _array(patches: UInt8Array, spacing_um_px: float | None) -> _Request:
    # With its shape: bare pixels of patches of another size may be a whole number of patches of the model's.
    buffer = BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(patches), allow_pickle=False)
    content = buffer.getvalue()
    return _Request("POST", "/v1/predict/batch", _spacing(spacing_um_px), content=content, content_type="application/x-npy", is_batch=True)


def _pieces(patches: UInt8Array, size: int) -> list[UInt8Array]:
    return [patches[start : start + size] for start in range(0, len(_patches(patches)), size)]


def _answers(response: httpx.Response, count: int) -> list[Prediction | Problem]:
    """Return the answers to `count` patches; raises SentinodeError where there are not as many."""
    found = BATCH.validate_json(response.content)
    if len(found) != count:
        raise SentinodeError(f"the endpoint gave {len(found)} answers for {count} patches")
    return found


def _predictions(response: httpx.Response, count: int) -> list[Prediction]:
    """Return the answers to an array, of which none can fail alone."""
    found = []
    for answer in _answers(response, count):
        if isinstance(answer, Problem):
            raise RequestRefusedError(answer)
        found.append(answer)
    return found


def _images_in(folder: str | Path) -> list[Path]:
    if not Path(folder).is_dir():
        raise UsageError(f"{folder}: no such folder")
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name.lower().endswith(IMAGE_SUFFIXES))
    if not found:
        raise UsageError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in it")
    return found


def _chunks(paths: Iterable[str | Path], size: int) -> Iterator[list[Path]]:
    """Yield so many paths at a time, fewer where their files are large."""
    some: list[Path] = []
    size_bytes = 0
    for path in map(Path, paths):
        own_bytes = path.stat().st_size if path.is_file() else 0
        if some and (len(some) == size or size_bytes + own_bytes > _BYTES_PER_REQUEST):
            yield some
            some, size_bytes = [], 0
        some.append(path)
        size_bytes += own_bytes
    if some:
        yield some


def _read(some: Sequence[Path]) -> tuple[list[bytes], list[Problem | None]]:
    """Return the bytes of the files that can be sent, and in order of all why one cannot."""
    data: list[bytes] = []
    problems: list[Problem | None] = []
    for path in some:
        try:
            if path.stat().st_size > _BYTES_PER_REQUEST:
                problems.append(_local_problem(413, "body_too_large", "the file is far too large for a patch"))
                continue
            data.append(path.read_bytes())
            problems.append(None)
        except OSError as error:
            problems.append(_local_problem(422, "unreadable", f"the file cannot be read ({error.strerror})"))
    return data, problems


def _local_problem(status: int, kind: str, detail: str) -> Problem:
    return Problem(type=f"urn:sentinode:problem:{kind}", title="The file was not sent", status=status, detail=detail, request_id="")


def _joined(
    some: Sequence[Path], problems: Sequence[Problem | None], answers: Sequence[Prediction | Problem]
) -> list[tuple[Path, Prediction | Problem]]:
    """Return each path with its answer: its own problem, or the next of the endpoint's answers."""
    given = iter(answers)
    return [(path, problem if problem is not None else next(given)) for path, problem in zip(some, problems, strict=True)]


@dataclass(frozen=True)
class _Limits:
    one_s: float
    give_up_one_s: float
    batch_s: float
    give_up_batch_s: float

    def of(self, request: _Request) -> tuple[float, float]:
        """Return the time for one attempt, and for all."""
        return (self.batch_s, self.give_up_batch_s) if request.is_batch else (self.one_s, self.give_up_one_s)


class Client:
    """The endpoint, asked from threads.

    Parameters
    ----------
    url : str
        E.g. `http://127.0.0.1:8000`.
    api_key : str or None
    timeout_s : float
        Longest silence of the server in one attempt of a request about one patch.
    give_up_after_s : float
        For a request about one patch: no attempt begins later than this after the first.
    batch_timeout_s, batch_give_up_after_s : float
        The same for requests about several; the first should exceed the endpoint's `batch_request_timeout_s`.
    verify : bool or str
        Whether the server's certificate is checked, or the file of the authority to check it with.
    transport : httpx.BaseTransport or None
        For tests.

    Every method raises `RequestRefusedError` for what the endpoint will not answer and `UnavailableError` where it gave no answer in time.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 60.0,
        give_up_after_s: float = 300.0,
        batch_timeout_s: float = 320.0,
        batch_give_up_after_s: float = 1800.0,
        verify: bool | str = True,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url, self._limits = url, _Limits(timeout_s, give_up_after_s, batch_timeout_s, batch_give_up_after_s)
        self._http = httpx.Client(base_url=url, headers=_key(api_key), timeout=timeout_s, verify=_verify(verify), transport=transport)

    def predict(self, image: Image, *, spacing_um_px: float | None = None) -> Prediction:
        """Classify one patch; `spacing_um_px` is the physical size of its pixels, micrometres, None where it is not known."""
        return Prediction.model_validate_json(self._send(_one(image, "/v1/predict", _spacing(spacing_um_px))).content)

    def predict_array(self, patches: UInt8Array, *, spacing_um_px: float | None = None, patches_per_request: int = 256) -> list[Prediction]:
        """Classify pixels, uint8 (n, side, side, 3), RGB; one answer per patch, in order."""
        found: list[Prediction] = []
        for piece in _pieces(patches, patches_per_request):
            found += _predictions(self._send(_array(piece, spacing_um_px)), len(piece))
        return found

    def predict_files(
        self, paths: Iterable[str | Path], *, spacing_um_px: float | None = None, files_per_request: int = 64, at_a_time: int = 4
    ) -> Iterator[tuple[Path, Prediction | Problem]]:
        """Classify image files, some requests at a time; yields (path, answer) in order. A file that cannot be used gets its problem for one."""

        def ask(some: Sequence[Path]) -> list[tuple[Path, Prediction | Problem]]:
            data, problems = _read(some)
            return _joined(some, problems, self._answers(data, spacing_um_px) if data else [])

        waiting: deque[Future[list[tuple[Path, Prediction | Problem]]]] = deque()
        pool = ThreadPoolExecutor(at_a_time, thread_name_prefix="predict")
        try:
            for some in _chunks(paths, files_per_request):
                waiting.append(pool.submit(ask, some))
                if len(waiting) > at_a_time:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            # Whoever stops in the middle does not wait for what is under way.
            pool.shutdown(wait=False, cancel_futures=True)

    def _answers(self, data: list[bytes], spacing_um_px: float | None) -> list[Prediction | Problem]:
        """Ask about files; where they are too much for one request, about half of them at a time, and one that is too much alone has its problem."""
        try:
            return _answers(self._send(_several(data, spacing_um_px)), len(data))
        except RequestRefusedError as error:
            if error.problem.status != 413:
                raise
            if len(data) == 1:
                return [error.problem]
            half = len(data) // 2
            return self._answers(data[:half], spacing_um_px) + self._answers(data[half:], spacing_um_px)

    def predict_folder(self, folder: str | Path, **options: Any) -> Iterator[tuple[Path, Prediction | Problem]]:
        """Classify every image below a folder; options and answers as of `predict_files`."""
        yield from self.predict_files(_images_in(folder), **options)

    def explain(self, image: Image, *, opacity: float = 0.4) -> bytes:
        """Return a patch under its Grad-CAM map, as the bytes of a PNG file; `opacity` of the map, 0..1."""
        return self._send(_one(image, "/v1/explain", {"opacity": opacity})).content

    def model(self) -> ModelCard:
        """Return the card of the model that is served."""
        return ModelCard.model_validate_json(self._send(_Request("GET", "/v1/model", {})).content)

    def _send(self, request: _Request) -> httpx.Response:
        timeout_s, give_up_after_s = self._limits.of(request)
        attempts = _Attempts(self._url, give_up_after_s)
        while True:
            try:
                met: httpx.Response | httpx.TransportError = self._http.request(request.method, request.path, timeout=timeout_s, **request.options())
            except httpx.TransportError as error:
                met = error
            if attempts.is_answer(met) and isinstance(met, httpx.Response):
                return _checked(met)
            time.sleep(attempts.wait_s(met))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class AsyncClient:
    """The endpoint, asked from asyncio; parameters, methods and errors as of `Client`."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 60.0,
        give_up_after_s: float = 300.0,
        batch_timeout_s: float = 320.0,
        batch_give_up_after_s: float = 1800.0,
        verify: bool | str = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url, self._limits = url, _Limits(timeout_s, give_up_after_s, batch_timeout_s, batch_give_up_after_s)
        # As many connections as there are requests: a caller bounds these.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self._http = httpx.AsyncClient(
            base_url=url, headers=_key(api_key), timeout=timeout_s, verify=_verify(verify), transport=transport, limits=limits
        )

    async def predict(self, image: Image, *, spacing_um_px: float | None = None) -> Prediction:
        """See `Client.predict`."""
        response = await self._send(_one(image, "/v1/predict", _spacing(spacing_um_px)))
        return Prediction.model_validate_json(response.content)

    async def predict_array(self, patches: UInt8Array, *, spacing_um_px: float | None = None, patches_per_request: int = 256) -> list[Prediction]:
        """See `Client.predict_array`."""
        found: list[Prediction] = []
        for piece in _pieces(patches, patches_per_request):
            found += _predictions(await self._send(_array(piece, spacing_um_px)), len(piece))
        return found

    async def predict_files(
        self, paths: Iterable[str | Path], *, spacing_um_px: float | None = None, files_per_request: int = 64, at_a_time: int = 4
    ) -> AsyncIterator[tuple[Path, Prediction | Problem]]:
        """See `Client.predict_files`."""

        async def ask(some: Sequence[Path]) -> list[tuple[Path, Prediction | Problem]]:
            data, problems = await asyncio.to_thread(_read, some)
            return _joined(some, problems, await self._answers(data, spacing_um_px) if data else [])

        waiting: deque[asyncio.Task[list[tuple[Path, Prediction | Problem]]]] = deque()
        try:
            for some in _chunks(paths, files_per_request):
                waiting.append(asyncio.create_task(ask(some)))
                if len(waiting) >= at_a_time:
                    for pair in await waiting.popleft():
                        yield pair
            while waiting:
                for pair in await waiting.popleft():
                    yield pair
        finally:
            for task in waiting:
                task.cancel()

    async def _answers(self, data: list[bytes], spacing_um_px: float | None) -> list[Prediction | Problem]:
        try:
            return _answers(await self._send(_several(data, spacing_um_px)), len(data))
        except RequestRefusedError as error:
            if error.problem.status != 413:
                raise
            if len(data) == 1:
                return [error.problem]
            half = len(data) // 2
            return await self._answers(data[:half], spacing_um_px) + await self._answers(data[half:], spacing_um_px)

    async def predict_folder(self, folder: str | Path, **options: Any) -> AsyncIterator[tuple[Path, Prediction | Problem]]:
        """See `Client.predict_folder`."""
        async for pair in self.predict_files(_images_in(folder), **options):
            yield pair

    async def explain(self, image: Image, *, opacity: float = 0.4) -> bytes:
        """See `Client.explain`."""
        return (await self._send(_one(image, "/v1/explain", {"opacity": opacity}))).content

    async def model(self) -> ModelCard:
        """See `Client.model`."""
        return ModelCard.model_validate_json((await self._send(_Request("GET", "/v1/model", {}))).content)

    async def _send(self, request: _Request) -> httpx.Response:
        timeout_s, give_up_after_s = self._limits.of(request)
        attempts = _Attempts(self._url, give_up_after_s)
        while True:
            try:
                met: httpx.Response | httpx.TransportError = await self._http.request(
                    request.method, request.path, timeout=timeout_s, **request.options()
                )
            except httpx.TransportError as error:
                met = error
            if attempts.is_answer(met) and isinstance(met, httpx.Response):
                return _checked(met)
            await asyncio.sleep(attempts.wait_s(met))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()


def _verify(verify: bool | str) -> bool | ssl.SSLContext:
    if not isinstance(verify, str):
        return verify
    try:
        return ssl.create_default_context(cafile=verify)
    except OSError as error:
        # ssl.SSLError is one too.
        raise UsageError(f"{verify}: no certificate to verify with ({error.strerror or error})") from error


def _key(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"X-API-Key": api_key}
