"""StableGPT for Transformers' own mixins; copied by run.sh to where those are."""

import os
import unittest
from typing import Any

import torch
from transformers.models.auto import modeling_auto

from hf_stable import (
    StableGPTConfig,
    StableGPTForCausalLM,
    StableGPTForQuestionAnswering,
    StableGPTForSequenceClassification,
    StableGPTForTokenClassification,
    StableGPTModel,
)
from hf_stable.model import configuration_stable_gpt
from hf_stable.model.slots_stable_gpt import StableGPTRotaryEmbedding

from . import test_tensor_parallel_mixin as tensor_parallel
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_training_mixin import TrainingTesterMixin

tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
# The mixins learn from these which labels a class takes.
for kind, mapping in (
    (StableGPTModel, modeling_auto.MODEL_MAPPING_NAMES),
    (StableGPTForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (StableGPTForQuestionAnswering, modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    (
        StableGPTForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    (StableGPTForTokenClassification, modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
):
    mapping["stable_gpt"] = kind.__name__
# They set every epsilon that a model may have; unknown fields are refused otherwise.
configuration_stable_gpt._HOST_KEYWORDS |= {
    f"{name}_eps" for name in ("batch_norm", "rms_norm", "layer_norm", "post_norm", "input_norm")
} | {"norm_epsilon", "layer_norm_epsilon"}

# Refused or done otherwise on purpose.
LONGER = "a sequence beyond max_position_embeddings is refused"
NO_KERNEL = "sdpa is refused by name for a cap or a clip"
OTHERWISE = {
    "test_generation_tester_mixin_inheritance": "the generation mixin is in no package",
    "test_model_get_set_embeddings": "ours takes the weight, and keeps its scale and detach",
    "test_model_rope_scaling_from_config_0_linear": LONGER,
    "test_model_rope_scaling_from_config_1_dynamic": LONGER,
    "test_model_rope_scaling_from_config_2_yarn": LONGER,
    "test_model_rope_scaling_frequencies": "cos and sin have an axis for the heads",
}
OTHERWISE_WITH = {
    "qk_norm_cap": dict.fromkeys(
        ("test_can_set_attention_dynamically", "test_sdpa_can_dispatch_non_composite_models"),
        NO_KERNEL,
    ),
    "sigma_reparam": {
        "test_init_weights_can_init_buffers": "u and v are singular vectors of random weights"
    },
}
OTHERWISE_WITH["soft_clip"] = OTHERWISE_WITH["qk_norm_cap"]


class _Tester:
    """A tiny model of a preset, in the words of the mixins."""

    config_class = StableGPTConfig
    base_model_class, causal_lm_class = StableGPTModel, StableGPTForCausalLM
    batch_size, seq_length, vocab_size = 3, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads, head_dim = 32, 2, 2, 16
    num_key_value_heads, num_labels, is_training = 2, 3, True

    def __init__(self, preset: str) -> None:
        self.preset = preset

    def get_config(self) -> StableGPTConfig:
        return StableGPTConfig.from_preset(
            self.preset,
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=37,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[StableGPTConfig, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.tril(torch.ones_like(ids)),
        }


def _make(preset: str) -> type:
    class Suite(
        ModelTesterMixin,
        TrainingTesterMixin,
        tensor_parallel.TensorParallelTesterMixin,
        unittest.TestCase,
    ):
        all_model_classes = (
            StableGPTModel,
            StableGPTForCausalLM,
            StableGPTForSequenceClassification,
            StableGPTForTokenClassification,
            StableGPTForQuestionAnswering,
        )
        rotary_embedding_layer = StableGPTRotaryEmbedding
        model_tester: Any = None

        def setUp(self) -> None:
            self.model_tester = _Tester(preset)
            self.config_tester = ConfigTester(self, config_class=StableGPTConfig, hidden_size=48)
            name = self._testMethodName
            if reason := {**OTHERWISE, **OTHERWISE_WITH.get(preset, {})}.get(name):
                self.skipTest(reason)

        def test_config(self) -> None:
            self.config_tester.run_common_tests()

    Suite.__name__ = Suite.__qualname__ = f"Test_{preset}"
    return Suite


for name in os.environ["PRESETS"].split(","):
    globals()[f"Test_{name}"] = _make(name)
