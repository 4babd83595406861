"""Loading of any causal language model and its tokenizer, with one-sentence errors.

A StableGPT needs no trust_remote_code: importing this package registers its classes.
"""

import json
import warnings
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_stable.checksums import SUMS, our_sums, verify_sums
from hf_stable.errors import CheckpointError
from hf_stable.evaluation.downloading import download_verified
from hf_stable.model import StableGPTConfig

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Errors of from_pretrained for damaged files, shapes that differ from config.json, code that needs
# missing packages, and model types that are not causal language models.
_UNLOADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    EOFError,
    UnpicklingError,
    SafetensorError,
)
# Fields of config.json about the file rather than the model.
_BOOKKEEPING = {"model_type", "auto_map", "_name_or_path", "_commit_hash"}


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    refuse_unknown: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode, with its tokenizer.

    If the folder or repository has the SHA256SUMS of an export, all files are verified. Any other
    SHA256SUMS is ignored.

    Args:
        path: Folder, or id of a model on the Hub.
        revision: Branch, tag or commit of a model on the Hub.
        trust_remote_code: Allow code of the checkpoint to run.
        dtype: Data type of the weights; None keeps the checkpoint's.
        device: Device; the accelerator, if there is one, unless given.
        refuse_unknown: Refuse tensors that the model does not have. Transformers ignores them.

    Returns:
        Model and tokenizer.

    Raises:
        CheckpointError: If there is no such folder or revision, a file differs from the export,
            config.json is missing or broken, the installed version does not know the model type or
            a field, weights are missing or truncated, weights do not cover all parameters, or the
            tokenizer is missing or (for a StableGPT) has ids beyond the model's. The error names
            the folder or file.
    """
    source, remote = _find(str(path), revision, trust_remote_code)
    config = _load_config(source, remote)
    if Path(source).is_dir():
        _check_weights(Path(source))
    tokenizer = _load_tokenizer(source, remote)
    if isinstance(config, StableGPTConfig):
        check_vocabulary(source, config, tokenizer)
    model = _load_weights(source, config, remote, dtype, refuse_unknown)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # Module.to, because a decorator hides the signature of the class's own `to` from pyright.
    torch.nn.Module.to(model, device or accelerator or "cpu")
    return model.eval(), tokenizer


def load_config(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Load the config of a folder or of a model on the Hub; raise CheckpointError if unusable."""
    return _load_config(*_find(str(path), revision, trust_remote_code))


def model_place(place: str) -> str:
    """Return the model's folder if `place` is a run, else `place`, which may be on the Hub.

    Args:
        place: Folder of a run or a model, or id of a model on the Hub.

    Raises:
        CheckpointError: If the run has not finished.
    """
    folder = Path(place)
    if not (folder / "run.json").is_file() or (folder / "config.json").is_file():
        return place
    if not (folder / "model").is_dir():
        raise CheckpointError(
            f"{folder} is a run that has not finished: the same train command resumes it"
        )
    return str(folder / "model")


def _find(source: str, revision: str | None, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Return where to load from, verified if possible, and further arguments of the Auto classes.

    The place is a folder, or the id of a model on the Hub, which has revisions.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not _is_local(source):
        if folder := download_verified(source, revision):
            return str(folder), options
        return source, {**options, "revision": revision}
    if revision is not None:
        raise CheckpointError(
            f"{source} is a folder here, so revision {revision!r} would be ignored: leave it out"
        )
    _check_folder(Path(source))
    if (Path(source) / SUMS).is_file() and our_sums(Path(source) / SUMS) is not None:
        verify_sums(Path(source))
    return source, options


def check_vocabulary(
    source: str, config: StableGPTConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that a model has an embedding row for every id of a tokenizer.

    A bos or eos that differs from config.json, as in fine-tuned chat models, does not change the
    meaning of an id. It only gives a warning.

    Args:
        source: Place of the model, for messages.
        config: Config of the model.
        tokenizer: Tokenizer to check.

    Raises:
        CheckpointError: If the model has no row for an id; names the largest one.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{source}: its tokenizer has ids up to {largest}, but the model's vocab_size is "
            f"{config.vocab_size}: put the tokenizer there that the model was trained with"
        )
    pairs = {
        "bos_token_id": (config.bos_token_id, tokenizer.bos_token_id),
        "eos_token_id": (config.eos_token_id, tokenizer.eos_token_id),
    }
    for name, (ours, theirs) in pairs.items():
        known = ours if isinstance(ours, list) else [ours]
        if ours is not None and theirs is not None and theirs not in known:
            warnings.warn(
                f"{source}: {name} is {ours} in config.json and {theirs} in the tokenizer; "
                "generate uses generation_config.json, else config.json, and perplexity the "
                "tokenizer: make them equal if that is not intended",
                stacklevel=2,
            )


def _is_local(source: str) -> bool:
    """Return True if it can only be a local path: Hub ids are `name` or `owner/name`."""
    return Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        found = "a file" if folder.is_file() else "nothing"
        raise CheckpointError(f"{folder}: found {found} there, expected the folder of a model")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no config.json there; name the folder that save_pretrained or "
            "`hf-stable export` wrote"
        )


