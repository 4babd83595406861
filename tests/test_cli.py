"""Laws of the command line: its surface is known, and each outcome has its exit code."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_stable import cli
from hf_stable.cli.parsers import build_parser
from hf_stable.data import load_tokenizer, train_tokenizer
from hf_stable.errors import DataError, DivergedError
from hf_stable.model import StableGPTForCausalLM
from hf_stable.recipes import load_recipe
from hf_stable.wording import significant

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "recipes" / "base" / "tiny.yaml")
TEXT = "In the beginning God created the heaven and the earth.\n" * 40

# A new subcommand or option is added here; one that is gone breaks somebody's script.
SURFACE = {
    "recipes": {"ACTION", "NAME", "--output"},
    "train": {"RECIPE", "--set", "--print-config", "--output", "--resume"},
    "check": {"RECIPE", "--set", "--print-config", "--gpus"},
    "plan": {
        *("RECIPE", "--set", "--print-config", "--gpus", "--gpu", "--gpu-memory"),
        *("--gpus-per-node", "--price-per-gpu-hour"),
    },
    "tokenizer": {
        *("INPUT", "--kind", "--vocab-size", "--output", "--column", "--sample-by"),
        "--max-bad-share",
    },
    "evaluate": {
        *("MODEL", "--data", "--column", "--sample-by", "--name", "--split", "--max-length"),
        *("--stride", "--batch-size", "--limit-documents", "--trust-remote-code", "--output"),
        *("--revision", "--max-bad-share"),
    },
    "generate": {
        *("MODEL", "--prompt", "--max-new-tokens", "--temperature", "--top-k", "--seed"),
        "--revision",
    },
    "export": {
        *("RUN", "--step", "--output", "--fold-sigma", "--dtype", "--max-shard-size"),
        *("--license", "--license-name", "--license-link", "--watts"),
    },
    "push": {
        *(
            "SOURCE",
            "--output",
            "--private",
            "--revision",
            "--tag",
            "--commit-message",
            "--create-pr",
        ),
        *("--unevaluated", "--dry-run", "--overwrite-card"),
    },
    "card": {
        *("RUN", "--output", "--evaluations"),
        *("--license", "--license-name", "--license-link", "--watts"),
    },
    "convert": {"SOURCE", "--output", "--revision", "--dtype"},
    "watch": {"RUN", "--refresh", "--once", "--html"},
    "diagnose": {"RUN", "--json"},
    "sweep": {"PLAN", "--dry-run", "--workers", "--slurm", "--set", "--output"},
    "report": {"STUDY", "--output"},
    "sample-text": {"--output"},
}


def subparsers() -> dict[str, Any]:
    actions = build_parser("0")._actions
    return next(action.choices for action in actions if action.dest == "subcommand")


def test_the_surface_is_frozen() -> None:
    found = {
        name: {
            (action.option_strings or [action.metavar])[-1]
            for action in parser._actions
            if action.dest != "help"
        }
        for name, parser in subparsers().items()
    }
    assert found == SURFACE


def test_every_option_has_a_help_text() -> None:
    for name, parser in subparsers().items():
        assert parser.description, name
        assert all(action.help for action in parser._actions), name


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["train", "--help"]])
def test_help_is_instant(command: list[str]) -> None:
    """Less than 0.5 s of CPU time, the best of three, because it never imports torch."""
    run = [sys.executable, "-m", "hf_stable", *command]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    run[1:1] = ["-X", "importtime"]
    traced = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in traced.splitlines()}
    assert "hf_stable.cli" in imported
    assert not {"torch", "transformers", "datasets", "pydantic"} & imported
    assert min(seconds) < 0.5


def test_help_tells_a_newcomer_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "hf-stable train quickstart" in shown
    assert all(f"\n    {name}" in shown for name in SURFACE)
    assert all(f"\n  {code} " in shown for code in (0, 1, 2, 3, 130))
    for line in shown.splitlines():  # what the help tells to type is understood
        if line.startswith("  hf-stable ") and '"' not in line:
            build_parser("0").parse_args(line.split()[1:])


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (DataError("bad text"), 2),
        (DivergedError("no finite loss"), 3),
        (FileExistsError(17, "File exists", "x"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_failure_has_its_exit_code_and_one_line(
    raised: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: Any) -> None:
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "sample-text", fail)
    assert cli.main(["sample-text", "--output", "x"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    words = {KeyboardInterrupt: "interrupted", FileExistsError: "error: x: File exists"}
    assert captured.err.startswith(words.get(type(raised), f"error: {raised}"))


def test_an_unexpected_failure_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "sample-text", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["sample-text", "--output", "x"])


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["trian", TINY],
        ["check", TINY, "--wrold", "2"],
        ["check", TINY, "--gpu", "2"],
        ["check", TINY, "--gpus", "0"],
        ["plan", TINY],
        ["plan", TINY, "--gpus", "8", "--gpu", "v100"],
        ["tokenizer", "a.txt", "--output", "b"],
        ["tokenizer", "a.txt", "--output", "b", "--vocab-size", "1e3x"],
        ["generate", "m", "--prompt", "x", "--temperature", "-1"],
        ["train", TINY, "--resume", "always"],
        ["export", "run", "--output", "x", "--dtype", "int8"],
        ["push", "run"],
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["check", "none.yaml"], "none.yaml"),
        (["train", TINY, "--set", "trainig.steps=3"], "did you mean training?"),
        (["check", TINY, "--set", "model.qk_nrom=head"], "did you mean qk_norm?"),
        (["check", TINY, "--gpus", "3"], "3 processes"),
        (["plan", TINY, "--gpus", "3", "--gpu-memory", "80"], "3 GPUs"),
        (["tokenizer", "none.txt", "--vocab-size", "300", "--output", "x"], "none.txt"),
        (["evaluate", "./none", "--data", str(ROOT / "pyproject.toml")], "pyproject.toml"),
        (["generate", "./none", "--prompt", "x"], "none"),
        (["push", "./none", "--output", "owner/name", "--dry-run"], "none holds no model"),
        (["push", "./none", "--output", "name"], "names no owner"),
    ],
)
def test_bad_input_is_one_message_and_code_2(
    command: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert reason in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "check"])
def test_print_config_prints_a_recipe_equal_to_the_one_in_use(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["model.qk_norm=head", "training.steps=3", "data.train=[it's.txt]"]
    assert (
        cli.main([command, TINY, "--set", *overrides[:2], "--set", overrides[2], "--print-config"])
        == 0
    )
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(printed) == load_recipe(TINY, overrides)


def test_output_overrides_the_recipes_folder(capsys: pytest.CaptureFixture[str]) -> None:
    folder = 'it\'s a "run" \\ 010'
    assert cli.main(["train", TINY, "--output", folder, "--print-config"]) == 0
    assert load_recipe(TINY, [f"output={json.dumps(folder)}"]).output == folder
    assert "it's a" in capsys.readouterr().out


def test_check_prints_one_plain_line_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(ROOT / "recipes/base/830m.yaml"), "--gpus", "32"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for expected in ("826.4 M", "302.1 M", "3.989 GFLOP", "95,367 of 2,097,152 tokens"):
        assert expected in shown


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model with its tokenizer, as training leaves it."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    tokenizer = train_tokenizer([TEXT], kind="bpe", vocab_size=260, folder=folder)
    recipe = load_recipe(TINY, ["data.sequence_length=128"])
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    StableGPTForCausalLM(recipe.model_config(**ids)).save_pretrained(folder)
    return folder


def test_tokenizer_command_writes_a_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"body": "light"}\nnonsense\n', encoding="utf-8")
    for name, options in (("a.txt", ["--kind", "bpe"]), ("b.jsonl", ["--column", "body"])):
        folder = str(tmp_path / name[0])
        command = ["tokenizer", str(tmp_path / name), "--vocab-size", "259", "--output", folder]
        assert cli.main([*command, *options]) == 0
        tokenizer = load_tokenizer(folder)
        assert tokenizer.decode(tokenizer("Light!\n").input_ids) == "Light!\n"
    assert "1 bad" in capsys.readouterr().out


def test_evaluate_command_prints_and_writes_the_same_numbers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "a.txt", tmp_path / "result.json"
    text.write_text(TEXT, encoding="utf-8")
    command = ["evaluate", str(model), "--data", str(text), "--sample-by", "line"]
    command += ["--limit-documents", "5", "--max-length", "64", "--output", str(output)]
    assert cli.main(command) == 0
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["documents"] == 5
    assert significant(written["per_token"]["value"]) in capsys.readouterr().out


def test_evaluate_reads_the_test_split_and_writes_what_was_left_out(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "set", tmp_path / "result.json"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 9), ("test", 3)):
        lines = [json.dumps({"text": f"{split} {TEXT}"})] * count + ["broken", ""]
        path = folder / "data" / f"{split}-00000-of-00001.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
    command = ["evaluate", str(model), "--max-length", "64", "--output", str(output), "--data"]
    for options, count in (([], 3), (["--split", "train"], 9)):
        assert cli.main([*command, str(folder), *options]) == 0
        written = json.loads(output.read_text(encoding="utf-8"))
        assert written["documents"] == written["report"]["documents"] == count
        assert list(written["report"]["bad_counts"].values()) == [1]
    assert "1 bad" in capsys.readouterr().out
    files = str(folder / "data" / "*.jsonl")
    for options in (["--split", "train"], ["--name", "x"], ["--sample-by", "line"]):
        assert cli.main([*command, files, *options]) == 2
        assert f"{options[0][2:].replace('-', '_')} '{options[1]}'" in capsys.readouterr().err
    assert cli.main([*command, files]) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["documents"] == 12


def test_generate_command_continues_the_prompt(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(model), "--prompt", "In the", "--max-new-tokens", "8"]
    texts = []
    for options in (
        ["--temperature", "0"],
        ["--temperature", "0"],
        ["--seed", "1"],
        ["--seed", "2"],
    ):
        assert cli.main([*command, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("In the") and len(text) > len("In the\n") for text in texts)
    assert texts[0] == texts[1]
    assert texts[2] != texts[3]


def test_generating_beyond_the_positions_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(model), "--prompt", "In the", "--max-new-tokens", "128"]
    assert cli.main(command) == 2
    assert "128 positions" in capsys.readouterr().err
