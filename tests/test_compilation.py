"""Blocks under torch.compile: the same run, the same names, and no cost that grows with depth."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from hf_stable import records
from hf_stable.checkpoints import list_checkpoints
from hf_stable.compilation import check_compiler, compile_blocks
from hf_stable.errors import RecipeError
from hf_stable.model.functional_stable_gpt import squared_relu
from hf_stable.recipes import Recipe, dump
from hf_stable.training import TrainResult, train

from .techniques import build, relative_error, tokens
from .training import tiny_recipe

MODEL = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64"


@pytest.fixture(scope="session")
def compiler() -> None:
    try:
        check_compiler(torch.device("cpu"))
    except RecipeError as error:
        pytest.skip(str(error))


def _losses(result: TrainResult) -> list[float]:
    return [row["loss"] for row in records.read_metrics(result.folder, "train")]


def _recipe(folder: Path, name: str, compiled: bool, **options: str) -> Recipe:
    settings = {
        "model": f"{{preset: sigma_reparam, {MODEL}}}",
        "training__log_every": "1",
        "training__checkpoint_every": "10",
        "training__gradient_checkpointing": "true",
        "training__evaluate_blocks": "7",  # no multiple of a micro batch
        "training__compile": str(compiled).lower(),
        "output": str(folder / name),
    }
    return tiny_recipe(folder, **{**settings, **options})


def _stop_at(step: int, whole: Path, again: Path) -> None:
    """Make `again` what `whole` was at `step`."""
    shutil.copytree(whole, again)
    shutil.rmtree(again / "model")
    for checkpoint in list_checkpoints(again):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compilation")


@pytest.fixture(scope="module")
def plain(folder: Path) -> TrainResult:
    return train(_recipe(folder, "plain", compiled=False))


@pytest.fixture(scope="module")
def compiled(folder: Path, compiler: None) -> TrainResult:
    counters.clear()
    result = train(_recipe(folder, "compiled", compiled=True))
    # The check of the compiler, training, and validation with whole batches and with its last one.
    assert counters["stats"]["unique_graphs"] <= 1 + 1 + 2
    return result


def test_a_compiled_run_is_the_same_run(plain: TrainResult, compiled: TrainResult) -> None:
    assert len(_losses(compiled)) == 20
    assert _losses(compiled) == pytest.approx(_losses(plain), rel=1e-4)
    assert compiled.validation_perplexity == pytest.approx(plain.validation_perplexity, rel=1e-3)
    for name in ("model", f"checkpoints/{list_checkpoints(plain.folder)[-1].name}/model"):
        weights = [load_file(run.folder / name / "model.safetensors") for run in (plain, compiled)]
        shapes = [{key: weight.shape for key, weight in each.items()} for each in weights]
        assert shapes[0] == shapes[1]
    assert [records.read_run(run.folder)["compile"] for run in (plain, compiled)] == [False, True]


@pytest.mark.parametrize("first", ["plain", "compiled"])
def test_a_run_may_go_on_with_the_switch_flipped(
    first: str, folder: Path, plain: TrainResult, compiled: TrainResult
) -> None:
    whole = {"plain": plain, "compiled": compiled}[first]
    _stop_at(10, whole.folder, folder / f"flipped-{first}")
    result = train(_recipe(folder, f"flipped-{first}", compiled=first == "plain"))
    assert _losses(result)[-10:] == pytest.approx(_losses(plain)[10:], rel=1e-4)


def test_resuming_a_compiled_run_is_bit_exact(folder: Path, compiler: None) -> None:
    """With dropout, whose random numbers Inductor draws itself."""
    options = {"model": f"{{attention_dropout: 0.1, {MODEL}}}", "training__evaluate_blocks": "8"}
    whole = train(_recipe(folder, "whole", compiled=True, **options))
    _stop_at(10, whole.folder, folder / "resumed")
    resumed = train(_recipe(folder, "resumed", compiled=True, **options))
    assert records.read_metrics(resumed.folder, "resumed")[0]["step"] == 10
    for name in ("model/model", "optimizer", "random"):
        files = [
            list_checkpoints(run.folder)[-1] / f"{name}.safetensors" for run in (whole, resumed)
        ]
        assert files[0] != files[1] and files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture
def no_inductor(monkeypatch) -> None:
    """Graphs are captured as ever, but run as they are: their number is Dynamo's affair alone."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))


