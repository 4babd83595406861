"""A Hub for each test, and an exported run that the tests of this folder share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http, disable_progress_bars, enable_progress_bars

from hf_stable import StableGPTConfig
from hf_stable.checksums import sha256_of
from hf_stable.hub import ExportCheck, Weights, checking, export
from hf_stable.hub.files import files_of

from ..techniques import GEOMETRY, from_config
from ..test_card import evaluate, records
from ..tiny import byte_tokenizer
from ..warm import warm
from .server import TOKEN, Hub


def save(folder: Path, preset: str, **fields: object) -> Path:
    """A saved model whose every parameter has moved, with a tokenizer of its vocabulary."""
    tokenizer = byte_tokenizer()
    geometry = {**GEOMETRY, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = from_config(StableGPTConfig.from_preset(preset, **{**geometry, **fields})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.power_iterate(1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def finished_run(folder: Path) -> Path:
    """A run's folder as training and evaluation leave it, without training."""
    run = records(folder)
    save(run / "model", "qk_norm_cap")
    evaluate(run)
    return run


def unchecked(folder: Path) -> ExportCheck:
    """Stands in for `check_export`, which takes seconds and has tests of its own."""
    files = {name: sha256_of(path) for name, path in files_of(folder).items()}
    return ExportCheck(folder, "", files)


@pytest.fixture(scope="session", autouse=True)
def warm_checks() -> Iterator[None]:
    """Exports are checked in processes that have torch when they start."""
    with pytest.MonkeyPatch.context() as patch:
        warm(patch, checking)
        yield


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportCheck:
    """An export in shards; not to be changed."""
    folder = tmp_path_factory.mktemp("hub")
    weights = Weights(max_shard_size="60KB")
    return unchecked(export(finished_run(folder / "run"), folder / "export", weights=weights))


@pytest.fixture
def checked(exported: ExportCheck, tmp_path: Path) -> ExportCheck:
    """A copy to change."""
    folder = shutil.copytree(exported.folder, tmp_path / "export")
    return unchecked(folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that huggingface_hub takes for the real one, in this process and with an empty cache.

    Its constants are read at import, so they are set one by one; `test_end_to_end` sets what a
    user would.
    """
    with Hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # whose storage is not HTTP alone; plain LFS is
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "tokens"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()
        disable_progress_bars()  # as the command does in a log
        yield server
        enable_progress_bars()
        huggingface_hub.close_session()
