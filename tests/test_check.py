"""Laws of `check`: its numbers are those of a real step, its refusals say what would work."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_stable.check import CheckReport, _least_bytes, check, check_memory, flops_per_token
from hf_stable.errors import RecipeError
from hf_stable.model import StableGPTForCausalLM
from hf_stable.recipes import Recipe, load_recipe
from hf_stable.sharding import Sharding, resolve_sharding

RECIPES = Path(__file__).parent.parent / "recipes"
BASES = [*sorted(RECIPES.glob("base/*.yaml")), RECIPES / "quickstart.yaml"]
TINY = RECIPES / "base" / "tiny.yaml"
LARGE = RECIPES / "base" / "830m.yaml"


def tiny(preset: str = "baseline", *overrides: str) -> Recipe:
    return load_recipe(TINY, [f"model.preset={preset}", *overrides])


def build(recipe: Recipe, implementation: str) -> StableGPTForCausalLM:
    config = recipe.model_config()
    return StableGPTForCausalLM._from_config(config, attn_implementation=implementation)


def whole(recipe: Recipe) -> Sharding:
    return resolve_sharding(recipe.training, 1, 1)


def test_the_830m_recipe_is_the_papers_model() -> None:
    report = check(load_recipe(LARGE), world_size=32)
    assert round(report.parameters / 1e6, 1) == 826.4
    assert round(report.non_embedding_parameters / 1e6) == 302
    assert round(report.flops_per_token / 1e9, 3) == 3.989
    assert report.tokens_per_step == 512 * 4096
    assert round(report.warmup_steps, 1) == 238.4
    assert round(report.steps, -2) == 95_400
    assert report.steps * report.tokens_per_step <= 200e9 < (report.steps + 1) * 512 * 4096


@pytest.mark.parametrize(
    ("size", "total", "non_embedding"),
    [
        ("10m", 16.9, 10.6),
        ("50m", 50.4, 25.2),
        ("160m", 162.2, 85.0),
        ("3b", 3198.4, 1887.7),
        ("8b", 8540.1, 6443.0),
    ],
)
def test_a_size_is_as_large_as_its_first_line_says(
    size: str, total: float, non_embedding: float
) -> None:
    report = check(load_recipe(RECIPES / "base" / f"{size}.yaml"))
    assert round(report.parameters / 1e6, 1) == pytest.approx(total, abs=0.11)
    assert round(report.non_embedding_parameters / 1e6, 1) == pytest.approx(non_embedding, abs=0.11)


@pytest.mark.parametrize("path", BASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("world_size", [1, 4])
def test_every_recipe_works(path: Path, world_size: int) -> None:
    recipe = load_recipe(path, ["training.micro_batch_size=1"])
    report = check(recipe, world_size)
    assert report.tokens_per_step == (
        report.accumulation_steps * world_size * recipe.data.sequence_length
    )
    config = recipe.model_config()
    assert config.head_dim == {"tiny": 32, "3b": 128, "8b": 128}.get(path.stem, 64)


@pytest.mark.parametrize(
    "path", sorted(RECIPES.glob("techniques/*.yaml")), ids=lambda path: path.stem
)
def test_every_technique_works_on_every_size(path: Path) -> None:
    for base in ("tiny", "10m"):
        report = check(load_recipe([RECIPES / "base" / f"{base}.yaml", path]))
        assert report.parameters > report.non_embedding_parameters > 0
        assert report.memory.activations > 0


@pytest.mark.parametrize("overrides", [[], ["model.tie_word_embeddings=true"]])
def test_parameters_are_those_of_the_real_model(overrides: list[str]) -> None:
    recipe = tiny("qk_fc_norm", *overrides)
    model, report = build(recipe, "eager"), check(recipe)
    assert report.parameters == model.num_parameters()
    without = [*model.model.layers.parameters(), *model.model.norm.parameters()]
    assert report.non_embedding_parameters == sum(weight.numel() for weight in without)


@pytest.mark.parametrize("preset", ["baseline", "qk_norm_cap", "sigma_reparam", "gated_mlp"])
@pytest.mark.parametrize("heads", ["[2, 2]", "[4, 2]"])
def test_flops_are_those_that_torch_counts(preset: str, heads: str) -> None:
    num_heads, kv_heads = heads.strip("[]").split(", ")
    fields = [f"model.num_attention_heads={num_heads}", f"model.num_key_value_heads={kv_heads}"]
    recipe = tiny(preset, *fields)
    model = build(recipe, "eager").train()
    ids = torch.randint(recipe.tokenizer.vocab_size, (2, recipe.data.sequence_length + 1))
    model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:])  # what the first step alone does
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:]).loss.backward()
    tokens = ids[:, 1:].numel()
    matrices = (
        6.0
        * tokens
        * sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, torch.nn.Linear)
        )
    )
    causal = tokens * flops_per_token(model, recipe.data.sequence_length) - matrices
    # Eager attention computes the masked half too; sigma-Reparam multiplies vectors besides.
    own = 0.02 * matrices if preset == "sigma_reparam" else 0
    assert matrices + 2 * causal <= counter.get_total_flops() <= matrices + 2 * causal + own


@pytest.mark.parametrize(
    "preset", ["baseline", "qkv_norm", "soft_cap", "sigma_reparam", "gated_mlp"]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_a_real_step_keeps(preset: str, precision: str) -> None:
    backend = "eager" if preset == "soft_cap" else "sdpa"
    overrides = [f"training.precision={precision}", f"training.attn_implementation={backend}"]
    recipe = tiny(preset, *overrides)
    report = check(recipe)
    model = build(recipe, report.attention).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    shape = (recipe.training.micro_batch_size, recipe.data.sequence_length)
    ids = torch.randint(recipe.tokenizer.vocab_size, shape)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.model(input_ids=ids, use_cache=False)
    real = sum(
        tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights
    )
    assert report.memory.activations == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("preset", ["baseline", "gated_mlp"])
def test_the_lower_bound_of_memory_counts_the_matrices_of_a_block(preset: str) -> None:
    recipe = tiny(preset, "training.micro_batch_size=1", "data.sequence_length=2")
    model = build(recipe, "eager")
    matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    assert _least_bytes(recipe, whole(recipe)) == 16 * matrices + layers * 2 * width * 4


def test_a_cpu_refuses_what_its_estimate_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations too: the bound alone would let it through, and Linux would kill it."""
    recipe = tiny()
    machine = SimpleNamespace(total=_least_bytes(recipe, whole(recipe)))
    monkeypatch.setattr("psutil.virtual_memory", lambda: machine)
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(total=0))
    with pytest.raises(RecipeError, match=r"needs about .* MB or more .* activations"):
        check_memory(recipe, torch.device("cpu"), whole(recipe), 1)
    machine.total *= 20
    check_memory(recipe, torch.device("cpu"), whole(recipe), 1)


