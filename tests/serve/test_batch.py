"""Many patches in one request: files of a form, and arrays that are read while they come."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from sentinode.config import ServeConfig
from sentinode.images import UInt8Array
from sentinode.predictor import Predictor
from serve.batch_body import pieces_of_array
from serve.http_app import create_http_app
from serve.problems import ProblemError
from tests.factories import make_bundle, random_patches
from tests.serve.backends import InProcess
from tests.serve.patch_files import encode, refused_files

PATCHES = random_patches(23, seed=8)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle"))


def app_of(predictor: Predictor, backend: InProcess | None = None, **settings: Any) -> FastAPI:
    config = ServeConfig(**{"auth": "none", "engine": "torch", "max_batch_size": 5} | settings)
    return create_http_app(backend or InProcess(predictor), predictor.manifest, config)


@pytest.fixture(scope="module")
def client(predictor: Predictor) -> Iterator[TestClient]:
    with TestClient(app_of(predictor)) as client:
        yield client


def npy(patches: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(patches), **options)
    return buffer.getvalue()


def post_array(client: TestClient, body: bytes, kind: str = "application/octet-stream", **options: Any) -> httpx.Response:
    return client.post("/v1/predict/batch", content=body, headers={"content-type": kind}, **options)


def probabilities(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    return [answer["probabilities"]["Metastatic"] for answer in response.json()]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (PATCHES.tobytes(), "application/octet-stream"),
        (npy(PATCHES), "application/octet-stream"),
        (npy(PATCHES), "application/x-npy; v=1"),
        (npy(PATCHES, version=(2, 0)), "application/x-npy"),
        (npy(PATCHES, version=(3, 0)), "application/x-npy"),
    ],
)
def test_an_array_is_answered_in_order_each_patch_as_predict_would(client: TestClient, predictor: Predictor, body: bytes, kind: str) -> None:
    response = post_array(client, body, kind, params={"spacing_um_px": 0.5})
    assert probabilities(response) == pytest.approx([decision.probability for decision in predictor.decide(PATCHES)], abs=1e-5)
    one = client.post("/predict", files={"file": ("p", encode(PATCHES[3]))}, params={"spacing_um_px": 0.5}).json()
    same = response.json()[3]
    assert same.keys() == one.keys()
    for key in ("prediction", "needs_review", "review_reasons", "threshold", "model", "spacing_um_px", "notice"):
        assert same[key] == one[key]
    assert {answer["request_id"] for answer in response.json()} == {response.headers["x-request-id"]}


def test_a_file_that_cannot_be_used_fails_alone(client: TestClient, predictor: Predictor) -> None:
    refused = refused_files()
    good = [encode(patch, format) for patch, format in zip(PATCHES, ["TIFF", "PNG"] * 12, strict=False)]
    files = [good[0], *(data for data, _, _ in refused.values()), *good[1:]]
    response = client.post("/v1/predict/batch", files=[("files", ("p", data)) for data in files])
    assert response.status_code == 200
    answers = response.json()
    assert len(answers) == len(files)
    for answer, (_, kind, status) in zip(answers[1 : 1 + len(refused)], refused.values(), strict=True):
        assert (answer["type"], answer["status"]) == (f"urn:sentinode:problem:{kind}", status)
    found = [answer["probabilities"]["Metastatic"] for answer in [answers[0], *answers[1 + len(refused) :]]]
    assert found == pytest.approx([decision.probability for decision in predictor.decide(PATCHES)], abs=1e-5)


def test_nothing_but_unusable_files_is_no_error_of_the_request(client: TestClient) -> None:
    response = client.post("/v1/predict/batch", files=[("files", ("p", b"text"))] * 7)
    assert [answer["status"] for answer in response.json()] == [422] * 7


SIDE = 96 * 96 * 3


@pytest.mark.parametrize(
    ("body", "kind", "problem"),
    [
        (b"", "application/octet-stream", "empty"),
        (npy(PATCHES[:0]), "application/x-npy", "empty"),
        (PATCHES.tobytes()[:-1], "application/octet-stream", "wrong_length"),
        (PATCHES.tobytes() + b"x", "application/octet-stream", "wrong_length"),
        (b"\x93NUM", "application/octet-stream", "wrong_length"),
        (npy(PATCHES)[:-SIDE], "application/x-npy", "wrong_length"),
        (npy(PATCHES) + bytes(SIDE), "application/x-npy", "wrong_length"),
        (npy(PATCHES)[:60], "application/x-npy", "wrong_length"),
        (npy(PATCHES[:, :95]), "application/x-npy", "wrong_array"),
        (npy(PATCHES[0]), "application/x-npy", "wrong_array"),
        (npy(PATCHES.astype(np.float32)), "application/x-npy", "wrong_array"),
        (npy(np.asfortranarray(PATCHES)), "application/x-npy", "wrong_array"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': oops}\n" + bytes(SIDE), "application/x-npy", "wrong_array"),
        (b"\x93NUMPY\x01\x00\xff\xff" + bytes(70_000), "application/x-npy", "wrong_array"),
        (b"\x93NUMPY\x07\x00\x76\x00" + bytes(SIDE), "application/x-npy", "wrong_array"),
        (b"\x93NUMPY\x01\x00\x40\x00" + b"(" * 64 + bytes(SIDE), "application/x-npy", "wrong_array"),
        (b"\x93NUMPY\x01\x00\x08\x00" + b"{1: 2 } " + bytes(SIDE), "application/x-npy", "wrong_array"),
        (npy(np.array([{"a": 1}], object), allow_pickle=True), "application/x-npy", "wrong_array"),
        (bytes(65 * SIDE), "application/octet-stream", "too_many_patches"),
    ],
)
def test_a_body_that_is_no_array_of_patches_is_refused(predictor: Predictor, body: bytes, kind: str, problem: str) -> None:
    with TestClient(app_of(predictor, max_batch_patches=64)) as client:
        response = post_array(client, body, kind)
    assert response.json()["type"] == f"urn:sentinode:problem:{problem}", response.text
    assert response.status_code in (413, 422)


def test_an_npy_file_must_be_one_and_the_message_says_what_is_wrong(client: TestClient) -> None:
    for body, detail in (
        (PATCHES.tobytes(), "no .npy file"),
        (encode(PATCHES[0], "PNG"), "no .npy file"),
        (npy(PATCHES.astype(np.float32)), "not uint8"),
        (npy(np.asfortranarray(PATCHES)), "ascontiguousarray"),
    ):
        response = post_array(client, body, "application/x-npy")
        assert (response.status_code, response.json()["type"]) == (422, "urn:sentinode:problem:wrong_array")
        assert detail in response.json()["detail"]
    assert post_array(client, PATCHES.tobytes(), "application/octet-stream").status_code == 200


def test_other_kinds_of_bodies_are_refused(client: TestClient) -> None:
    for kind in ("application/json", "image/tiff", ""):
        response = client.post("/predict/batch", content=b"{}", headers={"content-type": kind})
        assert (response.status_code, response.json()["type"]) == (415, "urn:sentinode:problem:unsupported_media_type")
    response = client.post("/predict/batch", files={"file": ("p", encode(PATCHES[0]))})
    assert (response.status_code, response.json()["type"]) == (422, "urn:sentinode:problem:missing_file")
    response = client.post("/predict/batch", content=b"no", headers={"content-type": "multipart/form-data; boundary=b"})
    assert response.status_code == 400


def test_more_files_than_allowed_are_refused(predictor: Predictor) -> None:
    with TestClient(app_of(predictor, max_batch_patches=3)) as client:
        response = client.post("/v1/predict/batch", files=[("files", ("p", b"x"))] * 4)
        assert (response.status_code, response.json()["type"]) == (413, "urn:sentinode:problem:too_many_patches")
        assert client.post("/v1/predict/batch", files=[("files", ("p", b"x"))] * 3).status_code == 200


def test_a_form_of_which_a_part_would_be_passed_over_is_refused(client: TestClient) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    tif = encode(PATCHES[0])
    one = part % (b"files", b'; filename="p"', tif)
    bad = {
        "no name of a file": one + part % (b"files", b"", b"text") + one + b"--b--\r\n",
        "another field": one + part % (b"file", b'; filename="p"', tif) + b"--b--\r\n",
        "no last boundary": one + one[: len(one) // 2],
        "no last boundary after a whole part": one + b"--b\r\n",
        "a part after the end": one + b"--b--\r\n" + one + b"--b--\r\n",
    }
    headers = {"content-type": "multipart/form-data; boundary=b"}
    for name, body in bad.items():
        response = client.post("/v1/predict/batch", content=body, headers=headers)
        assert response.status_code in (400, 422), name
        assert response.json()["type"].rpartition(":")[2] in ("invalid_request", "malformed_body"), name
    for written in ('multipart/form-data; boundary="b"', "multipart/form-data; boundary=b; charset=utf-8", "multipart/form-data; Boundary=b"):
        assert client.post("/v1/predict/batch", content=one + one + b"--b--", headers={"content-type": written}).status_code == 200


@pytest.mark.parametrize("route", ["/predict", "/explain", "/predict/batch"])
def test_a_form_that_the_parser_chokes_on_is_the_callers_fault(client: TestClient, route: str) -> None:
    field = b"files" if route == "/predict/batch" else b"file"
    body = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="p"\r\n\r\n%s\r\n--b--\r\n' % (field, encode(PATCHES[0]))
    # A character set that there is, and with which nothing can be read.
    response = client.post(route, content=body, headers={"content-type": "multipart/form-data; boundary=b; charset=undefined"})
    assert (response.status_code, response.json()["type"]) == (400, "urn:sentinode:problem:malformed_body")


def test_a_file_that_is_too_large_for_predict_is_so_in_a_batch(predictor: Predictor) -> None:
    with TestClient(app_of(predictor, max_body_bytes=40_000)) as client:
        response = client.post("/v1/predict/batch", files=[("files", ("p", data)) for data in (bytes(50_000), encode(PATCHES[0]))])
    assert [answer.get("type", "answered") for answer in response.json()] == ["urn:sentinode:problem:body_too_large", "answered"]


def test_a_body_without_its_length_is_refused_unread(client: TestClient) -> None:
    def body() -> Iterator[bytes]:
        yield PATCHES.tobytes()

    response = client.post("/v1/predict/batch", content=body(), headers={"content-type": "application/octet-stream"})
    assert (response.status_code, response.json()["type"]) == (411, "urn:sentinode:problem:length_required")


def test_a_batch_may_be_larger_than_one_patch_may(predictor: Predictor) -> None:
    with TestClient(app_of(predictor, max_body_bytes=40_000, max_batch_body_bytes=300_000)) as client:
        assert len(probabilities(post_array(client, PATCHES[:10].tobytes()))) == 10
        assert post_array(client, PATCHES.tobytes()).json()["type"] == "urn:sentinode:problem:body_too_large"


@pytest.mark.parametrize("chunk", [1_000, 27_648, 100_000, 10_000_000])
def test_pieces_are_whole_patches_however_the_body_comes(chunk: int) -> None:
    async def run(data: bytes) -> list[UInt8Array]:
        async def body() -> AsyncIterator[bytes]:
            for start in range(0, len(data), chunk):
                yield data[start : start + chunk]

        return [piece async for piece in pieces_of_array(body(), 96, 5, 100)]

    for data in (PATCHES.tobytes(), npy(PATCHES)):
        pieces = asyncio.run(run(data))
        assert [len(piece) for piece in pieces] == [5, 5, 5, 5, 3]
        np.testing.assert_array_equal(np.concatenate(pieces), PATCHES)


def test_the_engine_works_while_the_body_still_comes_and_no_more_than_two_pieces_are_held(predictor: Predictor) -> None:
    backend = InProcess(predictor)
    seen_while_sending: list[int] = []

    async def body() -> AsyncIterator[bytes]:
        for number in range(6):
            yield PATCHES[:5].tobytes()
            # Let the application take what has come.
            for _ in range(200):
                await asyncio.sleep(0.001)
                if len(backend.pieces) > number:
                    break
            seen_while_sending.append(len(backend.pieces))

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app_of(predictor, backend))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            headers = {"content-type": "application/octet-stream", "content-length": str(30 * SIDE)}
            return await client.post("/v1/predict/batch", content=body(), headers=headers)

    response = asyncio.run(run())
    assert len(response.json()) == 30
    assert seen_while_sending == [1, 2, 3, 4, 5, 6]


def test_an_array_is_refused_as_soon_as_it_is_too_long() -> None:
    read = 0

    async def run() -> None:
        async def body() -> AsyncIterator[bytes]:
            nonlocal read
            while True:
                read += 1
                yield PATCHES[:5].tobytes()

        async for _ in pieces_of_array(body(), 96, 5, 12):
            pass

    with pytest.raises(ProblemError, match="12 patches at most"):
        asyncio.run(run())
    assert read == 3


def test_more_batches_than_are_worked_on_at_a_time_are_asked_to_come_again(predictor: Predictor) -> None:
    reading, most = 0, 0

    async def run() -> list[httpx.Response]:
        async def body() -> AsyncIterator[bytes]:
            nonlocal reading, most
            for number, patch in enumerate(PATCHES[:10]):
                yield patch.tobytes()
                if number == 0:
                    reading += 1
                    most = max(most, reading)
                await asyncio.sleep(0.005)
            reading -= 1

        transport = httpx.ASGITransport(app_of(predictor, max_batch_requests=2))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            headers = {"content-type": "application/octet-stream", "content-length": str(10 * SIDE)}
            first = await asyncio.gather(*(client.post("/v1/predict/batch", content=body(), headers=headers) for _ in range(6)))
            return [*first, await client.post("/v1/predict/batch", content=body(), headers=headers)]

    *first, last = asyncio.run(run())
    assert sorted(response.status_code for response in first) == [200, 200, 429, 429, 429, 429]
    refused = next(response for response in first if response.status_code == 429)
    assert (refused.json()["type"], refused.headers["retry-after"]) == ("urn:sentinode:problem:overloaded", "1")
    assert len({json.dumps(probabilities(response)) for response in [*first, last] if response.status_code == 200}) == 1
    assert last.status_code == 200
