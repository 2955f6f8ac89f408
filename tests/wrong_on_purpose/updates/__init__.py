"""Training steps that are wrong on purpose, each beside its correct twin.

The catalogue is filled here, in one order whichever file is asked for first.
"""

from tests.wrong_on_purpose.updates import (  # noqa: F401
    faults_phases,
    faults_registration,
    faults_rule,
    faults_step,
    faults_subclasses,
)
