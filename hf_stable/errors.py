"""Errors for the user: they name the field or file, what was found, and what to do."""


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


class DivergedError(UserError):
    """Training stopped because too many steps in a row were not finite (exit code 3)."""
