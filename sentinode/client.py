"""Clients of the endpoint, for threads and for asyncio, that lose no patch while replicas come and go.

    with Client("http://127.0.0.1:8000", api_key=os.environ["SENTINODE_API_KEY"]) as client:
        print(client.predict("patch.tif").probabilities.Metastatic)
        for path, answer in client.predict_folder("patches/"):
            print(path.name, answer.prediction if isinstance(answer, Prediction) else answer.detail)

What may succeed when it is asked again is asked again: equal patches get equal answers, so nothing is done twice. File names are not sent.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
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

    def options(self) -> dict[str, Any]:
        """Arguments of httpx beside method and path."""
        headers = {"Content-Type": self.content_type} if self.content_type else None
        given = {"params": self.params or None, "content": self.content, "files": self.files, "headers": headers}
        return {name: value for name, value in given.items() if value is not None}


class _Attempts:
    """Whether, and when, one request is sent again."""

    def __init__(self, give_up_after_s: float) -> None:
        self._until = time.monotonic() + give_up_after_s
        self._wait_s = FIRST_WAIT_S

    def wait_s(self, met: httpx.Response | httpx.TransportError) -> float:
        """Return how long to wait before the next attempt; raises UnavailableError where there is no time for one."""
        asked_s = 0.0
        if isinstance(met, httpx.Response):
            with suppress(ValueError):
                asked_s = float(met.headers.get("Retry-After", "0"))
        # Spread, so that callers who were refused together do not come back together.
        wait_s = max(asked_s, self._wait_s) * random.uniform(1.0, 1.5)
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        if time.monotonic() + wait_s > self._until:
            what = f"status {met.status_code}" if isinstance(met, httpx.Response) else type(met).__name__
            raise UnavailableError(f"the endpoint gave no answer in the time allowed; the last attempt met {what}")
        return wait_s


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
    from io import BytesIO

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
    return _Request("POST", "/v1/predict/batch", _spacing(spacing_um_px), files=[("files", ("patch", data)) for data in files])


def _array(patches: UInt8Array, spacing_um_px: float | None) -> _Request:
    content = np.ascontiguousarray(patches).tobytes()
    return _Request("POST", "/v1/predict/batch", _spacing(spacing_um_px), content=content, content_type="application/octet-stream")


def _pieces(patches: UInt8Array, size: int) -> list[UInt8Array]:
    return [patches[start : start + size] for start in range(0, len(_patches(patches)), size)]


def _predictions(response: httpx.Response) -> list[Prediction]:
    """Return the answers to an array, of which none can fail alone."""
    found = []
    for answer in BATCH.validate_json(response.content):
        if isinstance(answer, Problem):
            raise RequestRefusedError(answer)
        found.append(answer)
    return found


def _images_in(folder: str | Path) -> list[Path]:
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name.lower().endswith(IMAGE_SUFFIXES))
    if not found:
        raise UsageError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in it")
    return found


def _chunks(paths: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


class Client:
    """The endpoint, asked from threads.

    Parameters
    ----------
    url : str
        E.g. `http://127.0.0.1:8000`.
    api_key : str or None
    timeout_s : float
        For one attempt of a request.
    give_up_after_s : float
        For a request with all its repetitions.
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
        verify: bool | str = True,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._give_up_after_s = give_up_after_s
        self._http = httpx.Client(base_url=url, headers=_key(api_key), timeout=timeout_s, verify=verify, transport=transport)

    def predict(self, image: Image, *, spacing_um_px: float | None = None) -> Prediction:
        """Classify one patch; `spacing_um_px` is the physical size of its pixels, micrometres, None where it is not known."""
        return Prediction.model_validate_json(self._send(_one(image, "/v1/predict", _spacing(spacing_um_px))).content)

    def predict_array(self, patches: UInt8Array, *, spacing_um_px: float | None = None, patches_per_request: int = 256) -> list[Prediction]:
        """Classify pixels, uint8 (n, side, side, 3), RGB; one answer per patch, in order."""
        found: list[Prediction] = []
        for piece in _pieces(patches, patches_per_request):
            found += _predictions(self._send(_array(piece, spacing_um_px)))
        return found

    def predict_files(
        self, paths: Iterable[str | Path], *, spacing_um_px: float | None = None, files_per_request: int = 64, at_a_time: int = 4
    ) -> Iterator[tuple[Path, Prediction | Problem]]:
        """Classify image files, some requests at a time; yields (path, answer) in order. A file that cannot be used gets its problem for one."""

        def ask(some: Sequence[Path]) -> list[tuple[Path, Prediction | Problem]]:
            response = self._send(_several([_file_of(path) for path in some], spacing_um_px))
            return list(zip(some, BATCH.validate_json(response.content), strict=True))

        chunks = _chunks([Path(path) for path in paths], files_per_request)
        waiting: deque[Future[list[tuple[Path, Prediction | Problem]]]] = deque()
        with ThreadPoolExecutor(at_a_time, thread_name_prefix="predict") as pool:
            try:
                for some in chunks:
                    waiting.append(pool.submit(ask, some))
                    if len(waiting) > at_a_time:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

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
        attempts = _Attempts(self._give_up_after_s)
        while True:
            try:
                met: httpx.Response | httpx.TransportError = self._http.request(request.method, request.path, **request.options())
            except httpx.TransportError as error:
                met = error
            if isinstance(met, httpx.Response) and met.status_code not in RETRIED_STATUSES:
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
        verify: bool | str = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._give_up_after_s = give_up_after_s
        # As many connections as there are requests: a caller bounds these.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self._http = httpx.AsyncClient(base_url=url, headers=_key(api_key), timeout=timeout_s, verify=verify, transport=transport, limits=limits)

    async def predict(self, image: Image, *, spacing_um_px: float | None = None) -> Prediction:
        """See `Client.predict`."""
        response = await self._send(_one(image, "/v1/predict", _spacing(spacing_um_px)))
        return Prediction.model_validate_json(response.content)

    async def predict_array(self, patches: UInt8Array, *, spacing_um_px: float | None = None, patches_per_request: int = 256) -> list[Prediction]:
        """See `Client.predict_array`."""
        found: list[Prediction] = []
        for piece in _pieces(patches, patches_per_request):
            found += _predictions(await self._send(_array(piece, spacing_um_px)))
        return found

    async def predict_files(
        self, paths: Iterable[str | Path], *, spacing_um_px: float | None = None, files_per_request: int = 64, at_a_time: int = 4
    ) -> AsyncIterator[tuple[Path, Prediction | Problem]]:
        """See `Client.predict_files`."""

        async def ask(some: Sequence[Path]) -> list[tuple[Path, Prediction | Problem]]:
            data = await asyncio.to_thread(lambda: [_file_of(path) for path in some])
            response = await self._send(_several(data, spacing_um_px))
            return list(zip(some, BATCH.validate_json(response.content), strict=True))

        waiting: deque[asyncio.Task[list[tuple[Path, Prediction | Problem]]]] = deque()
        try:
            for some in _chunks([Path(path) for path in paths], files_per_request):
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
        attempts = _Attempts(self._give_up_after_s)
        while True:
            try:
                met: httpx.Response | httpx.TransportError = await self._http.request(request.method, request.path, **request.options())
            except httpx.TransportError as error:
                met = error
            if isinstance(met, httpx.Response) and met.status_code not in RETRIED_STATUSES:
                return _checked(met)
            await asyncio.sleep(attempts.wait_s(met))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()


def _key(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"X-API-Key": api_key}
