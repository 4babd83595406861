"""Conversion of other families' checkpoints to StableGPT, if our block computes exactly theirs.

`families.py` is the table; `converting.py` reads, maps, compares in float64 and only then writes.
"""

from .converting import TOLERANCE, Conversion, convert
from .families import FAMILIES, WHY_NOT

__all__ = ["FAMILIES", "TOLERANCE", "WHY_NOT", "Conversion", "convert"]
