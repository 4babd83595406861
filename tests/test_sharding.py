"""Laws of shardings: the recipe or the launcher's file decides, never both, never neither."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from hf_stable.errors import RecipeError
from hf_stable.recipes import load_recipe
from hf_stable.recipes.schema import TrainingRecipe
from hf_stable.sharding import Sharding, resolve_sharding

from .training import RECIPES

FILES = {
    "one_gpu": Sharding("ddp", 1, 1),
    "ddp_8": Sharding("ddp", 8, 1),
    "fsdp2_8": Sharding("fsdp2", 8, 8, True),
    "fsdp2_nodes": Sharding("fsdp2", 64, 64, True),
    "hsdp_nodes": Sharding("hsdp", 64, 8, True),
}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def settings(**more: object) -> TrainingRecipe:
    overrides = [f"training.{name}={value}" for name, value in more.items()]
    return load_recipe(RECIPES / "base" / "tiny.yaml", overrides).training


def launched(path: Path) -> dict[str, str]:
    """The variables that `accelerate launch` gives its processes for a config file."""
    arguments = ["--config_file", str(path), "-m", "hf_stable", "train", "x.yaml"]
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    return prepare_multi_gpu_env(parsed)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("accelerate/*.yaml")), ids=lambda it: it.stem)
def test_a_launchers_file_means_what_its_name_says(path: Path) -> None:
    expected, content = FILES[path.stem], load_config_from_file(str(path))
    assert (
        content.num_processes
        == expected.processes
        == 8 * content.num_machines // (8 if path.stem == "one_gpu" else 1)
    )
    environment = launched(path)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert resolve_sharding(settings(), expected.processes, 8, environment) == expected


def test_every_launchers_file_is_known() -> None:
    assert {path.stem for path in RECIPES.glob("accelerate/*.yaml")} == set(FILES)


def test_without_a_file_the_recipe_decides() -> None:
    def chosen(**more: object) -> Sharding:
        return resolve_sharding(settings(**more), 16, 8, {})

    assert chosen() == chosen(sharding="ddp") == Sharding("ddp", 16, 1)
    assert chosen(sharding="fsdp2") == Sharding("fsdp2", 16, 16, True)
    flags = {"reshard_after_forward": "false", "cpu_offload": "true"}
    assert chosen(sharding="fsdp2", **flags) == Sharding("fsdp2", 16, 16, False, True)
    assert chosen(sharding="hsdp") == Sharding("hsdp", 16, 8, True)
    assert chosen(sharding="hsdp", shard_size=4).replicas == 4


def test_a_file_that_says_the_same_is_no_contradiction() -> None:
    again = {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}
    own = settings(sharding="fsdp2", reshard_after_forward="false")
    assert resolve_sharding(own, 4, 4, again) == resolve_sharding(settings(), 4, 4, again)


@pytest.mark.parametrize(
    ("recipe", "environment", "reason"),
    [
        ({"sharding": "ddp"}, FSDP, "set training.sharding to auto"),
        ({"sharding": "hsdp", "shard_size": 2}, FSDP, "set training.sharding to auto"),
        (
            {"sharding": "fsdp2"},
            {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"},
            "resharded after forward, offloaded",
        ),
        ({"sharding": "hsdp", "shard_size": 3}, {}, "choose one of 1, 2, 4"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        ({}, {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing"),
        ({}, {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size: 2"),
        ({}, {**FSDP, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "3"}, "product"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    recipe: dict[str, object], environment: dict[str, str], reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        resolve_sharding(settings(**recipe), 4, 4, environment)


@pytest.mark.parametrize(
    "more",
    [
        {"shard_size": 2},
        {"sharding": "fsdp2", "shard_size": 2},
        {"reshard_after_forward": "false"},
        {"sharding": "ddp", "cpu_offload": "true"},
    ],
)
def test_a_key_without_effect_is_refused(more: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=f"{list(more)[-1]} .* has no effect with sharding"):
        settings(**more)
