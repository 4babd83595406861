"""Errors for the user: they name the field or file, what was found, and what to do.

Bad input is a `UserError`. Training that diverges is a result, so `DivergedError` is none.
"""


class UserError(ValueError):
    """Bad input. The command line prints its message without a traceback and exits with 2."""


class RecipeError(UserError):
    """A recipe that cannot be read or cannot work."""


class DataError(UserError):
    """Text, token or tokenizer files that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or model folder that cannot be loaded."""


class HubError(UserError):
    """What the Hub refused, or did not do; nothing is done that is not said to be."""


class DivergedError(RuntimeError):
    """Training stopped because the run diverged. The command line exits with 3."""
