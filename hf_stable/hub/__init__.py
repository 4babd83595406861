"""Path of a run to the Hub: export a folder, check it in a separate process, push it.

`files` defines the files of such a folder, and `scanning` what its text must not contain.
`rounding` measures the effect of changed weights. `remote` reads the Hub and explains its refusals.
"""

from .checking import ExportCheck, check_export, check_exports
from .exporting import Weights, export
from .pushing import Destination, Published, connect, preview, push
from .remote import Change, Difference, UnreachableError, compare

__all__ = [
    "Change",
    "Destination",
    "Difference",
    "ExportCheck",
    "Published",
    "UnreachableError",
    "Weights",
    "check_export",
    "check_exports",
    "compare",
    "connect",
    "export",
    "preview",
    "push",
]
