"""Attestations: an audit's verdict about a version's files, signed, and what tells a valid one from others."""
