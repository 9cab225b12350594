"""The client library: against the application behind a real HTTP server, and against endpoints that fail."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from sentinode import client as client_module
from sentinode.answers import Prediction, Problem
from sentinode.client import AsyncClient, Client, RequestRefusedError, UnavailableError
from sentinode.config import ServeConfig
from sentinode.errors import SentinodeError, UsageError
from sentinode.predictor import Predictor
from serve.auth import key_digest
from serve.http_app import create_http_app
from tests.factories import make_bundle, random_patches
from tests.serve.backends import InProcess
from tests.serve.patch_files import encode
from tests.serve.servers import served

KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle"))


@pytest.fixture(scope="module")
def url(predictor: Predictor) -> Iterator[str]:
    app = create_http_app(InProcess(predictor), predictor.manifest, ServeConfig(auth="keys", engine="torch"), [key_digest(KEY)])
    with served(app) as url:
        yield url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven patches in two folders, one of them damaged."""
    for number, patch in enumerate(random_patches(11, seed=4)):
        path = tmp_path / "abc"[number % 2] / f"{number:02d}.tif"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(patch) if number != 7 else b"II*\0damaged")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def expected(predictor: Predictor) -> dict[str, float]:
    decisions = predictor.decide(random_patches(11, seed=4))
    return {f"{number:02d}.tif": decision.probability for number, decision in enumerate(decisions)}


def check(answers: list[tuple[Path, Prediction | Problem]], predictor: Predictor, folder: Path) -> None:
    assert [path for path, _ in answers] == sorted(folder.rglob("*.tif"))
    for path, answer in answers:
        if path.name == "07.tif":
            assert isinstance(answer, Problem)
            assert answer.type == "urn:sentinode:problem:truncated"
        else:
            assert isinstance(answer, Prediction)
            assert answer.probabilities.Metastatic == pytest.approx(expected(predictor)[path.name], abs=1e-5)


@pytest.mark.parametrize("files_per_request", [1, 3, 64])
def test_a_folder_is_answered_in_order_and_a_damaged_file_alone_fails(url: str, predictor: Predictor, folder: Path, files_per_request: int) -> None:
    with Client(url, KEY) as client:
        check(list(client.predict_folder(folder, files_per_request=files_per_request, at_a_time=2)), predictor, folder)

    async def run() -> list[tuple[Path, Prediction | Problem]]:
        async with AsyncClient(url, KEY) as client:
            return [pair async for pair in client.predict_folder(folder, files_per_request=files_per_request, at_a_time=2)]

    check(asyncio.run(run()), predictor, folder)


def test_one_patch_can_be_bytes_a_path_or_pixels(url: str, predictor: Predictor, folder: Path) -> None:
    patch, path = random_patches(11, seed=4)[0], folder / "a" / "00.tif"

    async def run() -> list[Prediction]:
        async with AsyncClient(url, KEY) as client:
            return [await client.predict(image, spacing_um_px=0.97) for image in (patch, path)]

    with Client(url, KEY) as client:
        answers = [client.predict(image, spacing_um_px=0.97) for image in (path.read_bytes(), path, str(path), patch)] + asyncio.run(run())
    for answer in answers:
        assert answer.probabilities.Metastatic == pytest.approx(expected(predictor)["00.tif"], abs=1e-5)
        assert (answer.spacing_um_px, answer.model.digest) == (0.97, predictor.manifest.digest)


def test_arrays_are_sent_in_pieces_and_answered_in_order(url: str, predictor: Predictor) -> None:
    patches = random_patches(37, seed=9)
    wanted = [decision.probability for decision in predictor.decide(patches)]

    async def run() -> list[Prediction]:
        async with AsyncClient(url, KEY) as client:
            return await client.predict_array(patches, patches_per_request=10)

    with Client(url, KEY) as client:
        for answers in (client.predict_array(patches, patches_per_request=10), asyncio.run(run())):
            assert [answer.probabilities.Metastatic for answer in answers] == pytest.approx(wanted, abs=1e-5)
        assert client.predict_array(patches[:0]) == []
        # Of twice the side, each would be four patches.
        for side in (48, 192):
            with pytest.raises(RequestRefusedError, match=rf"the array has shape \(5, {side}, {side}, 3\)"):
                client.predict_array(random_patches(5, side_px=side))
        with pytest.raises(UsageError, match=r"got float64 \(37, 96, 96, 3\); expected uint8"):
            client.predict_array(patches / 255)