def test_memory_is_estimated_for_every_kind_of_rope() -> None:
    """Also where the rotation depends on the positions themselves."""
    rope = "{rope_type: dynamic, rope_theta: 10000.0, factor: 2.0}"
    assert check(tiny("baseline", f"model.rope_parameters={rope}")).memory == check(tiny()).memory


@pytest.mark.parametrize("preset", ["soft_cap", "soft_clip"])
def test_a_cap_or_clip_costs_no_memory_on_a_gpu(preset: str) -> None:
    """Nobody names a backend: GPUs get the kernels, which keep what plain fused attention keeps."""
    pytest.importorskip("triton")
    plain, fused = check(tiny()), check(tiny(preset))
    eager = check(tiny(preset, "training.attn_implementation=eager"))
    assert (plain.attention, fused.attention) == ("sdpa", "stable_triton")
    assert fused.memory.activations == plain.memory.activations < eager.memory.activations


def total(report: CheckReport) -> int:
    return report.memory.total


def test_memory_moves_with_what_decides_it() -> None:
    many = ["training.global_batch_size=64"]
    whole, sharded = tiny("baseline", *many), tiny("baseline", *many, "training.sharding=fsdp2")
    assert check(sharded, 4).memory.weights == check(whole, 4).memory.weights // 4
    assert check(sharded, 1).memory.weights == check(whole, 1).memory.weights
    double = check(tiny("baseline", *many, "training.micro_batch_size=8"))
    assert double.memory.activations == pytest.approx(2 * check(whole).memory.activations, rel=0.02)
    recompute = tiny("baseline", *many, "training.gradient_checkpointing=true")
    assert total(check(recompute)) < total(check(whole))
    large = load_recipe(LARGE)
    full = load_recipe(LARGE, ["training.precision=fp32"])
    assert total(check(large, 32)) < total(check(full, 32))


@pytest.mark.parametrize("world_size", range(1, 17))
def test_batches_divide_or_are_refused_with_what_would_work(world_size: int) -> None:
    recipe = load_recipe(TINY, ["training.global_batch_size=24", "training.micro_batch_size=4"])
    if 24 % (4 * world_size) == 0:
        assert check(recipe, world_size).accumulation_steps * 4 * world_size == 24
        return
    with pytest.raises(
        RecipeError, match=f"24 is not a multiple of .* {world_size} processes"
    ) as caught:
        check(recipe, world_size)
    remedy = re.search(r"micro_batch_size may be ([\d, ]+)", str(caught.value))
    if remedy is None:
        assert f"multiple of {world_size}" in str(caught.value)
        assert 24 % world_size
        return
    for size in remedy[1].split(", "):
        working = load_recipe(
            TINY, ["training.global_batch_size=24", f"training.micro_batch_size={size}"]
        )
        assert check(working, world_size).accumulation_steps >= 1


def test_no_processes_are_refused() -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        check(tiny(), 0)


@pytest.mark.parametrize(
    ("preset", "backend"),
    [("soft_cap", "sdpa"), ("soft_clip", "flex_attention"), ("baseline", "nonsense")],
)
def test_a_backend_that_cannot_do_the_model_is_refused(preset: str, backend: str) -> None:
    with pytest.raises(RecipeError, match=f"training.attn_implementation is {backend}"):
        check(tiny(preset, f"training.attn_implementation={backend}"))


def test_what_is_hardly_meant_is_noted() -> None:
    notes = check(tiny("baseline", "schedule.warmup=20", "data.train=[none.txt]"), 2).notes
    assert any("never decays" in note for note in notes)
    assert any("none.txt" in note for note in notes)
    assert any("launcher" in note for note in notes)


def test_every_number_of_the_report_is_shown() -> None:
    report = check(load_recipe(LARGE), 32)
    shown = dict(report.rows())
    assert shown["parameters"] == "826.4 M"
    assert shown["compute"].startswith("3.989 GFLOP")
    assert len(shown) == len(report.rows())
