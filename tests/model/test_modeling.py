"""The model as Transformers sees it: backends, masks, caches, checkpointing, saving, bad input.

What Transformers' own model tests look at, generation among it: tests/host/.
"""

import copy
import re

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    modeling_utils,
)

from hf_stable import StableGPTConfig, StableGPTForCausalLM, StableGPTModel
from hf_stable.model.configuration_stable_gpt import PRESETS
from hf_stable.model.loss_stable_gpt import linear_cross_entropy

from .. import reference
from ..alignment import place
from ..flex import trace_only
from ..techniques import GEOMETRY, build, from_config, relative_error, tokens

CAP = {"attn_logit_softcapping": 0.5}
CLIPS = [
    {"attention_clip_gamma": -0.05},
    {"attention_clip_alpha": 0.5},
    {"attention_clip_zeta": 1.1},
]
# What each backend must do; what it must refuse is all the rest.
SCORES = {
    "plain": {},
    "cap": CAP,
    "norm+cap": {**CAP, "qk_norm": "head"},
    "temperature": {"attention_multiplier": 0.5},
    "qkv_norm": {"qk_norm": "head", "v_norm": "head", "attention_pre_norm": False},
}


def _documents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, restarting positions and the (B, Q, K) mask of three documents packed into a row."""
    ids = tokens(length=13)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5, 6]).expand(2, -1)
    document = (positions == 0).cumsum(-1)
    same = document[:, :, None] == document[:, None, :]
    return ids, positions, same & torch.ones(13, 13, dtype=torch.bool).tril()


def _weights(model) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("attn", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mask", ["causal", "packed", "left", "right", "4d"])
def test_every_backend_and_mask_equals_the_reference_or_refuses(
    attn, score, mask, monkeypatch
) -> None:
    fields = SCORES[score]
    if attn == "sdpa" and CAP.items() <= fields.items():
        with pytest.raises(ValueError, match=r'"sdpa" cannot do attn_logit_softcapping=0.5'):
            build(attn=attn, **fields)
        return
    model = build(attn=attn, **fields)
    # What Inductor writes with ATEN_CPU_CAPABILITY=default is no C++ that compiles (torch 2.13).
    has_vectors = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    if (score, mask) == ("norm+cap", "packed") and has_vectors:
        torch._dynamo.reset()  # and flex is compiled, as users have it
    else:
        trace_only(monkeypatch)
    # Compiled, flex has no float64 on a CPU.
    tolerance = 1e-10 if attn != "flex_attention" else 2e-5
    if attn == "flex_attention":
        model = model.float()
    ids, positions, visible = _documents()
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    plain_positions = torch.arange(length).expand(2, -1)
    kept = torch.ones_like(ids, dtype=torch.bool)
    arguments: dict = {}
    if mask == "causal":
        positions, visible = plain_positions, causal.expand(2, -1, -1)
    elif mask == "packed":
        arguments = {"position_ids": positions}
    elif mask == "4d":
        if attn == "flex_attention":
            pytest.skip("flex takes block masks, not 4-d masks")
        dense = visible[:, None]
        additive = torch.zeros(dense.shape, dtype=torch.float64)
        additive = additive.masked_fill(~dense, torch.finfo(torch.float64).min)
        arguments = {"position_ids": positions, "attention_mask": additive, "use_cache": False}
    else:
        padding = slice(0, 4) if mask == "left" else slice(-4, None)
        kept[0, padding] = False
        positions = (kept.long().cumsum(-1) - 1).clamp(min=0) if mask == "left" else plain_positions
        visible = causal & kept[:, None, :]
        visible = visible | torch.eye(length, dtype=torch.bool)  # a padded row needs some key
        arguments = {"attention_mask": kept.long(), "position_ids": positions}
    with torch.no_grad():
        logits = model(ids, **arguments).logits
        weights = {name: tensor.double() for name, tensor in _weights(model).items()}
        expected = reference.logits(weights, model.config, ids, positions, visible)
    assert relative_error(logits[kept], expected[kept]) < tolerance


@pytest.mark.parametrize("fields", CLIPS, ids=lambda fields: next(iter(fields)))
@pytest.mark.parametrize("attn", ["sdpa", "flex_attention", "paged|eager"])
def test_backends_refuse_the_clip_by_name(fields: dict, attn: str) -> None:
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"cannot do {name}={value}"):
        build(attn=attn, **fields)
    model = build(**fields)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=name):
        model.set_attn_implementation(attn)


@pytest.mark.parametrize(
    "attn", ["flash_attention_2", "flash_attention_3", "paged|flash_attention_2", "org/kernel"]
)
@pytest.mark.parametrize("kernels", [False, True])
def test_flash_refuses_what_it_would_ignore(attn: str, kernels: bool, monkeypatch) -> None:
    """With `kernels` installed, Transformers turns flash names into Hub kernels by another way."""
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda *a, **k: kernels)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *a, **k: None)
    for fields in (*CLIPS, {**CAP, "attention_dropout": 0.1}):
        with pytest.raises(ValueError, match=f"{re.escape(attn)}.* cannot do attention_"):
            build(attn=attn, **fields)
        with pytest.raises(ValueError, match="cannot do attention_"):
            build(**fields).set_attn_implementation(attn)


def test_default_backend_can_do_the_model() -> None:
    assert build().config._attn_implementation == "sdpa"
    assert build(**CAP).config._attn_implementation == "eager"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("clipped", [False, True])
def test_causal_by_gradient(preset: str, clipped: bool) -> None:
    extra = {"attention_clip_alpha": 0.5} if clipped and preset != "soft_clip" else {}
    model = from_config(StableGPTConfig.from_preset(preset, **GEOMETRY, **extra))
    embeds = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    for position in (0, 5, 12):
        (grad,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[:, position].sum(), embeds)
        assert (grad[:, position + 1 :] == 0).all()
        assert (grad[:, position] != 0).any()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_equals_full(preset: str, cache: str) -> None:
    model = from_config(StableGPTConfig.from_preset(preset, **GEOMETRY))
    ids = tokens()
    full = model(ids).logits
    caches = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=20),
    }
    past = caches[cache]()
    parts = [model(part, past_key_values=past).logits for part in ids.split((6, 1, 1, 5), dim=1)]
    assert relative_error(torch.cat(parts, dim=1), full) < 1e-10


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(preset: str, reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = from_config(StableGPTConfig.from_preset(preset, **GEOMETRY)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
        results[-1] += [buffer.clone() for buffer in model.buffers()]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_num_items_makes_accumulation_exact() -> None:
    model, ids = build(z_loss=0.1), tokens(batch=4)
    labels = ids.clone()
    labels[0, :9] = -100
    gradients = []
    for size in (4, 1):
        model.zero_grad()
        for rows, targets in zip(ids.split(size), labels.split(size), strict=True):
            items = (labels[:, 1:] >= 0).sum()
            model(rows, labels=targets, num_items_in_batch=items).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for whole, parts in zip(*gradients, strict=True):
        assert (whole - parts).norm() <= 1e-12 * whole.norm()


def test_shift_labels_are_labels_already_shifted() -> None:
    model, ids = build(), tokens()
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, labels=ids).loss, model(ids, shift_labels=shifted).loss)


def test_training_skips_logits_and_evaluation_does_not() -> None:
    model, ids = build(), tokens()
    assert model.train()(ids, labels=ids).logits is None
    assert model(ids, labels=ids, skip_logits=False).logits is not None
    assert model.eval()(ids, labels=ids).logits.shape == (2, 13, 61)
    assert model(ids, labels=ids, skip_logits=True).logits is None
    assert model.train()(ids).logits is not None


def test_logits_to_keep() -> None:
    model, ids = build(), tokens()
    full = model(ids).logits
    assert relative_error(model(ids, logits_to_keep=3).logits, full[:, -3:]) < 1e-12
    chosen = torch.tensor([1, 7])
    assert relative_error(model(ids, logits_to_keep=chosen).logits, full[:, chosen]) < 1e-12


@pytest.mark.parametrize("preset", ["scaled_embed", "embed_norm", "embed_detach"])
def test_input_embeds_equal_input_ids(preset: str) -> None:
    model = from_config(StableGPTConfig.from_preset(preset, **GEOMETRY))
    embeds = model.get_input_embeddings()(tokens())
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens()).logits)


def test_tying_shares_one_weight_and_survives_saving(tmp_path) -> None:
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_resizing_the_vocabulary_keeps_cap_and_loss() -> None:
    model = build(final_logit_softcapping=0.2, z_loss=0.1, initializer_range=1.0)
    before = model(tokens()).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    output = model(tokens(), labels=tokens())
    assert output.logits.shape[-1] == 70 and output.logits.abs().max() <= 0.2
    # A product of another width may round each sum of 32 products otherwise, by a unit a term.
    rounding = 32 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(output.logits[..., :61], before, rtol=rounding, atol=rounding)
    assert output.z_loss > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_save_and_load_is_bit_equal(preset: str, tmp_path) -> None:
    model = from_config(StableGPTConfig.from_preset(preset, **GEOMETRY)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    if preset == "sigma_reparam":
        model.power_iterate(2)
    model.save_pretrained(tmp_path)
    for auto, kind in ((AutoModelForCausalLM, StableGPTForCausalLM), (AutoModel, StableGPTModel)):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, kind)
        assert not info["missing_keys"] and not info["mismatched_keys"]
    loaded = place(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), StableGPTConfig)


@pytest.mark.parametrize("preset", PRESETS)
def test_meta_construction_then_initialization_is_the_same_model(preset: str) -> None:
    """_init_weights covers every parameter and buffer: nothing keeps what a constructor set."""
    config = StableGPTConfig.from_preset(preset, **GEOMETRY)
    with torch.device("meta"):
        model = StableGPTForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    expected = StableGPTForCausalLM(config)
    for each in (model, expected):
        for module in each.modules():
            module._is_hf_initialized = False
        torch.manual_seed(0)
        each.init_weights()
    for (name, actual), tensor in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*expected.parameters(), *expected.buffers()],
        strict=True,
    ):
        assert torch.equal(actual, tensor), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_stays_near_float64(preset: str, dtype: torch.dtype) -> None:
    model = from_config(StableGPTConfig.from_preset(preset, **GEOMETRY))
    half = copy.deepcopy(model).to(dtype)
    output = half(tokens(), labels=tokens())
    assert output.loss.dtype == torch.float32
    exact = model(tokens(), labels=tokens())
    assert abs(output.loss - exact.loss) < 0.02
    half.train()(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


@pytest.mark.parametrize("preset", ["baseline", "sigma_reparam", "qk_norm_cap"])
def test_autocast_trains_fp32_weights(preset: str) -> None:
    model = from_config(StableGPTConfig.from_preset(preset, **GEOMETRY)).float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens(), labels=tokens())
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_parameters_are_never_scalars() -> None:
    """FSDP2 refuses 0-d parameters."""
    for preset in PRESETS:
        model = from_config(StableGPTConfig.from_preset(preset, **GEOMETRY))
        assert all(parameter.ndim >= 1 for parameter in model.parameters())


def test_state_dict_has_the_published_names() -> None:
    layer = "model.layers.0."
    everything = {
        "embedding_norm": True, "norm_bias": True, "layer_scale": 0.1, "attention_post_norm": True,
        "mlp_post_norm": True, "qk_norm": "head", "v_norm": "head", "sigma_reparam": True,
        "num_hidden_layers": 1,
    }  # fmt: skip
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
             "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm",
             "self_attn.v_norm"]  # fmt: skip
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    names |= {f"{layer}{scale}.weight" for scale in ("attention_scale", "mlp_scale")}
    for norm in [*(layer + norm for norm in norms), "model.norm", "model.embed_norm"]:
        names |= {f"{norm}.weight", f"{norm}.bias"}
    for linear in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        names |= {f"{layer}{linear}.{kind}" for kind in ("weight", "gain", "u", "v")}
    assert set(build(**everything).state_dict()) == names
    names |= {f"{layer}mlp.gate_proj.{kind}" for kind in ("weight", "gain", "u", "v")}
    names |= {name.replace(".gain", ".bias") for name in names if name.endswith(".gain")}
    everything |= {"mlp_gated": True, "linear_bias": "all"}
    assert set(build(**everything).state_dict()) == names
    assert build(**everything).state_dict()[f"{layer}self_attn.q_norm.weight"].shape == (8,)


# sigma-Reparam in time ------------------------------------------------------------------------


def _vectors(model) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if name[-2:] in (".u", ".v")]


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("update", ["by hand", "foreach", "fused", "loop"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_power_step_an_optimizer_step(update: str, checkpointing: bool) -> None:
    model = build(sigma_reparam=True).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    how = {"foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **how.get(update, {}))
    model(tokens(), labels=tokens()).loss.backward()
    for _ in range(3):
        before = _vectors(model)
        with torch.no_grad():
            if update == "by hand":
                for parameter in model.parameters():
                    parameter.sub_(0.5 * parameter.grad)
            else:
                optimizer.step()
        twin = copy.deepcopy(model)
        twin.power_iterate(1)
        for _ in range(2):  # accumulation: the second forward must not advance again
            model(tokens(), labels=tokens()).loss.backward()
            assert _equal(_vectors(model), _vectors(twin))
        assert not _equal(_vectors(model), before)


def test_vectors_stand_still_in_evaluation() -> None:
    model = build(sigma_reparam=True).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    before = _vectors(model)
    model.eval()(tokens())
    assert _equal(_vectors(model), before)


def test_sigma_follows_moving_weights() -> None:
    model = build(sigma_reparam=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model(tokens())
    for name, linear in model._sigma_linears():
        largest = torch.linalg.svdvals(linear.effective_weight())[0]
        assert relative_error(largest[None], linear.gain.abs()) < 0.02, name


def test_a_copy_that_an_adapter_trains_is_followed() -> None:
    """PEFT's modules_to_save trains a deep copy in the layer's place."""
    model = build(sigma_reparam=True).train()
    layer = model.model.layers[0].mlp
    layer.up_proj = copy.deepcopy(layer.up_proj)
    model(tokens(), labels=tokens())
    before = layer.up_proj.u.clone()
    with torch.no_grad():
        layer.up_proj.weight.add_(torch.randn_like(layer.up_proj.weight))
    model(tokens(), labels=tokens())
    assert not torch.equal(before, layer.up_proj.u)


def test_folding_one_model_leaves_another_of_the_same_config(tmp_path) -> None:
    config = StableGPTConfig(**GEOMETRY, sigma_reparam=True)
    one, other = StableGPTForCausalLM(config), StableGPTForCausalLM(config)
    one.fold_sigma_reparam()
    other.save_pretrained(tmp_path)
    loaded = StableGPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(tokens()).logits, other.eval()(tokens()).logits)
    assert loaded.config.sigma_reparam and not one.config.sigma_reparam


# precision ------------------------------------------------------------------------------------


def test_casting_a_model_keeps_its_rotations() -> None:
    model = build().float()
    cast = copy.deepcopy(model).to(torch.bfloat16).float()
    rotary, again = model.model.rotary_emb, cast.model.rotary_emb
    hidden, positions = torch.zeros(1), torch.arange(64)[None]
    for one, other in zip(rotary(hidden, positions), again(hidden, positions), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_fp16_gradients_survive_a_loss_scale(scale: float) -> None:
    """Rows of the head that are never a target have gradients near 1 / (tokens * vocabulary)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, 16, generator=generator)
    weight = torch.randn(2000, 16, generator=generator) * 0.02
    labels = torch.randint(0, 200, (2048,), generator=generator)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        leaf = weight.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32):
            loss, *_ = linear_cross_entropy(hidden.to(dtype), leaf, labels)
        (loss * scale).backward()
        gradients.append(leaf.grad.double())
    assert relative_error(gradients[1][200:], gradients[0][200:]) < 2e-3
    half = build().half()
    (half(tokens(), labels=tokens()).loss * scale).backward()
    assert half.lm_head.weight.grad.isfinite().all()


