"""Take the pictures of docs/how_to/mlflow_ui.md: `python docs/screenshots.py DEMO_FOLDER`, after `gradaudit demo`.

Needs Debian's chromium and chromium-driver. Writes docs/images/*.png.
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mlflow.tracking import MlflowClient  # noqa: E402
from PIL import Image  # noqa: E402
from selenium import webdriver  # noqa: E402

from tests.browsing import browser, close_assistant, find, mlflow_ui, model_training_mode, see  # noqa: E402

IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 1360, 820

#: What covers a page in a new profile and has nothing to do with it, and where this machine keeps its files.
_HIDE = """
for (const cover of document.querySelectorAll('[role=dialog], [class*=modal-root], .ant-popover')) cover.remove();
for (const leaf of document.querySelectorAll('*')) {
  if (leaf.children.length === 0 && /^(Path: )?file:/.test(leaf.textContent.trim())) leaf.textContent = '';
}
"""


def take(driver: webdriver.Chrome, name: str, *, settle: float = 1.5) -> None:
    """Save what the window shows, in 200 colours: enough for a page, and small."""
    time.sleep(settle)
    driver.switch_to.default_content()
    driver.execute_script(_HIDE)
    time.sleep(0.7)
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / f"{name}.png"
    image.quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1024:.0f} kB")


def main(folder: Path) -> None:
    """Take them all."""
    tracking_uri = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
    client = MlflowClient(tracking_uri=tracking_uri)
    experiment = client.get_experiment_by_name("gradaudit")
    if experiment is None:
        sys.exit(f"{folder} holds no demo: run `gradaudit demo --folder {folder}` first")
    version = client.get_model_version("digits-classifier", "2")
    run_id = version.tags["audit.run_id"]
    with (
        tempfile.TemporaryDirectory() as temporary,
        mlflow_ui(tracking_uri, Path(temporary) / "server") as url,
        browser(Path(temporary) / "profile", width=WIDTH, height=HEIGHT) as driver,
    ):
        runs = f"{url}/#/experiments/{experiment.experiment_id}/runs"
        model_training_mode(driver, url)
        close_assistant(driver)
        take(driver, "model_training")
        failing = urllib.parse.quote("tags.`audit.outcome` = 'fail'")
        driver.get(f"{runs}?searchFilter={failing}")
        see(driver, "matching runs")
        take(driver, "failing_runs")
        driver.get(f"{runs}/{run_id}")
        see(driver, "audit.n_failed")
        take(driver, "run")
        driver.get(f"{runs}/{run_id}/artifacts/report.html")
        driver.switch_to.frame(find(driver, "//iframe"))
        see(driver, "does not train correctly")
        take(driver, "report")
        driver.switch_to.frame(find(driver, "//iframe"))
        driver.execute_script("document.querySelector('#coverage').scrollIntoView()")
        take(driver, "coverage")
        driver.get("about:blank")  # the same page with another file is not read again otherwise
        driver.get(f"{runs}/{run_id}/artifacts/parameters.json")
        see(driver, "parameters.json")
        take(driver, "parameters", settle=4)
        driver.get(f"{url}/#/models/digits-classifier/versions/2")
        see(driver, "Open the audit's report")
        take(driver, "version")
        driver.get(f"{url}/#/models")
        see(driver, "audit.latest")
        take(driver, "models")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_workspace"))
