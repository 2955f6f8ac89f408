"""Which of the user's own code a stored recipe, factory or pickled model needs, and under which names it travels.

A package that is installed where audits run is imported there. Anything else (a folder in the working directory, an
editable install, the training script itself) is copied into the version by MLflow's ``code_paths``.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from torch import nn

from audits.errors import RecipeError
from audits.recipe.attributes import imports_in
from audits.recipe.callables import CallableReference
from audits.recipe.recipe import Recipe
from registry_models.artifacts.loading import PROTECTED
from registry_models.recipes.main_script import MAIN, MainScript

#: Largest amount of code that is shipped without being asked: more is data in a package's folder.
MAXIMUM_CODE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Shipment:
    """Callables renamed to what another process can import, and the files it needs for that.

    Attributes:
        recipe: the recipe, nothing in it in ``__main__`` any more.
        factory: the factory's import path, likewise.
        paths: files and folders to put beside each other on the import path.
    """

    recipe: Recipe | None
    factory: str | None
    paths: tuple[Path, ...]


def ship(
    recipe: Recipe | None,
    *,
    factory: CallableReference | None = None,
    pickled: nn.Module | None = None,
    given: Sequence[str] = (),
) -> Shipment:
    """Find the code that a version needs.

    Args:
        recipe: its recipe.
        factory: its factory.
        pickled: the module, when it is pickled: its classes are then imported by name.
        given: paths that the caller ships already.

    Raises:
        RecipeError: a callable of a script without a main guard, of a notebook, or inside a function; too much code.
    """
    main = MainScript()
    modules = list(_modules_of(recipe, main))
    if factory is not None:
        factory = main.renamed(factory, role="factory")
        modules.append(_module_of(factory.path))
    if pickled is not None:
        modules += [type(module).__module__ for module in pickled.modules() if type(module).__module__ != MAIN]
    paths = _paths([m for m in dict.fromkeys(modules) if m], main, [Path(path).name for path in given])
    size = sum(file.stat().st_size for path in paths for file in _files(path))
    if size > MAXIMUM_CODE_BYTES:
        raise RecipeError(
            f"the code to ship ({', '.join(path.name for path in paths)}) comes to {size / 2**20:.0f} MiB: it holds "
            "more than code; install the package where audits run, or give code_paths=[...] yourself"
        )
    return Shipment(main.recipe(recipe), None if factory is None else factory.path, paths)


def copy_code(paths: Iterable[Path], folder: Path) -> None:
    """Copy shipped files and folders into ``folder``."""
    for path in paths:
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(path, folder / path.name)


def _modules_of(recipe: Recipe | None, main: MainScript) -> Iterable[str]:
    renamed = main.recipe(recipe)
    if renamed is None:
        return
    for phase in renamed.phases:
        yield _module_of(phase.loss.path)
        yield from map(_module_of, imports_in(phase.loss.arguments))
        yield _module_of(phase.optimizer.class_path)
        if phase.optimizer.kept is not None:
            yield from map(_module_of, imports_in(phase.optimizer.kept.attributes))
    if renamed.step is not None:
        yield _module_of(renamed.step.path)
        yield from map(_module_of, imports_in(renamed.step.arguments))
    for rule in renamed.optimizer_rules:
        yield _module_of(rule.path)


def _module_of(path: str | None) -> str:
    """The module of an import path; empty for names of `torch.nn.functional` and the like."""
    if path is None:
        return ""
    module, separator, _ = path.partition(":")
    if separator:
        return module
    return path.rpartition(".")[0]


def _paths(modules: Sequence[str], main: MainScript, given: Sequence[str]) -> tuple[Path, ...]:
    """Return what to ship: the tops of these modules, and of what they import in turn, where it is not installed."""
    waiting = list(dict.fromkeys(module.partition(".")[0] for module in modules))
    found: dict[str, Path] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _own_code(name, main)
        if path is None or path.name in given:
            continue
        if name in PROTECTED:
            raise RecipeError(
                f"{path.name} would replace the library {name!r} where the version is loaded: rename the file"
            )
        found[name] = path
        waiting += sorted(_imported_tops(path) - seen)
    return tuple(found[name] for name in sorted(found))


def _own_code(name: str, main: MainScript) -> Path | None:
    """The file or folder of a top-level module that is the user's own; None for what is installed."""
    if main.path is not None and name == main.path.stem and not (main.path.parent / "__init__.py").exists():
        return main.path
    module: ModuleType | None = sys.modules.get(name)
    if module is None or name == MAIN:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return None
        origin, folders = (spec.origin, spec.submodule_search_locations) if spec else (None, None)
    else:
        origin, folders = getattr(module, "__file__", None), getattr(module, "__path__", None)
    places = list(folders or [])
    place = Path(places[0]) if places else Path(origin) if origin and origin.endswith(".py") else None
    if place is None or not place.exists() or _installed(place) or _is_ours(name, place):
        return None
    return place.resolve()


def _is_ours(name: str, place: Path) -> bool:
    """Whether it is gradaudit itself, run from a checkout."""
    return place.resolve().parent == Path(__file__).resolve().parents[2] and name in PROTECTED


def _installed(path: Path) -> bool:
    roots = {*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()}
    libraries = [Path(root).resolve() for root in roots if root and Path(root) != Path(sys.prefix)]
    resolved = path.resolve()
    inside = any(resolved.is_relative_to(library) for library in libraries)
    return inside or bool({"site-packages", "dist-packages"} & set(resolved.parts))


def _imported_tops(path: Path) -> set[str]:
    """Top-level names that the shipped sources import."""
    tops: set[str] = set()
    for file in _files(path):
        if file.suffix != ".py":
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                tops |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                tops.add(node.module.partition(".")[0])
    return tops - set(sys.stdlib_module_names)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
