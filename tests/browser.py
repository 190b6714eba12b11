"""A headless Chromium for tests of pages, driven by selenium, which fetches nothing: the driver is the system's."""

import json
import os
import shutil
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

os.environ |= {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}  # selenium asks nobody for another driver
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> tuple[str, str]:
    """Returns the paths of a browser and its driver; skips the test where there is none, fails it in CI.

    ``CDISTILL_NO_BROWSER`` says that CI has tried to install one, and could not.
    """
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if browser and driver:
        return browser, driver
    reason = "needs chromium and chromedriver: apt-get install chromium chromium-driver"
    if os.environ.get("CI") and shutil.which("apt-get") and not os.environ.get("CDISTILL_NO_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


class Browser:
    """A browser with its network cut off; all that it asks for is logged."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver
        self.call("Network.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def call(self, command: str, **parameters: Any) -> dict[str, Any]:
        """Calls the browser's own protocol."""
        return self.driver.execute_cdp_cmd(command, parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        """Runs a script in the page; the page's policy does not hold for it."""
        return self.driver.execute_script(script, *arguments)

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        """Gives the page a screen."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=mobile, deviceScaleFactor=2)

    def prefer(self, scheme: str, medium: str = "") -> None:
        """Emulates a reader's colour scheme, and print."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=medium, features=features)

    def open(self, page: Path) -> None:
        """Opens a file, after forgetting what was logged."""
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.driver.get(page.resolve().as_uri())

    def requests(self) -> list[str]:
        """Returns the addresses that were asked for since the page was opened; data within the page are none."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [
            event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"
        ]
        return [address for address in asked if not address.startswith("data:")]

    def complaints(self) -> list[str]:
        """Returns what the console says."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def print_pdf(self) -> bytes:
        """Prints the page on A4."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
        return b64decode(self.call("Page.printToPDF", **paper)["data"])

    def screenshot(self, path: Path) -> None:
        """Writes a picture of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(b64decode(found["data"]))


@contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """Yields a browser that keeps its files in `folder`."""
    browser, driver = find_browser()
    options = ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    flags = ["headless=new", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={folder / 'profile'}"]
    flags += ["disable-background-networking", "disable-component-update", "no-first-run", "hide-scrollbars"]
    flags += ["no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to root
    for flag in flags:
        options.add_argument(f"--{flag}")
    chrome = Chrome(options=options, service=Service(driver, log_output=str(folder / "driver.log")))
    try:
        yield Browser(chrome)
    finally:
        chrome.quit()
