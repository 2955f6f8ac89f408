"""Ties that a configuration declares are one tensor, or fail by the name of the head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audits.live.subject import open_subject
from audits.outcomes import Outcome, ResultRow
from audits.recipe.recipe import Recipe
from audits.updates import check_registration

transformers = pytest.importorskip("transformers")


class Speaker(nn.Module):
    """A model in transformers' manner, of one's own."""

    def __init__(self, keys: Any, tie: bool | None, tied: bool) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        if keys is not None:
            self._tied_weights_keys = keys
        if tie is not None:
            self.config = SimpleNamespace(tie_word_embeddings=tie)
        if tied:
            self.head.weight = self.tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.tokens(tokens))


def next_token(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"])[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten())


def judged(model: nn.Module, loss: Any = next_token, batch: Any = None) -> list[ResultRow]:
    torch.manual_seed(0)
    given = batch or {"tokens": torch.randint(0, 11, (2, 5))}
    trained = [p for p in model.parameters() if p.requires_grad]
    recipe = Recipe.capture(model, batch=given, loss=loss, optimizer=torch.optim.SGD(trained, lr=0.1))
    with open_subject(model, recipe, device="cpu") as subject:
        return [r for r in check_registration(subject) if r.check == "registration.tied"]


def failed(rows: list[ResultRow]) -> set[str | None]:
    return {row.parameter for row in rows if row.outcome is Outcome.FAIL}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "keys", [None, ["head.weight"], {"head.weight": "tokens.weight"}], ids=["none", "list", "dict"]
)
def test_a_declared_tie_that_is_none_fails_and_its_twin_passes(keys: Any, dtype: torch.dtype) -> None:
    wrong = judged(Speaker(keys, True, tied=False).to(dtype))
    assert failed(wrong) == {"head.weight"}
    assert all("declares them tied" in row.message for row in wrong if row.outcome is Outcome.FAIL)
    assert failed(judged(Speaker(keys, True, tied=True).to(dtype))) == set()


@pytest.mark.parametrize(
    "keys", [None, ["head.weight"], {"head.weight": "tokens.weight"}], ids=["none", "list", "dict"]
)
def test_what_the_configuration_does_not_tie_may_be_apart(keys: Any) -> None:
    assert failed(judged(Speaker(keys, False, tied=False))) == set()
    assert failed(judged(Speaker(None, None, tied=False))) == set()


def test_a_mapping_of_ties_says_all_of_them() -> None:
    """LUKE's configuration says ``tie_word_embeddings``, and its mapping ties the entities alone."""
    model = Speaker({"twin.weight": "source.weight"}, True, tied=False)
    model.source, model.twin = nn.Linear(2, 2), nn.Linear(2, 2)
    assert failed(judged(model)) == {"twin.weight"}
    model.twin.weight = model.source.weight
    assert failed(judged(model)) == set()


def test_two_frozen_tensors_only_warn() -> None:
    model = Speaker(None, True, tied=False).requires_grad_(False)
    model.extra = nn.Parameter(torch.zeros(11))
    rows = judged(model, lambda m, b: F.cross_entropy(m(b["tokens"]).mean((0, 1)) + m.extra, b["tokens"][0, 0]))
    assert {row.outcome for row in rows if row.parameter == "head.weight"} == {Outcome.WARN}


def build(name: str, tied: bool, declared: bool) -> tuple[nn.Module, str]:
    """A tiny model of transformers; untied behind its configuration's back where ``tied`` is False."""
    small: dict[str, Any] = {"vocab_size": 31, "tie_word_embeddings": declared}
    if name == "GPT2":
        config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **small)
        model, head = transformers.GPT2LMHeadModel(config), "lm_head"
    elif name == "BERT":
        config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=16, **small)  # fmt: skip
        model, head = transformers.BertForMaskedLM(config), "cls.predictions.decoder"
    else:
        config = transformers.LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                          num_key_value_heads=2, intermediate_size=16, **small)  # fmt: skip
        model, head = transformers.LlamaForCausalLM(config), "lm_head"
    if not tied:
        layer = model.get_submodule(head)
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model, f"{head}.weight"


@pytest.mark.parametrize("name", ["GPT2", "BERT", "Llama"])
def test_models_of_transformers(name: str) -> None:
    ids = torch.randint(1, 31, (2, 6))
    batch = {"input_ids": ids, "labels": ids.clone()}
    model, head = build(name, tied=False, declared=True)
    assert failed(judged(model, "model", batch)) == {head}
    assert failed(judged(build(name, tied=True, declared=True)[0], "model", batch)) == set()
    assert failed(judged(build(name, tied=False, declared=False)[0], "model", batch)) == set()
