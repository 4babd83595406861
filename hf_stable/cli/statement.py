"""Options for facts that are in no record, such as the license; shared by `card` and `export`."""

# ruff: noqa: PLC0415

from argparse import Namespace
from typing import TYPE_CHECKING

from hf_stable.cli.arguments import Parser, positive_float

if TYPE_CHECKING:
    from hf_stable.card import Statement


def add_statement_options(parser: Parser) -> None:
    """Add the options that `statement_of` reads."""
    parser.add_argument(
        "--license",
        metavar="ID",
        help="license of the weights, as one of the Hub's identifiers; shown in the card",
    )
    parser.add_argument("--license-name", metavar="NAME", help="name of a license not on the list")
    parser.add_argument("--license-link", metavar="URL", help="link to the text of that license")
    parser.add_argument(
        "--watts",
        type=positive_float,
        metavar="W",
        help="power of one process's device, which is not recorded; used to estimate energy",
    )


def statement_of(arguments: Namespace) -> "Statement":
    """Build the card's statement from the options."""
    from hf_stable.card import Statement

    return Statement(
        license=arguments.license,
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        watts=arguments.watts,
    )
