"""A real browser and a real MLflow server: Debian's Chromium without a window, MLflow's UI on a free port."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium")

#: Why there is no browser here; empty where there is one.
MISSING = "" if DRIVER and CHROMIUM else "needs chromium and chromium-driver (apt-get install chromium chromium-driver)"

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)


@contextlib.contextmanager
def browser(profile: Path, *, width: int = 1360, height: int = 900) -> Iterator[webdriver.Chrome]:
    """Provide a Chromium with a new profile."""
    options = Options()
    options.binary_location = CHROMIUM or ""
    for flag in (*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
    try:
        driver.set_page_load_timeout(60)
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def mlflow_ui(tracking_uri: str, folder: Path) -> Iterator[str]:
    """Provide MLflow's server on a database, its artifacts where the database says, and yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", tracking_uri, "--default-artifact-root", (folder / "unused").as_uri()]
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "mlflow.log").read_text(errors="replace")[-2000:])
            time.sleep(0.2)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait(timeout=20)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def close_assistant(driver: webdriver.Chrome) -> None:
    """Close the assistant, which takes a quarter of a new profile's window: the last button beside its name."""
    name = "//*[normalize-space(text())='MLflow Assistant']"
    for button in driver.find_elements(By.XPATH, f"({name}/ancestor::*[count(.//button) > 1][1]//button)"):
        box = button.rect
        if box["y"] < 70 and box["x"] > driver.execute_script("return innerWidth") - 60:
            button.click()
            break


def model_training_mode(driver: webdriver.Chrome, url: str) -> None:
    """Open MLflow in the mode for trained models; a new browser starts in the one for language models."""
    driver.get(f"{url}/#/experiments")
    see(driver, "Experiments")
    button = next((b for b in driver.find_elements(By.XPATH, "//*[normalize-space(text())='Model training']")), None)
    if button is not None:
        button.click()


def see(driver: webdriver.Chrome, text: str, *, seconds: float = 45) -> None:
    """Wait until the page, or the frame that is looked at, shows a text."""

    def shown(d: webdriver.Chrome) -> bool:
        return text in d.find_element(By.TAG_NAME, "body").text

    try:
        WebDriverWait(driver, seconds, ignored_exceptions=(Exception,)).until(shown)
    except Exception as error:
        body = driver.find_element(By.TAG_NAME, "body").text
        raise AssertionError(f"{text!r} is not on {driver.current_url}, which says:\n{body[:3000]}") from error


def find(driver: webdriver.Chrome, xpath: str, *, seconds: float = 45) -> WebElement:
    """Wait for an element that is displayed and return it."""

    def displayed(d: webdriver.Chrome) -> WebElement | None:
        return next((e for e in d.find_elements(By.XPATH, xpath) if e.is_displayed()), None)

    found: WebElement = WebDriverWait(driver, seconds, ignored_exceptions=(Exception,)).until(displayed)
    return found
