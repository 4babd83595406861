"""A conversion from start to end: refuse early, always compare, and write last, in one step."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file, extract_commit_hash

from hf_stable import durable
from hf_stable.checksums import sha256_of
from hf_stable.errors import CheckpointError
from hf_stable.evaluation import load_config, load_model
from hf_stable.evaluation.loading import check_vocabulary
from hf_stable.model import StableGPTConfig, StableGPTForCausalLM
from hf_stable.records import CONVERSION, versions, write_json

from .exact import exact_logits
from .families import FAMILIES, WHY_NOT, Family
from .rules import EVERYWHERE, Mapped, map_fields
from .tensors import map_tensors
from .unread import UNREAD

# Largest difference of a logit over the largest logit. float64 rounds by 1.1e-16; norms and softmax
# of many blocks add some digits.
TOLERANCE = 1e-10
_LENGTH = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion, which `conversion.json` in the folder records.

    Args:
        source: Hub id, or name of the folder.
        revision: The Hub's commit; None for a folder.
        weights_sha256: SHA-256 of the source's weight files, by name.
        model_type: Family of the source.
        fields: Fields of StableGPTConfig derived from the source's config.
        notes: Fields of the source that change nothing, with their values and the reasons.
        tokens: Number of compared tokens.
        difference: Largest difference of a logit over the largest logit, in float64, on random
            tokens at the first and the last positions.
        dtype: Data type of the written weights.
        saved_difference: The same difference with the weights as written.
    """

    source: str
    revision: str | None
    weights_sha256: dict[str, str]
    model_type: str
    fields: dict[str, Any]
    notes: dict[str, dict[str, Any]]
    tokens: int
    difference: float
    dtype: str
    saved_difference: float


def convert(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    dtype: Dtype | None = None,
) -> Conversion:
    """Write a checkpoint of another family as a StableGPT with the same logits and tokenizer.

    Both models are compared on the CPU, one after the other. This needs 8 bytes of memory per
    parameter, plus those of the largest tensor.

    Args:
        source: Folder or Hub id of a causal language model of Transformers.
        output: Folder to write; it appears once it is complete.
        revision: Branch, tag or commit of a Hub id.
        dtype: Data type of the weights to write; None is the source's.

    Returns:
        Summary of the conversion.

    Raises:
        CheckpointError: If a field of the source cannot be expressed (names all of them), the
            logits differ in float64 by more than TOLERANCE, the output exists, the source cannot be
            loaded, or its tokenizer has ids without an embedding row.
    """
    source, output = str(source), Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output}: exists already; name a folder that does not")
    family, mapped, config = _plan(source, revision)
    loaded, tokenizer = load_model(source, revision=revision, device="cpu", refuse_unknown=True)
    check_vocabulary(source, config, tokenizer)
    target: torch.dtype = loaded.dtype if dtype is None else _DTYPES[dtype]
    places = _sample(config)
    expected = _logits_of_source(source, loaded, places)
    model = _build(source, family, config, loaded)
    difference = _difference(exact_logits(model, *places), expected)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{source}: its logits and ours differ by {difference:.1e} of the largest in float64 "
            f"(at most {TOLERANCE:.0e} is rounding): it computes something that its config does "
            "not describe; nothing was written"
        )
    _round(source, model, target)
    conversion = Conversion(
        source=Path(source).name if Path(source).exists() else source,
        revision=_commit(source, revision),
        weights_sha256=_digests(source, revision),
        model_type=str(loaded.config.model_type),
        fields=mapped.fields,
        notes=mapped.notes,
        tokens=places[0].numel(),
        difference=difference,
        dtype=str(target).removeprefix("torch."),
        saved_difference=_difference(exact_logits(model, *places), expected),
    )
    torch.nn.Module.to(model, target)
    _write(output, model, tokenizer, conversion)
    return conversion


