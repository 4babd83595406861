"""Laws of arguments: paths mean what a shell makes of them, a mistake gets one plain line."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from hf_stable import cli
from hf_stable.cli import arguments
from hf_stable.cli.parsers import build_parser

PATH_TYPES = (arguments.path, arguments.output_file, arguments.output_folder)
# Text of other kinds; a new option without a type of its own is classified here.
NO_PATHS = {
    *("--column", "--commit-message", "--license", "--license-link", "--license-name"),
    *("--max-shard-size", "--name", "--prompt", "--revision", "--set", "--slurm", "--split"),
    *("--tag", "NAME"),
}


def subparsers() -> dict[str, Any]:
    actions = build_parser("0")._actions
    return next(action.choices for action in actions if action.dest == "subcommand")


def options() -> list[tuple[str, argparse.Action]]:
    found = [
        (name, action)
        for name, parser in subparsers().items()
        for action in parser._actions
        if action.nargs != 0
    ]
    assert len(found) > 60
    return found


def label(action: argparse.Action) -> str:
    return str((action.option_strings or [action.metavar])[-1])


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The message of a command line that is refused, by itself on one line."""
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_every_text_option_is_a_path_or_known_to_be_none() -> None:
    for command, action in options():
        if action.type is None and action.choices is None:
            is_hub = (command, label(action)) == ("push", "--output")
            assert label(action) in NO_PATHS or is_hub, (command, label(action))


def test_every_path_option_expands_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [action for _, action in options() if action.type in PATH_TYPES]
    assert len(paths) > 20
    for action in paths:
        assert callable(action.type)
        assert action.type("~/x") == str(tmp_path / "x")
        assert action.type("x/~") == "x/~"
        with pytest.raises(argparse.ArgumentTypeError, match="no known home"):
            action.type("~nobody-of-that-name/x")


def test_every_output_option_is_refused_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong = {arguments.output_file: tmp_path, arguments.output_folder: tmp_path / "file"}
    outputs = [each for each in options() if label(each[1]) in ("--output", "--html", "--json")]
    # A repository of the Hub; a file or a folder, refused where it exists.
    outputs = [each for each in outputs if each[0] not in ("push", "recipes")]
    assert len(outputs) >= 11
    for _, action in outputs:
        assert callable(action.type) and action.type in wrong
        for place in (wrong[action.type], tmp_path / "file" / "below"):
            with pytest.raises(argparse.ArgumentTypeError, match=r"is a f|is not a folder"):
                action.type(str(place))
        assert action.type(str(tmp_path / "new" / "x")) == str(tmp_path / "new" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_for_a_file_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "no-model", "--data", "no-text", "--output", str(tmp_path)]
    assert f"{tmp_path} is a folder" in refused(capsys, *command)


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_bytes_that_are_not_utf8_are_refused_by_every_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, command, "é--prompt", "é\udcff\udcfe abc")
    assert r"argument 3, after é--prompt: 'é\xff\xfe abc' is not UTF-8 (byte 3)" in message


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_every_command_says_what_it_needs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, command)
    needed = [label(action) for name, action in options() if name == command and action.required]
    assert message.startswith(f"error: {command} needs ")
    assert needed and all(name in message for name in needed)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("trian x", "no command 'trian': did you mean 'train'?"),
        ("xyzzy", "no command 'xyzzy': known are"),
        ("check x --gpu 2", "check has no option --gpu: did you mean --gpus?"),
        ("train x --otput=y", "train has no option --otput: did you mean --output?"),
        ("generate m more --prompt x", "generate takes no further argument 'more'"),
        ("check x --gpus 0", "argument --gpus: found '0', expected a whole number of at least 1"),
        ("generate m --prompt x --temperature nan", "expected a number of at least 0"),
        ("train x --resume no", "invalid choice: 'no' (choose from"),
        ("train", "train needs a RECIPE; hf-stable train --help"),
    ],
)
def test_a_mistake_gets_a_remedy(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, *command.split())


def test_whole_numbers_may_be_written_with_an_exponent() -> None:
    assert arguments.positive_int("1e9") == 10**9
    for text in ("1.5", "1e-1", "inf", "nan", "", "0"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
            arguments.positive_int(text)


def test_help_shows_every_default() -> None:
    shown = {name: " ".join(parser.format_help().split()) for name, parser in subparsers().items()}
    given = [each for each in options() if each[1].default not in (None, False)]
    assert len(given) > 10
    for command, action in given:
        assert f"(default: {action.default})" in shown[command], (command, label(action))
    assert "None" not in "".join(shown.values()) and "False" not in "".join(shown.values())
