"""Laws of convert: the same logits in float64, whole folders, nothing that is passed over."""

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_stable import StableGPTConfig, StableGPTForCausalLM, cli
from hf_stable.convert import FAMILIES, WHY_NOT, convert, converting
from hf_stable.convert.exact import exact_logits
from hf_stable.convert.rules import EVERYWHERE, map_fields
from hf_stable.convert.unread import UNREAD
from hf_stable.errors import CheckpointError
from hf_stable.hub import check_export, checking, export
from hf_stable.records import CONVERSION

from ..tiny import byte_tokenizer
from ..warm import python, warm
from .real import CONFIGS, NOTED
from .sources import CASES, SIZES, build, save, save_as_written

ROOT = Path(__file__).parents[2]
# Rounding of float64 is 1.1e-16; what was seen is at most 2e-14.
EXACT = 1e-12


def ids(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(SIZES["vocab_size"], (batch, length))


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_logits_are_the_source_s(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    source = save(tmp_path / "source", kind, **fields)
    done = convert(source, tmp_path / "ours")
    assert done.difference < EXACT
    # Once more from the folder, in fp32 as a user has it, where families differ by rounding alone.
    theirs = AutoModelForCausalLM.from_pretrained(source)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert isinstance(ours, StableGPTForCausalLM)
    text = ids()
    with torch.no_grad():
        expected, found = theirs(text).logits, ours(text).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id


@pytest.mark.parametrize("name", CONFIGS)
def test_what_authors_and_tools_leave_in_config_json_is_no_hindrance(
    name: str, tmp_path: Path
) -> None:
    source = save_as_written(tmp_path / "source", CONFIGS[name])
    assert convert(source, tmp_path / "ours").difference < EXACT
    pad = CONFIGS[name].get("pad_token_id", -1)
    ours = StableGPTConfig.from_pretrained(tmp_path / "ours")
    assert ours.pad_token_id == (None if pad == -1 else pad)
    notes = json.loads((tmp_path / "ours" / CONVERSION).read_text())["notes"]
    for field in NOTED.get(name, []):
        assert notes.pop(field)["value"] == CONFIGS[name][field]
    assert all(about["why"] for about in notes.values())


def test_configs_of_every_family_are_read() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", UNREAD)
def test_an_unread_field_is_noted_with_its_reason_or_refused(name: str) -> None:
    """Off, or any value: noted. A switch that is on: refused by its name."""
    values = [None, False, True, 0, 1, 3, {"a": 1}]
    answers = [map_fields(UNREAD, {name: value}) for value in values]
    assert all(not answer.fields for answer in answers)
    assert answers[0].notes == {name: {"value": None, "why": answers[0].notes[name]["why"]}}
    noted = [answer for answer in answers if answer.notes]
    assert all(answer.notes[name]["why"] and not answer.reasons for answer in noted)
    refused = [answer for answer in answers if not answer.notes]
    assert len(refused) == 0 or len(refused) >= 4
    assert all(answer.reasons[0].startswith(f"{name}=") for answer in refused)


def test_every_family_is_tested() -> None:
    assert {kind for kind, _ in CASES} == set(FAMILIES)
    assert not FAMILIES.keys() & WHY_NOT.keys()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("source") / "llama", "llama", num_key_value_heads=2)


def refused(source: Path, output: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(source, output)
    assert not output.exists()
    assert not [*output.parent.glob(".tmp-*")]
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("mistral", {"sliding_window": 64}, ["sliding_window=64", "windows of 64 of 128"]),
        ("gemma2", {"sliding_window": 64}, ["layer_types=", "sliding_window=64"]),
        ("gemma", {"use_bidirectional_attention": True}, ["use_bidirectional_attention=True"]),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            ["sliding_window=64", "windows"],
        ),
        ("qwen3", {"attention_bias": True}, ["attention_bias=True"]),
        ("olmo2", {"attention_bias": True}, ["attention_bias=True"]),
        ("llama", {"attention_bias": True}, ["attention_bias=True", "one branch alone"]),
        ("nemotron", {"mlp_bias": True}, ["mlp_bias=True", "one branch alone"]),
        ("gpt_neox", {"attention_bias": False}, ["attention_bias=False"]),
        ("gpt_neox", {"hidden_dropout": 0.1}, ["hidden_dropout=0.1", "dropout"]),
        ("gpt_neox", {"hidden_dropout_prob": 0.1}, ["hidden_dropout_prob=0.1", "ignores this"]),
        ("qwen2", {"use_mrope": True}, ["use_mrope=True", "accepts only False"]),
        ("llama", {"rope_interleaved": True}, ["rope_interleaved=True", "accepts only False"]),
        ("llama", {"chunk_size_feed_forward": 2}, ["chunk_size_feed_forward=2"]),
        ("llama", {"logit_scale": 0.5}, ["logit_scale=0.5", "accepts only 1"]),
        ("llama", {"attention_chunk": 5}, ["attention_chunk=5", "unknown to convert"]),
        ("llama", {"use_sliding_window": True}, ["use_sliding_window=True", "only False"]),
        ("mistral", {"attention_bias": True}, ["attention_bias=True", "only False"]),
        ("gemma", {"hidden_activation": "relu"}, ["hidden_activation=", "reads hidden_act"]),
        ("gemma2", {"hidden_act": "relu"}, ["hidden_act=", "reads hidden_activation"]),
        ("nemotron", {"layer_norm_eps": 1e-3}, ["layer_norm_eps=0.001", "reads norm_eps"]),
        ("gpt_neox", {"rope_theta": 5.0, "rotary_emb_base": 7}, ["rope_theta=5.0", "reads 7"]),
        ("llama", {"pad_token_id": 300}, ["pad_token_id=300", "an id or None"]),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor"],
        ),
        ("gpt2", {}, ["'gpt2'", "learns its positions", "Known are nemotron, gpt_neox"]),
        ("bloom", {}, ["'bloom'", "ALiBi"]),
        ("qwen3_moe", {}, ["'qwen3_moe'", "experts"]),
        ("gemma3_text", {}, ["'gemma3_text'", "different rotary embeddings"]),
        ("biogpt", {}, ["'biogpt'", "no table"]),
        ("stable_gpt", {}, ["'stable_gpt'", "already"]),
    ],
)
def test_what_ours_cannot_express_is_refused_by_name(
    kind: str, fields: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    """From config.json alone: no weights are there."""
    source = tmp_path / "source"
    source.mkdir()
    config = {**SIZES, "head_dim": 8, **fields, "model_type": kind}
    if kind == "gpt_neox":
        del config["head_dim"]
    (source / "config.json").write_text(json.dumps(config))
    message = refused(source, tmp_path / "ours")
    assert all(word in message for word in words), message


def test_every_reason_is_told_at_once(tmp_path: Path) -> None:
    fields = {"hidden_dropout": 0.1, "attention_bias": False, "auto_map": {"AutoModel": "x.X"}}
    (tmp_path / "config.json").write_text(json.dumps({**fields, "model_type": "gpt_neox"}))
    message = refused(tmp_path, tmp_path / "ours")
    assert all(f"{name}=" in message for name in fields)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_field_of_every_family_has_a_rule(kind: str) -> None:
    """Nothing of what Transformers declares is left to the refusal of unknown fields."""
    config = build(kind, num_hidden_layers=1).config.to_dict()
    known = {*UNREAD, *EVERYWHERE, *FAMILIES[kind].rules}
    assert config.keys() <= known


def test_a_map_that_is_wrong_is_found_by_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that are left interleaved, and a field that says something else than it means."""
    neox = save(tmp_path / "neox", "gpt_neox")
    right = FAMILIES["gpt_neox"]
    for wrong in (
        replace(right, reorder={}),
        replace(right, fields={**right.fields, "attention_multiplier": 1 + 1e-8}),
    ):
        monkeypatch.setitem(FAMILIES, "gpt_neox", wrong)
        assert "its logits and ours differ" in refused(neox, tmp_path / "ours")


def test_float64_is_float64_all_the_way() -> None:
    """The families' own fp32 norms, softmax and angles would hide a difference of 1e-8."""
    model, text = build("llama").double(), ids()
    places = torch.arange(text.shape[1]).expand(2, -1)
    plain = model(text).logits
    exact = exact_logits(model, text, places)
    assert exact.dtype == torch.float64
    assert 1e-9 < ((exact - plain).abs().max() / exact.abs().max()).item() < 1e-4
    assert torch.get_default_dtype() == torch.float32
    with torch.no_grad():
        model.model.norm.weight.mul_(1 + 1e-9)
    moved = (exact_logits(model, text, places) / exact - 1).abs().max().item()
    assert 0.5e-9 < moved < 2e-9


def test_the_folder_is_a_model_s_folder(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm(monkeypatch, checking)
    done = convert(llama, tmp_path / "ours", dtype="bfloat16")
    record = json.loads((tmp_path / "ours" / CONVERSION).read_text())
    assert record["source"] == "llama" and record["revision"] is None
    assert record["model_type"] == "llama" and record["dtype"] == "bfloat16"
    assert len(record["weights_sha256"]["model.safetensors"]) == 64
    assert record["difference"] == done.difference < EXACT
    assert 1e-4 < record["saved_difference"] == done.saved_difference < 0.1
    assert str(tmp_path) not in (tmp_path / "ours" / CONVERSION).read_text()
    model = StableGPTForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert StableGPTConfig(**record["fields"]).mlp_gated == model.config.mlp_gated is True
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (llama, tmp_path / "ours")]
    assert tokenizers[0]("to be").input_ids == tokenizers[1]("to be").input_ids
    exported = export(tmp_path / "ours", tmp_path / "export")
    check_export(exported, new_tokens=3)
    assert json.loads((exported / "records" / CONVERSION).read_text()) == record
    card = (exported / "README.md").read_text()
    assert "from llama, a llama checkpoint" in card and f"{done.difference:.1e}" in card


def test_weights_keep_the_source_s_dtype_bit_by_bit(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "qwen2")
    half = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    half.save_pretrained(source)
    assert convert(source, tmp_path / "ours").dtype == "bfloat16"
    ours = StableGPTForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    layer: Any = half.model.layers[1]
    rows = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    for name in ("weight", "bias"):
        joined = torch.cat([getattr(each, name) for each in rows])
        assert torch.equal(getattr(ours.model.layers[1].self_attn.qkv_proj, name), joined)


def test_weights_beyond_float16_are_not_written(tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 4] = 1e6
    model.save_pretrained(tmp_path / "source")
    save_tokenizer = save(tmp_path / "other", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / name).write_bytes((save_tokenizer / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is not finite .*--dtype"):
        convert(tmp_path / "source", tmp_path / "ours", dtype="float16")
    assert not (tmp_path / "ours").exists()


def test_a_chat_model_s_end_of_text_is_kept(tmp_path: Path) -> None:
    """config.json's is another than the tokenizer's, and export takes the folder."""
    source = save(tmp_path / "source", "llama", eos_token_id=7)
    with pytest.warns(UserWarning, match="eos_token_id is 7 in config.json and 256 in the"):
        convert(source, tmp_path / "ours")
        exported = export(tmp_path / "ours", tmp_path / "export")
    assert StableGPTConfig.from_pretrained(exported).eos_token_id == 7


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(source)
    words = "its tokenizer has ids up to 257, but the model's vocab_size is 257"
    assert words in refused(source, tmp_path / "ours")


def test_nothing_is_half_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "conversion.json")

    with monkeypatch.context() as patch:
        patch.setattr(converting, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            convert(llama, tmp_path / "ours")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "ours").mkdir()
    convert(llama, tmp_path / "ours")  # an empty folder is as good as none
    with pytest.raises(CheckpointError, match="exists already"):
        convert(llama, tmp_path / "ours")


def test_the_folder_one_is_in_and_templates_in_a_folder(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    templates = source / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ messages }}")
    (source / "chat_template.jinja").write_text("{{ messages[0] }}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert("../source", ".")
    written = tmp_path / "here" / "additional_chat_templates" / "tool.jinja"
    assert written.read_text() == "{{ messages }}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "source"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "here").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(("factor", "words"), [(0.0, "zero"), (float("nan"), "not finite")])
def test_logits_that_show_nothing_are_refused(factor: float, words: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    tensors = load_file(source / "model.safetensors")
    scaled = {name: tensor * factor for name, tensor in tensors.items()}
    save_file(scaled, source / "model.safetensors", metadata={"format": "pt"})
    assert f"its own logits are {words}" in refused(source, tmp_path / "ours")


def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (source / "config.json").write_text(json.dumps(config))
    assert "lack" in refused(source, tmp_path / "ours")


def test_tensors_that_would_be_dropped_are_refused_by_name(tmp_path: Path) -> None:
    """Biases that config.json does not tell of; what old Transformers saved beside is none."""
    for kind, dropped, harmless in (
        ("llama", "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.rotary_emb"),
        ("gpt_neox", "gpt_neox.layers.0.attention.gain", "gpt_neox.layers.0.attention.rotary_emb"),
    ):
        source = save(tmp_path / kind, kind)
        file = source / "model.safetensors"
        tensors = {**load_file(file), f"{harmless}.inv_freq": torch.ones(4)}
        if kind == "gpt_neox":
            tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
        save_file(tensors, file, metadata={"format": "pt"})
        convert(source, tmp_path / f"ours-{kind}")
        save_file({**tensors, dropped: torch.ones(32)}, file, metadata={"format": "pt"})
        message = refused(source, tmp_path / "ours")
        assert f"no place for 1 of its tensors: {dropped}" in message


def test_the_command_line_says_what_it_found(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", str(llama), "--output", str(tmp_path / "ours")]) == 0
    shown = capsys.readouterr().out
    assert "llama (llama): logits differ by" in shown and "in float64" in shown
    assert cli.main(["convert", str(llama), "--output", str(tmp_path / "ours")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_model_of_the_hub_is_recorded_with_its_commit(llama: Path, tmp_path: Path) -> None:
    """From the Hub's cache on the disk, in another process: its place is read at import."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache" / "hub" / "models--someone--tiny"
    shutil.copytree(llama, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    older = "1" * 40
    save(cache / "snapshots" / older, "qwen2")
    (cache / "refs" / "v1").write_text(older)
    command = [python(), "-m", "hf_stable", "convert", "someone/tiny"]
    for options, kind, expected in (
        ([], "llama", commit),
        (["--revision", "v1"], "qwen2", older),
    ):
        output = tmp_path / kind
        subprocess.run(
            [*command, "--output", str(output), *options],
            env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        record = json.loads((output / CONVERSION).read_text())
        assert (record["source"], record["revision"]) == ("someone/tiny", expected)
        assert record["model_type"] == kind
        file = (cache / "snapshots" / expected / "model.safetensors").read_bytes()
        digests = {"model.safetensors": hashlib.sha256(file).hexdigest()}
        assert record["weights_sha256"] == digests