def _plan(source: str, revision: str | None) -> tuple[Family, Mapped, StableGPTConfig]:
    """Return the family, the mapped fields, and our config, from the source's config alone."""
    found = load_config(source, revision=revision)
    kind = str(found.model_type)
    if kind not in FAMILIES:
        why = WHY_NOT.get(kind, "convert has no table of it")
        if kind == "stable_gpt":
            why = "it is a StableGPT already: use it as it is"
        raise CheckpointError(
            f"{source}: model_type {kind!r} cannot be converted: {why}. "
            f"Known are {', '.join(FAMILIES)}."
        )
    family = FAMILIES[kind]
    rules = {**UNREAD, **EVERYWHERE, **family.rules}
    mapped = map_fields(rules, found.to_dict())
    if mapped.reasons:
        raise CheckpointError(
            f"{source}: this {kind} cannot be converted:\n"
            + "\n".join(f"  {reason}" for reason in mapped.reasons)
        )
    mapped.fields |= family.fields
    try:
        return family, mapped, StableGPTConfig(**mapped.fields)
    except (ValueError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{source}: this {kind} cannot be converted: {error.__cause__ or error}"
        ) from error


def _sample(config: StableGPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random ids, and positions at the beginning and at the end, (2, Q) each."""
    length = min(_LENGTH, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, length), generator=generator)
    first = torch.arange(length)
    return ids, torch.stack((first, first + config.max_position_embeddings - length))


def _logits_of_source(
    source: str, loaded: Any, places: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    torch.nn.Module.to(loaded, "cpu", torch.float64)
    logits = exact_logits(loaded, *places)
    if not logits.isfinite().all() or not logits.any():
        what = "zero" if logits.isfinite().all() else "not finite"
        raise CheckpointError(
            f"{source}: its own logits are {what}, so that nothing can be compared: the weights "
            "are damaged or were never trained"
        )
    return logits


def _build(
    source: str, family: Family, config: StableGPTConfig, loaded: Any
) -> StableGPTForCausalLM:
    """Build our model in float64 from the tensors of the loaded one, which loses them."""
    tensors = dict(loaded.state_dict())
    torch.nn.Module.to(loaded, "meta")  # frees each tensor once it has been mapped
    with no_init_weights():
        model: Any = StableGPTForCausalLM._from_config(config, dtype=torch.float64)
    try:
        model.load_state_dict(map_tensors(family, model, tensors), assign=True)
    except (CheckpointError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: its tensors do not fit its config: {error}; nothing was written"
        ) from error
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model.eval()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def _round(source: str, model: StableGPTForCausalLM, dtype: torch.dtype) -> None:
    """Round the weights to `dtype`, but store them in float64."""
    for name, parameter in model.named_parameters():
        rounded = parameter.to(dtype)
        if not rounded.isfinite().all():
            raise CheckpointError(
                f"{source}: {name} is not finite in {dtype}: choose another --dtype"
            )
        parameter.copy_(rounded)


def _commit(source: str, revision: str | None) -> str | None:
    """Return the commit of a Hub id; None for a folder."""
    if Path(source).exists():
        return None
    return extract_commit_hash(cached_file(source, "config.json", revision=revision), None)


def _digests(source: str, revision: str | None) -> dict[str, str]:
    """Return the SHA-256 of the source's weight files, by name."""
    folder = Path(source)
    if not folder.exists():
        folder = Path(str(cached_file(source, "config.json", revision=revision))).parent
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return {file.name: sha256_of(file) for file in files}


def _write(
    output: Path,
    model: StableGPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    conversion: Conversion,
) -> None:
    """Write beside the folder, read back and rename: the folder is complete or absent."""
    # An empty folder is replaced, but not one that was filled in the meantime.
    with durable.whole_folder(output, replace=False) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / CONVERSION, {**asdict(conversion), "versions": versions()})
        again = StableGPTForCausalLM.from_pretrained(temporary, dtype="auto")
        for name, tensor in model.state_dict().items():
            if not torch.equal(again.state_dict()[name], tensor):
                raise CheckpointError(f"{temporary / name}: differs when read back after writing")
