"""What micro-batches weigh is found from the losses, and a step is held against the loss of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audits.lanes.separation import find_weighings
from audits.live.subject import open_subject
from audits.live.weighing import Weighing
from audits.outcomes import Outcome, ResultRow
from audits.recipe.recipe import Recipe
from audits.updates import check_updates

VOCABULARY, WIDTH = 11, 8

Batch = dict[str, torch.Tensor]


class Language(nn.Module):
    """Embedding, mixing over positions, dropout, head; with a BatchNorm where one is asked for."""

    def __init__(self, *, batch_norm: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.norm = nn.BatchNorm1d(WIDTH) if batch_norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.mix(self.embedding(tokens))
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        return self.head(self.drop(hidden))


def tokens(*counts: int, width: int = 6, rows: int = 3) -> list[Batch]:
    """Micro-batches of which so many labels count, spread over all positions."""
    torch.manual_seed(1)
    batches = []
    for count in counts:
        given = torch.randint(1, VOCABULARY, (rows, width))
        labels = torch.full((rows * width,), -100)
        places = torch.randperm(rows * width)[:count]
        labels[places] = torch.randint(1, VOCABULARY, (count,))
        batches.append({"tokens": given, "labels": labels.view(rows, width)})
    return batches


def mean_of_tokens(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())


def shifted(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def padded(model: nn.Module, batch: Batch) -> torch.Tensor:
    labels = batch["labels"].clamp(min=0)
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), labels.flatten(), ignore_index=0)


def masked(model: nn.Module, batch: Batch) -> torch.Tensor:
    each = F.cross_entropy(
        model(batch["tokens"]).flatten(0, 1), batch["labels"].clamp(min=0).flatten(), reduction="none"
    )
    return (each * batch["mask"].flatten()).sum() / batch["mask"].sum()


def summed(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum")


def class_weighted(model: nn.Module, batch: Batch) -> torch.Tensor:
    weight = torch.linspace(0.2, 2.0, VOCABULARY)
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), weight=weight)


def row_by_row(model: nn.Module, batch: Batch) -> torch.Tensor:
    each = F.cross_entropy(model(batch["tokens"]).transpose(1, 2), batch["labels"], reduction="none")
    return each.sum(1).div((batch["labels"] != -100).sum(1).clamp(min=1)).mean()


def sampled(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A loss that draws: noise on the logits, another one in each row."""
    logits = model(batch["tokens"])
    return F.cross_entropy((logits + 0.3 * torch.randn_like(logits)).flatten(0, 1), batch["labels"].flatten())


def contrastive(model: nn.Module, batch: Batch) -> torch.Tensor:
    rows = F.normalize(model(batch["tokens"]).mean(1), dim=-1)
    again = F.normalize(model(batch["tokens"].flip(1)).mean(1), dim=-1)
    return F.cross_entropy(rows @ again.T / 0.2, torch.arange(len(rows)))