def test_graphs_do_not_grow_with_depth(no_inductor: None) -> None:
    """With all that a block reads from its config, and numbers that depend on depth."""
    techniques = {
        "qk_norm": "head", "attn_logit_softcapping": 5.0, "attention_clip_gamma": -0.03,
        "attention_multiplier": 0.5, "layer_scale": 0.1, "mlp_post_norm": True,
    }  # fmt: skip
    counted = []
    for layers in (2, 5):
        model = build(num_hidden_layers=layers, **techniques).float()
        expected = model(tokens(), labels=tokens()).loss
        compile_blocks(model)
        counters.clear()
        for _ in range(2):
            model.zero_grad()
            loss = model.train()(tokens(), labels=tokens(), use_cache=False).loss
            loss.backward()
        torch.testing.assert_close(loss, expected)
        counted.append(counters["stats"]["unique_graphs"])
    assert counted == [1, 1]


def test_many_runs_of_a_process_do_not_use_up_each_others_graphs(no_inductor: None) -> None:
    """Dynamo refuses a ninth graph of a function."""
    for length in range(4, 14):
        model = build(num_hidden_layers=1)
        compile_blocks(model)
        with torch.no_grad():
            model(tokens(length=length))


def test_buckets_of_ddp_do_not_cut_blocks(no_inductor: None) -> None:
    """Dynamo would compile the pieces, and fail on buckets smaller than its first."""
    alone = not dist.is_initialized()  # an earlier test may have left its group of one process
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = build().float().train()
        expected = plain(input_ids=tokens(), labels=tokens()).loss
        compile_blocks(plain)
        wrapped = DistributedDataParallel(plain, bucket_cap_mb=0.005)
        loss = wrapped(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
    finally:
        if alone:
            dist.destroy_process_group()


def _mlp_gradient(
    activation: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, compiled: bool
) -> tuple[torch.Tensor, int]:
    """Gradient of down(act(up(x))) in its input, and the bytes kept for it."""
    generator = torch.Generator().manual_seed(0)
    inputs, up, down, cotangent = (
        torch.randn(*shape, generator=generator).to(torch.bfloat16).to(dtype)
        for shape in ((96, 32), (128, 32), (32, 128), (96, 32))
    )

    def mlp(hidden: torch.Tensor) -> torch.Tensor:
        return activation(hidden @ up.T) @ down.T

    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    for tensor in (inputs, up, down):
        tensor.requires_grad_()
    function = torch.compile(mlp, fullgraph=True, dynamic=False) if compiled else mlp
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function(inputs)
    output.backward(cotangent)
    assert inputs.grad is not None
    return inputs.grad, sum(kept.values())


@pytest.mark.parametrize("compiled", [False, True])
def test_squared_relu_saves_one_tensor_and_loses_nothing_in_bf16(
    compiled: bool, compiler: None
) -> None:
    torch._dynamo.reset()
    plain = lambda hidden: torch.relu(hidden).pow(2)  # noqa: E731
    exact, _ = _mlp_gradient(plain, torch.float64, compiled=False)
    ours, kept = _mlp_gradient(squared_relu, torch.bfloat16, compiled)
    theirs, kept_by_plain = _mlp_gradient(plain, torch.bfloat16, compiled)
    assert kept == kept_by_plain - 96 * 128 * 2
    assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) > 0


def test_a_missing_compiler_is_named_before_anything_else(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(_recipe(tmp_path, "run", compiled=True)))
    missing = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    finished = subprocess.run(
        [sys.executable, "-m", "hf_stable", "train", str(recipe)],
        env={**os.environ, **missing},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert "training.compile" in finished.stderr and "C++ compiler" in finished.stderr
    assert "Traceback" not in finished.stderr and "tokens:" not in finished.stderr
