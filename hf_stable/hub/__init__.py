"""From a run to the Hub: export a folder, check it in a process of its own, push it.

`files` says what may be in such a folder, `scanning` what must not stand in its text; `rounding`
measures what a change of the weights costs; `remote` is what the Hub holds and how it refuses.
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