# embeddings -----------------------------------------------------------------------------------


def test_another_input_embedding_keeps_scale_and_detach() -> None:
    model = build(embedding_scale="sqrt_hidden", embedding_detach=0.1)
    before = model(tokens()).logits
    plain = torch.nn.Embedding(61, 32).double()
    plain.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.set_input_embeddings(plain)
    assert torch.equal(model(tokens()).logits, before)
    assert model.get_input_embeddings().weight is plain.weight


def test_adapters_train_and_merge() -> None:
    peft = pytest.importorskip("peft")
    model = build(embedding_scale="sqrt_hidden", qk_norm="head").float()
    targets = ["embed_tokens", "qkv_proj", "o_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.3)
    adapted(tokens(), labels=tokens()).loss.backward()
    expected = adapted.eval()(tokens()).logits
    assert relative_error(adapted.merge_and_unload()(tokens()).logits, expected) < 1e-4


# compile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["qk_norm_cap", "sigma_reparam"])
def test_blocks_compile_without_graph_breaks(preset: str) -> None:
    config = StableGPTConfig.from_preset(preset, **{**GEOMETRY, "num_hidden_layers": 1})
    model = from_config(config).float().train()
    expected = model(tokens(), labels=tokens()).loss
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert relative_error(loss, expected) < 1e-6


# bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 61])
def test_ids_outside_the_vocabulary_are_named(wrong: int) -> None:
    ids = tokens()
    ids[1, 2] = wrong
    with pytest.raises(ValueError, match=f"input_ids contains {wrong}, .* 0 to 60"):
        build()(ids)


def test_too_long_a_sequence_is_named_by_every_route() -> None:
    model, message = build(), "65 tokens, but max_position_embeddings=64"
    with pytest.raises(ValueError, match=message):
        model(tokens(length=65))
    with pytest.raises(ValueError, match=message):
        model(tokens(length=2), position_ids=torch.tensor([[63, 64]]))
    past = model(tokens(length=60)).past_key_values
    with pytest.raises(ValueError, match=message):
        model(tokens(length=5), past_key_values=past)
    packed = torch.arange(40).repeat(2)[None].expand(2, -1)
    assert model(tokens(length=80), position_ids=packed).logits.shape[1] == 80


@pytest.mark.parametrize("wrong", [61, -1])
def test_labels_outside_the_vocabulary_are_named(wrong: int) -> None:
    labels = tokens()
    labels[0, 3] = wrong
    with pytest.raises(ValueError, match=f"labels contains {wrong}"):
        build()(tokens(), labels=labels)
    with pytest.raises(ValueError, match=r"labels have the shape \(13, 2\)"):
        build()(tokens(), labels=tokens().T)


def test_ignore_index_is_honoured() -> None:
    model, ids = build(), tokens()
    ignored = ids.masked_fill(ids == 7, -100)
    assert torch.equal(model(ids, labels=ids, ignore_index=7).loss, model(ids, labels=ignored).loss)


def test_flex_refuses_a_dense_mask() -> None:
    with pytest.raises(ValueError, match="not a 4-d tensor"):
        build(attn="flex_attention").float()(
            tokens(), attention_mask=torch.ones(2, 1, 13, 13, dtype=torch.bool)
        )


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_a_batch_without_tokens_is_named(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        build()(torch.zeros(shape, dtype=torch.long))


def test_both_or_neither_input_is_refused() -> None:
    model = build()
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model(tokens(), inputs_embeds=model.get_input_embeddings()(tokens()))


@pytest.mark.parametrize("field, value", [("z_loss", 0.1), ("qk_norm", "head"), ("layer_scale", 1)])
def test_a_built_models_config_refuses_what_it_would_ignore(field: str, value) -> None:
    model = build()
    with pytest.raises(ValueError, match=f"{field}={value!r} would be ignored"):
        setattr(model.config, field, value)
    changed = copy.deepcopy(model.config)
    setattr(changed, field, value)
    assert getattr(from_config(changed).config, field) == value
    model.config.use_cache = False  # what the model reads at every call stays free


def test_fields_set_after_the_config_was_made_are_checked() -> None:
    config = StableGPTConfig(**GEOMETRY)
    config.attn_logit_softcapping = -1.0
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=-1\.0"):
        StableGPTForCausalLM(config)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_cumulative_lengths_alone_are_refused_where_nobody_reads_them(backend: str) -> None:
    model, ids = build(attn=backend), tokens(1, 9)
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=f'"{backend}" ignores cu_seq_lens_q.*position_ids'):
        model(ids, cu_seq_lens_q=lengths, use_cache=False)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, cu_seq_lens_q=lengths, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:], use_cache=False).logits)
