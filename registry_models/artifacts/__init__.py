"""A version's files: a private copy of them, their kinds, and the way from files to a torch module."""
