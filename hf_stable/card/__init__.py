"""Model cards from the records of runs, with the Hub's checks made before a push."""

from .metadata import problems
from .privacy import clean, leaks, secrets_here
from .rendering import Statement, render_card, write_card

__all__ = [
    "Statement",
    "clean",
    "leaks",
    "problems",
    "render_card",
    "secrets_here",
    "write_card",
]
