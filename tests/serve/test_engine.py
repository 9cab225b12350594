"""The classifier of a replica, without Ray."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sentinode.bundle import Bundle
from sentinode.config import ServeConfig
from sentinode.errors import ManifestError
from sentinode.predictor import Predictor
from serve.engine import Classifier, EngineError
from tests.factories import make_bundle, random_patches

PATCHES = random_patches(9, seed=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def classifier(bundle: Bundle, **settings: Any) -> Classifier:
    config = ServeConfig(**{"bundle": str(bundle.path), "auth": "none", "engine": "torch"} | settings)
    return Classifier(config, bundle.manifest.digest)


def test_single_patches_and_many_get_the_offline_answers_and_the_model_that_spoke(bundle: Bundle) -> None:
    async def run() -> tuple[Any, Any]:
        mine = classifier(bundle)
        return await asyncio.gather(*(mine.classify(patch) for patch in PATCHES)), await mine.classify_many(PATCHES)

    single, (many, speaker) = asyncio.run(run())
    expected = [decision.probability for decision in Predictor(bundle).decide(PATCHES)]
    assert [decision.probability for decision, _ in single] == pytest.approx(expected, abs=1e-5)
    assert [decision.probability for decision in many] == pytest.approx(expected, abs=1e-5)
    assert speaker == single[0][1]
    assert (speaker.model.digest, speaker.model.engine, speaker.threshold) == (bundle.manifest.digest, "torch", bundle.manifest.threshold)


def test_a_map_is_drawn_beside_predictions(bundle: Bundle) -> None:
    async def run() -> Any:
        mine = classifier(bundle)
        return await asyncio.gather(mine.explain(PATCHES[0], 0.5), mine.classify(PATCHES[0]), mine.explain(PATCHES[0], 0))

    (shown, _), _, (plain, _) = asyncio.run(run())
    assert shown.shape == (96, 96, 3)
    assert not np.array_equal(shown, PATCHES[0])
    np.testing.assert_array_equal(plain, PATCHES[0])


def test_a_forward_pass_that_does_not_end_is_bad_health_and_a_busy_one_is_not(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun = threading.Event(), threading.Event()

    async def run() -> None:
        mine = classifier(bundle, engine_timeout_s=0.2)
        decide = mine._predictor.decide

        def hang(*arguments: Any) -> Any:
            begun.set()
            go_on.wait()
            return decide(*arguments)

        monkeypatch.setattr(mine._predictor, "decide", hang)
        task = asyncio.create_task(mine.classify(PATCHES[0]))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        await mine.check_health()
        while time.monotonic() - (mine._running_since or 0) < 0.25:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match=r"running for more than 0\.2 s"):
            await mine.check_health()
        go_on.set()
        await task
        await mine.check_health()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_an_idle_replica_is_probed_and_one_whose_network_is_broken_is_unhealthy(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        mine = classifier(bundle)
        mine._last_pass_at -= 100
        asked = []
        decide = mine._predictor.decide
        monkeypatch.setattr(mine._predictor, "decide", lambda patches: asked.append(len(patches)) or decide(patches))
        await mine.check_health()
        await mine.check_health()
        assert asked == [1]
        mine._last_pass_at -= 100
        monkeypatch.setattr(mine._predictor, "decide", lambda patches: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await mine.check_health()

    asyncio.run(run())


def test_another_bundle_than_the_one_deployed_is_not_served(bundle: Bundle, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", seed=5)
    with pytest.raises(ManifestError, match="was replaced by another bundle"):
        Classifier(ServeConfig(bundle=str(bundle.path), auth="none", engine="torch"), other.manifest.digest)
