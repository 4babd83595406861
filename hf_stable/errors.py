"""Errors for the user. A message names the field or file, the value found, and the remedy.

Bad input is a `UserError`. Training that diverges is a result, so `DivergedError` is not.
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
    """A request that the Hub refused, or did not complete; the message says what was done."""


class DivergedError(RuntimeError):
    """Training stopped because the run diverged. The command line exits with 3."""
