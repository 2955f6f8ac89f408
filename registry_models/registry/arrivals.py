"""What has just come to the registry: new versions, and versions that were given another recipe. Knows no Prefect."""

from __future__ import annotations

import datetime

from mlflow.tracking import MlflowClient

from registry_models.registry.versions import RECIPE_TAG, Version, registry_errors

#: Versions asked for at a time: few are new at a beat, so the first page is nearly always the last.
_PAGE = 200


class Arrivals:
    """The versions that are new or newly tagged, asked for again and again; old ones are not listed each time.

    MLflow keeps no time of a tag. So the recipe tags are remembered, and a version counts as newly tagged from the
    look at which its tag has changed; the first look only takes them down.

    Args:
        client: client of the registry.
        window: how far back a version counts as new.
    """

    def __init__(self, client: MlflowClient, window: datetime.timedelta) -> None:
        self._client, self._window = client, window
        self._tags: dict[str, str] | None = None
        self._retagged: dict[str, datetime.datetime] = {}

    def look(self, now: datetime.datetime) -> list[Version]:
        """Return the versions that were registered or given another recipe within the window, oldest first.

        Raises:
            InfrastructureError: the registry does not answer.
        """
        oldest = now - self._window
        tagged = {version.uri: version for version in self._tagged()}
        self._note(tagged, now)
        self._retagged = {uri: at for uri, at in self._retagged.items() if at >= oldest}
        found = {version.uri: version for version in self._new(oldest)}
        found |= {uri: tagged[uri] for uri in self._retagged if uri in tagged}
        return sorted(found.values(), key=lambda version: (version.created, version.name, version.version))

    def _note(self, tagged: dict[str, Version], now: datetime.datetime) -> None:
        tags = {uri: version.tags[RECIPE_TAG] for uri, version in tagged.items()}
        if self._tags is not None:
            changed = [uri for uri, tag in tags.items() if self._tags.get(uri) != tag]
            self._retagged |= dict.fromkeys(changed, now)
        self._tags = tags

    def _tagged(self) -> list[Version]:
        return self._search(f"tags.`{RECIPE_TAG}` LIKE '%'", 1000, 0)

    def _new(self, oldest: datetime.datetime) -> list[Version]:
        return self._search("", _PAGE, int(oldest.timestamp() * 1000))

    def _search(self, condition: str, page_size: int, oldest: int) -> list[Version]:
        """Return what fits the condition, newest first, down to ``oldest`` in milliseconds since 1970."""
        found: list[Version] = []
        token = None
        with registry_errors("the registry"):
            while True:
                page = self._client.search_model_versions(
                    condition or None, page_size, order_by=["creation_timestamp DESC"], page_token=token
                )
                versions = [Version.of(version) for version in page]
                found += [version for version in versions if version.created >= oldest]
                token = page.token
                if not token or (versions and versions[-1].created < oldest):
                    return found