def _load_config(source: str, remote: dict[str, Any]) -> PreTrainedConfig:
    try:
        raw, _ = PreTrainedConfig.get_config_dict(source, revision=remote.get("revision"))
    except (OSError, ValueError) as error:
        raise CheckpointError(_config_unreadable(source, error)) from error
    version = str(raw.get("transformers_version", "an unknown version"))
    written = f"it was written by transformers {version}, installed is {transformers.__version__}"
    try:
        config = AutoConfig.from_pretrained(source, **remote)
    except ImportError as error:
        raise CheckpointError(f"{source}: its own code cannot be imported: {error}") from error
    # Any other error of a config class is about the content of config.json.
    except Exception as error:
        raise CheckpointError(
            f"{source}/config.json: model_type {raw.get('model_type')!r} cannot be built "
            f"({_first_line(error)}); {written}: upgrade, or pass trust_remote_code if the "
            "checkpoint brings code that you trust"
        ) from error
    unknown = sorted(raw.keys() - _known_fields(config))
    if unknown and _is_newer(version):
        raise CheckpointError(
            f"{source}/config.json: this version would ignore {', '.join(unknown)}, and {written}: "
            "upgrade transformers (and hf_stable)"
        )
    return config


def _config_unreadable(source: str, error: Exception) -> str:
    if (Path(source) / "config.json").is_file():
        return f"{source}/config.json: not readable as JSON ({_first_line(error)}); copy it again"
    return (
        f"{source}: neither a local folder nor an available model on the Hub "
        f"({_first_line(error)}); check the name and the connection"
    )


def _known_fields(config: PreTrainedConfig) -> set[str]:
    return {field.name for field in fields(config)} | set(config.attribute_map) | _BOOKKEEPING


def _is_newer(version: str) -> bool:
    installed = Version(transformers.__version__)
    return version[:1].isdigit() and Version(version).release > installed.release


def _check_weights(folder: Path) -> None:
    """Check that all weight files are complete; a safetensors header has the expected length."""
    for name in _INDEXES:
        if (folder / name).is_file():
            files = _shards(folder / name)
            break
    else:
        files = [folder / name for name in _WEIGHTS if (folder / name).is_file()][:1]
        if not files:
            raise CheckpointError(
                f"{folder}: has a config.json but no weights ({' or '.join(_WEIGHTS + _INDEXES)}); "
                "copy or export the model again"
            )
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, though the index names it; copy it again")
        if file.suffix == ".safetensors":
            _check_safetensors(file)


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [index.parent / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: not an index of weight files ({_first_line(error)}); copy it again"
        ) from error


def _check_safetensors(file: Path) -> None:
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: truncated or damaged, {file.stat().st_size:,} bytes "
            f"({_first_line(error)}); copy or export it again"
        ) from error


def _load_tokenizer(source: str, remote: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **remote)
    # Transformers raises OSError, ValueError, TypeError or KeyError, depending on the kind of
    # tokenizer that it expected.
    except Exception as error:
        raise CheckpointError(
            f"{source}: no usable tokenizer ({_first_line(error)}); put the model's tokenizer.json "
            "and tokenizer_config.json beside config.json"
        ) from error
    if len(tokenizer) == 0:
        raise CheckpointError(f"{source}: its tokenizer has no tokens; add tokenizer.json")
    return tokenizer


def _load_weights(
    source: str,
    config: PreTrainedConfig,
    remote: dict[str, Any],
    dtype: str | torch.dtype | None,
    refuse_unknown: bool,
) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            **remote,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
        )
    except _UNLOADABLE as error:
        raise CheckpointError(
            f"{source}: cannot be loaded as a causal language model ({_first_line(error)})"
        ) from error
    model, info = loaded
    # Transformers would initialize these randomly and only warn.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{source}: its weights lack {len(missing)} parameters of a {type(model).__name__}, "
            f"such as {missing[0]}; the checkpoint is incomplete or of another model"
        )
    if refuse_unknown and info["unexpected_keys"]:
        unknown = sorted(info["unexpected_keys"])
        raise CheckpointError(
            f"{source}: a {type(model).__name__} with its config.json has no place for "
            f"{len(unknown)} of its tensors: {', '.join(unknown[:5])}; correct config.json, or "
            "remove them from a copy"
        )
    return model


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
