"""Find and name the watched modules of a Transformers causal LM.

The search uses what all Transformers families share: a `config`, a module list of
`num_hidden_layers` blocks, input and output embeddings, and attention modules with a `layer_idx`.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

# Name of a linear map in the papers -> its names in model families.
_ROLES = {
    "qkv": {"qkv_proj", "c_attn", "query_key_value", "Wqkv"},
    "q": {"q_proj"},
    "k": {"k_proj"},
    "v": {"v_proj"},
    "proj": {"o_proj", "out_proj", "dense"},
    "gate": {"gate_proj"},
    "fc1": {"up_proj", "c_fc", "fc1", "dense_h_to_4h"},
    "fc2": {"down_proj", "fc2", "dense_4h_to_h"},
}
_WORDS = {name: word for word, names in _ROLES.items() for name in names}
# Modules that read the residual stream on its way to the MLP; the first one found is used.
_MLP_READERS = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "mlp")
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class Layer:
    """One block and its watched modules.

    Args:
        index: Index of the block, from 0.
        module: The block.
        linears: Linear maps by place, such as "layers.1.qkv".
        attention: Module that calls the attention function, or None.
        mlp_reader: Module whose input is the stream that the MLP reads, or None.
    """

    index: int
    module: nn.Module
    linears: dict[str, nn.Module]
    attention: nn.Module | None
    mlp_reader: nn.Module | None

    @property
    def place(self) -> str:
        """Name of the block, `layers.N`."""
        return f"layers.{self.index}"


@dataclass(frozen=True)
class Sites:
    """Watched modules of a model; `final` is the norm after the last block, or None."""

    model: Any
    layers: list[Layer]
    embedding: nn.Module
    head: nn.Module
    final: nn.Module | None


def find_sites(model: Any) -> Sites:
    """Find the watched modules of a causal LM.

    Args:
        model: Transformers causal LM, not wrapped.

    Raises:
        ValueError: If the model has no list of blocks, or no input or output embedding.
    """
    config = model.config.get_text_config(decoder=True)
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    head = model.get_output_embeddings()
    if not lists or head is None:
        what = "output embedding" if lists else f"list of {config.num_hidden_layers} blocks"
        raise ValueError(
            f"{type(model).__name__} has no {what}: telemetry needs a Transformers causal LM."
        )
    layers = [_layer(index, module) for index, module in enumerate(lists[0])]
    children = dict(model.base_model.named_children())
    finals = [children[name] for name in _FINAL_NORMS if name in children]
    final = finals[0] if finals else None
    return Sites(model, layers, model.get_input_embeddings(), head, final)


def _layer(index: int, block: nn.Module) -> Layer:
    found: dict[str, nn.Module] = {
        path: module
        for path, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    words = {path: _word(path) for path in found}
    times = Counter(words.values())
    linears = {
        # Several maps of one kind, such as experts, keep their paths.
        f"layers.{index}.{words[path] if times[words[path]] == 1 else path}": module
        for path, module in found.items()
    }
    attentions = [module for module in block.modules() if "layer_idx" in vars(module)]
    children = dict(block.named_children())
    # With a norm after the MLP but none before it, the norm after attention is also in a branch.
    after = {"post_feedforward_layernorm"} & children.keys()
    before = "pre_feedforward_layernorm" in children
    names = _MLP_READERS if before or not after else ("mlp",)
    readers = [children[name] for name in names if name in children]
    return Layer(
        index,
        block,
        linears,
        next((module for module in attentions if module is not block), None),
        readers[0] if readers else None,
    )


def _word(path: str) -> str:
    *_, parent, name = ("", *path.split("."))
    if name == "c_proj":
        return "proj" if "attn" in parent else "fc2"
    return _WORDS.get(name, path)
