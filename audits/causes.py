"""What lies behind a row: every cause that a row may name, once. Texts are stored; code compares members.

A cause may be *of* something, a Function, a module or a hook: `Cause.at` writes ``wrong backward of F in M (path)`` and
`Cause.read` reads it again, from a row of any age. Texts that describe one numeric case (how a gradient differs, which
other rule explains an update) stand in a row as they are and are no members.
"""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """The cause of a row, as the column ``cause`` holds it."""

    # The gradient is another one.
    WRONG_GRADIENT = "wrong gradient"
    WRONG_TOWARDS_LOSS = "wrong gradient between the loss and"
    WRONG_FEW_ELEMENTS = "wrong in"
    ONE_WRONG_ELEMENT = "one wrong element"
    WRONG_BACKWARD = "wrong backward of"
    BACKWARD_HOOK = "gradient changed by"
    STOP_GRADIENT = "stop-gradient at"
    CANCELLED_GRADIENT = "cancelled gradient at"
    NO_CREATE_GRAPH = "autograd.grad without create_graph=True in"
    COMPILED_GRADIENT = "compiled gradient"
    NON_FINITE_GRADIENT = "non-finite gradient"
    # The gradient is meant to be, or rightly is, what it is.
    DECLARED_CUSTOM_GRADIENT = "declared custom gradient of"
    DECLARED_STOP = "declared stop-gradient at"
    BUILT_IN_STOP = "built-in stop-gradient at"
    CONVENTION = "torch's convention"
    ZERO_GRADIENT = "zero gradient"
    CANCELS = "cancels"  # a bias before a BatchNorm, say: ``sum d = 0`` while ``sum d x != 0``
    ZERO_START = "zero at the start"
    NO_GRADIENT_ASKED = "no gradient, and none asked for"
    ROUNDING_INSIDE_AN_OP = "rounding inside an op"
    SUBGRADIENT = "subgradient at a kink"
    KINK_CROSSED = "a kink is crossed at larger steps"
    GRADCHECK = "gradcheck"
    # It could not be told.
    UNRESOLVED = "unresolved"
    UNCONFIRMED = "unconfirmed exceedance"
    NONDETERMINISTIC = "nondeterministic"
    CANNOT_EVALUATE = "cannot evaluate:"
    NOT_DETERMINISTIC = "not deterministic"
    MEASURED_ONLY = "measured only"
    MEMORY = "memory"
    NO_FLOAT64_KERNEL = "no float64 kernel"
    LARGE_MODEL = "large model"
    NOT_RUN = "not run"
    CANNOT_RUN = "cannot run"
    # It shows once, or not again.
    FIRST_CALL = "first call, or chance"
    FIRST_CALL_ONLY = "first call only"
    NOT_REPRODUCED = "not reproduced"
    # The step and its optimizer.
    ENVIRONMENT = "environment"
    CUT_GRAPH = "cut graph"
    UNUSED = "not used by the loss"
    BATCH_CHANGED = "batch changed in place"
    NOT_REGISTERED = "not registered"
    NETWORK_IN_EVAL_MODE = "network in eval mode"
    NO_GRADIENT = "no gradient"
    NO_REFERENCE = "no reference"
    FOREIGN = "another phase's parameter"
    RATE_IS_ZERO = "lr is 0"
    OVERFLOW = "overflow"
    NOT_STEPPED = "not stepped"
    ASSUMED = "assumed"
    PRECISION = "precision"
    COARSE_STATE = "coarse state"
    NO_REFERENCE_RULE = "no reference rule"
    RELATIONS = "relations, no reference rule"
    COULD_NOT_STEP = "could not step"
    OTHER_STATE_NAMES = "state under other names"
    NOT_WHOLE = "not whole"
    CANNOT_BE_RESUMED = "cannot be resumed"
    STEP_RAISED = "step raised"
    PROBE_RAISED = "probe raised"
    NOTHING_HELD = "nothing held"
    PLAIN_LOOP = "plain loop"
    CANONICAL_STEP = "canonical step"
    NOT_DECLARED = "not declared"
    JUDGED_IN_THE_STEP = "judged in the step"
    ONE_MEMORY = "one memory"
    # Buffers and averages.
    OWN_CLASS = "own class"
    OWN_RULE = "own rule"
    MATCHES_NOTHING = "matches nothing"
    DID_NOT_MOVE = "did not move"
    NEVER_UPDATED = "never updated"
    INCONSISTENT = "inconsistent"
    # The audit itself.
    OUT_OF_MEMORY = "out of memory"
    LESS_MEMORY = "less memory"
    STOPPED = "stopped"
    REFUSED = "refused"
    NO_RECIPE = "no recipe"
    NOTHING_TO_TRAIN = "nothing to train"
    REWRITTEN = "rewritten"
    BAD_ANSWER = "bad answer"
    CRASHED = "crashed"
    MEMORY_LIMIT = "memory limit"
    TIME_LIMIT = "time limit"
    OUTPUT_LIMIT = "output limit"
    ANSWER_LIMIT = "answer limit"
    PROCESS_LIMIT = "process limit"
    DISK_LIMIT = "disk limit"
    OWN_ERROR = "own error"

    def at(self, place: str) -> str:
        """Return the cause with what it is of: ``wrong backward of F in M (path)``."""
        return f"{self} {place}"

    def begins(self, text: str | None) -> bool:
        """Whether a row's cause is this one, of whatever."""
        return text is not None and (text == self or text.startswith(f"{self} "))

    @classmethod
    def read(cls, text: str | None) -> tuple[Cause | None, str]:
        """Return the cause that a row's text names, and what it is of; None and the text where it is none of them.

        Args:
            text: a row's ``cause``.
        """
        if not text:
            return None, ""
        for cause in _LONGEST_FIRST:
            if cause.begins(text):
                return cause, text[len(cause) :].strip()
        return None, text


_LONGEST_FIRST = sorted(Cause, key=len, reverse=True)
