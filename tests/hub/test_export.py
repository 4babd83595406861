"""Export: a folder that needs nothing but Transformers, proven in a process of its own."""

import gzip
import json
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from hf_stable import StableGPTForCausalLM, cli
from hf_stable.card import leaks, problems, write_card
from hf_stable.card.rendering import PICTURE
from hf_stable.checksums import SUMS, sha256_of, verify_sums, write_sums
from hf_stable.data import load_tokenizer
from hf_stable.errors import CheckpointError, UserError
from hf_stable.evaluation import load_model
from hf_stable.hub import Weights, check_export, check_exports, checking, export, exporting
from hf_stable.hub.files import belongs
from hf_stable.hub.scanning import refuse_strangers
from hf_stable.records import read_metrics
from hf_stable.training import TrainResult, train

from ..poison import Poison
from ..tiny import byte_tokenizer
from ..training import tiny_recipe
from .conftest import save

ROOT = Path(__file__).parents[2]
FOLDED = Weights(fold_sigma=True)
ROUNDED = Weights(dtype="bfloat16")
BOTH = Weights(fold_sigma=True, dtype="bfloat16", max_shard_size="20KB")


@dataclass(frozen=True)
class Exported:
    source: Path
    folder: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run with a secret in its records."""
    folder = tmp_path_factory.mktemp("finished")
    result = train(tiny_recipe(folder, training__checkpoint_every=10))
    run = json.loads((result.folder / "run.json").read_text())
    planted = {**run, "device": f"{run['device']} " + "hf_" + "a" * 30}
    (result.folder / "run.json").write_text(json.dumps(planted))
    return result


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, finished: TrainResult) -> dict[str, Exported]:
    """Every kind of export, all of which load without hf_stable, bit-equal, in one process."""
    root, found = tmp_path_factory.mktemp("exports"), {}
    for name, preset, weights in (
        ("qkv_norm", "qkv_norm", None),
        ("soft_clip", "soft_clip", Weights(max_shard_size="40KB")),
        ("kept", "sigma_reparam", None),
        ("folded", "sigma_reparam", FOLDED),
        ("rounded", "qk_norm", ROUNDED),
        ("both", "sigma_reparam", BOTH),
    ):
        torch.manual_seed(3)
        source = save(root / f"{name}-source", preset)
        found[name] = Exported(source, export(source, root / name, weights=weights))
    found["run"] = Exported(finished.folder, export(finished.folder, root / "run"))
    found["step"] = Exported(finished.folder, export(finished.folder, root / "step", step=10))
    checked = check_exports([each.folder for each in found.values()], new_tokens=3)
    assert all(each.text for each in checked)
    return found


def logits(folder: Path, dtype: Any = "auto") -> torch.Tensor:
    """(T, V) on the tokens that an export measures on."""
    model = StableGPTForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    text = (ROOT / "LICENSE").read_text()
    ids = load_tokenizer(folder)(text).input_ids[: model.config.max_position_embeddings]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_is_in_a_folder(exports: dict[str, Exported]) -> None:
    folder = exports["qkv_norm"].folder
    assert set(contents(folder)) == {
        "LICENSE", "README.md", "SHA256SUMS", "config.json", "generation_config.json",
        "model.safetensors",
        "blocks_stable_gpt.py", "configuration_stable_gpt.py", "functional_stable_gpt.py",
        "generation_stable_gpt.py", "host_stable_gpt.py",
        "loss_stable_gpt.py", "modeling_stable_gpt.py", "parallel_stable_gpt.py",
        "sigma_stable_gpt.py", "slots_stable_gpt.py", "tokenizer.json", "tokenizer_config.json",
        "watch_stable_gpt.py",
    }  # fmt: skip
    places = json.loads((folder / "config.json").read_text())["auto_map"]
    assert places.keys() >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for place in places.values():
        module, name = place.split(".")
        assert f"class {name}(" in (folder / f"{module}.py").read_text()
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes() != b""
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1  # safetensors writes for the owner alone


@pytest.mark.parametrize("name", ["qkv_norm", "soft_clip", "kept"])
def test_weights_are_kept_bit_by_bit_unless_another_form_is_asked_for(
    name: str, exports: dict[str, Exported]
) -> None:
    each = exports[name]
    before, after = tensors(each.source), tensors(each.folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(each.source), logits(each.folder))
    assert "Not as trained" not in (each.folder / "README.md").read_text()


def test_folded_sigma_is_plain_weights_of_the_same_model(exports: dict[str, Exported]) -> None:
    each = exports["folded"]
    before, after = tensors(each.source), tensors(each.folder)
    assert {key for key in before if key.endswith((".gain", ".u", ".v"))} == set(before) - set(
        after
    )
    assert len(before) > len(after) and set(after) < set(before)
    assert json.loads((each.folder / "config.json").read_text())["sigma_reparam"] is False
    double = [logits(folder, torch.float64) for folder in (each.source, each.folder)]
    single = logits(each.folder).double()
    scale = double[0].abs().max()
    assert (double[0] - double[1]).abs().max() <= 1e-6 * scale  # weights are rounded to fp32 once
    assert (single - double[0]).abs().max() <= 1e-5 * scale
    assert not torch.equal(double[0], double[1])  # the comparison sees rounding at all


@pytest.mark.parametrize("name", ["folded", "rounded", "both"])
def test_the_card_states_what_was_changed_and_the_measured_error(
    name: str, exports: dict[str, Exported], tmp_path: Path
) -> None:
    """Numbers are those of a second computation, on text that is in the folder."""
    each = exports[name]
    p, q = (logits(folder).double() for folder in (each.source, each.folder))
    difference = (p - q).abs()
    divergence = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    record = json.loads((each.folder / "records" / "export.json").read_text())
    assert record["tokens"] == len(p) == 64
    assert record["largest"] == pytest.approx(float(difference.max()), rel=1e-9)
    assert (record["largest"] > 0) == (name != "folded")  # which multiplies as training does
    assert record["root_mean_square"] == pytest.approx(float(difference.square().mean().sqrt()))
    assert record["divergence"] == pytest.approx(float(divergence), rel=1e-6, abs=1e-14)
    card = (each.folder / "README.md").read_text()
    assert card.count("> Not as trained: ") == 1
    assert ("folded into the plain weights" in card) == (name != "rounded")
    assert ("float32 in training and are bfloat16 here" in card) == (name != "folded")
    assert f"by at most {difference.max():.3g} (root mean square" in card.replace("\\", "")
    assert "KL divergence" in card
    dtypes = {tensor.dtype for tensor in tensors(each.folder).values()}
    assert dtypes == {torch.float32 if name == "folded" else torch.bfloat16}
    copy = shutil.copytree(each.folder, tmp_path / "copy")
    again = write_card(each.source, copy / "README.md").read_text()  # as `hf-stable card` does
    assert "> Not as trained: " in again


def test_shards_are_no_larger_than_asked_and_hold_all(exports: dict[str, Exported]) -> None:
    folder = exports["soft_clip"].folder
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) >= 3 and not (folder / "model.safetensors").exists()
    for shard in shards:
        held = load_file(shard).values()
        assert sum(each.nbytes for each in held) <= 40_000 or len(held) == 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(folder))


def test_the_same_export_has_the_same_bytes_and_nothing_of_the_one_before(
    exports: dict[str, Exported], tmp_path: Path
) -> None:
    each = exports["both"]
    folder = export(each.source, tmp_path / "both", weights=Weights(max_shard_size="10KB"))
    assert len(list(folder.glob("model-*"))) > len(list(each.folder.glob("model-*")))
    assert contents(export(each.source, folder, weights=BOTH)) == contents(each.folder)
    run = exports["run"]
    assert contents(export(run.source, tmp_path / "run")) == contents(run.folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "run"]


def test_a_run_exports_with_a_card_and_its_records(
    exports: dict[str, Exported], finished: TrainResult
) -> None:
    """Equal to the run's own but for secrets and places."""
    folder = exports["run"].folder
    run = json.loads((finished.folder / "run.json").read_text())
    card = (folder / "README.md").read_text()
    assert f"{finished.validation_perplexity:.4f} per token" in card and "step 20" in card
    assert problems(ModelCard(card).data.to_dict()) == []
    assert f"]({PICTURE})" in card and (folder / PICTURE).is_file()
    record = (folder / "records" / "run.json").read_text()
    assert leaks(card) == leaks(record) == [] and str(finished.folder) not in card + record
    assert json.loads(record)["recipe"]["optimizer"] == run["recipe"]["optimizer"]
    lines = gzip.decompress((folder / "records" / "metrics.jsonl.gz").read_bytes()).decode()
    assert [json.loads(line) for line in lines.splitlines()] == read_metrics(finished.folder)


