"""Schema of a recipe, which describes one training run completely. An unknown key is an error.

The dataclasses below define all keys of a recipe file. The text under a field is its meaning, which
error messages show. Lengths are in tokens, batches in sequences.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    model_validator,
)
from pydantic.dataclasses import dataclass

from hf_stable.licenses import is_license
from hf_stable.paths import expand_home
from hf_stable.recipes import strict_yaml

if TYPE_CHECKING:
    from hf_stable.model.configuration_stable_gpt import StableGPTConfig

_STRICT = ConfigDict(
    extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True
)
# Beyond any published vocabulary; the tokenizer trainer aborts the process for absurd values.
_LARGEST_VOCABULARY = 4_000_000
# <|endoftext|>, <|padding|> and the 256 bytes to which every trained tokenizer falls back.
_SMALLEST_VOCABULARY = 258
# Seconds for which a step may legitimately be silent.
_LEAST_PATIENCE = 60
# Keys of a source that change no result.
_INERT = {"license", "max_bad_share"}
_DEFAULT_SPLITS = {("split", "train"), ("split", None)}

# Largest count of tensors, files and deques.
_LARGEST_COUNT = 2**63 - 1


def _whole(value: Any) -> Any:
    """Return an integer for a number such as 1e9, which YAML reads as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=0, le=_LARGEST_COUNT)]
