"""The page at /ui in a headless Chromium: what a person sees and does, with mouse, keyboard and without a network."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

from sentinode.bundle import Bundle
from sentinode.config import ServeConfig
from sentinode.predictor import Predictor
from serve.auth import key_digest
from serve.http_app import create_http_app
from tests.factories import make_bundle, random_patches
from tests.serve.backends import InProcess
from tests.serve.browsers import chromium
from tests.serve.patch_files import encode
from tests.serve.servers import served

webdriver = pytest.importorskip("selenium.webdriver")

pytestmark = [pytest.mark.browser, pytest.mark.skipif(shutil.which("chromedriver") is None, reason="needs Debian's chromium and chromium-driver")]

WAIT_S = 30


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def predictor(bundle: Bundle) -> Predictor:
    return Predictor(bundle)


def app(predictor: Predictor, keys: tuple[str, ...] = ()) -> FastAPI:
    config = ServeConfig(auth="keys" if keys else "none", engine="torch")
    return create_http_app(InProcess(predictor), predictor.manifest, config, [key_digest(key) for key in keys])


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("SE_OFFLINE", "true")
    driver = chromium(tmp_path / "profile")
    yield driver
    driver.quit()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three patches, of which one is damaged; TIF, which browsers cannot show."""
    paths = [tmp_path / f"{name}.tif" for name in ("first", "second", "damaged")]
    for path, patch in zip(paths, random_patches(3, seed=3), strict=True):
        path.write_bytes(encode(patch))
    paths[2].write_bytes(b"II*\0damaged")
    return paths


def wait_for(browser: Any, condition: Callable[[Any], Any]) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, WAIT_S, poll_frequency=0.1).until(condition)


def text(browser: Any, id_: str) -> str:
    return str(browser.find_element("id", id_).text)


def choose(browser: Any, paths: list[Path]) -> None:
    browser.find_element("id", "files").send_keys("\n".join(map(str, paths)))


def check_no_complaints(browser: Any) -> None:
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "favicon" not in entry["message"]]
    assert not [entry for entry in severe if "422" not in entry["message"]], severe


def test_patches_are_answered_and_shown_with_their_map(browser: Any, predictor: Predictor, files: list[Path]) -> None:
    decisions = predictor.decide(random_patches(3, seed=3)[:2])
    with served(app(predictor)) as url:
        browser.get(f"{url}/ui")
        wait_for(browser, lambda _: "Research use only" in text(browser, "notice"))
        choose(browser, files)
        wait_for(browser, lambda _: text(browser, "status").startswith("3 of 3 answered"))
        assert "1 not usable" in text(browser, "status")
        # The first one answered is shown, whichever it was: go to the top with the keyboard.
        listed = browser.find_element("id", "list")
        listed.send_keys(webdriver.Keys.HOME)
        wait_for(browser, lambda _: text(browser, "file-name") == "first.tif")
        assert text(browser, "decision") == decisions[0].prediction
        assert f"{100 * decisions[0].probability:.1f} %" in text(browser, "numbers")
        assert browser.find_element("id", "review").is_displayed() is decisions[0].needs_review
        wait_for(browser, lambda _: _shown(browser, "patch") and _shown(browser, "map"))
        # What is under the map is the very patch.
        np.testing.assert_array_equal(_pixels(browser, "patch"), random_patches(3, seed=3)[0])
        assert not np.array_equal(_pixels(browser, "map"), _pixels(browser, "patch"))
        slider = browser.find_element("id", "opacity")
        slider.send_keys(webdriver.Keys.END)
        assert (text(browser, "opacity-value"), browser.find_element("id", "map").value_of_css_property("opacity")) == ("100 %", "1")
        slider.send_keys(webdriver.Keys.HOME)
        assert browser.find_element("id", "map").value_of_css_property("opacity") == "0"
        listed.send_keys(webdriver.Keys.ARROW_DOWN)
        wait_for(browser, lambda _: text(browser, "file-name") == "second.tif")
        assert text(browser, "decision") == decisions[1].prediction
        listed.send_keys(webdriver.Keys.END)
        wait_for(browser, lambda _: "truncated or damaged" in text(browser, "problem"))
        assert not browser.find_element("id", "decision").is_displayed()
        browser.find_element("css selector", "#card-area summary").click()
        assert predictor.manifest.digest in text(browser, "card")
        check_no_complaints(browser)


