"""One conversion from start to end: refuse early, compare always, write last and at once."""

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

# Largest difference of a logit over the largest logit. Rounding of float64 is 1.1e-16; norms and
# softmax of many blocks add some digits to it.
TOLERANCE = 1e-10
_LENGTH = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did; `conversion.json` of the folder holds it.

    Args:
        source: Hub id, or the name of the folder. revision: the Hub's commit; None for a folder.
        weights_sha256: of the source's weight files by name.
        fields: of StableGPTConfig, as they came from the source's.
        notes: fields of the source that change nothing, with their values and the reasons.
        difference: largest difference of a logit over the largest logit, in float64, on
            `tokens` random tokens at the first and the last positions.
        saved_difference: the same with the weights as they were written, in `dtype`.
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

    Both are compared on the CPU, one after the other: 8 bytes of memory a parameter, and those of
    the largest tensor.

    Args:
        source: folder or Hub id of a causal language model of Transformers.
        output: folder to write; it appears when everything is in it.
        revision: branch, tag or commit of a Hub id.
        dtype: of the weights to write; None is the source's.

    Raises:
        CheckpointError: with every field of the source that ours cannot express; when the logits
            differ in float64 by more than TOLERANCE; when the output exists, the source cannot
            be loaded or its tokenizer has ids that it has no row for.
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
            "not tell; nothing was written"
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
    """The family, what became of each field, and our config, from the source's config alone."""
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
    """Random ids, and positions that begin with the first and end with the last, (2, Q) each."""
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
    """Our model in float64 with the tensors of the loaded one, which has none afterwards."""
    tensors = dict(loaded.state_dict())
    torch.nn.Module.to(loaded, "meta")  # so that each is freed when it has become ours
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
    """Round the weights to `dtype`, and keep them in float64."""
    for name, parameter in model.named_parameters():
        rounded = parameter.to(dtype)
        if not rounded.isfinite().all():
            raise CheckpointError(
                f"{source}: {name} is not finite in {dtype}: choose another --dtype"
            )
        parameter.copy_(rounded)


def _commit(source: str, revision: str | None) -> str | None:
    """The commit that a Hub id stood for; None for a folder."""
    if Path(source).exists():
        return None
    return extract_commit_hash(cached_file(source, "config.json", revision=revision), None)


def _digests(source: str, revision: str | None) -> dict[str, str]:
    """SHA-256 of the source's weight files, by name."""
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
    """Write beside the folder, read again, and rename: it is whole or not there."""
    # An empty folder is replaced; what somebody has put there meanwhile is not.
    with durable.whole_folder(output, replace=False) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / CONVERSION, {**asdict(conversion), "versions": versions()})
        again = StableGPTForCausalLM.from_pretrained(temporary, dtype="auto")
        for name, tensor in model.state_dict().items():
            if not torch.equal(again.state_dict()[name], tensor):
                raise CheckpointError(f"{temporary / name}: reads otherwise than it was written")
