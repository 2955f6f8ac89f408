"""What a person finds in MLflow's UI, in a real browser: from the failing runs to the finding and back."""

from __future__ import annotations

import urllib.parse
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

pytest.importorskip("selenium", reason="needs selenium (pip install 'gradaudit[dev]')")

from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from flows.one_audit.one_version import Target, audit_version
from flows.settings.environment import GradauditSettings
from registry_models.registry.versions import list_versions
from tests.browsing import MISSING, browser, find, mlflow_ui, model_training_mode, see
from tests.flows.choosing.test_notifying import register_failing
from tests.stores import register_linear

pytestmark = [pytest.mark.end_to_end, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

CAUSE = "the optimizer's options are not those declared"
FINDING = "the optimizer of phase 'step' is SGD, expect declares Adam"


@pytest.mark.exhaustive
def test_a_person_finds_the_failing_version_its_finding_and_its_report(client: MlflowClient, tmp_path: Path) -> None:
    register_linear("fine")
    register_failing("broken")
    settings = GradauditSettings.load(tracking_uri=client.tracking_uri, results=str(tmp_path / "results"))
    for version in list_versions(client):
        audit_version(Target(version, "registration"), client, settings)
    experiment = client.get_experiment_by_name("gradaudit")
    assert experiment is not None
    with mlflow_ui(client.tracking_uri, tmp_path / "server") as url, browser(tmp_path / "profile") as driver:
        model_training_mode(driver, url)
        runs = f"{url}/#/experiments/{experiment.experiment_id}/runs"
        failing = urllib.parse.quote("tags.`audit.outcome` = 'fail'")
        driver.get(f"{runs}?searchFilter={failing}")
        see(driver, "1 matching run")
        assert "fine v1" not in driver.find_element(By.TAG_NAME, "body").text
        find(driver, "//a[normalize-space()='broken v1']").click()
        see(driver, "audit.n_failed")
        see(driver, f"{CAUSE} (registration.hyperparameters). {FINDING[0].upper()}{FINDING[1:]}")  # the note
        run_id = client.get_model_version("broken", "1").tags["audit.run_id"]
        assert run_id in driver.current_url

        driver.get("about:blank")
        driver.get(f"{runs}/{run_id}/artifacts/parameters.json")
        see(driver, "gradient_error")  # the table's headings, not its JSON
        see(driver, "weight")

        driver.get("about:blank")
        driver.get(f"{url}/#/models/broken/versions/1")
        see(driver, f"FAIL: {CAUSE} (registration.hyperparameters)")
        find(driver, '//a[normalize-space()="Open the audit\'s report"]').click()
        WebDriverWait(driver, 30).until(lambda d: len(d.window_handles) == 2)  # MLflow opens it in a tab of its own
        driver.switch_to.window(driver.window_handles[-1])
        see(driver, "audit.n_failed")
        assert run_id in driver.current_url, "the version's link leads to its run"

        driver.get("about:blank")
        driver.get(f"{runs}/{run_id}/artifacts/report.html")
        driver.switch_to.frame(find(driver, "//iframe"))
        see(driver, "broken v1 does not train correctly")
        see(driver, FINDING)
        find(driver, "//input[@id='find']").send_keys("bias")
        see(driver, "1 of 2")  # the report's own script runs inside MLflow's frame
        blocked = [e["message"] for e in driver.get_log("browser") if "Content Security Policy" in e["message"]]
        assert blocked == [], "the report asks for nothing that its policy forbids"
