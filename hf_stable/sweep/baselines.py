"""Does the divergence rule have its marks on a study's text? Asked before anything is trained."""

import json
from collections.abc import Sequence

from hf_stable.corpus import prepare_corpus
from hf_stable.data import NgramBaselines, boundary_ids, ngram_cross_entropy
from hf_stable.errors import UserError
from hf_stable.recipes import Recipe, to_dict

from .plan import Planned
from .rule import Thresholds

# Tokens of a text that a run counts, too.
_COUNTED = 20_000_000


def check_baselines(runs: Sequence[Planned], thresholds: Thresholds) -> None:
    """Count every text of the runs once; token files that this makes are those of the runs.

    Raises:
        UserError: names the run, where a bigram table is no better than a unigram table and the
            thresholds need it to be.
        DataError, RecipeError: when a run's text or tokenizer cannot be used.
    """
    if not thresholds.needs_bigram:
        return
    texts: dict[str, Planned] = {}
    for run in runs:
        texts.setdefault(_text_of(run.recipe), run)
    for run in texts.values():
        found = _baselines(run.recipe)
        try:
            thresholds.collapse_at(found.unigram, found.bigram)
        except UserError as error:
            raise UserError(f"{run.id}: {error}") from error


def _text_of(recipe: Recipe) -> str:
    content = to_dict(recipe)
    parts = [content["tokenizer"], content["data"], recipe.model_config().vocab_size]
    return json.dumps(parts, sort_keys=True)


def _baselines(recipe: Recipe) -> NgramBaselines:
    tokenizer, corpus = prepare_corpus(recipe, progress=False)
    return ngram_cross_entropy(
        corpus.train_tokens.sample(_COUNTED),
        corpus.validation_tokens.sample(_COUNTED),
        recipe.model_config().vocab_size,
        boundary=boundary_ids(tokenizer)[0][0],
    )
