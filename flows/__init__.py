"""Prefect flows, the command line and the services: how audits are run. Does no arithmetic."""
