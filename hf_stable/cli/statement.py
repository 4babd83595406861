"""What a publisher states beside the records: options that `card` and `export` share."""

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
        help="of the weights, of the Hub's identifiers; stated in the card",
    )
    parser.add_argument("--license-name", metavar="NAME", help="of a licence that is other")
    parser.add_argument("--license-link", metavar="URL", help="where that licence's text is")
    parser.add_argument(
        "--watts",
        type=positive_float,
        metavar="W",
        help="power of each process's device, which no record holds, to estimate energy with",
    )


def statement_of(arguments: Namespace) -> "Statement":
    """The card's statement that the options make."""
    from hf_stable.card import Statement

    return Statement(
        license=arguments.license,
        license_name=arguments.license_name,
        license_link=arguments.license_link,
        watts=arguments.watts,
    )
