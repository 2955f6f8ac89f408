"""Callbacks for training frameworks: they capture the recipe while training runs and register the model at its end.

Nothing here is imported by gradaudit itself; each module needs its framework.
"""
