"""Callables that the running script defines: the name another process imports them by, where that is safe."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audits.errors import RecipeError
from audits.recipe.attributes import imports_in, renamed, with_imports
from audits.recipe.callables import CallableReference, import_object
from audits.recipe.moulds import Kept
from audits.recipe.recipe import Recipe

#: The name of the module that runs as a script.
MAIN = "__main__"

_RULE = "expect['optimizer_rule']"


class MainScript:
    """The running script: the name it can be imported by, once it is known to have a main guard."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._name: str | None = None

    def renamed(self, reference: CallableReference, *, role: str) -> CallableReference:
        """Return the reference under a name that another process can import."""
        if reference.path is None:
            raise RecipeError(
                f"{role} {reference.describe()} is a lambda, closure or notebook cell: it works in process but cannot "
                "be stored. Cure: move it to a module that can be imported, and pass it or its path 'package.module:"
                "function'"
            )
        path = reference.path
        if reference.arguments is not None and any(imports_in(reference.arguments)):
            arguments = with_imports(reference.arguments, functools.partial(self._imported, role=role))
            reference = dataclasses.replace(reference, arguments=arguments)
        if not path.startswith((f"{MAIN}:", f"{MAIN}.")):
            return reference
        target = reference.target if reference.arguments is None else type(reference.target)
        return dataclasses.replace(reference, path=self.rename(path, target, role))

    def _imported(self, path: str, role: str) -> str:
        """Return an import path inside of a callable's arguments under the name it has elsewhere."""
        return self.rename(path, import_object(path, role=role), role) if path.startswith(f"{MAIN}:") else path

    def rename(self, path: str, target: object, role: str) -> str:
        """Return ``__main__:name`` as ``script:name``."""
        self._find(target, f"{role} {path}")
        return f"{self._name}{path.removeprefix(MAIN)}"

    def recipe(self, recipe: Recipe | None) -> Recipe | None:
        """Return the recipe with every callable renamed."""
        if recipe is None:
            return None
        phases = []
        for phase in recipe.phases:
            optimizer = phase.optimizer
            if "<locals>" in optimizer.class_path:
                raise RecipeError(
                    f"the optimizer class {optimizer.class_path} is made inside a function: no other process can "
                    "import it. Cure: move it to a module"
                )
            if optimizer.class_path.startswith(f"{MAIN}:"):
                path = self.rename(optimizer.class_path, optimizer.live_class, "the optimizer class")
                optimizer = dataclasses.replace(optimizer, class_path=path)
            optimizer = dataclasses.replace(optimizer, kept=self._kept(optimizer.kept))
            phases.append(dataclasses.replace(phase, loss=self.renamed(phase.loss, role="loss"), optimizer=optimizer))
        step = None if recipe.step is None else self.renamed(recipe.step, role="step")
        expect = self._expect(recipe.expect)
        return dataclasses.replace(recipe, phases=tuple(phases), step=step, expect=expect)

    def _expect(self, expect: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the declarations with the user's own optimizer rule under an importable name."""

        def named(value: Any) -> str | None:
            return self.renamed(CallableReference.of(value, role=_RULE), role=_RULE).path

        rule = expect.get("optimizer_rule")
        if rule is None:
            return expect
        renamed = {p: named(v) for p, v in rule.items()} if isinstance(rule, Mapping) else named(rule)
        return {**expect, "optimizer_rule": renamed}

    def _kept(self, kept: Kept | None) -> Kept | None:
        """Return an optimizer's hooks and attributes renamed; what no other process can import is then missing."""
        if kept is None or kept.attributes is None:
            return kept

        def rename(path: str) -> str:
            if not path.startswith(f"{MAIN}:"):
                return path
            return self.rename(path, import_object(path, role="hook"), "the optimizer's")

        attributes, missing = renamed(kept.attributes, rename)
        return dataclasses.replace(kept, attributes=attributes, missing=(*kept.missing, *missing))

    def _find(self, target: object, what: str) -> None:
        if self._name is not None:
            return
        module = sys.modules.get(MAIN)
        file = getattr(module, "__file__", None)
        if file is None or not Path(file).is_file() or not _defined_in(target, Path(file)):
            raise RecipeError(
                f"{what} is defined in a notebook cell or an interactive session: it works in process but cannot be "
                "stored. Cure: write it to a module (in a notebook: %%writefile losses.py) and import it from there"
            )
        if not has_main_guard(Path(file)):
            raise RecipeError(
                f"{what} is defined in the script {Path(file).name}, which would train again when it is imported: it "
                'has no main guard. Cure: put what the script runs under `if __name__ == "__main__":`, or move the '
                "function to a module"
            )
        spec = getattr(module, "__spec__", None)
        self.path = Path(file).resolve()
        self._name = spec.name if spec is not None and spec.name else self.path.stem


def has_main_guard(path: Path) -> bool:
    """Whether a script runs its work only under ``if __name__ == "__main__":``."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return False
    for node in tree.body:
        if isinstance(node, ast.If):
            names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
            texts = {n.value for n in ast.walk(node.test) if isinstance(n, ast.Constant)}
            if "__name__" in names and MAIN in texts:
                return True
    return False


def _defined_in(target: object, file: Path) -> bool:
    try:
        source = inspect.getsourcefile(target)  # type: ignore[arg-type]
    except (TypeError, OSError):
        return True
    return source is None or Path(source).resolve() == file.resolve()
