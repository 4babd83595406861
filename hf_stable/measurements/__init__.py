"""Folders that `evaluate.load` finds, one per measurement."""
