"""A headless Chromium (Debian's packages chromium and chromium-driver), driven by Selenium."""

import shutil
from pathlib import Path
from typing import Any


def chromium(profile: Path, *, width: int = 1280, height: int = 900) -> Any:
    """Return a driver; every host but 127.0.0.1 is unknown to it, so that whatever needs another one fails."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    rules = "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    flags = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}", f"--host-resolver-rules={rules}"]
    for flag in [*flags, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
