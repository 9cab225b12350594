"""What answers say beside the decision: versions, spacing, colours, maps, other origins, the web page."""

from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from pydantic import ValidationError
from starlette.testclient import TestClient

from sentinode import RESEARCH_USE_NOTICE
from sentinode.answers import Problem, Speaker
from sentinode.bundle import Bundle
from sentinode.config import ServeConfig
from sentinode.predictor import Predictor
from serve.backend import NotExplainableError
from serve.http_app import create_http_app
from tests.factories import make_bundle, random_patches
from tests.serve.backends import InProcess
from tests.serve.patch_files import encode

PATCH = random_patches(1)[0]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def build(bundle: Bundle) -> Callable[..., FastAPI]:
    predictor = Predictor(bundle)

    def build(backend: Any = None, **settings: Any) -> FastAPI:
        config = ServeConfig(**{"auth": "none", "engine": "torch"} | settings)
        return create_http_app(backend or InProcess(predictor), bundle.manifest, config)

    return build


@pytest.fixture(scope="module")
def client(build: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(build()) as client:
        yield client


def files() -> dict[str, Any]:
    return {"file": ("p", encode(PATCH))}


@pytest.mark.parametrize("path", ["/predict", "/explain", "/model"])
def test_each_route_answers_with_and_without_its_version(client: TestClient, path: str) -> None:
    method = "GET" if path == "/model" else "POST"
    answers = [client.request(method, prefix + path, files=None if method == "GET" else files()) for prefix in ("", "/v1")]
    assert [answer.status_code for answer in answers] == [200, 200]
    if path != "/predict":
        assert answers[0].content == answers[1].content
    assert client.request(method, "/v2" + path).status_code == 404


@pytest.mark.parametrize(
    ("given", "settings", "reason"),
    [
        (None, {}, None),
        (0.972, {}, None),
        (1.06, {}, None),
        (1.08, {}, "wrong_spacing"),
        (0.25, {}, "wrong_spacing"),
        (1.08, {"spacing_tolerance": 0.2}, None),
        (None, {"expect_spacing": True}, "unknown_spacing"),
        (0.972, {"expect_spacing": True}, None),
    ],
)
def test_a_spacing_that_differs_or_is_missed_is_a_reason_to_look(
    build: Callable[..., FastAPI], bundle: Bundle, given: float | None, settings: dict[str, Any], reason: str | None
) -> None:
    assert bundle.manifest.spacing_um_px == 0.972
    with TestClient(build(**settings)) as client:
        answer = client.post("/predict", files=files(), params={} if given is None else {"spacing_um_px": given}).json()
    assert answer["spacing_um_px"] == given
    assert [one for one in answer["review_reasons"] if "spacing" in one] == ([reason] if reason else [])
    assert answer["needs_review"] is bool(answer["review_reasons"])


def test_a_model_of_unknown_spacing_judges_none(bundle: Bundle) -> None:
    speaker = Speaker.of(bundle.manifest.model_copy(update={"spacing_um_px": None}), "torch")
    assert speaker.spacing_reason(99.0, tolerance=0.1, expected=False) is None


@pytest.mark.parametrize("spacing", ["0", "-1", "nan", "inf", "1e9", "abc", ""])
def test_what_is_no_spacing_is_refused(client: TestClient, spacing: str) -> None:
    response = client.post("/predict", files=files(), params={"spacing_um_px": spacing})
    assert (response.status_code, response.json()["type"]) == (422, "urn:sentinode:problem:invalid_request")
    assert "spacing_um_px" in response.json()["detail"]


def test_colours_unlike_those_validated_on_are_a_reason_to_look(bundle: Bundle) -> None:
    reference = bundle.manifest.reference.model_copy(update={"patch_colour_low": (0.5, 0.3, 0.4), "patch_colour_high": (0.9, 0.8, 0.9)})
    manifest = bundle.manifest.model_copy(update={"reference": reference})
    config = ServeConfig(auth="none", engine="torch")
    with TestClient(create_http_app(InProcess(Predictor(Bundle(bundle.path, manifest, bundle.where))), manifest, config)) as client:
        for colour, reasons in (((180, 120, 170), []), ((60, 160, 60), ["unusual_colours"])):
            patch = np.clip(np.random.default_rng(0).normal(colour, 10, (96, 96, 3)), 0, 255).astype(np.uint8)
            answer = client.post("/predict", files={"file": ("p", encode(patch))}).json()
            assert [reason for reason in answer["review_reasons"] if reason == "unusual_colours"] == reasons


def test_a_map_lies_over_the_patch_as_far_as_asked(client: TestClient, bundle: Bundle) -> None:
    shown = {}
    for opacity in (None, 0, 0.4, 1):
        response = client.post("/explain", files=files(), params={} if opacity is None else {"opacity": opacity})
        assert response.headers["content-type"] == "image/png"
        assert response.headers["x-model-digest"] == bundle.manifest.digest
        assert response.headers["x-notice"] == RESEARCH_USE_NOTICE
        shown[opacity] = np.asarray(Image.open(BytesIO(response.content)).convert("RGB"))
    np.testing.assert_array_equal(shown[0], PATCH)
    np.testing.assert_array_equal(shown[None], shown[0.4])
    distance = [float(np.abs(shown[opacity].astype(float) - PATCH).mean()) for opacity in (0, 0.4, 1)]
    assert distance[0] < distance[1] < distance[2]
    for wrong in ("2", "-0.1", "nan"):
        assert client.post("/explain", files=files(), params={"opacity": wrong}).status_code == 422
    assert client.post("/explain", files={"file": ("p", b"text")}).status_code == 422


def test_a_model_without_maps_says_so(build: Callable[..., FastAPI]) -> None:
    class NoMaps:
        async def explain(self, patch: Any, opacity: float) -> Any:
            raise NotExplainableError("no stage of this network has a map")

    with TestClient(build(NoMaps())) as client:
        response = client.post("/explain", files=files())
    assert (response.status_code, response.json()["type"]) == (404, "urn:sentinode:problem:not_explainable")


def test_pages_of_other_origins_may_not_call_unless_they_are_named(build: Callable[..., FastAPI]) -> None:
    origin = "https://viewer.example.org"
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    with TestClient(build()) as client:
        assert "access-control-allow-origin" not in client.options("/v1/predict", headers=asked).headers
        assert "access-control-allow-origin" not in client.get("/healthz", headers={"Origin": origin}).headers
    with TestClient(build(cors_origins=[origin])) as client:
        response = client.options("/v1/predict", headers=asked)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, origin)
        assert client.get("/healthz", headers={"Origin": origin}).headers["access-control-allow-origin"] == origin
        assert "access-control-allow-origin" not in client.get("/healthz", headers={"Origin": "https://evil.example"}).headers
    for wrong in ("*", "viewer.example.org", "https://viewer.example.org/page"):
        with pytest.raises(ValidationError, match="cors_origins: got"):
            ServeConfig(cors_origins=[wrong])


def test_the_page_asks_nobody_else(client: TestClient) -> None:
    for path, kind in (("/ui", "text/html"), ("/ui/app.js", "text/javascript"), ("/ui/style.css", "text/css")):
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "http" not in response.text.replace("http-equiv", "")


def test_the_description_is_one_that_clients_are_generated_from(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    operations = {operation["operationId"]: operation for methods in described["paths"].values() for operation in methods.values()}
    # Names of functions in a generated client.
    assert {"predict", "predict_batch", "explain", "model"} <= operations.keys()
    for name in ("predict", "predict_batch", "explain"):
        assert "multipart/form-data" in operations[name]["requestBody"]["content"]
        # One class for every problem.
        problems = [
            answer["content"]["application/problem+json"]["schema"] for status, answer in operations[name]["responses"].items() if status != "200"
        ]
        assert all(schema == {"$ref": "#/components/schemas/Problem"} for schema in problems)
        for status, answer in operations[name]["responses"].items():
            if status != "200":
                example = answer["content"]["application/problem+json"]["example"]
                assert Problem(**example).status == int(status)
    assert {"Prediction", "Problem", "ModelCard"} <= described["components"]["schemas"].keys()
