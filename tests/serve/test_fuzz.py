"""Hostile input always ends in an answer of ours, soon and in little memory: an image that was not damaged enough, or a 4xx problem."""

import time
import warnings
from collections.abc import Iterator
from typing import Any

import hypothesis
import psutil
import pytest
import schemathesis
from fastapi import FastAPI
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance
from starlette.testclient import TestClient

from sentinode.config import ServeConfig
from sentinode.predictor import Predictor
from serve.http_app import create_http_app
from tests.factories import make_bundle
from tests.serve.backends import InProcess
from tests.serve.hostile import CONTENT_TYPE, form_of, good_files, hostile

LONGEST_S = 5.0
MOST_MEMORY_BYTES = 300 * 2**20


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    predictor = Predictor(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle"))
    return create_http_app(InProcess(predictor), predictor.manifest, ServeConfig(auth="none", engine="torch", max_body_bytes=2**21))


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def send(client: TestClient, body: bytes, content_type: str, made: str, path: str = "/v1/predict") -> int:
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        response = client.post(path, content=body, headers={"content-type": content_type})
    assert time.monotonic() - started < LONGEST_S, made
    if response.status_code == 200:
        return 200
    assert 400 <= response.status_code < 500, (made, response.text)
    assert response.headers["content-type"] == "application/problem+json", made
    assert response.json()["type"].startswith("urn:sentinode:problem:"), made
    return response.status_code


def check_cases(client: TestClient, numbers: range) -> None:
    send(client, form_of(good_files()["tif"]), CONTENT_TYPE, "a good one")
    before = psutil.Process().memory_info().rss
    statuses = []
    for number in numbers:
        case = hostile(number)
        statuses.append(send(client, case.body, case.content_type, case.made))
    assert psutil.Process().memory_info().rss - before < MOST_MEMORY_BYTES
    # Neither all refused nor none: the cases are at the border.
    assert 0.02 < statuses.count(200) / len(statuses) < 0.6
    assert {400, 415, 422} <= set(statuses)


def test_some_hundred_hostile_requests(client: TestClient) -> None:
    check_cases(client, range(400))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_thousand_hostile_requests(client: TestClient) -> None:
    check_cases(client, range(1_000, 11_000))


@pytest.mark.parametrize("name", ["tif", "tif lzw", "png", "jpeg", "webp"])
def test_a_file_cut_at_every_64_bytes(client: TestClient, name: str) -> None:
    data = good_files()[name]
    for end in range(0, len(data) - 64, 64):
        assert send(client, form_of(data[:end]), CONTENT_TYPE, f"{name} cut at {end}") in (415, 422)


@pytest.mark.parametrize("path", ["/v1/predict/batch", "/v1/explain"])
def test_the_other_routes_bear_the_same(client: TestClient, path: str) -> None:
    for number in range(60):
        case = hostile(number)
        body = case.body.replace(b'name="file"', b'name="files"') if "batch" in path else case.body
        send(client, body, case.content_type, case.made, path)


EVERY_HEALTH_CHECK = list(hypothesis.HealthCheck)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def check_api(app: FastAPI, examples: int) -> None:
    """Send what the description allows to every operation, and compare the answers with it. Without schemathesis' own pytest integration: it does not
    know pytest 9."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/predict", "/v1/predict/batch", "/v1/explain", "/v1/model", "/readyz"}
    for operation in operations:

        @hypothesis.settings(
            max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        check()


def test_what_the_api_description_allows_is_answered_as_it_says(app: FastAPI) -> None:
    check_api(app, 25)


@pytest.mark.slow
def test_what_the_api_description_allows_is_answered_as_it_says_at_length(app: FastAPI) -> None:
    check_api(app, 600)
