"""Export of a folder that loads with Transformers alone.

The folder holds safetensors, config with `auto_map`, the flat model code, generation config,
tokenizer, model card with its picture, LICENSE, the run's records and SHA256SUMS. Loading it can
run no code except the named model code. Equal sources give equal bytes.
"""

import contextlib
import dataclasses
import gzip
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from hf_stable import durable
from hf_stable import model as model_package
from hf_stable.card import Statement, clean, write_card
from hf_stable.card.rendering import EXPORT_RECORD
from hf_stable.checkpoints import export_model, find_checkpoint
from hf_stable.checksums import write_sums
from hf_stable.errors import CheckpointError, UserError
from hf_stable.evaluation import load_model
from hf_stable.model import StableGPTConfig, StableGPTForCausalLM
from hf_stable.records import CONVERSION, read_metrics, write_json
from hf_stable.registration import AUTO_CLASSES

from .files import CARD, files_of, strangers
from .rounding import Rounding, measure, measuring_tokens

# The place from which the tokenizer was loaded is private.
_PLACES = {"is_local", "local_files_only", "name_or_path"}
_SIZE = re.compile(r"[1-9]\d*(?:[KMGT]i?)?B", re.IGNORECASE)


@dataclass(frozen=True)
class Weights:
    """Options for writing the weights.

    Args:
        fold_sigma: Fold sigma-Reparam into equivalent plain weights, instead of keeping it.
        dtype: "bfloat16" rounds the weights; None keeps the checkpoint's.
        max_shard_size: Largest size of one file, such as "5GB"; a tensor is never split.
    """

    fold_sigma: bool = False
    dtype: Literal["bfloat16"] | None = None
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        if not _SIZE.fullmatch(self.max_shard_size):
            raise UserError(
                f"max_shard_size is {self.max_shard_size!r}: give a number with KB, MB, GB or TB"
            )


