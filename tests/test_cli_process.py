"""Commands as processes of their own, which know only what they import themselves."""

import subprocess
import sys
from pathlib import Path

import pytest

from .warm import python

ROOT = Path(__file__).parent.parent
TECHNIQUES = sorted((ROOT / "recipes" / "techniques").glob("*.yaml"))
HF_STABLE = Path(sys.executable).with_name("hf-stable")


def run(*command: str | Path) -> str:
    answer = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.parametrize("base", ["quickstart.yaml", "base/830m.yaml"])
def test_check_accepts_every_technique(base: str) -> None:
    program = (
        "import sys; from hf_stable.cli import main\n"
        "for technique in sys.argv[2:]:\n"
        "    assert main(['check', sys.argv[1], technique]) == 0, technique"
    )
    recipe = ROOT / "recipes" / base
    assert len(TECHNIQUES) >= 16
    output = run(python(), "-W", "ignore", "-c", program, recipe, *TECHNIQUES)
    assert output.count("this recipe works") == len(TECHNIQUES)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["recipes/techniques/soft_clip.yaml"],
        ["--set", "data.separate_documents=true", "model.preset=baseline"],
    ],
    ids=["cap", "clip", "packed documents"],
)
def test_plan_knows_the_kernels(options: list[str]) -> None:
    sizes = ["--gpus", "8", "--gpu-memory", "80"]
    assert "|    8 |" in run(
        python(), HF_STABLE, "plan", "recipes/quickstart.yaml", *options, *sizes
    )


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
