"""Commands as processes of their own, which know only what they import themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .warm import python

ROOT = Path(__file__).parent.parent
HF_STABLE = Path(sys.executable).with_name("hf-stable")


def run(*command: str | Path) -> str:
    answer = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_stable; import transformers",
        "import transformers; import hf_stable",
        "import hf_stable.model",
        "from hf_stable import StableGPTConfig",
        "import hf_stable.kernels.linear_cross_entropy",
    ],
)
def test_importing_the_package_registers_the_family(imports: str) -> None:
    program = (
        "import importlib.util; importlib.util.find_spec('transformers')\n"
        f"{imports}\n"
        "from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM\n"
        "import transformers\n"
        "config = AutoConfig.for_model('stable_gpt', hidden_size=48, num_hidden_layers=1)\n"
        "model = AutoModelForCausalLM.from_config(config)\n"
        "assert type(model) is transformers.StableGPTForCausalLM\n"
        "assert 'stable_triton' in AttentionInterface().valid_keys()"
    )
    run(python(), "-c", program)


def test_importing_the_package_alone_imports_no_torch() -> None:
    run(sys.executable, "-c", "import sys, hf_stable.cli; assert 'torch' not in sys.modules")


def broken(command: list[str], **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command whose output nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [HF_STABLE, *command],
            cwd=ROOT,
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
            env={**os.environ, **variables},
        )
    finally:
        os.close(writing)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_no_command(unbuffered: str) -> None:
    command = ["check", "recipes/base/tiny.yaml", "--print-config"]
    answer = broken(command, PYTHONUNBUFFERED=unbuffered)
    assert (answer.returncode, answer.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_the_output_is_one_error() -> None:
    with Path("/dev/full").open("wb") as full:
        answer = subprocess.run(
            [HF_STABLE, "check", "recipes/base/tiny.yaml", "--print-config"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model with its tokenizer."""
    folder = tmp_path_factory.mktemp("process") / "model"
    program = (
        "import sys; from pathlib import Path; folder = Path(sys.argv[1])\n"
        "from hf_stable.data import train_tokenizer; from hf_stable import StableGPTForCausalLM\n"
        "from hf_stable.recipes import load_recipe\n"
        "t = train_tokenizer(['some text ' * 9], kind='bpe', vocab_size=258, folder=folder)\n"
        "ids = {'bos_token_id': t.bos_token_id, 'eos_token_id': t.eos_token_id}\n"
        "config = load_recipe('recipes/base/tiny.yaml').model_config(**ids)\n"
        "StableGPTForCausalLM(config).save_pretrained(folder)"
    )
    run(sys.executable, "-c", program, folder)
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_results_survive_every_encoding_of_the_terminal(
    encoding: str, model: Path, tmp_path: Path
) -> None:
    """The line about bad records ends with an ellipsis, which no such encoding has."""
    text, output = tmp_path / "a.jsonl", tmp_path / "r.json"
    text.write_text('{"text": "some text"}\n' * 9 + "broken\n" * 7, encoding="utf-8")
    program = "from hf_stable.cli import main; print(main(), main())"
    command = ["evaluate", str(model), "--data", str(text), "--output", str(output)]
    answer = subprocess.run(
        [sys.executable, "-c", program, *command],
        cwd=ROOT,
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert answer.returncode == 0, answer.stderr
    assert b"perplexity per token" in answer.stdout and b"; ?)" in answer.stdout
    assert answer.stdout.split()[-2:] == [b"0", b"0"]
    assert json.loads(output.read_text(encoding="utf-8"))["documents"] == 9


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_progress_bar_shares_no_line_with_a_result(
    unbuffered: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
    variables = {"HF_HUB_DISABLE_PROGRESS_BARS": "0", "PYTHONUNBUFFERED": unbuffered}
    answer = subprocess.run(
        [HF_STABLE, "evaluate", str(model), "--data", str(tmp_path / "a.txt")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )
    lines = answer.stdout.split("\n")
    assert any("it/s]" in line for line in lines), answer.stdout
    assert any(line.startswith("perplexity per token") for line in lines)


def test_a_warning_is_one_line_without_source() -> None:
    settings = ["model.preset=soft_clip", "data.sequence_length=4096"]
    answer = subprocess.run(
        [HF_STABLE, "check", "recipes/base/tiny.yaml", "--set", *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = answer.stderr.splitlines()
    assert lines and all(line.startswith("warning: attention_clip_gamma") for line in lines)


def test_printing_a_recipe_imports_no_torch() -> None:
    program = (
        "import sys; from hf_stable.cli import main\n"
        "assert main(['check', 'recipes/base/830m.yaml', '--print-config']) == 0\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    assert "# sigma_reparam: false" in run(sys.executable, "-c", program)
