"""Registering the demo: every version once, whatever happened before."""

import mlflow
import pytest
import torch

from audits.errors import InputError
from flows.demo import char_gpt, digits_classifier, digits_gan, frozen_features, register
from flows.demo.catalogue import DEMO_VERSIONS
from flows.demo.register import EXPERIMENT, RUN_TAG, register_demo
from registry_models.artifacts.factory_files import read_factory
from registry_models.recipes.recipe_files import read_recipe


@pytest.fixture(autouse=True)
def _short_trainings(tmp_path, monkeypatch):
    for module in (digits_classifier, digits_gan, char_gpt, frozen_features):
        monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(frozen_features, "PRETRAINING_STEPS", 2)
    monkeypatch.chdir(tmp_path)


def only(monkeypatch, *labels):
    monkeypatch.setattr(register, "DEMO_VERSIONS", tuple(v for v in DEMO_VERSIONS if v.label in labels))


@pytest.mark.end_to_end
def test_registering_twice_makes_nothing_new(client, tmp_path, capfd):
    capfd.readouterr()
    seen = []
    first = register_demo(client, on_progress=seen.append)
    assert capfd.readouterr() == ("", "")
    assert seen == first
    assert [(r.name, r.version) for r in first] == [(v.name, v.version) for v in DEMO_VERSIONS]
    assert not any(r.reused for r in first)
    assert [r.planted for r in first] == [v.planted for v in DEMO_VERSIONS]

    second = register_demo(client)
    assert all(r.reused for r in second)
    assert [(r.uri, r.run_id) for r in second] == [(r.uri, r.run_id) for r in first]
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert len(client.search_runs([experiment.experiment_id])) == len(DEMO_VERSIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifacts", "mlflow.db"]

    gpt = next(r for r in first if r.label == "char-gpt v2")
    run = client.get_run(gpt.run_id)
    assert run.data.tags[RUN_TAG] == "char-gpt v2"
    assert run.data.params["optimizer_name"] == "AdamW"
    assert run.data.metrics["final_loss"] == pytest.approx(gpt.final_loss)
    assert len(client.get_metric_history(gpt.run_id, "loss")) == 2
    assert [m.model_id for m in run.outputs.model_outputs]
    folder = mlflow.artifacts.download_artifacts(gpt.uri, dst_path=str(tmp_path / "download"))
    stored = tmp_path / "download" / "extra_files" / "audit"
    assert folder
    assert read_recipe(stored).phases[0].optimizer.unknown[0].likely == "head.weight"
    assert isinstance(read_factory(stored), torch.nn.Module)


@pytest.mark.slow
def test_an_interrupted_registration_is_completed_with_the_right_numbers(client, monkeypatch):
    labels = ("tutorial-linear v1", "digits-classifier v1", "digits-classifier v2")
    only(monkeypatch, *labels)
    log_model = register.log_model

    def interrupted(model, name, **options):
        if name == "digits-classifier":
            client.create_registered_model(name)
            raise KeyboardInterrupt
        return log_model(model, name, **options)

    monkeypatch.setattr(register, "log_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        register_demo(client)
    monkeypatch.setattr(register, "log_model", log_model)
    completed = register_demo(client)
    assert [(r.label, r.reused) for r in completed] == list(zip(labels, (True, False, False), strict=True))
    assert mlflow.active_run() is None


def test_somebody_elses_model_of_the_same_name_is_refused(client, monkeypatch):
    only(monkeypatch, "tutorial-linear v1")
    client.create_registered_model("tutorial-linear")
    client.create_model_version("tutorial-linear", source="file:///nowhere")
    with pytest.raises(InputError, match="no tutorial-linear v1 of the demo's"):
        register_demo(client)