def test_maps_and_the_card(url: str, predictor: Predictor) -> None:
    patch = random_patches(1)[0]
    with Client(url, KEY) as client:
        assert client.model().digest == predictor.manifest.digest
        np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(client.explain(patch, opacity=0)))), patch)
        assert Image.open(BytesIO(client.explain(patch))).size == (96, 96)


def test_what_is_refused_is_told_at_once(url: str) -> None:
    with (
        Client(url, "wrong") as client,
        pytest.raises(RequestRefusedError, match="401 An API key is needed: the API key is not known here") as caught,
    ):
        client.predict(random_patches(1)[0])
    assert caught.value.problem.type == "urn:sentinode:problem:unauthorized"
    with Client(url, KEY) as client, pytest.raises(RequestRefusedError) as caught:
        client.predict(encode(random_patches(1)[0][:50]))
    assert caught.value.problem.type == "urn:sentinode:problem:wrong_size"
    with Client(url, KEY) as client, pytest.raises(UsageError, match="nothing/here"):
        client.predict("nothing/here.tif")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that would have been waited."""
    waited: list[float] = []
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        waited.append(seconds)
        now += seconds

    async def sleep_async(seconds: float) -> None:
        sleep(seconds)

    # The client's own: other threads have a clock too.
    monkeypatch.setattr(client_module, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now))
    monkeypatch.setattr(client_module, "asyncio", SimpleNamespace(sleep=sleep_async))
    return waited


def failing(*met: int | type[Exception], retry_after: str | None = None) -> tuple[Callable[[httpx.Request], httpx.Response], list[bytes]]:
    """An endpoint that meets requests with these before it answers; and the bodies that it has read."""
    left, bodies = list(met), []

    def handle(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        if left:
            one = left.pop(0)
            if not isinstance(one, int):
                raise one("lost", request=request)
            return httpx.Response(one, headers={"Retry-After": retry_after} if retry_after else {}, text="not now")
        return httpx.Response(200, content=b"png")

    return handle, bodies


FAILURES: tuple[int | type[Exception], ...] = (503, 429, 500, 502, 504, 408, httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError)


def test_what_may_succeed_later_is_sent_again_as_it_was(waits: list[float]) -> None:
    handle, bodies = failing(*FAILURES)
    with Client("http://test", transport=httpx.MockTransport(handle)) as client:
        assert client.explain(b"an image") == b"png"
    assert len(bodies) == len(FAILURES) + 1
    # The boundary of a form is drawn anew.
    assert {body.count(b"an image") for body in bodies} == {1}
    assert waits == sorted(waits[:5]) + waits[5:]
    assert 0.2 <= waits[0] <= 0.3
    assert max(waits) <= 1.5 * client_module.LONGEST_WAIT_S


def test_the_same_holds_in_asyncio(waits: list[float]) -> None:
    handle, bodies = failing(*FAILURES)

    async def run() -> bytes:
        async with AsyncClient("http://test", transport=httpx.MockTransport(handle)) as client:
            return await client.explain(b"an image")

    assert asyncio.run(run()) == b"png"
    assert len(bodies) == len(FAILURES) + 1


def test_retry_after_is_honoured(waits: list[float]) -> None:
    handle, _ = failing(429, 429, retry_after="7")
    with Client("http://test", transport=httpx.MockTransport(handle)) as client:
        client.explain(b"an image")
    assert all(7 <= wait <= 10.5 for wait in waits)
    waits.clear()
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=9), usegmt=True)
    for value, least_s in ((later, 7), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("nan", 0), ("inf", 0), ("-5", 0), ("soon", 0)):
        handle, _ = failing(503, retry_after=value)
        with Client("http://test", transport=httpx.MockTransport(handle)) as client:
            assert client.explain(b"an image") == b"png"
        assert least_s <= waits[-1] <= 13.5, value


@pytest.mark.parametrize(("met", "what"), [(503, "status 503"), (httpx.ConnectError, "ConnectError")])
def test_an_endpoint_that_stays_away_is_given_up(waits: list[float], met: Any, what: str) -> None:
    handle, _ = failing(*[met] * 1000)
    with (
        Client("http://test", transport=httpx.MockTransport(handle), give_up_after_s=60) as client,
        pytest.raises(UnavailableError, match=f"the last attempt met {what}"),
    ):
        client.explain(b"an image")
    assert 40 < sum(waits) <= 60


def test_a_refusal_that_is_not_ours_is_told_too() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(403, text="<html>no</html>"))
    with Client("http://test", transport=transport) as client, pytest.raises(RequestRefusedError, match="403 Forbidden: <html>no</html>"):
        client.model()


def test_file_names_and_paths_are_not_sent(tmp_path: Path) -> None:
    seen: list[bytes] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.read() + str(request.headers).encode() + str(request.url).encode())
        return httpx.Response(200, content=b"[]" if "batch" in request.url.path else b"png")

    path = tmp_path / "patient-7.tif"
    path.write_bytes(b"pixels")
    with Client("http://test", transport=httpx.MockTransport(handle)) as client:
        client.explain(path)
        with pytest.raises(SentinodeError, match="0 answers for 1 patches"):
            list(client.predict_files([path]))
    assert len(seen) == 2
    assert not any(b"patient" in one for one in seen)


def test_files_that_cannot_be_sent_have_their_problem_and_the_others_their_answer(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, missing = folder / "a" / "large.tif", folder / "a" / "gone.tif"
    large.write_bytes(bytes(3_000_000))
    monkeypatch.setattr(client_module, "_BYTES_PER_REQUEST", 2_000_000)
    paths = [folder / "a" / "00.tif", large, missing, folder / "b" / "01.tif"]

    async def run() -> list[tuple[Path, Prediction | Problem]]:
        async with AsyncClient(url, KEY) as client:
            return [pair async for pair in client.predict_files(paths)]

    with Client(url, KEY) as client:
        for answers in (list(client.predict_files(paths)), asyncio.run(run())):
            assert [path for path, _ in answers] == paths
            kinds = [answer.type.rpartition(":")[2] if isinstance(answer, Problem) else answer.prediction for _, answer in answers]
            assert kinds[1:3] == ["body_too_large", "unreadable"]
            assert {kinds[0], kinds[3]} <= {"Normal", "Metastatic"}


def test_what_is_too_much_for_one_request_is_sent_in_parts() -> None:
    seen: list[int] = []

    def handle(request: httpx.Request) -> httpx.Response:
        count = request.read().count(b"filename")
        seen.append(count)
        problem = {"type": "t", "title": "large", "status": 413, "detail": "too large", "request_id": "r"}
        if count > 3:
            return httpx.Response(413, json=problem, headers={"content-type": "application/problem+json"})
        return httpx.Response(200, json=[problem] * count)

    with Client("http://test", transport=httpx.MockTransport(handle)) as client:
        assert len(client._answers([b"x"] * 10, None)) == 10
    assert seen == [10, 5, 2, 3, 5, 2, 3]


def test_an_address_that_cannot_be_asked_is_told_at_once(waits: list[float]) -> None:
    with Client("127.0.0.1:8000") as client, pytest.raises(UsageError, match=r"cannot be asked: .*protocol"):
        client.model()
    assert waits == []


def test_a_proxy_that_knows_no_routes_yet_is_asked_again_and_an_address_without_an_endpoint_is_told(waits: list[float]) -> None:
    handle, bodies = failing(404, 404)
    with Client("http://test", transport=httpx.MockTransport(handle)) as client:
        assert client.explain(b"an image") == b"png"
    assert len(bodies) == 3
    handle, bodies = failing(*[404] * 100)
    with Client("http://test", transport=httpx.MockTransport(handle)) as client, pytest.raises(RequestRefusedError, match="404 Not Found"):
        client.explain(b"an image")
    assert len(bodies) == 6