def told(model: nn.Module, batch: Batch, num_items_in_batch: int | None = None) -> torch.Tensor:
    """A loss in transformers' manner: the sum over the whole batch's count."""
    logits, labels = model(batch["tokens"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    if num_items_in_batch is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def counts(batches: list[Batch], first: int = 0) -> list[float]:
    found = [float((b["labels"][:, first:] != -100).sum()) for b in batches]
    return [count / sum(found) for count in found]


def found_by(loss: Any, batch: Any, model: nn.Module | None = None, **arguments: Any) -> tuple[Weighing, list[float]]:
    torch.manual_seed(0)
    model = model or Language()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer, **arguments)
    with open_subject(model, recipe, device="cpu") as subject:
        find_weighings(subject)
        phase = subject.phases[0]
        return subject.weighings[phase.name], [weight for weight, _ in subject.micro_batches(phase)]


UNEQUAL = tokens(3, 17, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        (mean_of_tokens, counts(UNEQUAL)),
        (shifted, counts(UNEQUAL, 1)),
        (padded, counts(UNEQUAL)),
        (sampled, counts(UNEQUAL)),
        (row_by_row, [1 / 3] * 3),
        (summed, [1.0] * 3),
    ],
)
def test_weights_are_found(loss: Any, weights: list[float], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weighing, found = found_by(loss, UNEQUAL, Language().to(dtype))
    assert found == pytest.approx(weights, abs=1e-12)
    assert weighing.unit == ""


def test_a_mask_counts() -> None:
    batches = [{**b, "mask": (b["labels"] != -100).float()} for b in UNEQUAL]
    assert found_by(masked, batches)[1] == pytest.approx(counts(UNEQUAL))


def test_weights_that_nothing_counts_are_solved_for() -> None:
    weighing, found = found_by(class_weighted, UNEQUAL)
    scale = torch.linspace(0.2, 2.0, VOCABULARY)
    total = [float(scale[b["labels"][b["labels"] != -100]].sum()) for b in UNEQUAL]
    assert weighing.fixed
    assert found == pytest.approx([t / sum(total) for t in total], rel=1e-6)


def test_rows_of_other_lengths_are_padded() -> None:
    batches = [*tokens(3, width=4), *tokens(17, width=7)]
    assert found_by(mean_of_tokens, batches)[1] == pytest.approx(counts(batches))


def test_unequal_rows_count() -> None:
    torch.manual_seed(2)
    batches = [{"inputs": torch.randn(n, 4), "targets": torch.randn(n, 2)} for n in (2, 5)]
    assert found_by(nn.MSELoss(), batches, nn.Linear(4, 2))[1] == pytest.approx([2 / 7, 5 / 7])


def test_accumulate_cuts_unequal_counts() -> None:
    whole = {key: torch.cat([b[key] for b in UNEQUAL]) for key in ("tokens", "labels")}
    assert found_by(mean_of_tokens, whole, accumulate=3)[1] == pytest.approx(counts(UNEQUAL))


def test_a_micro_batch_without_targets_is_left_out() -> None:
    batches = tokens(0, 7)
    assert found_by(mean_of_tokens, batches)[1] == [0.0, 1.0]


def test_what_is_declared_is_not_looked_for() -> None:
    assert found_by(mean_of_tokens, UNEQUAL, normalize="mean")[1] == pytest.approx([1 / 3] * 3)
    assert found_by(row_by_row, UNEQUAL, normalize="tokens:labels")[1] == pytest.approx(counts(UNEQUAL))


def test_a_loss_that_does_not_separate_has_micro_batches_for_its_unit() -> None:
    weighing, found = found_by(contrastive, UNEQUAL)
    assert found == pytest.approx([1 / 3] * 3)
    assert "does not separate" in weighing.unit


def test_batch_norm_separates_in_eval_mode_alone() -> None:
    weighing, found = found_by(mean_of_tokens, UNEQUAL, Language(batch_norm=True))
    assert found == pytest.approx(counts(UNEQUAL))
    assert "BatchNorm" in weighing.unit


def test_a_loss_is_told_the_whole_count() -> None:
    torch.manual_seed(0)
    model = Language(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=UNEQUAL, loss=told, optimizer=optimizer)
    with open_subject(model, recipe, device="cpu") as subject:
        find_weighings(subject)
        phase = subject.phases[0]
        assert phase.items == sum(int((b["labels"][:, 1:] != -100).sum()) for b in UNEQUAL)
        assert [weight for weight, _ in subject.micro_batches(phase)] == [1.0] * 3
        whole = {key: torch.cat([b[key] for b in UNEQUAL]) for key in ("tokens", "labels")}
        assert subject.loss(phase).item() == pytest.approx(told(model, whole).item(), rel=1e-6)


Step = Any


def accumulating(loss: Any, share: Any) -> Step:
    """A step that weighs each micro-batch's loss by ``share(batch, batches)``."""

    def step(model: nn.Module, batches: list[Batch], context: Any) -> None:
        context.optimizer.zero_grad()
        for batch in batches:
            (loss(model, batch) * share(batch, batches)).backward()
        context.optimizer.step()

    return step


def by_mean(batch: Batch, batches: list[Batch]) -> float:
    return 1.0 / len(batches)


def by_tokens(batch: Batch, batches: list[Batch]) -> float:
    return float((batch["labels"] != -100).sum() / sum((b["labels"] != -100).sum() for b in batches))


def in_full(batch: Batch, batches: list[Batch]) -> float:
    return 1.0


def audited(loss: Any, share: Any, batch: Any, dtype: torch.dtype = torch.float32, **options: Any) -> list[ResultRow]:
    torch.manual_seed(0)
    model = Language(**options).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer, step=accumulating(loss, share))
    with open_subject(model, recipe, device="cpu") as subject:
        return [row for row in check_updates(subject) if row.check == "step.gradient"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_mean_of_means_fails_and_weighing_by_tokens_passes(dtype: torch.dtype) -> None:
    wrong = audited(mean_of_tokens, by_mean, UNEQUAL, dtype)
    failed = [row for row in wrong if row.outcome is Outcome.FAIL]
    assert {row.parameter for row in failed} >= {"embedding.weight", "head.weight", "head.bias"}
    assert all("a mean of means" in row.message and "'labels' that are not -100" in row.message for row in failed)
    right = audited(mean_of_tokens, by_tokens, UNEQUAL, dtype)
    assert right
    assert all(row.outcome is Outcome.PASS for row in right)


@pytest.mark.parametrize("share", [by_mean, by_tokens])
def test_with_equal_counts_both_pass(share: Any) -> None:
    rows = audited(mean_of_tokens, share, tokens(9, 9))
    assert rows
    assert all(row.outcome is Outcome.PASS and "unit" not in row.message for row in rows)


def test_a_sum_is_added_up() -> None:
    assert all(row.outcome is Outcome.PASS for row in audited(summed, in_full, UNEQUAL))
    wrong = [row for row in audited(summed, by_mean, UNEQUAL) if row.outcome is Outcome.FAIL]
    assert wrong
    assert all("the mean over 3 micro-batches instead of their sum" in row.message for row in wrong)


def test_a_mean_is_not_added_up() -> None:
    wrong = [row for row in audited(mean_of_tokens, in_full, tokens(9, 9)) if row.outcome is Outcome.FAIL]
    assert wrong
    assert all("the sum over 2 micro-batches instead of their mean" in row.message for row in wrong)


@pytest.mark.parametrize("share", [by_mean, by_tokens])
def test_where_losses_do_not_tell_either_mean_passes_and_says_so(share: Any) -> None:
    rows = audited(contrastive, share, UNEQUAL)
    assert rows
    assert all(row.outcome is Outcome.PASS for row in rows)
    assert all("does not separate over the batch" in row.message for row in rows)
    assert all("micro-batches are the unit" in row.message for row in rows)


def test_where_losses_do_not_tell_a_sum_still_fails() -> None:
    assert any(row.outcome is Outcome.FAIL for row in audited(contrastive, in_full, UNEQUAL))


@pytest.mark.parametrize(("share", "outcome"), [(by_mean, Outcome.FAIL), (by_tokens, Outcome.PASS)])
def test_batch_norm_weighs_by_tokens_and_says_that_micro_batches_are_the_unit(share: Any, outcome: Outcome) -> None:
    rows = audited(mean_of_tokens, share, UNEQUAL, batch_norm=True)
    assert {row.outcome for row in rows if row.parameter == "head.weight"} == {outcome}
    assert outcome is Outcome.FAIL or all("micro-batches are the unit" in row.message for row in rows)


def test_a_share_of_the_whole_count_passes_and_one_of_each_fails() -> None:
    def share(model: nn.Module, batches: list[Batch], context: Any, count: int | None) -> None:
        context.optimizer.zero_grad()
        for batch in batches:
            own = int((batch["labels"][:, 1:] != -100).sum())
            told(model, batch, count or own).backward()
        context.optimizer.step()

    total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in UNEQUAL)
    for count, outcome in ((total, Outcome.PASS), (None, Outcome.FAIL)):
        torch.manual_seed(0)
        model = Language()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recipe = Recipe.capture(
            model, batch=UNEQUAL, loss=told, optimizer=optimizer,
            step=lambda m, b, c, count=count: share(m, b, c, count),
        )  # fmt: skip
        with open_subject(model, recipe, device="cpu") as subject:
            rows = [row for row in check_updates(subject) if row.check == "step.gradient"]
        assert {row.outcome for row in rows if row.parameter == "head.weight"} == {outcome}
