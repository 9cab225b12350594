"""The pictures of the page in docs/serving.

SE_OFFLINE=true python -m tests.serve.screenshots --bundle out/run/bundle --patches kaggle/train --out docs/serving
"""

import argparse
import sys
import tempfile
from pathlib import Path

from selenium.webdriver import Keys
from selenium.webdriver.support.ui import WebDriverWait

from sentinode.config import ServeConfig
from sentinode.predictor import Predictor
from serve.http_app import create_http_app
from tests.serve.backends import InProcess
from tests.serve.browsers import chromium
from tests.serve.servers import served

PATCHES = 12


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("bundle", "patches", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args(argv)
    predictor = Predictor.load(args.bundle)
    app = create_http_app(InProcess(predictor), predictor.manifest, ServeConfig(auth="none", engine="torch"))
    args.out.mkdir(parents=True, exist_ok=True)
    with served(app) as url, tempfile.TemporaryDirectory() as profile:
        for name, width, height in (("page", 1280, 860), ("narrow", 430, 1500)):
            browser = chromium(Path(profile) / name, width=width, height=height)
            browser.get(f"{url}/ui")
            browser.find_element("id", "files").send_keys("\n".join(str(path.resolve()) for path in sorted(args.patches.glob("*.tif"))[:PATCHES]))
            wait = WebDriverWait(browser, 60)
            wait.until(lambda one: one.find_element("id", "status").text.startswith(f"{PATCHES} of {PATCHES}"))
            browser.find_element("id", "list").send_keys(Keys.HOME)
            wait.until(lambda one: one.execute_script("return document.getElementById('map').naturalWidth > 0"))
            browser.save_screenshot(str(args.out / f"{name}.png"))
            browser.quit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
