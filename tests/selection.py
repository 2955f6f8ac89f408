"""Which tests a command runs, as markers that are worked out when the tests are collected.

``exhaustive``
    What `make test` leaves to `make test-all`: tests marked so by hand, and the cases of a ``sampled`` test that are
    no part of its sample.
``sampled("fault.name", "dtype", ...)``
    A test of many cases. Its sample is a set of cases in which every value of each of these parameters occurs at least
    once; ``"dtype,trained"`` stands for every pair. Without a name: every value of every parameter, of those that are
    listed together every row. ``cases=2``: so many of them, where other tests see what distinguishes the cases.
``quick``
    What `make test-quick` runs: of every test function the first case of its sample, unless it starts processes
    (``end_to_end``), needs a device (``accelerator``, ``gpu``) or takes seconds (``slow``).

`pytest tests/ROOM` runs every case in the room; ``-m "not exhaustive"`` and ``-m quick`` choose there as well.
"""

from __future__ import annotations

import types
import zlib
from collections.abc import Hashable, Iterable
from operator import attrgetter

import pytest

#: Seconds that the longest files of `make test` take. They start first, so that no process is left alone with one at
#: the end; what a file takes matters by its order of magnitude only.
LONGEST = {
    "tests/wrong_on_purpose/updates/test_updates_caught.py": 90,
    "tests/flows/test_nightly.py": 60,
    "tests/audits/repeating/test_first_calls.py": 55,
    "tests/flows/cli/test_audit_command.py": 50,
    "tests/registry_models/recipes/test_recipe_sources.py": 50,
    "tests/flows/demo/test_audits.py": 45,
    "tests/audits/live/test_left_alone.py": 40,
    "tests/registry_models/recipes/test_shipping.py": 40,
    "tests/flows/service/test_handing_over.py": 35,
    "tests/audits/gradients/test_conventions.py": 35,
    "tests/flows/service/test_setup.py": 30,
    "tests/registry_models/recipes/test_optimizers_whole.py": 25,
    "tests/registry_models/registry/test_artifact_places.py": 25,
    "tests/flows/service/test_production_server.py": 25,
    "tests/accelerator/test_recipes.py": 20,
    "tests/hostile/test_code.py": 20,
    "tests/flows/test_odd_names.py": 20,
    "tests/docs/test_python_blocks.py": 20,
    "tests/docs/test_commands.py": 20,
    "tests/flows/demo/test_register.py": 20,
    "tests/audits/findings/test_advice.py": 20,
    "tests/audits/gradients/test_each_function.py": 20,
}

#: Tests with one of these are not quick.
NOT_QUICK = ("end_to_end", "accelerator", "gpu", "slow", "exhaustive")


@pytest.hookimpl(tryfirst=True)  # before pytest's own hook, which leaves out what -m does not ask for
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for cases in _by_function(items):
        if (marker := cases[0].get_closest_marker("sampled")) is not None:
            if "cases" in marker.kwargs:
                chosen = set(sorted(cases, key=_checksum)[: marker.kwargs["cases"]])
            else:
                chosen = sample({case: _features(case, marker.args) for case in cases})
            for case in cases:
                if case not in chosen:
                    case.add_marker("exhaustive")
        quick = [case for case in cases if not any(case.get_closest_marker(name) for name in NOT_QUICK)]
        for case in quick[:1]:
            case.add_marker("quick")
    items.sort(key=lambda item: -LONGEST.get(item.nodeid.partition("::")[0], 0))


def sample(features: dict[pytest.Item, set[Hashable]]) -> set[pytest.Item]:
    """Return few cases that have every feature among them: always the case that adds the most.

    Of equals, the one whose name's checksum is the least: with the first one, every value of one parameter would meet
    the first value of all others.
    """
    missing = set().union(*features.values())
    chosen: set[pytest.Item] = set()
    while missing:
        best = max(features, key=lambda case: (len(features[case] & missing), -_checksum(case)))
        chosen.add(best)
        missing -= features[best]
    return chosen


def _checksum(case: pytest.Item) -> int:
    return zlib.crc32(case.nodeid.encode())


def _features(case: pytest.Item, names: Iterable[str]) -> set[Hashable]:
    """Return (names, values) of each parameter, or of those that are named; parameters listed together are one."""
    parameters = types.SimpleNamespace(**case.callspec.params)  # type: ignore[attr-defined]
    if not names:
        listed = [marker.args[0] for marker in case.iter_markers("parametrize")]
        names = [names if isinstance(names, str) else ",".join(names) for names in listed]
    return {(name, *(repr(attrgetter(part.strip())(parameters)) for part in name.split(","))) for name in names}


def _by_function(items: list[pytest.Item]) -> list[list[pytest.Item]]:
    functions: dict[tuple[pytest.Item | pytest.Collector | None, str], list[pytest.Item]] = {}
    for item in items:
        functions.setdefault((item.parent, getattr(item, "originalname", item.name)), []).append(item)
    return list(functions.values())
