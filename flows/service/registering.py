"""The webhook in MLflow's registry: made once, corrected when its address or secret changed."""

from __future__ import annotations

from mlflow.entities.webhook import WebhookEvent, WebhookStatus
from mlflow.tracking import MlflowClient

from audits.errors import ArtifactError
from registry_models.registry.versions import registry_errors

#: The webhook's name in MLflow.
NAME = "gradaudit"

_EVENTS = [WebhookEvent.from_str("model_version.created"), WebhookEvent.from_str("model_version_tag.set")]


def register_webhook(client: MlflowClient, url: str, secret: str) -> str:
    """Create gradaudit's webhook, or correct it; return which in words.

    Raises:
        ArtifactError: MLflow refuses the address, or there is no MLflow server.
        InfrastructureError: MLflow does not answer.
    """
    if not client._registry_uri.startswith(("http://", "https://")):
        raise ArtifactError(
            "a database sends no webhooks, only MLflow's server does: set MLFLOW_TRACKING_URI to its URL"
        )
    with registry_errors("the registry's webhooks"):
        token = None
        while True:
            page = client.list_webhooks(max_results=100, page_token=token)
            for webhook in page:
                if webhook.name == NAME:
                    client.update_webhook(
                        webhook.webhook_id, url=url, events=_EVENTS, secret=secret or None, status=WebhookStatus.ACTIVE
                    )
                    return f"{NAME!r} sends to {url}"
            token = page.token
            if not token:
                break
        client.create_webhook(
            NAME, url, _EVENTS, description="asks gradaudit for audits", secret=secret or None,
            status=WebhookStatus.ACTIVE,
        )  # fmt: skip
        return f"{NAME!r} was created and sends to {url}"
