"""Warm start: begin a recipe's model with trained weights, and measure the cost of the switch.

`training.initial_model` names the trained model; the recipe's model section describes the new one.
All trained weights are kept. Vectors that a technique adds begin at their neutral value, if one
exists. The perplexity on held-out text before and after the switch is printed and recorded.
"""

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .corpus import sources_of
from .data import ReadReport, expand, read_documents
from .errors import CheckpointError, RecipeError
from .evaluation import PerplexityResult, load_model, model_place, perplexity
from .model import StableGPTConfig, StableGPTForCausalLM
from .model.configuration_stable_gpt import PRESETS
from .model.sigma_stable_gpt import init_sigma
from .recipes import Recipe

# Fields that give the same tensors another meaning.
_MEANING = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("tie_word_embeddings", "zero_centered_norm"),
)
# Fields that only affect the initial weights.
_BEGINNING = ("initializer", "initializer_range", "embedding_std", "depth_scaled_init")
_UNTOLD = {
    *_BEGINNING,
    *("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "sigma_gain_init"),
}


class WarmStart:
    """Trained model that a recipe begins with."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        """Load the trained model.

        Args:
            recipe: Recipe that names the model.
            device: Device on which perplexities are computed.

        Raises:
            CheckpointError: If there is no model, or it cannot be loaded.
            RecipeError: If it is no StableGPT.
        """
        self._recipe, self._device = recipe, device
        try:
            place = model_place(str(recipe.training.initial_model))
            source, self._tokenizer = load_model(place, dtype=torch.float32, device="cpu")
        except CheckpointError as error:
            raise CheckpointError(f"training.initial_model: {error}") from error
        if not isinstance(source, StableGPTForCausalLM):
            raise self._error(
                f"holds a {type(source).__name__}; `hf-stable convert` supports some families"
            )
        self._source = source
        self._trained = copy.deepcopy(source.config)  # unchanged even if sigma is folded later
        self.sha256 = _digest(source)

    def give_weights(self, model: StableGPTForCausalLM) -> list[str]:
        """Copy the trained weights into the recipe's model, in place.

        Args:
            model: Model of the recipe.

        Returns:
            Names of the tensors that the trained model lacks.

        Raises:
            RecipeError: If the models do not match; names every tensor that does not fit, or the
                field that would change the meaning of the weights or be ignored.
        """
        self._check_fields(model.config)
        if self._trained.sigma_reparam and not model.config.sigma_reparam:
            self._source.fold_sigma_reparam()
        theirs, ours = self._source.state_dict(), model.state_dict()
        problems = [f"{name} has no place in it" for name in theirs if name not in ours]
        for name, tensor in ours.items():
            if name not in theirs and tensor.ndim > 1:
                problems.append(f"{name} {tuple(tensor.shape)} would be random")
            elif name in theirs and theirs[name].shape != tensor.shape:
                problems.append(f"{name} is {tuple(theirs[name].shape)}, not {tuple(tensor.shape)}")
        if problems:
            raise self._error("does not fit the recipe's model:\n  " + "\n  ".join(problems))
        model.load_state_dict(theirs, strict=False)
        if not self._trained.sigma_reparam:
            for _, linear in model._sigma_linears():
                init_sigma(model.config, linear)
        return [name for name in ours if name not in theirs]

    def measure(
        self, model: StableGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, added: list[str]
    ) -> dict[str, Any]:
        """Measure the perplexity of both models on the recipe's held-out text.

        Args:
            model: Model of the recipe with the trained weights.
            tokenizer: Tokenizer of the run.
            added: Names of the tensors that the trained model lacks.

        Returns:
            Entry for run.json.

        Raises:
            RecipeError: If the run has another tokenizer than the trained model.
        """
        texts = list(_held_out(self._recipe, tokenizer))
        self._check_tokenizer(tokenizer, texts)
        before, after = (self._perplexity(each, tokenizer, texts) for each in (self._source, model))
        return {
            "folder": str(self._recipe.training.initial_model),
            "sha256": self.sha256,
            "switched": _differences(self._trained, model.config),
            "added": added,
            "perplexity_before": before.to_dict(),
            "perplexity_after": after.to_dict(),
            "perplexity_ratio": after.per_token.value / before.per_token.value,
        }

    def _perplexity(
        self, model: StableGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]
    ) -> PerplexityResult:
        place = next(model.parameters()).device
        torch.nn.Module.to(model, self._device)
        length = self._recipe.data.sequence_length
        try:
            return perplexity(
                model,
                tokenizer,
                texts,
                max_length=min(length, model.config.max_position_embeddings),
                batch_size=self._recipe.training.micro_batch_size,
            )
        finally:
            torch.nn.Module.to(model, place)

    def _check_fields(self, config: StableGPTConfig) -> None:
        trained = self._trained
        for name in _MEANING:
            there, here = getattr(trained, name), getattr(config, name)
            if there != here:
                raise self._error(
                    f"was trained with {name}={there!r}, with which its tensors mean something "
                    f"else than with model.{name} {here!r}: set that to {there!r}"
                )
        given = {**PRESETS[self._recipe.model.get("preset", "baseline")], **self._recipe.model}
        ignored = [name for name in _BEGINNING if name in given] + _given_values(trained, config)
        for name in ignored:
            there, here = getattr(trained, name), getattr(config, name)
            if there != here:
                raise self._error(
                    f"has the weights, so model.{name} {here!r} would be ignored: set it "
                    f"to {there!r}, as there"
                )
        self._check_neutral("layer_scale", trained.layer_scale is None, config.layer_scale, 1.0)
        gain = config.sigma_gain_init if config.sigma_reparam else None
        self._check_neutral("sigma_gain_init", not trained.sigma_reparam, gain, "spectral")

    def _check_neutral(self, name: str, is_new: bool, value: Any, neutral: Any) -> None:
        if is_new and value is not None and value != neutral:
            raise self._error(
                f"is trained, and model.{name} {value!r} would undo that: set it to {neutral!r}, "
                "which leaves the model what it computes"
            )

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
        same = tokenizer.get_vocab() == self._tokenizer.get_vocab() and all(
            tokenizer(text).input_ids == self._tokenizer(text).input_ids for text in texts
        )
        if not same:
            raise self._error(
                "has another tokenizer than the run: set tokenizer.path to it, and "
                f"tokenizer.vocab_size to {self._source.config.vocab_size}"
            )

    def _error(self, text: str) -> RecipeError:
        return RecipeError(f"training.initial_model {self._recipe.training.initial_model}: {text}")


def cost_line(record: dict[str, Any]) -> str:
    """Describe the cost of the switch in one line, from the result of `measure`."""

    def value(key: str) -> str:
        found = record[key]["per_token"]
        interval = "" if found["low"] is None else f" ({found['low']:.4g} to {found['high']:.4g})"
        return f"{found['value']:.6g}{interval}"

    switched = ", ".join(
        f"{name} {there!r} -> {here!r}" for name, (there, here) in record["switched"].items()
    )
    return (
        f"{record['folder']}: perplexity {value('perplexity_before')} before and "
        f"{value('perplexity_after')} after the switch ({switched or 'nothing'}), "
        f"{record['perplexity_ratio']:.4f} times, on "
        f"{record['perplexity_after']['documents']} held-out documents"
    )


def _given_values(trained: StableGPTConfig, config: StableGPTConfig) -> list[str]:
    """Return the fields that only initialize vectors which the trained model already has."""
    norms = [name for name in ("attention_post_norm", "mlp_post_norm") if getattr(config, name)]
    brought = {
        "layer_scale": None not in (trained.layer_scale, config.layer_scale),
        "sigma_gain_init": trained.sigma_reparam and config.sigma_reparam,
        "post_norm_gain": bool(norms) and all(getattr(trained, name) for name in norms),
    }
    return [name for name, is_brought in brought.items() if is_brought]


def _digest(model: StableGPTForCausalLM) -> str:
    """Return the SHA-256 of names and bytes of all tensors, independent of their files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield held-out documents of every source, together as many tokens as a validation reads."""
    sources = expand(sources_of(recipe)[1])
    share = recipe.training.evaluate_blocks * recipe.data.sequence_length / len(sources)
    for source in sources:
        seen = 0
        for text in read_documents(source, ReadReport()):
            yield text
            seen += len(tokenizer(text, verbose=False).input_ids)
            if seen >= share:
                break


def _differences(one: StableGPTConfig, other: StableGPTConfig) -> dict[str, list[Any]]:
    left, right = one.to_dict(), other.to_dict()
    names = [name for name in right if name not in _UNTOLD]
    return {name: [left.get(name), right[name]] for name in names if left.get(name) != right[name]}
