"""Saving and loading: sharded, on meta, with missing keys, in every dtype, over devices.

That each preset's checkpoint is bit-equal after loading, and that construction on the meta device
plus initialization is the same model: tests/model/test_modeling.py.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from hf_stable import StableGPTConfig, StableGPTForCausalLM, StableGPTModel
from hf_stable.model.sigma_stable_gpt import StableGPTSigmaLinear

from ..alignment import place
from .models import PRESETS, make, prompt


@pytest.fixture(params=PRESETS)
def model(request):
    return make(request.param)


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt().to(model.device)).logits


def test_a_sharded_checkpoint_is_bit_equal_and_holds_safetensors_only(model, tmp_path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(file.name for file in tmp_path.glob("model-*"))
    assert len(shards) > 2 and all(name.endswith(".safetensors") for name in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert set(index["weight_map"].values()) == set(shards)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(place(loaded)), _logits(model))
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_a_tied_weight_is_saved_once(tmp_path) -> None:
    model = make("baseline", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, info = StableGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert model._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def test_every_missing_key_is_initialized_as_in_a_new_model(model, tmp_path) -> None:
    """Loading builds on the meta device: what a constructor set is lost."""
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {"model.embed_tokens.weight": weights["model.embed_tokens.weight"]}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = StableGPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) >= set(weights) - set(kept)
    new = StableGPTForCausalLM(model.config)
    for (name, tensor), fresh in zip(
        loaded.state_dict().items(), new.state_dict().values(), strict=True
    ):
        assert tensor.isfinite().all() and not tensor.is_meta, name
        if tensor.ndim == 1 and not name.endswith((".u", ".v")):
            assert torch.equal(tensor, fresh), name  # gains: nothing random
        elif tensor.ndim == 2:
            torch.testing.assert_close(tensor.std(), fresh.std(), rtol=0.1, atol=0)
    for linear in loaded.modules():
        if isinstance(linear, StableGPTSigmaLinear):
            largest = torch.linalg.svdvals(linear.effective_weight().detach())[0]
            torch.testing.assert_close(largest, linear.gain[0].detach())
    assert _logits(loaded).isfinite().all()


def test_sigma_reparam_warms_up_from_a_plain_checkpoint_unchanged(tmp_path) -> None:
    """Its gains and vectors are missing keys that begin as what the loaded weights make them."""
    model = make("baseline")
    model.save_pretrained(tmp_path)
    loaded = StableGPTForCausalLM.from_pretrained(
        tmp_path, sigma_reparam=True, sigma_gain_init="spectral"
    )
    torch.testing.assert_close(_logits(loaded), _logits(model), atol=1e-4, rtol=1e-4)


def test_decoder_and_language_model_load_each_others_checkpoints(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "whole")
    decoder, info = AutoModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert isinstance(decoder, StableGPTModel) and set(info["unexpected_keys"]) == {
        "lm_head.weight"
    }
    decoder.save_pretrained(tmp_path / "decoder")
    again, info = StableGPTForCausalLM.from_pretrained(
        tmp_path / "decoder", output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    with torch.no_grad():
        hidden = model.model(prompt()).last_hidden_state
        assert torch.equal(again.model(prompt()).last_hidden_state, hidden)


def test_weights_of_another_shape_are_refused_unless_asked_for(tmp_path) -> None:
    make("baseline").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        StableGPTForCausalLM.from_pretrained(tmp_path, vocab_size=80)
    loaded, info = StableGPTForCausalLM.from_pretrained(
        tmp_path, vocab_size=80, ignore_mismatched_sizes=True, output_loading_info=True
    )
    names = {key for key, *_ in info["mismatched_keys"]}
    assert names == {"model.embed_tokens.weight", "lm_head.weight"}
    assert _logits(loaded).shape[-1] == 80


# dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_as_saved_and_as_asked(model, dtype, tmp_path) -> None:
    expected = _logits(model)
    model.to(dtype).save_pretrained(tmp_path)
    for asked in ("auto", dtype, str(dtype).removeprefix("torch.")):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=asked)
        assert {each.dtype for each in loaded.parameters()} == {dtype}
        assert torch.equal(_logits(place(loaded)), _logits(model))
        assert loaded.config.dtype == dtype
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {each.dtype for each in wide.parameters()} == {torch.float32}
    error = (_logits(wide) - expected).norm() / expected.norm()
    # Rounding of weights alone, 2^-9 and 2^-12 each, through two blocks.
    assert 0 < error < (0.05 if dtype == torch.bfloat16 else 0.005)


def test_auto_takes_the_checkpoints_dtype_when_the_config_has_none(tmp_path) -> None:
    make("baseline").to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16


# devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}])
def test_device_map_on_one_device(model, where, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where)
    assert torch.equal(_logits(loaded).cpu(), _logits(model))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_layers_on_disk_compute_the_same(preset: str, tied: bool, tmp_path) -> None:
    model = make(preset, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    places = {
        "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.embed_norm": "cpu",
        "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk", "lm_head": "cpu",
    }  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[1].self_attn.qkv_proj.weight.is_meta
    assert torch.equal(_logits(loaded), _logits(model))
    options = {"max_new_tokens": 4, "do_sample": False}
    generated = loaded.generate(prompt(), **options)
    assert torch.equal(generated, model.generate(prompt(), **options))


def test_device_map_splits_between_blocks_only() -> None:
    """accelerate's placement, by `_no_split_modules`, with room for half the model on a device."""
    accelerate = pytest.importorskip("accelerate")
    model = make("qk_fc_norm")
    sizes = accelerate.utils.compute_module_sizes(model)
    places = accelerate.infer_auto_device_map(
        model,
        max_memory={0: sizes[""] // 2, "cpu": sizes[""] * 2},
        no_split_module_classes=model._no_split_modules,
    )
    assert len(set(places.values())) == 2
    assert all(name.count(".") <= 2 for name in places)


def test_a_model_of_no_checkpoint_is_built_on_meta_without_memory() -> None:
    with torch.device("meta"):
        model = StableGPTForCausalLM(StableGPTConfig(sigma_reparam=True))
    tensors = (*model.parameters(), *model.buffers())
    assert all(tensor.is_meta for tensor in tensors)
