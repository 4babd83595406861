"""Numbers in sentences for users. Standard library only."""

import math


def counted(number: int, noun: str) -> str:
    """Return the number with its noun, e.g. "1 worker" or "2,000 workers"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def significant(value: float, digits: int = 4) -> str:
    """Return the value with so many significant digits, and all digits before the point."""
    if not math.isfinite(value) or value == 0:
        return str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"
