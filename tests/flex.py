"""FlexAttention on a CPU in a second instead of half a minute: nothing is compiled to C++."""

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import masking_utils
from transformers.integrations import flex_attention as transformers_flex


def trace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run PyTorch's own definition of FlexAttention and of its masks, with the same arguments.

    What we give it is what a test is about, a mask and a function of scores; that Inductor makes
    the same of them, a case of tests/model/test_modeling.py shows.
    """
    torch._dynamo.reset()  # it keeps eight traces of a function and refuses a ninth
    monkeypatch.setattr(
        transformers_flex, "WrappedFlexAttention", lambda training: lambda: flex_attention
    )

    def create(*arguments: Any, **options: Any) -> Any:
        return create_block_mask(*arguments, **{**options, "_compile": False})

    monkeypatch.setattr(masking_utils, "create_block_mask", create)
