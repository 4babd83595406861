"""Folders that `evaluate.load` finds; each is one measurement of its own."""
