"""The library guide's lines about Transformers, as a user types them."""

import re
from pathlib import Path

import torch
import transformers
from transformers.distributed import DistributedConfig

from hf_stable import StableGPTForCausalLM

from .models import make, prompt

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "library.md"


def _blocks(heading: str) -> list[str]:
    section = GUIDE.read_text(encoding="utf-8").split(f"{heading}\n")[1].split("\n#")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def test_lines_inside_transformers_run(tmp_path, monkeypatch) -> None:
    make("qk_norm_cap").save_pretrained(tmp_path)
    classify, split = _blocks("## Inside Transformers")
    names = {"folder": tmp_path, "AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    exec(classify, names)
    with torch.no_grad():
        assert names["classifier"](prompt()).logits.shape == (2, 3)
    # Two processes load and compare in test_parallel_plans.py; here, what is asked of Transformers.
    asked = {}
    monkeypatch.setattr(
        StableGPTForCausalLM, "from_pretrained", lambda folder, **options: asked.update(options)
    )
    exec(split, names)
    assert asked["distributed_config"] == DistributedConfig(tp_size=2)
