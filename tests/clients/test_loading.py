"""Laws of clients that load or rewrite a StableGPT: same numbers, or refused by name."""

import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands import accelerate_cli, estimate
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM

from hf_stable import StableGPTConfig
from hf_stable.model.functional_stable_gpt import attention_forward
from tests.tiny import stable_gpt

from .conftest import guide_blocks

TESTED = {
    "transformers.Trainer", "TRL", "PEFT", "lm-evaluation-harness", "pipeline",
    "transformers serve", "accelerate", "torchao", "ONNX", "vLLM and SGLang",
}  # fmt: skip


def test_every_client_of_the_guide_is_tested() -> None:
    blocks = guide_blocks()
    assert set(blocks) == TESTED
    assert {name for name, found in blocks.items() if not found} == {"vLLM and SGLang"}


def test_accelerate_estimates_the_bytes_of_all_weights(
    lines: Callable[[str, str], str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exported: Any = AutoModelForCausalLM.from_pretrained(folder)
    auto_map = {"AutoModelForCausalLM": "modeling_stable_gpt.StableGPTForCausalLM"}
    config = exported.config.to_dict()
    # What the Hub says about a pushed export; all else is read from the folder.
    answer = SimpleNamespace(config={**config, "auto_map": auto_map}, library_name="transformers")
    monkeypatch.setattr(estimate, "model_info", lambda *_, **__: answer)
    command = shlex.split(lines("accelerate", "bash"))
    assert command[:2] == ["accelerate", "estimate-memory"]
    command[command.index("org/name")] = str(folder)
    seen: list[int] = []
    sizes = estimate.calculate_maximum_sizes
    monkeypatch.setattr(
        estimate,
        "calculate_maximum_sizes",
        lambda model: seen.append(sizes(model)[0]) or sizes(model),
    )
    monkeypatch.setattr("sys.argv", command)
    accelerate_cli.main()
    assert str(folder) in capsys.readouterr().out
    tensors = [*exported.parameters(), *exported.buffers()]
    assert seen == [4 * sum(each.numel() for each in tensors)]


@pytest.mark.parametrize("key", ["device_map", "gguf_file", "tqdm_class", "trust_remote_code"])
def test_what_clients_say_about_loading_is_no_field_of_the_config(key: str, folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder, **{key: None})
    assert isinstance(config, StableGPTConfig) and key not in config.to_dict()


def test_a_misspelt_field_is_still_refused_when_loading(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no field 'qk_nrom'.*'qk_norm'"):
        AutoConfig.from_pretrained(folder, qk_nrom="head")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0, "z_loss": 0.1},
        {"sigma_reparam": True, "attention_clip_alpha": 0.5, "qk_norm": "head"},
    ],
    ids=["baseline", "caps", "sigma-clip-norm"],
)
def test_onnx_of_the_guide_gives_the_same_logits_at_other_sizes(
    fields: dict[str, Any],
    lines: Callable[[str, str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    model = stable_gpt(**fields).eval()
    scope: dict[str, Any] = {"model": model}
    exec(lines("ONNX", "python"), scope)
    session = runtime.InferenceSession("model.onnx")
    for ids, logits in [
        (scope["ids"], scope["logits"]),
        *((other, None) for other in (torch.arange(99).reshape(3, 33), torch.arange(2)[None])),
    ]:
        found = logits if logits is not None else session.run(None, {"input_ids": ids.numpy()})[0]
        with torch.no_grad():
            wanted = model(ids).logits
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


REFUSED = {
    "vllm": {
        "attention_clip_gamma": {"attention_clip_gamma": -0.03},
        "sigma_reparam": {"sigma_reparam": True},
        "zero_centered_norm": {"zero_centered_norm": True, "norm": "rmsnorm"},
    },
    "sglang": {
        "attention_clip_alpha": {"attention_clip_alpha": 0.5},
        "sigma_reparam": {"sigma_reparam": True},
        "attn_logit_softcapping": {"attn_logit_softcapping": 5.0},
    },
}


@pytest.mark.parametrize("server", REFUSED)
def test_servers_that_would_ignore_a_technique_are_refused(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in: those backends register an attention and build AutoModel with it."""
    monkeypatch.setitem(AttentionInterface._global_mapping, server, attention_forward)
    for field, fields in REFUSED[server].items():
        config = stable_gpt(**fields).config
        config._attn_implementation = server
        with pytest.raises(ValueError, match=rf"{server}.*{field}"):
            AutoModel.from_config(config)
    allowed = {"attn_logit_softcapping": 5.0} if server == "vllm" else {}
    config = stable_gpt(qk_norm="head", final_logit_softcapping=5.0, **allowed).config
    config._attn_implementation = server
    assert AutoModel.from_config(config).config._attn_implementation == server


def test_vllm_can_read_the_embeddings_scale_of_a_model_without_storage() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(StableGPTConfig(embedding_scale="sqrt_hidden"))
    assert float(model.get_input_embeddings().embed_scale) == pytest.approx(768**0.5)
