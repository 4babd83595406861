"""FSDP2 and DDP on two gloo processes, one process, and each one's checkpoints in the others."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_stable.checkpoints import (
    Keep,
    export_model,
    list_checkpoints,
    load_newest,
    save_checkpoint,
)

from ..warm import ranks
from .models import differences, make_model, make_optimizer, train, whole_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What one process and then two left."""
    folder = tmp_path_factory.mktemp("sharded")
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(3))
    save_checkpoint(folder / "alone", 3, model, optimizer, Accelerator(cpu=True), {}, Keep())
    save_file(whole_state(model, optimizer), folder / "alone.safetensors")
    ranks(2, Path(__file__).with_name("sharded_worker.py"), folder)
    return folder


def test_two_processes_keep_every_law(folder: Path) -> None:
    """Exact resume, every layout into every sharding, background, one rank's failure, fallback."""
    assert [(folder / f"broken-{rank}.txt").read_text() for rank in (0, 1)] == ["", ""]


@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_one_process_goes_on_from_two(folder: Path, name: str) -> None:
    model = make_model(1)
    optimizer = make_optimizer(model)
    scalars = load_newest(folder / name, model, optimizer, Accelerator(cpu=True))
    assert scalars == {"tokens": 7, "step": 3}
    assert (
        differences(whole_state(model, optimizer), load_file(folder / f"{name}.safetensors")) == []
    )
    train(model, optimizer, range(3, 4))


@pytest.mark.parametrize("name", ["alone", "fsdp2", "ddp"])
def test_the_model_of_every_layout_is_a_plain_folder(
    folder: Path, name: str, tmp_path: Path
) -> None:
    (checkpoint,) = list_checkpoints(folder / name)
    target = export_model(checkpoint, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(target)
    expected = load_file(folder / f"{name}.safetensors")
    weights = {f"model/{key}": each for key, each in model.state_dict().items()}
    assert [key for key in expected if key.startswith("model/")]
    for key, tensor in expected.items():
        assert not key.startswith("model/") or torch.equal(weights[key], tensor), key
    assert model.config.architectures == ["StableGPTForCausalLM"]
    assert {path.name for path in target.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors")
    }


def test_no_process_writes_the_whole_of_a_sharded_state(folder: Path) -> None:
    (checkpoint,) = list_checkpoints(folder / "fsdp2")
    sizes = [path.stat().st_size for path in sorted((checkpoint / "shards").glob("*.distcp"))]
    assert len(sizes) == 2
    assert max(sizes) < 0.7 * sum(sizes)
    assert not list(checkpoint.glob("model/*.safetensors"))
    assert str(folder).encode() not in (checkpoint / "shards" / ".metadata").read_bytes()