def test_a_checkpoint_on_the_way_exports_without_claims_of_the_end(
    exports: dict[str, Exported], finished: TrainResult, tmp_path: Path
) -> None:
    folder = exports["step"].folder
    assert f"{finished.validation_perplexity:.2f}" not in (folder / "README.md").read_text()
    saved = load_file(finished.folder / "checkpoints/step-00000010/model/model.safetensors")
    exported = load_file(folder / "model.safetensors")
    assert saved.keys() == exported.keys()
    assert all(torch.equal(saved[name], exported[name]) for name in saved)
    with pytest.raises(CheckpointError, match="no checkpoint of step 11; there are: 10, 20"):
        export(finished.folder, tmp_path / "none", step=11)


def test_nothing_but_the_model_leaves_a_poisoned_folder(tmp_path: Path) -> None:
    source, trace = save(tmp_path / "source", "qk_norm"), tmp_path / "ran"
    payload = pickle.dumps(Poison(trace))
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth",
                 "pytorch_model.bin", "tokenizer.pkl"):  # fmt: skip
        (source / name).write_bytes(payload)
    for name in ("modeling_stable_gpt.py", "sitecustomize.py"):
        (source / name).write_text(f"open({str(trace)!r}, 'w')\n")
    clean = save(tmp_path / "clean", "qk_norm")
    shutil.copyfile(source / "model.safetensors", clean / "model.safetensors")
    folder = export(source, tmp_path / "export")
    assert not trace.exists()
    assert contents(folder) == contents(export(clean, tmp_path / "clean-export")) | {
        "README.md": (folder / "README.md").read_bytes()  # which has the folder's name
    }
    pickle.loads(payload)  # the poison works
    assert trace.exists()


