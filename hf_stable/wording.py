"""Numbers in sentences for users. Standard library only."""

import math


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return the number with its noun, e.g. "1 worker" or "2,000 workers"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def significant(value: float, digits: int = 4) -> str:
    """Return the value with this many significant digits; below a million with all its digits."""
    if not math.isfinite(value) or value == 0:
        return str(value)
    if abs(value) >= 1e6:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"
