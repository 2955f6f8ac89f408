"""The process of one audit: loads, audits and answers; holds no credentials. python -m registry_models.child."""
