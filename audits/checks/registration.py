"""Registration: the right tensors are in the optimizers, once each, trainable and tied as declared."""

from __future__ import annotations

from audits.checks.check import Check

COVERAGE = Check(
    name="registration.coverage",
    unmet="trainable parameters are in no optimizer",
    claim="Every trainable parameter is in an optimizer of some phase, or declared frozen.",
    bound="none missing",
    blind_to="a parameter that is held, but by the wrong group",
    where_to_look="Was the module made, or replaced, after the optimizer was built? Build the optimizer last.",
)

STALE = Check(
    name="registration.stale",
    unmet="an optimizer holds tensors that are not the model's",
    claim="Every tensor that an optimizer holds is a live parameter of the model.",
    bound="none stale",
    blind_to="nothing that identity can show",
    where_to_look="Was the module replaced, cast or moved in a way that made new tensors after the optimizer was "
    "built? Build the optimizer last.",
)

REACHES_LOSS = Check(
    name="registration.reaches-loss",
    claim="Every leaf that requires a gradient and reaches a loss is a parameter of the model, or an optimizer holds "
    "it; every trainable parameter reaches a loss.",
    unmet="what reaches the loss is no parameter of the model",
    bound="none besides; a network in eval mode, and a parameter that no loss uses, warn",
    blind_to="what a reentrant checkpoint or a custom Function hides from the loss's graph",
    where_to_look="Layers in a plain list or dict, tensors that are attributes or buffers, networks that the loss "
    "function holds: nn.ModuleList, nn.ModuleDict, nn.Parameter, or requires_grad_(False).",
)

OPTIMIZER_WHOLE = Check(
    name="registration.optimizer-whole",
    unmet="the optimizer under audit is not the one that trains",
    claim="The optimizer under audit is the one that trains, with its attributes, hooks and a `step` of its own.",
    bound="nothing missing",
    blind_to="what its functions refer to outside of themselves: global variables, files, other processes",
    where_to_look="Lambdas, functions made inside functions and objects on the optimizer cannot be stored: move "
    "functions to a module, keep plain values.",
)

DUPLICATE = Check(
    name="registration.duplicate",
    unmet="an optimizer holds a parameter twice",
    claim="Each parameter is registered once per optimizer.",
    bound="once",
    where_to_look="Parameter lists that are joined (`a + b`) may hold the same, or a tied, parameter twice.",
)

REQUIRES_GRAD = Check(
    name="registration.requires-grad",
    unmet="parameters are not trainable or frozen as declared",
    claim="Parameters are trainable and frozen as `expect` declares.",
    bound="equal",
    blind_to="what nobody declared: the row is then skipped",
    where_to_look="requires_grad_(False) must come before the optimizer is built, and survive later train() code.",
)

HYPERPARAMETERS = Check(
    name="registration.hyperparameters",
    unmet="the optimizer's options are not those declared",
    claim="The optimizer's class and each group's options are those that `expect` declares.",
    bound="equal",
    blind_to="what nobody declared: the row is then skipped",
    where_to_look="Look at the order of the param groups and at options set on a group after construction.",
)

TIED = Check(
    name="registration.tied",
    unmet="tied parameters are not one tensor",
    claim="Parameters tied when the recipe was captured, or by the model's configuration, are one tensor after "
    "loading, before and after the step; no two Parameters lie on one memory.",
    bound="identity; no element in common",
    where_to_look="Tie the weights again after loading, or save them in a format that keeps ties; tie by assigning "
    "the Parameter itself, not its .data.",
)

STATE_ROUND_TRIP = Check(
    name="registration.state-round-trip",
    unmet="the optimizer goes on differently after saving and loading",
    claim="An optimizer that is saved and loaded goes on exactly as one that never stopped.",
    formula="elements of theta that differ, bit for bit, over the steps after loading",
    bound="equality",
    blind_to="state kept by the training script itself (data order, random generators)",
    where_to_look="State that lives outside `optimizer.state` and `param_groups` is not in state_dict().",
)

CHECKS = (
    COVERAGE,
    STALE,
    REACHES_LOSS,
    OPTIMIZER_WHOLE,
    DUPLICATE,
    REQUIRES_GRAD,
    HYPERPARAMETERS,
    TIED,
    STATE_ROUND_TRIP,
)
