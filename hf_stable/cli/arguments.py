"""Arguments of commands: their types, and errors in one plain line."""

import argparse
import difflib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from hf_stable.errors import UserError
from hf_stable.paths import check_file_to_write, check_folder_to_write, expand_home

PROGRAM = "hf-stable"
_REQUIRED = "the following arguments are required: "
Number = TypeVar("Number", int, float)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are `UserError`s in plain words."""

    def __init__(self, **settings: Any) -> None:
        # With abbreviations, adding an option could break existing command lines.
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise UserError for a problem that argparse found."""
        words = self.prog.split()
        if message.startswith(_REQUIRED):
            names = message.removeprefix(_REQUIRED).split(", ")
            message = f"{words[-1]} needs {' and '.join(map(_with_article, names))}"
        raise UserError(f"{message}; {self.prog} --help shows what it takes")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Raise UserError for arguments unknown to the command, with the nearest name."""
        name, command = unknown[0].partition("=")[0], self.prog.split()[-1]
        if not name.startswith("-"):
            self.error(f"{command} takes no further argument {unknown[0]!r}")
        known = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(name, known, n=1)
        if close:
            raise UserError(f"{command} has no option {name}: did you mean {close[0]}?")
        self.error(f"{command} has no option {name}")


def _with_article(name: str) -> str:
    if name.startswith("-"):
        return name
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def check_command(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Check the first argument, and that all arguments are text.

    Args:
        arguments: Arguments of the process.
        known: Names of all commands.

    Raises:
        UserError: If the first is not a command, or an argument has bytes that are not UTF-8 (which
            Python represents as surrogates).
    """
    for number, argument in enumerate(arguments, start=1):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError as error:
            before = f", after {arguments[number - 2]}" if number > 1 else ""
            shown = os.fsencode(argument).decode("utf-8", "backslashreplace")
            byte = len(os.fsencode(argument[: error.start])) + 1
            raise UserError(
                f"argument {number}{before}: '{shown}' is not UTF-8 (byte {byte})"
            ) from error
    if not arguments:
        raise UserError(f"no command given; {PROGRAM} --help lists them")
    first = arguments[0]
    if first.startswith("-") or first in known:
        return
    close = difflib.get_close_matches(first, known, n=1)
    remedy = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    raise UserError(f"no command {first!r}: {remedy}")


def _number(
    kind: Callable[[str], Number], holds: Callable[[Number], bool], wanted: str
) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or not holds(value):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {wanted}")
        return value

    return parse


def _whole(text: str) -> int:
    """Parse an integer, also one written as `1e9`."""
    try:
        return int(text)
    except ValueError:
        if (value := float(text)).is_integer():
            return int(value)
        raise


positive_int = _number(_whole, lambda value: value > 0, "a whole number of at least 1")
non_negative_int = _number(_whole, lambda value: value >= 0, "a whole number of at least 0")
# 64 bits, as in a recipe.
seed = _number(_whole, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2^63 - 1")
positive_float = _number(float, lambda value: value > 0, "a number greater than 0")
non_negative_float = _number(float, lambda value: value >= 0, "a number of at least 0")
share = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def path(text: str) -> str:
    """Parse a path, or the name of something on the Hub, with `~` for the home directory."""
    try:
        return expand_home(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def output_file(text: str) -> str:
    """Parse a file to write; refuse it before the command starts if it cannot be written."""
    return _checked(text, check_file_to_write)


def output_folder(text: str) -> str:
    """Parse a folder to write; refuse it before the command starts if it cannot be written."""
    return _checked(text, check_folder_to_write)


def _checked(text: str, check: Callable[[str], None]) -> str:
    expanded = path(text)
    try:
        check(expanded)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return expanded
