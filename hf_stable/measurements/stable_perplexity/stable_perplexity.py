"""Measurement for `evaluate`: perplexity per token and word, and bits per byte, with intervals."""

import datasets
import evaluate

from hf_stable.errors import UserError
from hf_stable.evaluation import load_model, perplexity

_DESCRIPTION = """
Perplexity of any causal language model. Every token of every text is scored once, by a log-softmax
in at least fp32. Padding and auxiliary losses are excluded. The result does not depend on the batch
size. Each value has a bootstrap interval over the texts.
"""

_INPUTS = """
Args:
    data (list of str): Texts, one document each. Empty ones are counted and left out.
    model (str or PreTrainedModel): Folder, Hub id, or loaded causal language model.
    tokenizer (PreTrainedTokenizerBase, optional): Required with a loaded model; otherwise loaded
        from the same place as the model.
    trust_remote_code (bool): Allow remote code for a model given as str. Default False.
    **options: max_length, stride, batch_size, confidence, bootstrap_samples, seed and progress of
        hf_stable.evaluation.perplexity.
Returns:
    dict: per_token, per_word and bits_per_byte, each {"value", "low", "high"}, and the counts they
    are computed from.
"""


class StablePerplexity(evaluate.Measurement):
    """Measurement returned by `evaluate.load("<folder of this file>")`."""

    def _info(self) -> evaluate.MeasurementInfo:
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"data": datasets.Value("string")}),
        )

    def _compute(
        self, data, model, tokenizer=None, trust_remote_code=False, **options
    ) -> dict[str, object]:
        if isinstance(model, str):
            model, loaded = load_model(model, trust_remote_code=trust_remote_code)
            tokenizer = loaded if tokenizer is None else tokenizer
        if tokenizer is None:
            raise UserError("tokenizer: found None; pass the tokenizer of the model object")
        return perplexity(model, tokenizer, data, **options).to_dict()
