"""The application without Ray: a real predictor behind it, real files in front."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from sentinode import RESEARCH_USE_NOTICE
from sentinode.config import ServeConfig
from sentinode.images import UInt8Array
from sentinode.predictor import Predictor
from sentinode.probability import Decision
from serve.auth import key_digest
from serve.backend import Overloaded
from serve.http_app import OPEN_PATHS, create_http_app
from serve.problems import KINDS
from tests.factories import make_bundle, random_patches
from tests.processes import ROOT
from tests.serve.backends import InProcess
from tests.serve.patch_files import encode, good_tif, refused_files

REFUSED = refused_files()


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle"))


@pytest.fixture(scope="module")
def build(predictor: Predictor) -> Callable[..., FastAPI]:
    def build(classify: Any = None, keys: tuple[str, ...] = (), **settings: Any) -> FastAPI:
        config = ServeConfig(auth="keys" if keys else "none", engine="torch", **settings)
        return create_http_app(InProcess(predictor, classify), predictor.manifest, config, [key_digest(key) for key in keys])

    return build


@pytest.fixture(scope="module")
def client(build: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(build()) as client:
        yield client


def post(client: TestClient, data: bytes, **options: Any) -> httpx.Response:
    return client.post("/predict", files={"file": ("patient-7.tif", data, "image/tiff")}, **options)


def require_problem(response: httpx.Response, kind: str, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert list(problem) == ["type", "title", "status", "detail", "request_id"]
    assert problem["type"] == f"urn:sentinode:problem:{kind}"
    assert problem["status"] == status == KINDS[kind].status
    assert problem["title"] == KINDS[kind].title
    assert problem["request_id"] == response.headers["x-request-id"]
    return problem


@pytest.mark.parametrize("format", ["TIFF", "PNG"])
def test_an_answer_equals_the_offline_prediction(client: TestClient, predictor: Predictor, format: str) -> None:
    patches = random_patches(8, seed=3)
    for patch, decision in zip(patches, predictor.decide(patches), strict=True):
        answer = post(client, encode(patch, format)).json()
        assert list(answer) == [
            "prediction",
            "confidence",
            "probabilities",
            "threshold",
            "needs_review",
            "review_reasons",
            "spacing_um_px",
            "model",
            "request_id",
            "notice",
        ]
        assert answer["prediction"] == decision.prediction
        assert answer["probabilities"]["Metastatic"] == pytest.approx(decision.probability, abs=1e-5)
        assert answer["probabilities"]["Normal"] + answer["probabilities"]["Metastatic"] == pytest.approx(1, abs=1e-12)
        assert answer["confidence"] == answer["probabilities"][answer["prediction"]]
        assert answer["threshold"] == predictor.manifest.threshold
        assert answer["needs_review"] == decision.needs_review
        assert answer["review_reasons"] == list(decision.review_reasons)
        assert answer["model"] == {"name": "sentinode", "version": "1", "digest": predictor.manifest.digest, "engine": "torch"}
        assert answer["notice"] == RESEARCH_USE_NOTICE


def test_review_reasons_reach_the_caller(client: TestClient) -> None:
    white = np.full((96, 96, 3), 240, np.uint8)
    answer = post(client, encode(white)).json()
    assert answer["needs_review"] is True
    assert "no_tissue" in answer["review_reasons"]


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_file_is_refused_with_its_own_problem(client: TestClient, name: str) -> None:
    data, kind, status = REFUSED[name]
    problem = require_problem(post(client, data), kind, status)
    assert "patient-7" not in json.dumps(problem)


def test_a_tif_cut_anywhere_is_refused(client: TestClient) -> None:
    tif = good_tif()
    for length in (1, 3, 4, 7, 9, 64, 130, 1000, 20_000, len(tif) - 100, len(tif) - 1):
        response = post(client, tif[:length])
        assert response.status_code == 422, length
        assert response.json()["type"].rpartition(":")[2] in ("truncated", "not_an_image")


def test_requests_without_a_file_are_refused(client: TestClient) -> None:
    require_problem(client.post("/predict"), "missing_file", 422)
    require_problem(client.post("/predict", json={"file": "abc"}), "missing_file", 422)
    require_problem(client.post("/predict", files={"image": ("a.tif", good_tif())}), "missing_file", 422)
    require_problem(client.post("/predict", data={"file": "text, not a file"}), "missing_file", 422)
    require_problem(client.post("/predict", content=good_tif(), headers={"content-type": "image/tiff"}), "missing_file", 422)


def test_two_files_are_refused_rather_than_one_ignored(client: TestClient) -> None:
    files = [("file", ("a.tif", good_tif(1))), ("file", ("b.tif", good_tif(2)))]
    require_problem(client.post("/predict", files=files), "several_files", 422)


def test_what_would_be_passed_over_is_refused(client: TestClient) -> None:
    # A spacing in the wrong place, or misspelt, would be taken for one that fits.
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("/predict", {"data": {"spacing_um_px": "0.5"}}),
        ("/predict?spacing=0.5", {}),
        ("/predict/batch?spacing=0.5", {}),
        ("/explain?opacty=0.5", {}),
    ]
    for path, sent in wrong:
        field = "files" if "batch" in path else "file"
        problem = require_problem(client.post(path, files={field: ("p", good_tif())}, **sent), "invalid_request", 422)
        assert "spacing_um_px" in problem["detail"] or "opacity" in problem["detail"]
    response = client.post("/predict", files={"file": ("p", good_tif()), "other": ("p", good_tif())})
    require_problem(response, "invalid_request", 422)


def test_balancers_may_ask_with_head(client: TestClient) -> None:
    assert [client.head(path).status_code for path in ("/", "/healthz", "/readyz")] == [200, 200, 200]


def test_a_wrong_address_is_told_where_to_look(client: TestClient) -> None:
    assert "/docs" in require_problem(client.get("/predictions"), "not_found", 404)["detail"]
    assert "use POST" in require_problem(client.get("/predict"), "method_not_allowed", 405)["detail"]


def test_broken_multipart_is_refused(client: TestClient) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    require_problem(client.post("/predict", content=b"no boundary in here", headers=headers), "malformed_body", 400)
    require_problem(client.post("/predict", content=b"x", headers={"content-type": "multipart/form-data"}), "malformed_body", 400)


def test_a_body_too_large_is_refused_with_and_without_its_length(build: Callable[..., FastAPI]) -> None:
    app = build(max_body_bytes=40_000)
    with TestClient(app) as client:
        require_problem(post(client, b"x" * 50_000), "body_too_large", 413)
        assert post(client, good_tif()).status_code == 200

    async def stream() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.tif"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 10_000

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            headers = {"content-type": "multipart/form-data; boundary=b"}
            return await client.post("/predict", content=stream(), headers=headers)

    require_problem(asyncio.run(send()), "body_too_large", 413)


def test_unknown_paths_and_methods_are_problems(client: TestClient) -> None:
    require_problem(client.get("/nothing/here"), "not_found", 404)
    require_problem(client.get("/predict/"), "not_found", 404)
    response = client.get("/predict")
    require_problem(response, "method_not_allowed", 405)
    assert response.headers["allow"] == "POST"


def test_only_open_paths_answer_without_a_key(build: Callable[..., FastAPI]) -> None:
    app = build(keys=("right",))
    with TestClient(app) as client:
        for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/ui", "/ui/app.js", "/ui/style.css"):
            assert client.get(path).status_code == 200, path
        closed = set(client.get("/openapi.json").json()["paths"]) - OPEN_PATHS
        assert closed == {"/v1/predict", "/v1/predict/batch", "/v1/explain", "/v1/model"}
        for path in closed | {path.removeprefix("/v1") for path in closed}:
            for method in ("GET", "POST"):
                response = client.request(method, path)
                require_problem(response, "unauthorized", 401)
                assert response.headers["www-authenticate"].startswith("Bearer")
        require_problem(client.get("/nothing"), "not_found", 404)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-API-Key": "right"}, 200),
        ({"X-API-Key": "also-right"}, 200),
        ({"Authorization": "Bearer right"}, 200),
        ({"X-API-Key": "wrong"}, 401),
        ({"X-API-Key": "right "}, 200),
        ({"X-API-Key": key_digest("right")}, 401),
        ({"Authorization": "Basic right"}, 401),
    ],
)
def test_a_known_key_is_needed(build: Callable[..., FastAPI], headers: dict[str, str], status: int) -> None:
    with TestClient(build(keys=("right", "also-right"))) as client:
        assert post(client, good_tif(), headers=headers).status_code == status
        assert client.get("/model", headers=headers).status_code == status


def test_a_request_id_is_kept_or_made_and_a_wrong_one_refused(client: TestClient) -> None:
    response = post(client, good_tif(), headers={"X-Request-ID": "trace.1_a-B"})
    assert response.headers["x-request-id"] == response.json()["request_id"] == "trace.1_a-B"
    made = {client.get("/healthz").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    for wrong in ("a b", "x" * 129, "<script>", ""):
        problem = require_problem(client.get("/healthz", headers={"X-Request-ID": wrong}), "invalid_request_id", 400)
        assert problem["request_id"] != wrong


def test_health_routes(client: TestClient, predictor: Predictor) -> None:
    root = client.get("/").json()
    assert root["status"] == "healthy"
    assert root["model_loaded"] is True
    assert root["model"]["digest"] == predictor.manifest.digest
    assert root["notice"] == RESEARCH_USE_NOTICE
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_a_readiness_that_failed_is_not_tried_again_at_once(build: Callable[..., FastAPI]) -> None:
    asked = []

    async def classify(patch: UInt8Array) -> Decision:
        asked.append(patch)
        raise RuntimeError("engine broke")

    with TestClient(build(classify)) as client:
        for _ in range(20):
            require_problem(client.get("/readyz"), "not_ready", 503)
    # Else whoever asks, and none needs a key to, would hold a place each time for as long as a probe takes.
    assert len(asked) < 5


def test_readiness_is_a_prediction_and_its_success_is_remembered(
    build: Callable[..., FastAPI], predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.backend.UNREADY_FOR_S", 0)
    seen: list[UInt8Array] = []
    works = False

    async def classify(patch: UInt8Array) -> Decision:
        seen.append(patch)
        if not works:
            raise RuntimeError("secret: engine broke")
        return predictor.decide(patch[None])[0]

    with TestClient(build(classify)) as client:
        for path in ("/readyz", "/"):
            response = client.get(path)
            problem = require_problem(response, "not_ready", 503)
            assert "secret" not in json.dumps(problem)
            assert response.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == 200
        works = True
        count = len(seen)
        assert {client.get("/readyz").status_code for _ in range(5)} == {200}
        assert len(seen) == count + 1
        assert seen[-1].shape == (96, 96, 3)


def test_engine_failures_are_retryable_problems(build: Callable[..., FastAPI]) -> None:
    failure: Exception = RuntimeError("secret: CUDA error at /home/x")

    async def classify(patch: UInt8Array) -> Decision:
        raise failure

    with TestClient(build(classify)) as client:
        response = post(client, good_tif())
        assert "secret" not in json.dumps(require_problem(response, "engine_failed", 503))
        assert response.headers["retry-after"] == "1"
        failure = Overloaded(7)
        response = post(client, good_tif())
        require_problem(response, "overloaded", 429)
        assert response.headers["retry-after"] == "7"


def test_a_slow_engine_is_504(build: Callable[..., FastAPI]) -> None:
    async def classify(patch: UInt8Array) -> Decision:
        await asyncio.Event().wait()
        raise AssertionError

    with TestClient(build(classify, request_timeout_s=0.2)) as client:
        require_problem(post(client, good_tif()), "timeout", 504)


def test_allow_resize_takes_square_images_only(build: Callable[..., FastAPI], predictor: Predictor) -> None:
    big = np.kron(random_patches(1)[0], np.ones((2, 2, 1), np.uint8))
    with TestClient(build(allow_resize=True)) as client:
        assert post(client, encode(big)).status_code == 200
        exact = post(client, good_tif()).json()["probabilities"]["Metastatic"]
        assert exact == pytest.approx(predictor.decide(random_patches(1))[0].probability, abs=1e-5)
        require_problem(post(client, encode(big[:150])), "wrong_size", 422)


def test_the_card_tells_the_bundle(client: TestClient, predictor: Predictor) -> None:
    manifest = predictor.manifest
    card = client.get("/model").json()
    assert card["digest"] == manifest.digest
    assert card["threshold"] == manifest.threshold
    assert card["threshold_rule"] == manifest.threshold_rule.model_dump()
    assert card["metrics"] == manifest.metrics
    assert card["data"]["fingerprint"] == manifest.data.fingerprint
    assert card["data"]["leak_level"] == "pixels"


def test_openapi_carries_the_notice_and_problems(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert RESEARCH_USE_NOTICE in document["info"]["description"]
    responses = document["paths"]["/v1/predict"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "408", "413", "415", "422", "429", "500", "503", "504"}
    assert set(responses["422"]["content"]) == {"application/problem+json"}


def test_one_log_line_per_request_without_names_or_keys(build: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture) -> None:
    with TestClient(build(keys=("key-abc",))) as client, caplog.at_level(logging.DEBUG, logger="ray.serve.sentinode"):
        headers = {"X-API-Key": "key-abc", "X-Request-ID": "id-1"}
        post(client, good_tif(), headers=headers)
        post(client, b"GIF89a" + b"0" * 40, headers=headers)
        client.post("/v1/predict/batch?name=patient-7", headers={"X-API-Key": "another"})
        client.get("/patient-7/slide.tif?name=patient-7")
    lines = [record.__dict__ for record in caplog.records if record.name == "ray.serve.sentinode"]
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("POST", "/predict", 200),
        ("POST", "/predict", 415),
        ("POST", "/v1/predict/batch", 401),
        ("GET", "unmatched", 404),
    ]
    assert lines[0]["request_id"] == "id-1"
    assert lines[0]["latency_ms"] > 0
    assert set(json.loads(lines[0]["msg"])) == {"method", "route", "status", "latency_ms", "request_id"}
    ours = json.dumps([{key: str(value) for key, value in line.items()} for line in lines])
    assert "patient-7" not in ours
    assert "key-abc" not in ours


def test_answers_are_not_cached(client: TestClient) -> None:
    assert post(client, good_tif()).headers["cache-control"] == "no-store"


def test_a_bundle_path_is_not_shown(client: TestClient, tmp_path: Path) -> None:
    assert "/tmp" not in client.get("/model").text


def test_every_kind_of_problem_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    assert [kind for kind in KINDS if f"`{kind}`" not in text] == []
