"""Laws of every technique, alone and in pairs: off is the baseline, on is its formula."""

import itertools
import math

import pytest
import torch

from hf_stable import StableGPTConfig
from hf_stable.model.configuration_stable_gpt import PRESETS
from hf_stable.model.slots_stable_gpt import StableGPTNorm

from .. import reference
from ..techniques import GEOMETRY, TECHNIQUES, Technique, build, from_config, relative_error, tokens

IDS = [row.name for row in TECHNIQUES]
# What excludes each other in a pair: another value of the same field, or a field made meaningless.
EXCLUSIVE = [
    {"attention_clip_gamma", "attention_clip_alpha"},
    {"initializer", "initializer_range"},
    {"embedding_scale", "embedding_norm"},
]


def _parameters(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _gradients(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("row", TECHNIQUES, ids=IDS)
def test_off_is_the_baseline(row: Technique) -> None:
    neutral = {row.field: getattr(StableGPTConfig(), row.field)}
    plain = from_config(StableGPTConfig(**GEOMETRY, **row.beside))
    off = from_config(StableGPTConfig(**GEOMETRY, **row.beside, **neutral))
    assert plain.state_dict().keys() == off.state_dict().keys()
    assert torch.equal(plain(tokens()).logits, off(tokens()).logits)


@pytest.mark.parametrize("row", TECHNIQUES, ids=IDS)
def test_on_changes_what_it_should(row: Technique) -> None:
    """With the same weights, or with the same seed where the technique is about the beginning."""
    ids = tokens()
    plain, on = build(**row.beside), build(**row.beside, **row.on)
    if row.changes != "init":
        on.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        logits = relative_error(on(ids).logits, plain(ids).logits)
    before, after = plain(ids, labels=ids).loss, on(ids, labels=ids).loss
    if row.changes == "init":
        differ = [
            name
            for name, tensor in _parameters(on).items()
            if name not in _parameters(plain) or not torch.equal(tensor, _parameters(plain)[name])
        ]
        assert differ
    elif row.changes == "logits":
        assert logits > 1e-6
    elif row.changes == "loss":
        assert logits == 0 and after > before
    else:
        assert logits == 0 and after == before
        gradients = [_gradients(model, ids) for model in (plain, on)]
        assert any(not torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def _assert_equals_reference(fields: dict) -> None:
    model, ids = build(**fields), tokens()
    # Gains of 1 and LayerScale vectors of one value would hide a transposed or forgotten gain.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise)
    if model.config.sigma_reparam:
        model.power_iterate(3)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    for name in names:
        weights[name].requires_grad_()
    output = model(ids, labels=ids)
    ce, z_loss = reference.loss(weights, model.config, ids)
    assert relative_error(output.logits, reference.logits(weights, model.config, ids)) < 1e-10
    assert relative_error(output.ce_loss, ce) < 1e-10
    assert relative_error(output.z_loss, z_loss) < 1e-10
    gradients = torch.autograd.grad(ce + z_loss, [weights[name] for name in names])
    output.loss.backward()
    factor = model.config.embedding_detach
    # A gain under a norm has a gradient of zero up to rounding, hence the absolute part.
    rounding = 1e-12 * max(gradient.norm() for gradient in gradients)
    for name, parameter, gradient in zip(names, model.parameters(), gradients, strict=True):
        expected = gradient * factor if "embed_tokens" in name else gradient
        assert torch.isfinite(parameter.grad).all()
        assert (parameter.grad - expected).norm() < 1e-10 * expected.norm() + rounding, name


@pytest.mark.parametrize("row", TECHNIQUES, ids=IDS)
def test_float64_model_equals_the_reference(row: Technique) -> None:
    _assert_equals_reference({**row.beside, **row.on})


def _pairs() -> list[tuple[Technique, Technique]]:
    return [
        (one, other)
        for one, other in itertools.combinations(TECHNIQUES, 2)
        if one.field != other.field and {one.field, other.field} not in EXCLUSIVE
    ]


@pytest.mark.parametrize("room", ["branch", "linear", "score", "head", "init"])
def test_every_pair_equals_the_reference(room: str) -> None:
    for one, other in _pairs():
        if one.room != room:
            continue
        fields = {**one.beside, **other.beside, **one.on, **other.on}
        try:
            _assert_equals_reference(fields)
        except AssertionError as error:
            raise AssertionError(f"{one.name} with {other.name}: {error}") from error


# branch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_begin_with_gain_one(norm: str, zero_centered: bool, dtype: torch.dtype) -> None:
    model = build(norm=norm, zero_centered_norm=zero_centered).to(dtype)
    hidden = torch.randn(7, 32, dtype=dtype) * 5 + 1
    output = model.model.norm(hidden)
    assert output.dtype == dtype
    # The epsilon inside the root makes it a little less than 1.
    tolerance = torch.finfo(dtype).eps * 8 + 1e-6
    assert (output.double().square().mean(-1).sqrt() - 1).abs().max() < tolerance
    if norm == "layernorm":
        assert output.double().mean(-1).abs().max() < torch.finfo(dtype).eps * 8


def test_norm_statistics_do_not_overflow_in_half_precision() -> None:
    norm = build(norm="rmsnorm").half().model.norm
    assert isinstance(norm, StableGPTNorm)
    assert norm(torch.full((1, 32), 3e4, dtype=torch.float16)).isfinite().all()


def test_zero_layer_scale_makes_every_block_the_identity() -> None:
    model = build(layer_scale=0.0)
    output = model.model(tokens(), output_hidden_states=True)
    for hidden in output.hidden_states[:-1]:
        assert torch.equal(hidden, output.hidden_states[0])


def test_post_norm_gain_is_the_rms_of_a_branch() -> None:
    model = build(mlp_post_norm=True, post_norm_gain=0.25, norm="rmsnorm")
    branches = []
    model.model.layers[0].post_feedforward_layernorm.register_forward_hook(
        lambda module, inputs, output: branches.append(output)
    )
    model(tokens())
    assert (branches[0].square().mean(-1).sqrt() - 0.25).abs().max() < 1e-4


def test_scaled_embedding_enlarges_the_shortcut() -> None:
    plain, scaled = build(), build(embedding_scale="sqrt_hidden")
    embedded = [model.get_input_embeddings()(tokens()) for model in (plain, scaled)]
    assert torch.equal(embedded[0] * math.sqrt(32), embedded[1])


def test_a_parallel_mlp_does_not_see_what_attention_adds() -> None:
    model, read = build(parallel_residual=True), []
    layer = model.model.layers[0]
    for norm in (layer.input_layernorm, layer.pre_feedforward_layernorm):
        norm.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    model(tokens())
    assert torch.equal(read[0], read[1])


def test_embedding_detach_scales_the_embedding_gradient_only() -> None:
    plain, detached = (_gradients(build(embedding_detach=x), tokens()) for x in (1.0, 0.1))
    for name, gradient in plain.items():
        factor = 0.1 if "embed_tokens" in name else 1.0
        torch.testing.assert_close(detached[name], factor * gradient)


# linear ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["one", "spectral"])
def test_largest_singular_value_is_the_gain(start: str) -> None:
    model = build(sigma_reparam=True, sigma_gain_init=start)
    linears = [linear for _, linear in model._sigma_linears()]
    assert len(linears) == 4 * GEOMETRY["num_hidden_layers"]
    for linear in linears:
        largest = torch.linalg.svdvals(linear.effective_weight())[0]
        assert relative_error(largest[None], linear.gain) < 1e-6
        if start == "spectral":
            assert relative_error(linear.effective_weight(), linear.weight) < 1e-6


def test_folding_sigma_reparam_changes_nothing_but_the_layers() -> None:
    model, ids = build(sigma_reparam=True), tokens()
    before = model(ids).logits
    model.fold_sigma_reparam()
    assert relative_error(model(ids).logits, before) < 1e-12
    assert not list(model._sigma_linears()) and not model.config.sigma_reparam
    plain = from_config(model.config)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(ids).logits, model(ids).logits)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_mup_is_neutral_at_its_base_width() -> None:
    plain, mup = build(), build(mup_base_width=32)
    assert mup.config.learning_rate_multiplier == 1.0
    assert torch.equal(plain(tokens()).logits, mup(tokens()).logits)


def test_mup_keeps_the_scale_of_activations_across_widths() -> None:
    stds = []
    for width in (64, 256):
        model = build(hidden_size=width, intermediate_size=None, mup_base_width=64)
        stds.append(
            model.model.layers[0].self_attn.qkv_proj(torch.randn(500, width).double()).std()
        )
    assert abs(stds[0] / stds[1] - 1) < 0.05


@pytest.mark.parametrize(
    ("linear_bias", "biased"),
    [("qkv", ["qkv_proj"]), ("all", ["qkv_proj", "o_proj", "up_proj", "gate_proj", "down_proj"])],
)
def test_biases_are_where_they_should_be_and_begin_at_zero(linear_bias, biased) -> None:
    model = build(linear_bias=linear_bias, mlp_gated=True)
    found = {
        name.rsplit(".", 2)[1]: parameter
        for name, parameter in model.model.layers[0].named_parameters()
        if name.endswith(".bias")
    }
    assert set(found) == set(biased)
    assert not any(parameter.any() for parameter in found.values())
    assert model.lm_head.bias is None


def test_folding_sigma_reparam_keeps_the_biases() -> None:
    model, ids = build(sigma_reparam=True, linear_bias="all"), tokens()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    before = model(ids).logits
    assert relative_error(model.fold_sigma_reparam()(ids).logits, before) < 1e-12
    assert model.model.layers[0].mlp.up_proj.bias is not None


# score ----------------------------------------------------------------------------------------


def _heads_of(model, name: str) -> torch.Tensor:
    seen = []
    module = model.get_submodule(f"model.layers.0.self_attn.{name}")
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(tokens())
    return seen[0].unflatten(-1, (-1, model.config.head_dim))


@pytest.mark.parametrize(
    "field, name", [("qk_norm", "q_norm"), ("qk_norm", "k_norm"), ("v_norm", "v_norm")]
)
def test_normed_heads_have_rms_one(field: str, name: str) -> None:
    heads = _heads_of(build(**{field: "head"}), name)
    assert (heads.square().mean(-1).sqrt() - 1).abs().max() < 1e-3
    whole = _heads_of(build(**{field: "full"}), name)
    assert (whole.square().mean((-1, -2)).sqrt() - 1).abs().max() < 1e-3
    assert (whole.square().mean(-1).sqrt() - 1).abs().max() > 1e-2


def test_qk_norm_bounds_the_logits_by_the_gains() -> None:
    model = build(qk_norm="head", attn="eager", initializer_range=5.0)
    scores = []
    model.model.layers[0].self_attn.scaling = 1.0
    bound = model.config.head_dim * 1.0
    for name in ("q_norm", "k_norm"):
        scores.append(_heads_of(model, name))
    query, key = scores[0], scores[1].repeat_interleave(2, dim=2)
    products = torch.einsum("bqhd,bkhd->bhqk", query, key)
    assert products.abs().max() <= bound * (1 + 1e-9)


def test_capped_probabilities_are_bounded_by_the_cap() -> None:
    """With |logit| <= c, no probability exceeds that of one key at c against all others at -c."""
    cap, length = 0.5, 13
    model = build(attn_logit_softcapping=cap, initializer_range=5.0)
    for weights in model(tokens(length=length), output_attentions=True).attentions:
        most = 1 / (1 + (length - 1) * math.exp(-2 * cap))
        assert weights[:, :, -1].max() <= most


def test_temperature_multiplies_the_logits() -> None:
    plain, cool = build(), build(attention_multiplier=0.5)
    ratios = [model.model.layers[0].self_attn.scaling for model in (plain, cool)]
    assert ratios[1] == 0.5 * ratios[0]


def test_clipped_attention_gives_nothing_to_anything_when_all_rows_are_dead() -> None:
    model = build(attention_clip_gamma=-0.9)
    attentions = model(tokens(), output_attentions=True).attentions
    assert (attentions[0][:, :, 1:].sum(-1) == 0).any()


# head -----------------------------------------------------------------------------------------


def test_final_cap_bounds_logits_in_every_mode() -> None:
    model = build(final_logit_softcapping=0.2, initializer_range=2.0)
    ids = tokens()
    for output in (model(ids).logits, model(ids, labels=ids).logits):
        assert output.abs().max() <= 0.2
    generated = model.generate(
        ids, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert all(step.abs().max() <= 0.2 for step in generated.logits)


def test_loss_is_the_sum_of_its_reported_parts() -> None:
    output = build(z_loss=0.1)(tokens(), labels=tokens())
    assert output.z_loss > 0
    torch.testing.assert_close(output.loss, output.ce_loss + output.z_loss)


# init -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "matrix", "embedding"),
    [
        ({"initializer_range": 0.02}, 0.02, 0.02),
        ({"initializer": "small"}, math.sqrt(2 / 5 / 256), math.sqrt(2 / 5 / 256)),
        ({"initializer": "fan_in"}, 1 / math.sqrt(256), 1 / math.sqrt(256)),
        ({"embedding_std": 0.63, "initializer_range": 0.02}, 0.02, 0.63),
    ],
)  # fmt: skip
def test_initializers_have_the_std_they_promise(fields, matrix: float, embedding: float) -> None:
    model = build(**{**fields, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512})
    layer = model.model.layers[0]
    depth = math.sqrt(2 * GEOMETRY["num_hidden_layers"])
    wider = math.sqrt(2) if fields.get("initializer") == "fan_in" else 1.0
    for weight, std in [
        (layer.self_attn.qkv_proj.weight, matrix),
        (layer.self_attn.o_proj.weight, matrix / depth),
        (layer.mlp.up_proj.weight, matrix),
        (layer.mlp.down_proj.weight, matrix / depth / wider),
        (model.lm_head.weight, matrix),
        (model.model.embed_tokens.weight, embedding),
    ]:
        assert abs(weight.std().item() / std - 1) < 0.02
    if fields.get("initializer") == "fan_in":
        bound = 2 * matrix / 0.8796 * 1.001
        assert layer.mlp.up_proj.weight.abs().max() <= bound


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_begin_near_the_uniform_loss(preset: str) -> None:
    model = from_config(StableGPTConfig.from_preset(preset, **GEOMETRY))
    ids = tokens(8)
    assert abs(model(ids, labels=ids).ce_loss.item() - math.log(61)) < 0.8


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_learn(preset: str) -> None:
    """Twenty steps on a fixed batch lower its loss, in fp32 as users train."""
    torch.manual_seed(0)
    config = StableGPTConfig.from_preset(preset, **{**GEOMETRY, "max_position_embeddings": 16})
    model = from_config(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(tokens(4), labels=tokens(4)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