def _shown(browser: Any, id_: str) -> bool:
    return bool(browser.execute_script("const i = document.getElementById(arguments[0]); return i.complete && i.naturalWidth > 0", id_))


def _pixels(browser: Any, id_: str) -> Any:
    script = """
    const image = document.getElementById(arguments[0]), canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
    return [canvas.height, canvas.width, Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data)];
    """
    height, width, values = browser.execute_script(script, id_)
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def test_a_key_is_asked_for_and_used(browser: Any, predictor: Predictor, files: list[Path]) -> None:
    with served(app(predictor, keys=("right",))) as url:
        browser.get(f"{url}/ui")
        key = wait_for(browser, lambda _: (field := browser.find_element("id", "key")).is_displayed() and field)
        choose(browser, files[:1])
        wait_for(browser, lambda _: "1 not usable" in text(browser, "status"))
        key.send_keys("right" + webdriver.Keys.ENTER)
        wait_for(browser, lambda _: text(browser, "status").startswith("1 of 1 answered, ") and "not usable" not in text(browser, "status"))
        assert not key.is_displayed()
        wait_for(browser, lambda _: browser.find_element("id", "card-area").is_displayed())


def test_the_api_is_described_on_a_page_that_needs_nobody_else(browser: Any, predictor: Predictor) -> None:
    with served(app(predictor)) as url:
        browser.get(f"{url}/docs")
        wait_for(browser, lambda _: "/v1/predict/batch" in browser.find_element("id", "swagger-ui").text)
        assert "Research use only" in browser.find_element("id", "swagger-ui").text
        check_no_complaints(browser)


def test_names_of_files_are_text_and_never_leave_the_page(browser: Any, predictor: Predictor, tmp_path: Path) -> None:
    seen: list[bytes] = []
    application = app(predictor)

    async def listening(scope: Any, receive: Any, send: Any) -> None:
        async def receive_and_keep() -> Any:
            message = await receive()
            seen.append(message.get("body", b""))
            return message

        seen.append(str(scope.get("path", "")).encode() + scope.get("query_string", b"") + str(scope.get("headers", "")).encode())
        await application(scope, receive_and_keep, send)

    path = tmp_path / "<img src=x onerror=document.title='owned'> patient-7.tif"
    path.write_bytes(encode(random_patches(1)[0]))
    with served(listening) as url:
        browser.get(f"{url}/ui")
        choose(browser, [path])
        wait_for(browser, lambda _: text(browser, "file-name") == path.name)
        wait_for(browser, lambda _: _shown(browser, "map"))
        assert browser.title == "Sentinode"
    assert not any(b"patient-7" in one for one in seen)


def test_only_those_to_review_can_be_shown_and_all_can_be_cleared(browser: Any, predictor: Predictor, tmp_path: Path) -> None:
    patches = random_patches(12, seed=5)
    flagged = sum(decision.needs_review for decision in predictor.decide(patches))
    assert flagged > 0
    paths = []
    for number, patch in enumerate(patches):
        paths.append(tmp_path / f"{number:02d}.png")
        paths[-1].write_bytes(encode(patch, "PNG"))
    with served(app(predictor)) as url:
        browser.get(f"{url}/ui")
        choose(browser, paths)
        wait_for(browser, lambda _: text(browser, "status") == f"12 of 12 answered, {flagged} to review")
        browser.find_element("id", "only-review").click()
        assert len(browser.find_elements("css selector", "#list li")) == flagged
        browser.find_element("id", "clear").click()
        assert not browser.find_element("id", "detail").is_displayed()
        assert browser.find_elements("css selector", "#list li") == []
