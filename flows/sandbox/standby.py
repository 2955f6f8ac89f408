"""A sandbox that starts before its audit: it imports torch while its parent asks the registry and downloads.

One audit, one sandbox, as ever. It is shown an empty folder, and the version's files are moved into that folder when
its turn has come: until then nothing of the model is in it, and what runs inside is gradaudit's own code alone. Where
an audit's conditions are others than those it was started under, it is left alone and a fresh one is started.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from registry_models.artifacts.snapshot import Snapshot

from audits.errors import InfrastructureError
from flows.sandbox.confinement import readable_by_others
from flows.sandbox.levels import reached_level
from flows.sandbox.limits import limits_of
from flows.sandbox.private_folders import private_folder
from flows.sandbox.starting import Conditions, StartedChild, starting
from flows.settings.environment import GradauditSettings


class Standby:
    """An audit's private folder, and the process that waits for the audit; `take` gives it out once.

    Attributes:
        folder: the private folder: downloads go here, out of the process's sight.
    """

    def __init__(self, folder: Path, shown: Path, bound: Sequence[Path], child: StartedChild | None) -> None:
        self.folder, self._shown, self._bound, self._child = folder, shown, (shown, *bound), child

    def hand_over(self, snapshot: Snapshot, files: Sequence[Path]) -> Snapshot:
        """Move what an audit is to see of its download into the folder that the process sees.

        They are copies of this process's own, in a folder that no other user enters: so they are made readable to the
        user that the audit becomes inside.

        Args:
            snapshot: the download, below ``folder``.
            files: what is moved: files and folders; those that lie elsewhere stay where they are.

        Returns:
            The snapshot as it lies now.
        """
        for path in files:
            if path.is_relative_to(self.folder):
                target = self._moved(path)
                for above in reversed(target.relative_to(self._shown).parents[:-1]):
                    _passable(self._shown / above)
                path.rename(target)
                _readable(target)
        sources = tuple(dataclasses.replace(source, path=self._moved(source.path)) for source in snapshot.sources)
        return dataclasses.replace(
            snapshot,
            folder=self._moved(snapshot.folder),
            recipe_folder=snapshot.recipe_folder and self._moved(snapshot.recipe_folder),
            code_folder=snapshot.code_folder and self._moved(snapshot.code_folder),
            sources=sources,
        )

    def _moved(self, path: Path) -> Path:
        return self._shown / path.relative_to(self.folder) if path.is_relative_to(self.folder) else path

    def take(self, conditions: Conditions, readable: Sequence[Path]) -> StartedChild | None:
        """Return the waiting process if it fits, once: same conditions, sees all it is to read, still there."""
        child, self._child = self._child, None
        if child is None or child.conditions != conditions or child.process.poll() is not None:
            return None
        if not all(any(path.is_relative_to(place) for place in self._bound) for path in readable):
            return None
        if child.own_user and not all(readable_by_others(path) for path in readable):
            return None
        return child


@contextlib.contextmanager
def standing_by(settings: GradauditSettings, *, readable: Sequence[Path] = ()) -> Iterator[Standby]:
    """Make an audit's private folder and start its process; at the end of the block both are gone.

    Args:
        settings: isolation, limits, device.
        readable: what is known to be read beforehand: a local model directory.

    Raises:
        SettingsError: this host does not offer the isolation asked for.
    """
    conditions = Conditions.of(
        reached_level(settings.isolation), limits_of(settings), device=settings.device, extra=settings.readable_paths
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(private_folder()))
        shown, own = folder / "shown", folder / "standby"
        for place in (shown, own):
            _passable(place)
        try:
            child = stack.enter_context(starting(conditions, own, [shown, *readable]))
        except InfrastructureError:  # a fresh one is tried, and says why it cannot be
            child = None
        yield Standby(folder, shown, readable, child)


def _passable(folder: Path) -> None:
    """Make a folder that the user inside a sandbox may look into, whatever this process's mask."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)


def _readable(path: Path) -> None:
    """Let everybody read a file or a folder with all that is in it; links are left alone."""
    if path.is_symlink():
        return
    path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))
    for inner in path.iterdir() if path.is_dir() else ():
        _readable(inner)
