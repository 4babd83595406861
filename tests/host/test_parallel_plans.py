"""Split by Transformers over two processes, a model computes what the whole one does."""

import json
from typing import Any

import pytest
import torch

from hf_stable import StableGPTForCausalLM
from hf_stable.model.blocks_stable_gpt import StableGPTAttention
from hf_stable.model.configuration_stable_gpt import PRESETS as ALL_PRESETS
from hf_stable.model.parallel_stable_gpt import check_parallelism

from ..warm import ranks
from .models import PRESETS, make, make_config

TENSOR, PIPELINE, SHARDED = {"tp_size": 2}, {"pp_size": 2}, {"fsdp_size": 2}
NO_RANGE = {"initializer_range": 0.02}
# name: split, preset, fields
CASES: dict[str, tuple[dict[str, int], str, dict[str, Any]]] = {
    **{f"tensor-{preset}": (TENSOR, preset, {}) for preset in PRESETS},
    "tensor-tied": (TENSOR, "qk_norm_cap", {"tie_word_embeddings": True}),
    "tensor-full-norms": (TENSOR, "baseline", {"qk_norm": "full", "v_norm": "full"}),
    "tensor-uneven-heads": (
        TENSOR,
        "qkv_norm",
        {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6, "vocab_size": 63},
    ),
    "tensor-embedding": (
        TENSOR,
        "baseline",
        {"embedding_scale": 3.0, "embedding_detach": 0.1, "layer_scale": 0.3},
    ),
    "tensor-head": (
        TENSOR,
        "baseline",
        {"final_logit_softcapping": 0.5, "z_loss": 0.1, "embedding_norm": True, "norm_bias": True},
    ),
    "tensor-gated": (TENSOR, "gated_mlp", {"linear_bias": "all", "parallel_residual": True}),
    "pipeline-head": (PIPELINE, "baseline", {"final_logit_softcapping": 0.5}),
    "pipeline-qk_norm_cap": (PIPELINE, "qk_norm_cap", {"embedding_scale": 3.0}),
    "pipeline-sigma_reparam": (PIPELINE, "sigma_reparam", {"tie_word_embeddings": True}),
    "pipeline-embed_norm": (PIPELINE, "embed_norm", NO_RANGE),
    "sharded-sigma_reparam": (SHARDED, "sigma_reparam", {}),
    "sharded-qk_fc_norm": (SHARDED, "qk_fc_norm", {"tie_word_embeddings": True}),
}
REFUSED = {
    "tensor-sigma_reparam": "tp_size=2 cannot do sigma_reparam=True",
    "pipeline-embed_norm": "pp_size=2 cannot do embedding_norm=True",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("parallel")
    for name, (_, preset, fields) in CASES.items():
        make(preset, **fields).double().save_pretrained(root / name)
    splits = {name: split for name, (split, *_) in CASES.items()}
    (root / "splits.json").write_text(json.dumps(splits))
    ranks(2, "-m", "tests.host.parallel_worker", root)
    return {name: json.loads((root / name / "result.json").read_text()) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_split_equals_whole_or_is_refused_by_name(name: str, results) -> None:
    result = results[name]
    if name in REFUSED:
        assert REFUSED[name] in result["refused"]
        return
    assert "refused" not in result, result
    assert result["logits"] < 1e-10
    assert result["generated"]
    if CASES[name][0] is PIPELINE:
        return  # it has no loss, and Transformers loses count of a static cache in later stages
    assert result["static"]
    assert result["loss"] < 1e-10 and result["evaluated"] < 1e-10
    assert len(result["gradients"]) > 10
    assert max(result["gradients"].values()) < 1e-9, result["gradients"]
    assert result["saved"] < 1e-10


def test_tensor_parallel_processes_hold_half_of_every_matrix(results) -> None:
    held = results["tensor-qk_fc_norm"]["held"]
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in held} == {
        "embed_tokens", "lm_head", "qkv_proj", "o_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert len(held) == 2 + 4 * 2
    assert all(0.48 <= share <= 0.52 for share in held.values())


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_plans_name_what_is_there_and_every_linear_map(preset: str) -> None:
    fields = NO_RANGE if ALL_PRESETS[preset].get("initializer", "normal") != "normal" else {}
    with torch.device("meta"):
        model = StableGPTForCausalLM(make_config(preset, **fields))
    modules = {name.replace(".0", ".*") for name, _ in model.named_modules()}
    for plan in (model.tp_plan, model.pp_plan, model.fsdp_plan):
        assert set(plan) <= modules
    linears = {
        name.replace(".0", ".*")
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and ".1." not in name
    }
    if preset == "sigma_reparam":
        assert model.config.base_model_tp_plan is None
    else:
        assert set(model.tp_plan) == linears
    assert "tp_plan" not in json.dumps(model.config.to_dict())


def test_folding_makes_tensor_parallelism_possible() -> None:
    model = make("sigma_reparam")
    model.fold_sigma_reparam()
    assert model.config.base_model_tp_plan == make_config("baseline").base_model_tp_plan


def test_one_process_refuses_nothing() -> None:
    from transformers.distributed import DistributedConfig  # noqa: PLC0415

    config = make_config("sigma_reparam", embedding_norm=True)
    check_parallelism(config, DistributedConfig(tp_size=1, pp_size=1))


def test_layers_are_where_backends_and_pipelines_look_for_their_numbers() -> None:
    model = make("baseline")
    for index, module in enumerate(
        each for each in model.modules() if isinstance(each, StableGPTAttention)
    ):
        assert module.layer_idx == index and module.is_causal
        assert module.num_key_value_groups == 2 and module.scaling == 1 / 8**0.5