def test_an_export_that_fails_leaves_what_was_there(
    exports: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(exports["qkv_norm"].folder, tmp_path / "export")
    before = contents(folder)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "sums")

    monkeypatch.setattr("hf_stable.hub.exporting.write_sums", fail)
    with pytest.raises(OSError, match="No space left"):
        export(exports["kept"].source, folder)
    assert contents(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_what_would_be_lost_or_has_no_effect_is_refused(
    exports: dict[str, Exported], tmp_path: Path
) -> None:
    source = exports["qkv_norm"].source
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which is not part of an export"):
        export(source, tmp_path / "mine")
    with pytest.raises(UserError, match="is the folder of the exported model"):
        export(source, source)
    with pytest.raises(UserError, match="is a file"):
        export(source, tmp_path / "mine" / "thesis.tex")
    with pytest.raises(UserError, match="nothing to fold"):
        export(source, tmp_path / "new", weights=FOLDED)
    with pytest.raises(UserError, match="max_shard_size is '5 gigs'"):
        Weights(max_shard_size="5 gigs")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_tampered_code_is_noticed(exports: dict[str, Exported], tmp_path: Path) -> None:
    """By its hash; and by its outputs, if the hashes were made anew."""
    folder = shutil.copytree(exports["qkv_norm"].folder, tmp_path / "export")
    code = folder / "blocks_stable_gpt.py"
    code.write_text(code.read_text().replace("self.scaling = ", "self.scaling = 2 * "))
    with pytest.raises(CheckpointError, match=r"blocks_stable_gpt\.py: its SHA-256 is not"):
        check_export(folder, new_tokens=1)
    write_sums(folder)
    with pytest.raises(CheckpointError, match="logits differ from ours"):
        check_export(folder, new_tokens=1)
    code.write_text("raise RuntimeError('broken on purpose')\n")
    write_sums(folder)
    with pytest.raises(CheckpointError, match=r"export does not load .* broken on purpose"):
        check_export(folder, new_tokens=1)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="holds no SHA256SUMS"):
        check_export(folder)


