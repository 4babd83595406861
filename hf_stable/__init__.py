"""Stable LLM pre-training on the HuggingFace stack: `import hf_stable` registers `stable_gpt`."""

import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

__version__ = "0.1.0"
# The names below come from __getattr__.
# pyright: reportUnsupportedDunderAll=false
__all__ = [
    "StableGPTConfig",
    "StableGPTForCausalLM",
    "StableGPTForQuestionAnswering",
    "StableGPTForSequenceClassification",
    "StableGPTForTokenClassification",
    "StableGPTModel",
    "StableGPTPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hf_stable' has no attribute {name!r}")
    from . import model, registration  # noqa: F401, PLC0415

    return vars(model)[name]


class _RegisterOnImport:
    """Module finder that registers the family once anything imports Transformers.

    Importing Transformers and torch takes seconds, too long for `hf-stable --help`. Users of the
    Auto classes have imported Transformers, so for them the family is always registered.
    """

    # The model's files import Transformers, and kernels import the model. Registration needs them
    # all, so it waits until the outermost of these imports is complete.
    _watched = ("transformers", "hf_stable.model")
    _loading: ClassVar[set[str]] = set()

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the other finders' result for a watched module, and None for any other."""
        if name not in cls._watched and not name.startswith("hf_stable.kernels."):
            return None
        others = (each for each in sys.meta_path if each is not cls)
        specs = (each.find_spec(name, path, target) for each in others)
        spec = next((each for each in specs if each is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = partial(cls._load, name, spec.loader.exec_module)
        return spec

    @classmethod
    def _load(cls, name: str, load: Callable[[ModuleType], None], module: ModuleType) -> None:
        cls._loading.add(name)
        try:
            load(module)
        finally:
            cls._loading.discard(name)
        if not cls._loading and "transformers" in sys.modules:
            from . import registration  # noqa: F401, PLC0415


if sys.modules.get("transformers") is not None:
    from . import registration  # noqa: F401
else:
    sys.meta_path.insert(0, _RegisterOnImport)
