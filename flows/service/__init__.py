"""What runs all the time: servers, workers, the webhook, and what they need on the Prefect server."""
