"""Reference rules: of torch.optim's optimizers by class name, of published ones by plain name."""

from __future__ import annotations

from audits.updates.rules.adam import ADAM, ADAMAX, ADAMW, NADAM, RADAM, SPARSE_ADAM
from audits.updates.rules.adaptive import ADADELTA, ADAGRAD, RMSPROP, RPROP
from audits.updates.rules.base import Options, Rule, State
from audits.updates.rules.matrix import ADAFACTOR, MUON
from audits.updates.rules.published import PUBLISHED, plain_name
from audits.updates.rules.sgd import ASGD, SGD

#: Rules of one tensor. LBFGS, which couples all tensors and calls its closure, is in `rules.lbfgs`.
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (SGD, ASGD, ADAM, ADAMW, NADAM, RADAM, ADAMAX, SPARSE_ADAM, ADAGRAD, ADADELTA, RMSPROP, RPROP,
                 ADAFACTOR, MUON)
}  # fmt: skip

__all__ = ["PUBLISHED", "RULES", "Options", "Rule", "State", "plain_name"]
