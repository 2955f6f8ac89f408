"""Published rules beyond torch.optim, by the plain names under which packages offer them."""

from __future__ import annotations

from audits.updates.rules.adam_kin import (
    ADABELIEF,
    ADABOUND,
    ADAN,
    ADEMAMIX,
    ADOPT,
    QHADAM,
    RADAM_PUBLISHED,
    STABLE_ADAMW,
    YOGI,
)
from audits.updates.rules.averaging import MADGRAD, SCHEDULE_FREE_ADAMW, SCHEDULE_FREE_SGD, SGDW
from audits.updates.rules.base import Rule
from audits.updates.rules.layerwise import LAMB, LARS, NOVOGRAD
from audits.updates.rules.matrix_kin import ADAFACTOR_CAPPED, ADAFACTOR_FAIRSEQ, MUON_PUBLISHED, RMSPROP_TENSORFLOW
from audits.updates.rules.signs import LION, SIGN_SGD, TIGER


def plain_name(name: str) -> str:
    """Return a class's name as it is looked up: LAMB and Lamb are one."""
    return name.replace("_", "").lower()


_NAMES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (LION, ("Lion",)),
    (TIGER, ("Tiger",)),
    (SIGN_SGD, ("SignSGD", "Signum")),
    (LAMB, ("LAMB", "FusedLAMB")),
    (LARS, ("LARS",)),
    (NOVOGRAD, ("NovoGrad",)),
    (ADABELIEF, ("AdaBelief",)),
    (ADAN, ("Adan",)),
    (ADEMAMIX, ("AdEMAMix",)),
    (YOGI, ("Yogi",)),
    (STABLE_ADAMW, ("StableAdamW",)),
    (QHADAM, ("QHAdam",)),
    (ADOPT, ("ADOPT",)),
    (ADABOUND, ("AdaBound",)),
    (RADAM_PUBLISHED, ("RAdam",)),
    (SCHEDULE_FREE_SGD, ("ScheduleFreeSGD", "SGDScheduleFree")),
    (SCHEDULE_FREE_ADAMW, ("ScheduleFreeAdamW", "AdamWScheduleFree")),
    (MADGRAD, ("MADGRAD",)),
    (SGDW, ("SGDW",)),
    (ADAFACTOR_FAIRSEQ, ("Adafactor",)),
    (ADAFACTOR_CAPPED, ("Adafactor",)),
    (MUON_PUBLISHED, ("Muon", "SingleDeviceMuon", "MuonWithAuxAdam", "SingleDeviceMuonWithAuxAdam")),
    (RMSPROP_TENSORFLOW, ("RMSpropTF",)),
)

#: Rules by plain name; several where packages differ so much that another function says it better.
PUBLISHED: dict[str, tuple[Rule, ...]] = {}
for _rule, _classes in _NAMES:
    for _class in _classes:
        PUBLISHED[plain_name(_class)] = (*PUBLISHED.get(plain_name(_class), ()), _rule)
