"""Every version of the demo trains, the same way every time, and its recipe survives being stored."""

import ast
from pathlib import Path

import pytest
import torch

import flows.demo
from audits.live.subject import open_subject
from audits.recipe.callables import import_object
from audits.recipe.digests import recipe_digest
from flows.demo import char_gpt, data, digits_classifier, digits_gan, frozen_features
from flows.demo.catalogue import DEMO_VERSIONS
from flows.demo.training import seeded
from registry_models.artifacts.factory_files import Factory, read_factory, write_factory
from registry_models.recipes.recipe_files import read_recipe, write_recipe

pytestmark = pytest.mark.slow

#: Beyond this an audit takes too long for a demo.
MAXIMUM_PARAMETERS = 150_000


@pytest.fixture
def few_steps(monkeypatch):
    for module in (digits_classifier, digits_gan, char_gpt, frozen_features):
        monkeypatch.setattr(module, "STEPS", 4)
    monkeypatch.setattr(frozen_features, "PRETRAINING_STEPS", 4)


def each_version():
    return pytest.mark.parametrize("version", DEMO_VERSIONS, ids=lambda version: version.label)


def test_versions_are_numbered_from_one_and_follow_a_right_one():
    for version in DEMO_VERSIONS:
        earlier = [v for v in DEMO_VERSIONS[: DEMO_VERSIONS.index(version)] if v.name == version.name]
        assert version.version == len(earlier) + 1
        assert (version.planted is None) is (version.version == 1)


@each_version()
def test_training_is_deterministic_and_leaves_the_generator_alone(version, few_steps):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = version.train()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = version.train()
    assert first.losses == second.losses
    assert recipe_digest(first.recipe) == recipe_digest(second.recipe)
    for (name, a), b in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@each_version()
def test_the_loss_falls(version, trained):
    losses = trained[version.label].losses
    assert len(losses) <= 900, "MLflow takes 1,000 metrics in one call"
    end = sum(losses[-5:]) / 5
    assert end < 0.9 * losses[0]


@pytest.mark.slow
@each_version()
def test_models_are_small_and_every_parameter_gets_a_gradient(version, trained):
    result = trained[version.label]
    assert sum(p.numel() for p in result.model.parameters()) <= MAXIMUM_PARAMETERS
    with open_subject(result.model, result.recipe) as subject:
        for phase in subject.phases:
            subject.model.zero_grad()
            subject.loss(phase).backward()
            for name, parameter in phase.parameters.items():
                assert parameter.grad is not None, name
                assert bool(parameter.grad.abs().max() > 0), name


@each_version()
def test_recipe_and_weights_survive_being_stored(version, trained, tmp_path):
    result = trained[version.label]
    read = read_recipe(write_recipe(result.recipe, tmp_path))
    assert read == result.recipe
    assert recipe_digest(read) == recipe_digest(result.recipe)
    if result.factory is None:
        assert version.name == "digits-gan"
        assert import_object(f"{type(result.model).__module__}:{type(result.model).__name__}", role="class")
        return
    write_factory(result.model, Factory(result.factory, dict(result.factory_args or {})), tmp_path)
    rebuilt = read_factory(tmp_path)
    for (name, a), b in zip(result.model.state_dict().items(), rebuilt.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("sign", [1, -1])
def test_scaled_gelu_is_right_for_positive_inputs_and_backward_wrong_for_negative_ones(sign):
    x = (sign * torch.linspace(0.25, 2, 8, dtype=torch.float64)).requires_grad_()
    activation = digits_classifier.ScaledGelu().double()
    expected = activation.scale * torch.nn.functional.gelu(x)
    assert torch.allclose(activation(x), expected)
    right = torch.autograd.grad(expected.sum(), (x, activation.scale))
    for got, wanted in zip(torch.autograd.grad(activation(x).sum(), (x, activation.scale)), right, strict=True):
        assert bool((wanted != 0).all())
        if sign > 0:
            assert torch.allclose(got, wanted)
        else:
            assert not got.any()


@pytest.mark.slow
def test_the_gans_second_version_moves_the_generator_in_the_discriminators_phase(trained):
    for number, wrong in ((1, False), (2, True)):
        held = trained[f"digits-gan v{number}"].recipe.phases[0].optimizer.names
        assert any(name.startswith("generator.") for name in held) is wrong
    assert (
        trained["digits-gan v1"].metrics["mean_image_distance"]
        < 0.5 * trained["digits-gan v2"].metrics["mean_image_distance"]
    )


@pytest.mark.slow
def test_the_second_gpt_holds_a_stale_head(trained):
    right, wrong = (trained[f"char-gpt v{number}"].recipe.phases[0].optimizer for number in (1, 2))
    assert not right.unknown
    assert [tensor.likely for tensor in wrong.unknown] == ["head.weight"]
    assert "head.weight" not in wrong.names
    assert trained["char-gpt v1"].recipe.ties == (("tokens.weight", "head.weight"),)


@pytest.mark.slow
def test_the_second_backbone_was_moved(trained):
    assert trained["frozen-features v1"].metrics["backbone_moved_by"] == 0
    assert trained["frozen-features v2"].metrics["backbone_moved_by"] > 1e-3


def test_the_text_is_real_and_has_no_unknown_characters():
    text = data.load_text()
    assert len(text) > 20_000
    read = "".join(data.VOCABULARY[index] for index in text.tolist())
    assert "Iris" in read
    assert len(data.VOCABULARY) == len(set(data.VOCABULARY)) == 96


def test_seeded_restores_the_generator():
    before = torch.get_rng_state()
    with seeded(3):
        torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_models_import_without_mlflow_prefect_or_scikit_learn():
    models = {"mlflow", "prefect", "typer", "sklearn", "registry_models"}
    for path in sorted(Path(flows.demo.__file__).parent.glob("*.py")):
        if path.stem in ("register", "verdicts"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & models, path.name
