"""The errors gradaudit raises, as one tree.

```
GradauditError
├── InputError (ValueError)      the caller is wrong; the text names the field and the cure
│   ├── RecipeError              a recipe that cannot be carried out
│   │   └── DeviceError          its loss makes tensors on another device than the audit's
│   ├── SettingsError            an unknown or impossible setting
│   └── ArtifactError            model files that cannot be read, found or loaded
├── MissingPartError (ImportError)  a part that this installation lacks; the text has the cure
└── InfrastructureError          MLflow, storage or Prefect did not answer; worth a retry
    └── SetupError               a login, right, address, certificate is in the way; the text has the cure
        └── DiskError            this host's disk is: no room, no right, read-only
```

A model that is wrong is not an error: it is a row whose outcome is ``fail``. Programmers' errors are ``assert``.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class GradauditError(Exception):
    """Base of everything gradaudit raises on purpose."""


class InputError(GradauditError, ValueError):
    """The caller asked for something that cannot be; the text names the field and the cure."""


class RecipeError(InputError):
    """A recipe that cannot be carried out on this model."""


class DeviceError(RecipeError):
    """A loss that makes tensors of its own on the CPU, on an audit's device that does not take them."""


class SettingsError(InputError):
    """An unknown or impossible setting."""


class ArtifactError(InputError):
    """Model files that cannot be found, read or loaded."""


class MissingPartError(GradauditError, ImportError):
    """A part of gradaudit that is not installed; the text names the extra that brings it."""


class InfrastructureError(GradauditError):
    """A service or a disk did not do its work; nothing was judged and a retry may help."""


class SetupError(InfrastructureError):
    """How things are set up keeps a service or a disk from its work: the same again ends the same.

    A login, a right, an address, a certificate, room on a disk, a package; the text names it and the cure.
    """


class DiskError(SetupError):
    """This host's disk is full, read-only, or not this user's."""


def unknown_among(given: Iterable[object], known: Collection[str]) -> str:
    """Return ``'lerning_rate'; did you mean 'learning_rate'?`` for the first name that is not known, or nothing."""
    wrong = next((name for name in given if name not in known), None)
    return "" if wrong is None else f"{wrong!r}{suggest(str(wrong), known)}"


def suggest(unknown: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string.

    The beginning of a name means that name, however much longer it is; else the most alike is the nearest, from half
    the letters on.
    """
    names = list(known)
    begun = sorted((name for name in names if unknown and name.startswith(unknown)), key=len)
    same = sorted(name for name in names if sorted(name) == sorted(unknown))  # two letters in the wrong order
    nearest = begun or same or difflib.get_close_matches(unknown, names, n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
