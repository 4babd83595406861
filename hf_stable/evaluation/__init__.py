"""Perplexity of any causal language model on any text, with intervals, and model loading."""

from .loading import load_config, load_model, model_place
from .result import Estimate, PerplexityResult
from .scoring import perplexity, windows

__all__ = [
    "Estimate",
    "PerplexityResult",
    "load_config",
    "load_model",
    "model_place",
    "perplexity",
    "windows",
]
