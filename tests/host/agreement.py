"""Ways to generate that must agree, in any process: imports neither hf_stable nor the tests.

    python tests/host/agreement.py FOLDER ...

loads each exported folder by the code in it, without hf_stable, and names the ways that disagree.
"""

import sys
from typing import Any

import torch

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
BEAMS: dict[str, Any] = {**GREEDY, "num_beams": 3}
CACHES: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "static cache": {"cache_implementation": "static"},
}
PADDING = 3


def disagreements(model: Any, ids: torch.Tensor) -> list[str]:
    """Return the ways of generation whose tokens differ from those without a cache or padding.

    Args:
        model: Causal language model with `pad_token_id=0`, in float64 so that no argmax is close.
        ids: (B, Q) int64, without 0.
    """
    padded = torch.nn.functional.pad(ids, (PADDING, 0), value=0)
    mask = (padded != 0).long()
    wrong = []
    for name, options in {"greedy": GREEDY, "beams": BEAMS}.items():
        expected = model.generate(ids, **options, use_cache=False)
        for cache, choice in CACHES.items():
            if not torch.equal(model.generate(ids, **options, **choice), expected):
                wrong.append(f"{name}, {cache}")
            left = model.generate(padded, attention_mask=mask, **options, **choice)
            if not torch.equal(left[:, PADDING:], expected):
                wrong.append(f"{name}, {cache}, left padding")
    return wrong


def main(folders: list[str]) -> int:
    """Check exports in this process and return the number of those that disagree."""
    # A None in sys.modules makes any import of hf_stable fail, as on a user's machine.
    sys.modules["hf_stable"] = None  # pyright: ignore[reportArgumentType]
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    failed = 0
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        model = model.double().eval()
        wrong = disagreements(model, torch.arange(1, 11).view(2, 5))
        failed += bool(wrong)
        print(f"{folder}: {type(model).__module__}: {'; '.join(wrong) or 'all ways agree'}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
