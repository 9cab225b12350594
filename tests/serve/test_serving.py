"""The endpoint over real HTTP, on a real Ray."""

import asyncio
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve as ray_serve

from sentinode.client import AsyncClient, Client
from sentinode.config import ServeConfig
from sentinode.errors import SentinodeError, UsageError
from sentinode.predictor import Predictor
from serve.app import build_app
from serve.local import run_local, usable_port, usable_tls
from tests.factories import make_bundle, random_patches
from tests.serve.patch_files import encode, good_tif, refused_files

pytestmark = [pytest.mark.serve, pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

KEY = "a-key-for-tests"
HEADERS = {"X-API-Key": KEY}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle").path


class Interrupted(BaseException):
    """Stands for the caller's Ctrl-C."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `check(url)` in another thread while run_local serves, then interrupts it, as a signal would."""
    monkeypatch.setenv("SENTINODE_API_KEYS", KEY)

    def run(config: ServeConfig, check: Any) -> None:
        failures: list[BaseException] = []

        def ready(url: str) -> None:
            try:
                check(url)
            except BaseException as error:
                failures.append(error)
            raise Interrupted

        with pytest.raises(Interrupted):
            serve_locally(config, ready)
        if failures:
            raise failures[0]

    return run


def serve_locally(config: ServeConfig, ready: Callable[[str], None]) -> None:
    run_local(build_app(config), request_timeout_s=config.request_timeout_s, port=usable_port("127.0.0.1", 0), ready=ready)


async def _post_all(url: str, files: list[bytes]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=len(files))
    async with httpx.AsyncClient(trust_env=False, timeout=60, limits=limits, headers=HEADERS) as client:
        return await asyncio.gather(*(client.post(f"{url}/predict", files={"file": ("p", data)}) for data in files))


def post(url: str, data: bytes, headers: dict[str, str] = HEADERS) -> httpx.Response:
    return httpx.post(f"{url}/predict", files={"file": ("p", data)}, headers=headers, timeout=60, trust_env=False)


@pytest.mark.parametrize("topology", ["fused", pytest.param("split", marks=pytest.mark.slow)])
def test_concurrent_answers_equal_the_offline_ones_and_never_mix(started: Any, bundle: Path, topology: str) -> None:
    patches = random_patches(64, seed=11)
    offline = Predictor.load(bundle).decide(patches)
    assert len({round(decision.probability, 4) for decision in offline}) > 50

    def check(url: str) -> None:
        responses = asyncio.run(_post_all(url, [encode(patch) for patch in patches]))
        assert {response.status_code for response in responses} == {200}
        for response, decision in zip(responses, offline, strict=True):
            answer = response.json()
            assert answer["probabilities"]["Metastatic"] == pytest.approx(decision.probability, abs=1e-5)
            assert answer["prediction"] == decision.prediction
            assert answer["review_reasons"] == list(decision.review_reasons)
        assert len({response.json()["request_id"] for response in responses}) == 64
        with Client(url, KEY) as client:
            many = client.predict_array(patches, patches_per_request=40)
            assert [answer.probabilities.Metastatic for answer in many] == pytest.approx([one.probability for one in offline], abs=1e-5)
            assert client.explain(patches[0]).startswith(b"\x89PNG")
        _check_errors(url)
        _check_measures()

    started(ServeConfig(bundle=str(bundle), topology=topology, max_replicas=1, max_body_bytes=200_000), check)


def _check_errors(url: str) -> None:
    assert post(url, good_tif(), {}).status_code == 401
    assert post(url, good_tif(), {"X-API-Key": "wrong"}).status_code == 401
    # Answered although the body was not wanted: the client reads 413 and 401 instead of a reset connection.
    assert post(url, b"x" * 5_000_000).json()["type"] == "urn:sentinode:problem:body_too_large"
    assert post(url, b"x" * 5_000_000, {}).status_code == 401
    assert _post_streamed(url).status_code == 413
    for name, (data, kind, status) in refused_files().items():
        response = post(url, data)
        assert (response.status_code, response.json()["type"]) == (status, f"urn:sentinode:problem:{kind}"), name
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        response = client.get("/healthz", headers={"X-Request-ID": "trace-1"})
        assert response.headers.get_list("x-request-id") == ["trace-1"]
        assert client.get("/").json()["model_loaded"] is True
        assert client.get("/model").status_code == 401
        assert client.get("/model", headers=HEADERS).status_code == 200
        assert client.get("/nothing").json()["type"] == "urn:sentinode:problem:not_found"


def _check_measures() -> None:
    """Prometheus finds on the node's port what was asked and what was decided; Ray exports it some seconds later."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    expected = (
        r'ray_sentinode_requests_total\{.*method="POST".*route="/predict".*status="200".*\} 64\.0',
        r'ray_sentinode_requests_total\{.*route="/predict".*status="401".*\}',
        r'ray_sentinode_decisions_total\{.*needs_review="(true|false)".*prediction="(Normal|Metastatic)".*\}',
        r"ray_sentinode_request_seconds_count\{",
        r"ray_sentinode_batch_patches_sum\{",
        r"ray_sentinode_engine_seconds_count\{",
    )
    end = time.monotonic() + 60
    while True:
        text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=30, trust_env=False).text
        missing = [pattern for pattern in expected if re.search(pattern, text) is None]
        if not missing:
            return
        assert time.monotonic() < end, (missing, [line for line in text.splitlines() if "sentinode_" in line])
        threading.Event().wait(0.5)


def _post_streamed(url: str) -> httpx.Response:
    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.tif"\r\n\r\n'
        for _ in range(50):
            yield b"x" * 100_000

    headers = HEADERS | {"content-type": "multipart/form-data; boundary=b"}
    return httpx.post(f"{url}/predict", content=body(), headers=headers, timeout=60, trust_env=False)


@pytest.mark.slow
def test_ten_thousand_patches_in_flight_get_each_its_own_answer(started: Any, bundle: Path) -> None:
    kinds = random_patches(400, seed=13)
    offline = [decision.probability for decision in Predictor.load(bundle).decide(kinds)]
    files = [encode(patch) for patch in kinds]
    # Far enough apart that no answer could be taken for another one.
    assert len({round(probability, 5) for probability in offline}) > 380

    async def ask(url: str) -> list[float]:
        at_a_time = asyncio.Semaphore(256)

        async with AsyncClient(url, KEY) as client:

            async def one(number: int) -> float:
                async with at_a_time:
                    answer = await client.predict(files[number % 400])
                return answer.probabilities.Metastatic

            return await asyncio.gather(*(one(number) for number in range(10_000)))

    def check(url: str) -> None:
        found = asyncio.run(ask(url))
        assert max(abs(value - offline[number % 400]) for number, value in enumerate(found)) < 1e-5

    started(ServeConfig(bundle=str(bundle), max_replicas=2, min_replicas=2), check)


@pytest.mark.parametrize("topology", ["fused", pytest.param("split", marks=pytest.mark.slow)])
def test_more_requests_than_may_wait_are_answered_429(started: Any, bundle: Path, topology: str) -> None:
    patches = random_patches(48, seed=5)
    offline = Predictor.load(bundle).decide(patches)

    def check(url: str) -> None:
        responses = asyncio.run(_post_all(url, [encode(patch) for patch in patches]))
        assert {response.status_code for response in responses} == {200, 429}
        for response, decision in zip(responses, offline, strict=True):
            if response.status_code == 200:
                assert response.json()["probabilities"]["Metastatic"] == pytest.approx(decision.probability, abs=1e-5)
            else:
                assert response.headers["retry-after"] == "1"

    config = ServeConfig(
        bundle=str(bundle), topology=topology, max_replicas=1, max_batch_size=1, max_ongoing_requests=1, max_queued_requests=1, batch_wait_timeout_s=0
    )
    started(config, check)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    paths = folder / "tls.crt", folder / "tls.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=127.0.0.1",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ]
    subprocess.run([*command, "-out", str(paths[0]), "-keyout", str(paths[1])], check=True, capture_output=True)
    return paths


@pytest.mark.slow
def test_https_is_served_with_a_certificate_and_the_client_checks_it(bundle: Path, certificate: tuple[Path, Path]) -> None:
    patch = random_patches(1)[0]
    asked = []

    def ready(url: str) -> None:
        assert url.startswith("https://")
        with Client(url, verify=str(certificate[0])) as client:
            asked.append(client.predict(patch).prediction)
        with Client(url) as client, pytest.raises(UsageError, match=r"cannot be asked: .*certificate"):
            client.predict(patch)
        raise Interrupted

    config = ServeConfig(bundle=str(bundle), auth="none")
    with pytest.raises(Interrupted):
        run_local(build_app(config), request_timeout_s=30, port=usable_port("127.0.0.1", 0), ready=ready, tls=usable_tls(*map(str, certificate)))
    assert len(asked) == 1


def test_tls_needs_a_certificate_and_its_key(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    assert usable_tls(None, None) is None
    with pytest.raises(UsageError, match="needs both"):
        usable_tls(str(certificate[0]), None)
    for pair in ((tmp_path / "none.crt", certificate[1]), certificate[::-1]):
        with pytest.raises(UsageError, match="cannot be used"):
            usable_tls(*map(str, pair))


def test_serve_is_shut_down_afterwards(started: Any, bundle: Path) -> None:
    urls: list[str] = []
    started(ServeConfig(bundle=str(bundle), auth="none"), urls.append)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{urls[0]}/healthz", trust_env=False, timeout=5)
    assert ray_serve.status().applications == {}


@pytest.mark.slow  # Serve tries a replica three times
def test_a_replica_refuses_a_bundle_that_was_replaced(started: Any, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = make_bundle(tmp_path / "bundle").path
    application = build_app(ServeConfig(bundle=str(mine), auth="none"))
    make_bundle(mine, seed=1)
    with pytest.raises(SentinodeError, match=r"the endpoint did not start: .*was replaced by another bundle") as caught:
        run_local(application, request_timeout_s=30, port=usable_port("127.0.0.1", 0), ready=lambda url: None)
    assert "\n" not in str(caught.value)


def test_an_interrupt_ends_it(bundle: Path) -> None:
    """The way the command line stops it: KeyboardInterrupt in the main thread while it blocks."""

    def interrupt_soon(url: str) -> None:
        # A real signal to the main thread: interrupt_main() would not wake it.
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        threading.Thread(target=signal.pthread_kill, args=(main_thread, signal.SIGINT), daemon=True).start()

    with pytest.raises(KeyboardInterrupt):
        serve_locally(ServeConfig(bundle=str(bundle), auth="none"), interrupt_soon)
