"""Check before training that the divergence rule can be applied to a study's text."""

import json
from collections.abc import Sequence

from hf_stable.corpus import prepare_corpus
from hf_stable.data import NgramBaselines, boundary_ids, ngram_cross_entropy
from hf_stable.errors import UserError
from hf_stable.recipes import Recipe, to_dict

from .plan import Planned
from .rule import Thresholds

# Tokens counted of each text, the same number as in a run.
_COUNTED = 20_000_000


def check_baselines(runs: Sequence[Planned], thresholds: Thresholds) -> None:
    """Count n-grams of every text of the runs once; the runs reuse the token files built here.

    Raises:
        UserError: If the thresholds need a bigram table that is better than a unigram table, and it
            is not. The message names the run.
        DataError: If the text of a run cannot be used.
        RecipeError: If the tokenizer of a run cannot be used.
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