def export(
    source: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    weights: Weights | None = None,
    statement: Statement | None = None,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Write a Hub-ready folder from a run or a saved StableGPT.

    Args:
        source: Folder of a run, or of a saved StableGPT with its tokenizer.
        output: Folder to write. It appears once it is complete, and replaces an earlier export.
        step: Step of the checkpoint to export, instead of the run's finished model.
        weights: Options for the weights; None keeps them as trained.
        statement: Facts for the card that no record holds.
        check: Called with the complete folder before it replaces `output`, such as
            `check_export`. If it raises, `output` is unchanged.

    Returns:
        `output`.

    Raises:
        CheckpointError: If `source` holds no StableGPT, or no valid checkpoint of that step.
        UserError: If `output` holds files that are not an export's, or an option has no effect.
    """
    source, output = Path(source), Path(output)
    weights = weights or Weights()
    # A run's records describe its end, not an earlier checkpoint.
    is_run = step is None and (source / "run.json").is_file()
    with _model_folder(source, step) as folder, _fresh(output, folder) as fresh:
        _write_model(folder, fresh, weights)
        _write_code(fresh)
        if (made := folder / CONVERSION).is_file():
            content = clean(json.loads(made.read_text(encoding="utf-8")))
            write_json(fresh / "records" / CONVERSION, content)
        if is_run:
            _write_records(source, fresh / "records")
        statement = statement or Statement()
        named = statement.name if is_run else statement.name or output.resolve().name
        write_card(
            source if is_run else fresh,
            fresh / CARD,
            statement=dataclasses.replace(statement, name=named),
        )
        write_sums(fresh)
        if check is not None:
            check(fresh)
    return output


@contextlib.contextmanager
def _model_folder(source: Path, step: int | None) -> Iterator[Path]:
    """Yield a run's final weights or those of a step, or the folder itself if it is a model's."""
    if step is not None:
        with tempfile.TemporaryDirectory() as scratch:
            yield export_model(find_checkpoint(source, step), Path(scratch))
        return
    yield _finished_model(source)


def _finished_model(source: Path) -> Path:
    for folder in (source / "model", source):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        f"{source} holds no model: give a finished run's folder (with model/config.json in it), "
        "a Transformers folder, or a run's folder and the step of a checkpoint in it."
    )


@contextlib.contextmanager
def _fresh(output: Path, source: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `output` when it is complete."""
    place = output.resolve()
    if place == source.resolve():
        raise UserError(f"{output} is the folder of the exported model: name another folder")
    if place.exists() and not place.is_dir():
        raise UserError(f"{output} is a file: name a folder")
    if found := strangers(place):
        raise UserError(
            f"{output} holds {', '.join(found[:3])}{' and more' if found[3:] else ''}, which is "
            "not part of an export and would be removed: name a new folder"
        )
    with durable.whole_folder(place) as fresh:
        yield fresh
        _open_to_readers(fresh)


def _open_to_readers(folder: Path) -> None:
    """Give weight files, which safetensors writes for their owner only, the usual permissions."""
    os.umask(mask := os.umask(0))
    for path in files_of(folder).values():
        path.chmod(0o666 & ~mask)


def _write_model(folder: Path, fresh: Path, weights: Weights) -> None:
    """Write weights, config and tokenizer, and notes on changed weights with their cost."""
    loaded, tokenizer = load_model(folder)
    if not isinstance(loaded, StableGPTForCausalLM):
        raise CheckpointError(
            f"{folder} holds a {type(loaded).__name__}; only a StableGPT is exported with its "
            "code, any other model is Hub-ready as it is."
        )
    model: Any = loaded  # a decorator hides the signature of `to`
    if weights.fold_sigma and not model.config.sigma_reparam:
        raise UserError(f"{folder}: nothing to fold, its config has sigma_reparam off")
    is_changed = weights.fold_sigma or weights.dtype is not None
    trained, before = model.dtype, None
    if is_changed:
        ids = _measuring_tokens(model, tokenizer)
        before = _logits(model, ids)
    if weights.fold_sigma:
        model.fold_sigma_reparam()
    if weights.dtype is not None:
        model.to(torch.bfloat16)
    model.save_pretrained(fresh, max_shard_size=weights.max_shard_size)
    _write_tokenizer(tokenizer, fresh)
    if before is not None:
        after = _logits(StableGPTForCausalLM.from_pretrained(fresh, dtype="auto").eval(), ids)
        _write_notes(fresh, weights, str(trained).removeprefix("torch."), measure(before, after))


def _measuring_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    text = license_file().read_text(encoding="utf-8")
    return measuring_tokens(tokenizer, text, model.config.max_position_embeddings)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return logits (T, V) on the CPU."""
    with torch.no_grad():
        return model(ids.to(model.device)).logits[0].cpu()


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, fresh: Path) -> None:
    tokenizer.save_pretrained(fresh)
    file = fresh / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, {key: value for key, value in content.items() if key not in _PLACES})


def _write_notes(fresh: Path, weights: Weights, trained: str, rounding: Rounding) -> None:
    """Write records/export.json, from which the card of this folder is made."""
    changes = []
    if weights.fold_sigma:
        changes.append(
            "sigma-Reparam was on in training; here it is folded into the plain weights that it "
            "equals"
        )
    if weights.dtype is not None:
        changes.append(f"the weights were {trained} in training and are {weights.dtype} here")
    note = f"Not as trained: {'; '.join(changes)}. {rounding.sentence()}"
    content = {**dataclasses.asdict(weights), "trained_dtype": trained}
    write_json(fresh / EXPORT_RECORD, {**content, **dataclasses.asdict(rounding), "notes": [note]})


def _write_code(fresh: Path) -> None:
    """Write the flat model code, LICENSE, and `auto_map` in config.json, which names the code."""
    code = Path(model_package.__file__).parent
    for file in sorted(code.glob("*_stable_gpt.py")):
        shutil.copyfile(file, fresh / file.name)
    classes: dict[type, type] = {AutoConfig: StableGPTConfig, **AUTO_CLASSES}
    places = {
        auto.__name__: f"{ours.__module__.rpartition('.')[2]}.{ours.__name__}"
        for auto, ours in classes.items()
    }
    config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
    write_json(fresh / "config.json", {**config, "auto_map": places})
    shutil.copyfile(license_file(), fresh / "LICENSE")


def license_file() -> Path:
    """Return the package's LICENSE file, for any kind of installation."""
    checkout = Path(model_package.__file__).parents[2]
    places = [checkout / "LICENSE"] if (checkout / "pyproject.toml").is_file() else []
    for file in metadata.files("hf_stable") or []:
        places += [Path(str(file.locate()))] if file.name == "LICENSE" else []
    for place in places:
        if place.is_file() and place.stat().st_size:
            return place
    raise CheckpointError("hf_stable is installed without its LICENSE file: install it again")


def _write_records(run: Path, output: Path) -> None:
    """Write the run's JSON records and compressed metrics.jsonl, without secrets and paths."""
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(run.glob("*.json")):
        write_json(output / file.name, clean(json.loads(file.read_text(encoding="utf-8"))))
    rows = read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in clean(rows))
    # No timestamp, so that equal records give equal bytes.
    (output / "metrics.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