def test_other_tokens_are_noticed(
    exports: dict[str, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exports["qkv_norm"].folder
    assert check_export(folder, new_tokens=3).text
    script = checking._CLEAN_PROCESS
    other = script.replace(
        "    save_file", '    given["tokens"] = 0 * given["tokens"]\n    save_file'
    )
    assert other != script
    monkeypatch.setattr(checking, "_CLEAN_PROCESS", other)
    with pytest.raises(CheckpointError, match="the tokens that it samples differ from ours"):
        check_export(folder, new_tokens=3)


@pytest.mark.parametrize(
    "settings", [{"stop_strings": ["t5"]}, {"temperature": 0.0, "do_sample": True}]
)
def test_generation_settings_do_not_decide_whether_a_model_loads(
    settings: dict[str, Any], exports: dict[str, Exported], tmp_path: Path
) -> None:
    source = shutil.copytree(exports["qkv_norm"].source, tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(settings))
    folder = export(source, tmp_path / "export")
    assert check_export(folder, new_tokens=2).text


def test_an_export_that_fails_its_check_leaves_what_was_there(
    exports: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command: bad code is found in the new folder, and the good one is still there."""
    folder = shutil.copytree(exports["qkv_norm"].folder, tmp_path / "export")
    before = contents(folder)
    write = exporting._write_code

    def break_code(fresh: Path) -> None:
        write(fresh)
        (fresh / "blocks_stable_gpt.py").write_text("raise RuntimeError('broken on purpose')\n")

    monkeypatch.setattr(exporting, "_write_code", break_code)
    assert cli.main(["export", str(exports["kept"].source), "--output", str(folder)]) == 2
    assert contents(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_sums_of_others_say_nothing_about_an_export(
    exports: dict[str, Exported], tmp_path: Path
) -> None:
    """Of weights alone, in BSD's form, a remark: the model loads; an export's own are read."""
    plain = shutil.copytree(exports["qkv_norm"].source, tmp_path / "plain")
    sha256 = sha256_of(plain / "model.safetensors")
    for text in (f"{sha256}  model.safetensors\n", "SHA256 (x) = abc\n", "# made by x\n"):
        (plain / SUMS).write_text(text)
        load_model(plain)
    folder = shutil.copytree(exports["qkv_norm"].folder, tmp_path / "export")
    good = (folder / SUMS).read_text()
    lines = [line.split("  ") for line in good.splitlines()]
    (folder / SUMS).write_text("".join(f"{sha.upper()}  ./{name}\r\n" for sha, name in lines))
    assert verify_sums(folder) == {name: sha for sha, name in lines}
    load_model(folder)
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config\.json: its SHA-256 is not the one"):
        load_model(folder)
    (folder / SUMS).write_text(good[1:])  # damaged, not somebody else's
    with pytest.raises(CheckpointError, match="SHA256SUMS: line 1"):
        load_model(folder)


def test_tokenizers_with_several_templates_are_exported_again_and_again(
    exports: dict[str, Exported], tmp_path: Path
) -> None:
    source = shutil.copytree(exports["qkv_norm"].source, tmp_path / "source")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "x{{ messages }}"}
    tokenizer.save_pretrained(source)
    export(source, tmp_path / "export")
    folder = export(source, tmp_path / "export")
    assert (folder / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert "additional_chat_templates/tool_use.jinja" in verify_sums(folder)
    refuse_strangers(folder)
    (folder / "additional_chat_templates" / "other.jinja").write_text("y")
    with pytest.raises(CheckpointError, match=r"other\.jinja: not in SHA256SUMS"):
        verify_sums(folder)
    assert all(map(belongs, ("vocab.txt", "spiece.model", "sentencepiece.bpe.model")))
    assert not any(map(belongs, ("additional_chat_templates/x.py", "additional_chat_templates/.x")))


def test_what_is_no_stable_gpt_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model"):
        export(tmp_path / "empty", tmp_path / "export")
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="LlamaForCausalLM; only a StableGPT"):
        export(tmp_path / "llama", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """By export and by whatever loads: ids beyond the vocabulary."""
    source = save(tmp_path / "source", "baseline", vocab_size=256, eos_token_id=None)
    for act in (lambda: load_model(source), lambda: export(source, tmp_path / "export")):
        with pytest.raises(CheckpointError, match=r"has ids up to 256, but .* vocab_size is 256"):
            act()


def test_another_end_of_text_is_a_warning(tmp_path: Path) -> None:
    """As of chat models: what ids mean is the same."""
    other = save(tmp_path / "other", "baseline")
    change_config(other, eos_token_id=7)
    with pytest.warns(UserWarning, match=r"eos_token_id is 7 in config\.json and 256 in the"):
        load_model(other)
    change_config(other, eos_token_id=[7, 256])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*token_id is")
        load_model(other)


def test_a_config_of_a_later_version_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "later", "baseline")
    change_config(folder, transformers_version="99.0.0", attention_sink="learnt")
    with pytest.raises(CheckpointError, match=r"no field 'attention_sink'.*99.0.0.* upgrade"):
        load_model(folder)
    with pytest.raises(ValueError, match="no field 'attention_sink'"):
        AutoConfig.from_pretrained(folder)