PositiveCount = Annotated[Whole, Field(gt=0, le=_LARGEST_COUNT)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
# Every path in a recipe or a study's plan has one of these types.
PathText = Annotated[str, AfterValidator(expand_home)]
NamedPath = Annotated[PathText, Field(min_length=1)]


@dataclass(frozen=True, config=_STRICT)
class SourceRecipe:
    """Text to read: the fields of `hf_stable.data.Source` and two more; a string is its path."""

    path: NamedPath
    """File, folder or glob (text, JSON, parquet, Arrow), else the name of a `datasets` dataset.
    A folder that is a dataset is read as `datasets` reads it."""
    column: str = "text"
    """Column that holds the text, in JSON, parquet, Arrow or a dataset; `a.b` is b inside a."""
    sample_by: Literal["document", "line", "paragraph"] = "document"
    """Unit of a text file that is one document."""
    name: str | None = None
    """Configuration of a `datasets` dataset."""
    split: str | None = None
    """Split of a `datasets` dataset; null is train."""
    streaming: bool = True
    """Read a `datasets` dataset as a stream, without a full copy on disk."""
    part: Literal["all", "train", "validation"] = "all"
    """Part of the holdout split to read."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the documents used for validation, chosen by a hash of their text."""
    max_bad_share: Fraction = 0.5
    """Largest share of unusable documents in a file, which are left out; beyond it, the file is
    refused."""
    weight: Positive | None = None
    """Share of the training tokens relative to other sources; give it to all sources or to none."""
    license: str | None = None
    """License of the text as SPDX or one of the Hub's identifiers, for records and model card."""

    @model_validator(mode="after")
    def _license_is_known(self) -> "SourceRecipe":
        if self.license is not None and not is_license(self.license):
            raise ValueError(
                f"license {self.license!r} of {self.path} is neither an SPDX expression (such as "
                "CC-BY-4.0) nor one of the Hub's identifiers (such as odc-by); one without an "
                "identifier is written LicenseRef-NAME"
            )
        return self


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


SourceList = list[Annotated[SourceRecipe, BeforeValidator(_source)]]


@dataclass(frozen=True, config=_STRICT)
class TokenizerRecipe:
    """Tokenizer: a finished one at `path`, else one trained on the training text."""

    vocab_size: Annotated[Whole, Field(gt=0, le=_LARGEST_VOCABULARY)]
    """Rows of the embedding. The tokenizer may have fewer tokens, not more."""
    path: NamedPath | None = None
    """Folder or Hub name of a finished tokenizer; null trains one."""
    kind: Literal["bpe", "sentencepiece"] = "bpe"
    """Kind to train: byte-level BPE, or SentencePiece unigram with byte fallback."""
    training_bytes: PositiveCount = 100_000_000
    """Bytes of text to train a tokenizer on."""

    @model_validator(mode="after")
    def _room_for_bytes(self) -> "TokenizerRecipe":
        smallest = _SMALLEST_VOCABULARY
        if self.path is None and self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; a tokenizer to train needs at least {smallest}"
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class DataRecipe:
    """Text for training and validation."""

    train: Annotated[SourceList, Field(min_length=1)]
    """Training text: paths, or mappings with the keys of a source."""
    sequence_length: Annotated[Whole, Field(ge=2, le=_LARGEST_COUNT)]
    """Tokens of one training sequence."""
    validation: SourceList = Field(default_factory=list)
    """Validation text; if empty, a part of the training text is held out."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Fraction of the training documents held out if `validation` is empty. If there are too few
    documents to hold out whole ones, it is the end of each."""
    separate_documents: bool = False
    """Restart attention and positions at each document inside a sequence."""
    cache: NamedPath | None = None
    """Shared folder for token files and trained tokenizers; null is hf_stable in the folder of
    Hugging Face's caches (HF_HOME, or ~/.cache/huggingface if that is unset)."""
    num_workers: Annotated[Whole, Field(ge=0, le=256)] = 0
    """Data loader workers of each training process."""

    @model_validator(mode="after")
    def _parts_have_effect(self) -> "DataRecipe":
        for source in self.train:
            if not self.validation and (source.part != "all" or source.holdout):
                raise ValueError(
                    f"train: part and holdout of {source.path} have no effect while validation is "
                    "empty; remove them and set data.holdout, or give validation"
                )
        return self

    @model_validator(mode="after")
    def _weights_of_all_or_none(self) -> "DataRecipe":
        weighted = [source for source in self.train if source.weight is not None]
        if weighted and len(weighted) < len(self.train):
            missing = [source.path for source in self.train if source.weight is None]
            raise ValueError(
                f"train: {len(weighted)} of {len(self.train)} sources have a weight; give one to "
                f"{missing} too, or to none"
            )
        for source in self.validation:
            if source.weight is not None:
                raise ValueError(
                    f"validation: weight {source.weight} of {source.path} has no effect; all "
                    "validation text counts alike: remove it"
                )
        return self

    @property
    def weights(self) -> list[float] | None:
        """Weight of each training source; None if the sources are read as one text."""
        weights = [source.weight for source in self.train if source.weight is not None]
        return weights or None


@dataclass(frozen=True, config=_STRICT)
class OptimizerRecipe:
    """AdamW as the papers use it."""

    name: Literal["adamw", "stable_adamw"] = "adamw"
    """Update rule; `stable_adamw` divides a tensor's rate by its RMS of g^2 / v, if above 1."""
    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    beta1: Momentum = 0.9
    """Decay of the gradient average, per step."""
    beta2: Momentum = 0.95
    """Decay of the squared-gradient average, per step."""
    eps: Positive = 1e-8
    """Added to the root of the squared-gradient average."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of matrices per step, times the learning rate (coupled) or its share of the peak."""
    weight_decay_mode: Literal["coupled", "independent"] = "coupled"
    """`coupled` is torch's AdamW; `independent` decay does not grow with the peak (Wortsman)."""
    decay_embeddings: bool = True
    """Decay the input embedding."""
    decay_vectors: bool = False
    """Decay 1-d parameters (norm gains, LayerScale, sigma gains)."""
    max_grad_norm: Positive | None = 1.0
    """Norm to which gradients are clipped; null does not clip."""
    clip_by: Literal["global", "group"] = "global"
    """Gradients whose norm is clipped: all together, or matrices, embeddings and vectors apart."""
    late_max_grad_norm: Positive | None = None
    """Lower norm from `late_clip_step` on, as OPT's 0.3 after 1.0."""
    late_clip_step: PositiveCount | None = None
    """Steps before `late_max_grad_norm` applies."""
    qk_clip: Positive | None = None
    """Attention logit above which a head's W_q and W_k are shrunk (Kimi K2: 100)."""

    @model_validator(mode="after")
    def _clipping_has_effect(self) -> "OptimizerRecipe":
        late, at, norm = self.late_max_grad_norm, self.late_clip_step, self.max_grad_norm
        if (late is None) != (at is None):
            raise ValueError(
                f"late_max_grad_norm is {late} and late_clip_step is {at}; give both or neither"
            )
        if late is not None and norm is not None and late >= norm:
            raise ValueError(
                f"late_max_grad_norm {late} is not below max_grad_norm {norm}; lower it, or remove "
                "it and late_clip_step"
            )
        if self.clip_by == "group" and norm is None and late is None:
            raise ValueError(
                "clip_by has no effect while max_grad_norm is null; give a norm, or remove clip_by"
            )
        return self

    @model_validator(mode="after")
    def _decay_leaves_weights(self) -> "OptimizerRecipe":
        is_coupled = self.weight_decay_mode == "coupled"
        share = self.weight_decay * (self.learning_rate if is_coupled else 1.0)
        if share >= 1:
            what = " times learning_rate" if is_coupled else ""
            raise ValueError(
                f"weight_decay {self.weight_decay}{what} takes {share:g} of every weight in a "
                "step; lower it below 1"
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class ScheduleRecipe:
    """Learning rate over time, as a share of its peak: linear warm-up, then the named decay."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Decay after the warm-up; `wsd` is stable first, then a linear decay."""
    warmup: Count = 0
    """Length of the warm-up, in `warmup_unit`."""
    warmup_unit: Literal["samples", "tokens", "steps"] = "steps"
    """Unit of `warmup`; `samples` are sequences."""
    min_ratio: Fraction = 0.1
    """Learning rate at the end, as a share of the peak."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps over which `wsd` decays; other schedules do not use it."""

    @model_validator(mode="after")
    def _decay_fraction_has_effect(self) -> "ScheduleRecipe":
        if self.name != "wsd" and self.decay_fraction != 0.2:
            raise ValueError(
                f"decay_fraction has no effect on {self.name}; remove it, or set name to wsd"
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class TrainingRecipe:
    """Training loop: length, batches, precision, and intervals of its outputs."""

    global_batch_size: PositiveCount
    """Sequences of one optimizer step, over all processes."""
    micro_batch_size: PositiveCount
    """Sequences that one process computes at once; gradients are accumulated over them."""
    initial_model: NamedPath | None = None
    """Run or model folder whose trained weights the run begins with; null draws random ones."""
    steps: PositiveCount | None = None
    """Optimizer steps; give either this or `tokens`."""
    tokens: PositiveCount | None = None
    """Training tokens, rounded down to whole steps; give either this or `steps`."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the computation; `bf16` is autocast, with weights and optimizer in fp32."""
    sharding: Literal["auto", "ddp", "fsdp2", "hsdp"] = "auto"
    """Layout of the model over processes: full copies (ddp), shards (fsdp2), or shards inside
    groups of `shard_size` processes and copies across groups (hsdp). `auto` uses the launcher's
    config file, else ddp."""
    shard_size: PositiveCount | None = None
    """Processes that share one copy under hsdp; null is all processes of a node."""
    reshard_after_forward: bool = True
    """Under fsdp2 and hsdp, free gathered blocks after the forward pass: less memory, more
    communication."""
    cpu_offload: bool = False
    """Under fsdp2 and hsdp, keep weights, gradients and optimizer state in host memory."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile each block with torch.compile(fullgraph=True); the first step is slow."""
    attn_implementation: str | None = None
    """Attention backend; null selects one that supports the model on this machine."""
    log_every: PositiveCount = 10
    """Steps between log lines."""
    evaluate_every: Count = 100
    """Steps between validations; 0 validates only at the end."""
    evaluate_blocks: PositiveCount = 64
    """Sequences of one validation."""
    checkpoint_every: Count = 0
    """Steps between checkpoints; 0 writes one only at the end."""
    keep_checkpoints: PositiveCount = 2
    """Number of newest checkpoints to keep."""
    keep_every: Count = 0
    """Also keep checkpoints whose step is a multiple of this; 0 keeps no others."""
    asynchronous_checkpoints: bool = False
    """Write checkpoints in the background, from a copy in CPU memory."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(default_factory=list)
    """Trackers that mirror metrics.jsonl."""
    threads: Annotated[Whole, Field(gt=0, le=1024)] | None = None
    """CPU threads of each process; null is torch's default."""
    hang_timeout: Count = 1800
    """Seconds without progress after which a process aborts and reports the hung rank; 0 never."""

    @model_validator(mode="after")
    def _length_and_batches(self) -> "TrainingRecipe":
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"steps is {self.steps} and tokens is {self.tokens}; "
                "give exactly one and set the other to null"
            )
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _patience_outlasts_a_step(self) -> "TrainingRecipe":
        if 0 < self.hang_timeout < _LEAST_PATIENCE:
            raise ValueError(
                f"hang_timeout {self.hang_timeout} is shorter than a step, a validation or a "
                f"checkpoint may take; give at least {_LEAST_PATIENCE} seconds, or 0 to disable it"
            )
        return self

    @model_validator(mode="after")
    def _sharding_has_effect(self) -> "TrainingRecipe":
        meant = {
            "shard_size": (None, ("hsdp",)),
            "reshard_after_forward": (True, ("fsdp2", "hsdp")),
            "cpu_offload": (False, ("fsdp2", "hsdp")),
        }
        for name, (neutral, kinds) in meant.items():
            value = getattr(self, name)
            if value != neutral and self.sharding not in kinds:
                raise ValueError(
                    f"{name} {json.dumps(value)} has no effect with sharding {self.sharding}; "
                    f"remove it, or set sharding to {' or '.join(kinds)}"
                )
        return self


@dataclass(frozen=True, config=_STRICT)
class TelemetryRecipe:
    """Telemetry of every layer during training; `hf-stable watch` and `diagnose` show it."""

    every: Count = 100
    """Steps between samples, of which the first step is one; 0 takes none."""
    bounds_every: Count = 1000
    """Steps between spectral norms and bounds on gradients; 0 leaves them out."""


@dataclass(frozen=True, config=_STRICT)
class GuardRecipe:
    """Reaction of training to bad steps; actions are tried in the order of `actions` below."""

    actions: list[Literal["skip", "lower", "rollback"]] = Field(default_factory=list)
    """`skip` the update, `lower` the learning rate for a while, `rollback` and leave data out.
    Without any, only updates that are not finite are refused. The last resort is to give up."""
    window: Annotated[Whole, Field(ge=64, le=_LARGEST_COUNT)] = 256
    """Number of accepted steps from which the usual distance from the level is estimated."""
    spike: Positive = 6.5
    """Robust deviations above its level at which a loss, or a norm's logarithm, is a spike."""
    plateau: Positive = 4.0
    """Robust deviations above its level at which the median of five losses is a plateau."""
    drift_rise: Positive = 0.3
    """Nats above its best level at which the smoothed loss drifts away."""
    drift_steps: PositiveCount = 20
    """Number of consecutive steps above `drift_rise` that raise an alarm."""
    max_skips: PositiveCount = 20
    """Consecutive skipped updates before the next action is tried."""
    max_skips_in_memory: PositiveCount = 100
    """Skipped updates in the last `memory` steps before the next action is tried."""
    lower_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor on the learning rate while it is lowered."""
    lower_steps: PositiveCount = 100
    """Steps with the lowered learning rate; then it returns linearly in the same number."""
    rollback_steps: PositiveCount = 100
    """Steps before the first sign of trouble to which a rollback returns, as in PaLM."""
    skip_batches: PositiveCount = 300
    """Batches left out after a rollback, as in PaLM; a second one leaves out twice as many."""
    max_rollbacks: PositiveCount = 3
    """Rollbacks in `memory` steps before the run is given up."""
    memory: PositiveCount = 1000
    """Steps after which earlier actions no longer count."""

    @property
    def reach(self) -> int:
        """Largest number of steps between a rollback's decision and the checkpoint it needs."""
        seen_after = 2 * self.drift_steps + self.max_skips + self.lower_steps
        return self.rollback_steps + seen_after


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """One training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]
    """Name of the run: 1 to 80 letters, digits, dots, underscores or hyphens; the first character
    is a letter or digit."""
    tokenizer: TokenizerRecipe
    """Tokenizer and vocabulary."""
    data: DataRecipe
    """Text for training and validation."""
    training: TrainingRecipe
    """Training loop."""
    seed: Count = 0
    """Seed of the initial weights and of the order of the data."""
    output: PathText = ""
    """Folder of the run; `runs/<name>` unless given."""
    model: dict[str, Any] = Field(default_factory=dict)
    """`preset` (a technique's name) and any field of StableGPTConfig."""
    optimizer: OptimizerRecipe = Field(default_factory=OptimizerRecipe)
    """Optimizer."""
    schedule: ScheduleRecipe = Field(default_factory=ScheduleRecipe)
    """Learning rate over time."""
    telemetry: TelemetryRecipe = Field(default_factory=TelemetryRecipe)
    """Telemetry during training."""
    guard: GuardRecipe = Field(default_factory=GuardRecipe)
    """Reaction to bad steps."""

    def __post_init__(self) -> None:
        if not self.output:
            object.__setattr__(self, "output", f"runs/{self.name}")

    @model_validator(mode="after")
    def _rollback_has_checkpoints(self) -> "Recipe":
        every, keep = self.training.checkpoint_every, self.training.keep_checkpoints
        held, sparse = (keep - 1) * every, self.training.keep_every
        too_short = held < self.guard.reach and not 0 < sparse <= self.guard.reach
        if "rollback" in self.guard.actions and (too_short or not every):
            raise ValueError(
                f"guard.actions has rollback, which may go {self.guard.reach} steps back, but "
                f"training.checkpoint_every {every} and keep_checkpoints {keep} hold {held}; "
                f"raise one of them, set training.keep_every to at most {self.guard.reach}, or "
                "remove rollback"
            )
        return self

    @model_validator(mode="after")
    def _at_least_one_step(self) -> "Recipe":
        if self.num_steps < 1:
            raise ValueError(
                f"training.tokens {self.training.tokens:,} is less than one step of "
                f"{self.tokens_per_step:,} tokens; raise it, or lower training.global_batch_size"
            )
        if "vocab_size" in self.model:
            raise ValueError(
                "model.vocab_size is decided by tokenizer.vocab_size; set that and remove this"
            )
        longest = self.model.get("max_position_embeddings", self.data.sequence_length)
        if isinstance(longest, int) and self.data.sequence_length > longest:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is beyond "
                f"model.max_position_embeddings {longest}; raise it or shorten the sequences"
            )
        return self

    @model_validator(mode="after")
    def _late_clip_begins(self) -> "Recipe":
        at = self.optimizer.late_clip_step
        if at is not None and at >= self.num_steps:
            raise ValueError(
                f"optimizer.late_clip_step {at} is not before the run's end, step "
                f"{self.num_steps}; lower it, or remove it and optimizer.late_max_grad_norm"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all processes."""
        return self.training.global_batch_size * self.data.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run: `steps`, or the whole steps that fit in `tokens`."""
        return self.training.steps or (self.training.tokens or 0) // self.tokens_per_step

    @property
    def warmup_steps(self) -> float:
        """Length of the warm-up in optimizer steps, not rounded when given in samples or tokens."""
        unit = {
            "steps": 1,
            "samples": self.training.global_batch_size,
            "tokens": self.tokens_per_step,
        }
        return self.schedule.warmup / unit[self.schedule.warmup_unit]

    def model_config(self, **fields: Any) -> "StableGPTConfig":
        """Build the model's config.

        Args:
            **fields: Values from the tokenizer, such as `eos_token_id`. The recipe's model section
                takes precedence.

        Raises:
            ValueError: If StableGPTConfig does not know or accept a field.
        """
        from hf_stable.model.configuration_stable_gpt import (  # noqa: PLC0415 (imports torch)
            StableGPTConfig,
        )

        chosen = {
            "vocab_size": self.tokenizer.vocab_size,
            "max_position_embeddings": self.data.sequence_length,
            **fields,
            **self.model,
        }
        return StableGPTConfig.from_preset(chosen.pop("preset", "baseline"), **chosen)


ADAPTER = TypeAdapter(Recipe)


def to_dict(recipe: Recipe, *, defaults: bool = True) -> dict[str, Any]:
    """Return the recipe, or only its differences from the defaults, as plain JSON values."""
    return ADAPTER.dump_python(recipe, mode="json", exclude_defaults=not defaults)


def deciding_data(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data section of `to_dict` without the keys that change no result of a run.

    These keys are the license of a text, the consent to bad documents and the default split's name.
    """

    def decides(key: str, value: Any) -> bool:
        return key not in _INERT and (key, value) not in _DEFAULT_SPLITS

    return _with_sources(
        data, lambda source: {key: source[key] for key in source if decides(key, source[key])}
    )


def _with_sources(
    data: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    names = {"train", "validation"} & data.keys()
    return {**data, **{name: [change(source) for source in data[name]] for name in names}}


def _without_written_split(source: dict[str, Any]) -> dict[str, Any]:
    """Undo the default split that versions before `max_bad_share` wrote to sources of files."""
    is_written = "max_bad_share" not in source and source.get("split") == "train"
    return {**source, "split": None} if is_written else source


def from_dict(content: dict[str, Any]) -> Recipe:
    """Build a recipe from the result of `to_dict`, e.g. in run.json."""
    data = _with_sources(content["data"], _without_written_split)
    return ADAPTER.validate_json(json.dumps({**content, "data": data}))


def dump(recipe: Recipe) -> str:
    """Return the whole recipe, defaults included, as YAML that loads back to an equal recipe."""
    return strict_yaml.dump(to_dict(recipe))
