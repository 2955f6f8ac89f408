"""The claims of the update audit, by name: what each one says, its threshold and what it cannot see."""

from __future__ import annotations

from audits.outcomes import Check, Severity

_STEP = "Without a `step` function in the recipe the step is the audit's own, and the row is skipped."

UPDATE_CHECKS: tuple[Check, ...] = (
    Check(
        name="registration.coverage",
        claim="Every trainable parameter is in an optimizer of some phase, or declared frozen.",
        threshold="none missing",
        blind_to="a parameter that is held, but by the wrong group",
        where_to_look="Was the module made, or replaced, after the optimizer was built? Build the optimizer last.",
    ),
    Check(
        name="registration.stale",
        claim="Every tensor that an optimizer holds is a live parameter of the model.",
        threshold="none stale",
        blind_to="nothing that identity can show",
        where_to_look="Was the module replaced, cast or moved in a way that made new tensors after the optimizer was "
        "built?",
    ),
    Check(
        name="registration.optimizer-whole",
        claim="The optimizer under audit is the one that trains, with its attributes, hooks and a `step` of its own.",
        threshold="nothing missing",
        blind_to="what its functions refer to outside of themselves: global variables, files, other processes",
        where_to_look="Lambdas, functions made inside functions and objects on the optimizer cannot be stored: move "
        "functions to a module, keep plain values.",
    ),
    Check(
        name="registration.duplicate",
        claim="Each parameter is registered once per optimizer.",
        threshold="once",
        where_to_look="Parameter lists that are joined (`a + b`) may hold the same, or a tied, parameter twice.",
    ),
    Check(
        name="registration.requires-grad",
        claim="Parameters are trainable and frozen as `expect` declares.",
        threshold="equal",
        blind_to="what nobody declared: the row is then skipped",
        where_to_look="requires_grad_(False) must come before the optimizer is built, and survive later train() code.",
    ),
    Check(
        name="registration.hyperparameters",
        claim="The optimizer's class and each group's options are those that `expect` declares.",
        threshold="equal",
        blind_to="what nobody declared: the row is then skipped",
        where_to_look="Look at the order of the param groups and at options set on a group after construction.",
    ),
    Check(
        name="registration.tied",
        claim="Parameters tied when the recipe was captured are one tensor after loading, before and after the step; "
        "no two Parameters lie on one memory.",
        threshold="identity; no element in common",
        where_to_look="Tie the weights again after loading, or save them in a format that keeps ties; tie by assigning "
        "the Parameter itself, not its .data.",
    ),
    Check(
        name="registration.state-round-trip",
        claim="An optimizer that is saved and loaded goes on exactly as one that never stopped.",
        formula="elements of theta that differ, bit for bit, over the steps after loading",
        threshold="0",
        blind_to="state kept by the training script itself (data order, random generators)",
        where_to_look="State that lives outside `optimizer.state` and `param_groups` is not in state_dict().",
    ),
    Check(
        name="step.loss-finite",
        claim="The loss of every phase is finite.",
        threshold="finite",
        where_to_look="Logarithms, divisions and square roots at 0; overflow of float16.",
    ),
    Check(
        name="step.gradient-present",
        claim="Every trainable parameter's gradient reaches the optimizer, finite and not all zero.",
        threshold="present and finite; absent or all zero where the loss's own gradient is too only warns; absent "
        "fails a parameter that expect['trainable'] declares",
        blind_to="single rows or elements without a gradient",
        where_to_look="detach, no_grad, .item() or .data on the way from the parameter to the loss.",
    ),
    Check(
        name="step.gradient",
        claim="The gradient that the optimizer receives is the declared loss's gradient on the recipe's batch.",
        formula="rms(received - reference) / (eps * (rms(reference) + 0.01 * rms of the whole gradient))",
        threshold="1,024 eps in float32 and float64, 4 eps in bfloat16 and float16: the scatter of thread counts, "
        "measured on torch 2.13, was 562 and 22; with equal threads it was 0",
        blind_to="errors that the loss function and the step share: the gradient check's business; a batch that "
        "the step makes anew in each step, with random numbers, is judged as it was given to the loss",
        where_to_look="Accumulation, loss scaling, clipping, zero_grad and detach in the step function.",
    ),
    Check(
        name="step.clipping",
        claim="Gradients are clipped once per phase, at their true norm, as declared.",
        formula="|norm that clipping saw - reference norm| / reference norm",
        threshold="1e-3 in float32, 0.15 in bfloat16 and float16",
        blind_to=_STEP,
        where_to_look="Clip after unscaling, over a list (a generator is exhausted by its first use), before step().",
    ),
    Check(
        name="step.count",
        claim="`step()` is called once per phase and training step.",
        threshold="1",
        blind_to=_STEP,
        where_to_look="A step inside the micro-batch loop, or in both the closure and the loop.",
    ),
    Check(
        name="step.learning-rate",
        claim="The learning rate at each step is the scheduled one, else the one that expect['lr'] declares.",
        formula="|lr - scheduled lr| / scheduled lr",
        threshold="1e-9",
        blind_to=_STEP,
        where_to_look="scheduler.step() comes after optimizer.step(), once.",
    ),
    Check(
        name="step.mode",
        claim="Modules are in train or eval mode as declared in the forwards that lead to a gradient.",
        threshold="equal",
        blind_to=_STEP,
        where_to_look="model.train() after the last evaluation.",
    ),
    Check(
        name="update.rule",
        claim="The parameter moved as the optimizer's rule says for the gradient the optimizer received.",
        formula="rms(d - d_ref) / (eps * (rms(theta) + rms(d_ref))), d the update",
        threshold="L2 4 and max 16 in float32 (healthy worst 1.45 and 7.3), 3 and 25 in bfloat16 and float16 "
        "(healthy worst 0.71 and 1.9)",
        blind_to="terms of the rule below the row's resolution; data over many steps",
        where_to_look="The message names the rule that does explain the update, when one does.",
    ),
    Check(
        name="update.state",
        claim="The optimizer's state after the step is the rule's state.",
        formula="rms(s - s_ref) / (eps * (rms(s_ref) + rms(s before)))",
        threshold="as update.rule; counters equal",
        where_to_look="State that is not loaded, reset, or updated twice.",
    ),
    Check(
        name="update.frozen",
        claim="Frozen parameters, and those that no optimizer holds, stay bit for bit as they were.",
        threshold="equality",
        where_to_look="Take frozen parameters out of the optimizer: weight decay and momentum move a parameter whose "
        "gradient is zero.",
    ),
    Check(
        name="update.isolation",
        claim="A phase holds and moves only its own parameters.",
        threshold="equality; parameters declared `shared` may belong to several phases",
        blind_to="phases that are one optimizer",
        where_to_look="The parameter list given to that phase's optimizer.",
    ),
    Check(
        name="update.outside-step",
        claim="No parameter is written outside `optimizer.step`, nor by a hook around its rule.",
        threshold="equality; declared writes (`writes_outside_step`) warn, those of declared `step_hooks` pass",
        where_to_look="In-place writes to .data in hooks, forwards or the step function.",
    ),
    Check(
        name="update.finite",
        claim="Every parameter is finite after the step.",
        threshold="finite",
        where_to_look="The learning rate, an eps that the dtype rounds to 0, an overflowing second moment.",
    ),
    Check(
        name="update.lost-to-rounding",
        claim="The weight's dtype keeps the update.",
        severity=Severity.WARN,
        formula="elements that did not move though the rule moves them / elements that the rule moves",
        threshold="0.5",
        where_to_look="Keep float32 master weights, or round stochastically.",
    ),
    Check(
        name="optimizer.probe",
        claim="The optimizer follows its rule over 8 steps of synthetic gradients: small, flipped, zero and large.",
        formula="as update.rule, the worst of 8 steps",
        threshold="as update.rule",
        where_to_look="The message names the first step and the rule that does explain it.",
    ),
    Check(
        name="optimizer.parity",
        claim="The foreach or fused implementation in use agrees with the plain loop.",
        formula="rms(d - d_loop) / (eps * (rms(theta) + rms(d_loop))), the worst of 8 steps",
        threshold="L2 4",
        blind_to="implementations that the recipe does not use",
        where_to_look="foreach=False, fused=False avoids a faulty kernel.",
    ),
    Check(
        name="optimizer.invariants",
        claim="An optimizer without a reference rule keeps what every optimizer keeps: it repeats itself, leaves "
        "tensors without gradient alone, steps each group with its own options and each tensor for itself, goes on "
        "after saving and loading, reads its options, goes the same way in float32 and in every kernel, and lowers "
        "convex losses.",
        threshold="sqrt(eps) of a step, see the message; what is not torch's contract warns",
        blind_to="any formula that keeps these relations",
        where_to_look="The message names the relation. Declare `expect={'optimizer': 'AdamW'}` to have a class of "
        "your own judged by a known rule.",
    ),
    Check(
        name="step.first-call",
        claim="A process's first loss and gradient are what every later evaluation gives.",
        formula="|n_1 - n_2| / max(n_1, n_2, 1e-2 n), n the norms of a parameter's gradient and of the whole one",
        threshold="sqrt(eps) of the coarsest dtype in use; a fresh process must show it again",
        blind_to="a process in which the model ran before the audit; what the second call does wrong as well",
        where_to_look="Autotuning that runs an in-place kernel several times, initialisation or a cache at the first "
        "call.",
    ),
    Check(
        name="buffers.batch-norm",
        claim="BatchNorm's running statistics move by its own formula, once per forward of the declared loss.",
        formula="rms(r - r_ref) / (eps * (rms(r_ref) + rms of the batch's moment))",
        threshold="8 eps",
        where_to_look="Extra forwards in train mode, momentum, or statistics overwritten in the step.",
    ),
    Check(
        name="buffers.ema",
        claim="EMA shadows move by their decay towards the weights after the step; their buffers are copied, averaged "
        "likewise, or moved by their own forward.",
        formula="rms(s - s_ref) / (eps * rms(s_ref))",
        threshold="8 eps",
        blind_to="shadows outside the model; what nobody declared",
        where_to_look="Update the average after optimizer.step(), with the declared decay, buffers included.",
    ),
)

#: By name.
BY_NAME = {check.name: check for check in UPDATE_CHECKS}
