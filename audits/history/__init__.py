"""Stored audits read back as reports, compared, and followed over time."""
