"""The loop: what it records, that it resumes exactly, and what it refuses."""

import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_stable import StableGPTForCausalLM, records, stepping
from hf_stable.checkpoints import list_checkpoints
from hf_stable.cli import main
from hf_stable.corpus import prepare_corpus
from hf_stable.errors import CheckpointError, DataError, DivergedError, RecipeError
from hf_stable.recipes import dump
from hf_stable.sweep.worker import recipe_digest
from hf_stable.training import train

from .techniques import build
from .training import tiny_recipe, unfinish, write_text

SHARED = Path(__file__).parents[2] / "shared" / "data"


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _assert_same_weights(one: Path, other: Path) -> None:
    left, right = _weights(one), _weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_learns_and_leaves_its_records(tmp_path: Path) -> None:
    result = train(tiny_recipe(tmp_path))
    rows = records.read_metrics(result.folder, "train")
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert rows[-1]["loss"] < rows[0]["loss"] < math.log(512) + 0.5
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] > 0 for row in rows)
    validation = records.read_metrics(result.folder, "validation")
    assert [row["step"] for row in validation] == [10, 20]
    assert validation[-1]["perplexity"] == result.validation_perplexity < 512
    run = records.read_run(result.folder)
    assert run["recipe"]["name"] == "tiny" and run["versions"]["torch"] == metadata.version("torch")
    assert run["attn_implementation"] == "sdpa" and run["processes"] == 1
    assert run["loss_implementation"] == "eager" and run["compile"] is False
    assert len(run["data"]["train"]["fingerprint"]) >= 16
    assert run["data"]["bigram_nats_per_token"] < run["data"]["unigram_nats_per_token"]
    model = AutoModelForCausalLM.from_pretrained(result.folder / "model")
    assert isinstance(model, StableGPTForCausalLM)
    assert model.num_parameters() == run["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "model")
    assert tokenizer.eos_token_id == model.config.eos_token_id is not None


def test_validation_is_the_cross_entropy_of_the_validation_blocks(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **{"model.z_loss": 0.1})
    result = train(recipe)
    model = AutoModelForCausalLM.from_pretrained(result.folder / "model").eval()
    _, corpus = prepare_corpus(recipe, progress=False)
    losses = []
    for index in range(min(8, len(corpus.validation))):
        block = corpus.validation[index]
        logits = model(block["input_ids"][None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, block["shift_labels"]).item())
    assert math.log(result.validation_perplexity) == pytest.approx(sum(losses) / len(losses))


def test_a_run_is_evaluated_on_its_own_held_out_text(tmp_path: Path, capsys) -> None:
    recipe = tiny_recipe(tmp_path, training__evaluate_blocks=10_000)
    result = train(recipe)
    report = tmp_path / "report.json"
    assert main(["evaluate", str(result.folder), "--output", str(report)]) == 0
    measured = json.loads(report.read_text())
    run = records.read_run(result.folder)
    assert measured["documents"] == run["data"]["validation"]["documents"]
    shown = capsys.readouterr().out
    for name in ("unigram", "bigram"):
        assert measured[f"{name}_nats_per_token"] == run["data"][f"{name}_nats_per_token"]
        assert f"{name} table per token" in shown
    # Windows begin at documents there and at blocks here, so the two are near, not equal.
    assert measured["per_token"]["value"] == pytest.approx(result.validation_perplexity, rel=0.1)


def test_evaluating_a_model_needs_a_text(tmp_path: Path, capsys) -> None:
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "give --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "model", ["{preset: sigma_reparam, attention_dropout: 0.1}", "{preset: qk_norm_cap}"]
)
def test_resuming_is_bit_exact(tmp_path: Path, model: str) -> None:
    model = model[:-1] + ", hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"
    options = {"model": model, "training__checkpoint_every": 7, "training__keep_checkpoints": 9}
    whole = train(tiny_recipe(tmp_path, **options))
    assert [int(path.name[5:]) for path in list_checkpoints(whole.folder)] == [7, 14, 20]
    for step in (7, 14):
        again = tiny_recipe(tmp_path, **options, output=tmp_path / f"from-{step}")
        shutil.copytree(whole.folder, again.output)
        shutil.rmtree(Path(again.output) / "model")
        for checkpoint in list_checkpoints(Path(again.output)):
            if int(checkpoint.name[5:]) > step:
                shutil.rmtree(checkpoint)
        resumed = train(again)
        assert records.read_metrics(resumed.folder, "resumed")[0]["step"] == step
        _assert_same_weights(whole.folder / "model", resumed.folder / "model")
        for name in ("optimizer.safetensors", "random.safetensors"):
            files = [list_checkpoints(run.folder)[-1] / name for run in (whole, resumed)]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_a_changed_recipe_is_followed_from_where_the_run_stands(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, training__checkpoint_every=9, training__log_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, stop=lambda step, *_: _interrupt(step, 10))
    slow = tiny_recipe(
        tmp_path,
        training__checkpoint_every=9,
        training__log_every=1,
        optimizer__learning_rate=1e-30,
    )
    with pytest.raises(CheckpointError, match="learning_rate"):
        train(slow)
    result = train(slow, resume="changed")
    last = load_file(list_checkpoints(result.folder)[-1] / "model" / "model.safetensors")
    first = load_file(list_checkpoints(result.folder)[0] / "model" / "model.safetensors")
    assert {path.name for path in list_checkpoints(result.folder)} == {
        "step-00000009",
        "step-00000018",
        "step-00000020",
    }
    assert all(torch.equal(first[name], last[name]) for name in first)


def _interrupt(step: int, at: int) -> None:
    if step == at:
        raise KeyboardInterrupt


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    first, second = train(recipe), train(recipe)
    assert replace(first, was_finished=True) == second
    assert len(records.read_metrics(first.folder, "train")) == 4


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    result = train(tiny_recipe(tmp_path, training__checkpoint_every=4))
    assert [path.name for path in list_checkpoints(result.folder)] == [
        "step-00000016",
        "step-00000020",
    ]


def test_another_recipe_or_never_refuses_the_folder(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path))
    with pytest.raises(CheckpointError, match=r"optimizer\.learning_rate: 0\.01 there, 0\.02 here"):
        train(tiny_recipe(tmp_path, optimizer__learning_rate=0.02))
    with pytest.raises(CheckpointError, match="holds a run already"):
        train(tiny_recipe(tmp_path), resume="never")
    train(tiny_recipe(tmp_path, training__log_every=1))  # changes no number
    unfinish(tmp_path / "run")
    (tmp_path / "topics" / "more.txt").write_text("Another document.\n" * 100)
    with pytest.raises(CheckpointError, match="on other data:\n  fingerprint of the train tokens"):
        train(tiny_recipe(tmp_path))
    train(tiny_recipe(tmp_path, optimizer__learning_rate=0.02), resume="changed")


def test_the_seed_and_nothing_else_decides_a_run(tmp_path: Path) -> None:
    first, again, other = (
        load_file(
            train(tiny_recipe(tmp_path, output=tmp_path / name, seed=seed)).folder
            / "model/model.safetensors"
        )
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    assert not any(
        torch.equal(weight, other[name]) for name, weight in first.items() if weight.ndim > 1
    )


def test_a_licence_may_be_stated_later(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path))
    source = f"[{{path: {write_text(tmp_path)}, license: PSF-2.0}}]"
    result = train(tiny_recipe(tmp_path, data__train=source))
    assert recipe_digest(tiny_recipe(tmp_path, data__train=source)) == recipe_digest(
        tiny_recipe(tmp_path)
    )
    stated = records.read_run(result.folder)["data"]["train"]["sources"]
    assert {source["license"] for source in stated} == {"PSF-2.0"}


@pytest.mark.parametrize("file", ["optimizer.safetensors", "state.json", "model/model.safetensors"])
def test_a_damaged_checkpoint_is_kept_out_and_the_one_before_is_used(
    tmp_path: Path, file: str, capsys
) -> None:
    recipe = tiny_recipe(tmp_path, training__checkpoint_every=7)
    folder = list_checkpoints(train(recipe).folder)[-1]
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    unfinish(Path(recipe.output))
    train(recipe)
    assert f"{folder.name} is damaged ({file}" in capsys.readouterr().err
    assert records.read_metrics(Path(recipe.output), "resumed")[-1]["step"] == 14
    for checkpoint in list_checkpoints(Path(recipe.output)):
        (checkpoint / file).unlink()
    unfinish(Path(recipe.output))
    with pytest.raises(CheckpointError, match="holds no good checkpoint"):
        train(recipe)


def test_a_state_that_is_gone_is_no_fresh_start(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    shutil.rmtree(train(recipe).folder / "checkpoints")
    unfinish(Path(recipe.output))
    with pytest.raises(CheckpointError, match=r"no checkpoint left.*step-00000020 was written"):
        train(recipe)


def _poison(monkeypatch, steps: range) -> list[dict[str, torch.Tensor]]:
    """Make gradients NaN at the given steps; returns the weights seen before each step."""
    seen: list[dict[str, torch.Tensor]] = []
    clip = stepping.optim.clip_gradients

    def poisoned(model, *others):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        if len(seen) - 1 in steps:
            next(model.parameters()).grad.view(-1)[0] = math.nan
        return clip(model, *others)

    monkeypatch.setattr(stepping.optim, "clip_gradients", poisoned)
    return seen


def test_a_non_finite_gradient_never_reaches_the_weights(tmp_path: Path, monkeypatch) -> None:
    seen = _poison(monkeypatch, range(3, 5))
    result = train(tiny_recipe(tmp_path))
    events = records.read_metrics(result.folder, "non_finite")
    assert [(row["step"], row["grad_norm"]) for row in events] == [(4, "nan"), (5, "nan")]
    changed = [
        any(not torch.equal(seen[step][name], seen[step + 1][name]) for name in seen[0])
        for step in range(6)
    ]
    assert changed == [True, True, True, False, False, True]
    assert all(tensor.isfinite().all() for tensor in _weights(result.folder / "model").values())


def test_gradients_are_clipped_to_the_norms_that_the_recipe_names(
    tmp_path: Path, monkeypatch
) -> None:
    clip, norms = stepping.optim.clip_gradients, []

    def clipped(model, *others):
        before = clip(model, *others)
        left = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        norms.append((before.item(), left.item()))
        return before

    monkeypatch.setattr(stepping.optim, "clip_gradients", clipped)
    options = {"optimizer__late_max_grad_norm": 0.02, "optimizer__late_clip_step": 12}
    train(tiny_recipe(tmp_path, optimizer__max_grad_norm=0.3, **options))
    assert min(before for before, _ in norms) > 0.3
    limits = [0.3] * 12 + [0.02] * 8
    assert [left for _, left in norms] == pytest.approx(limits, rel=1e-4)


def test_many_non_finite_steps_end_the_run_with_its_records(tmp_path: Path, monkeypatch) -> None:
    _poison(monkeypatch, range(10**6))
    recipe = tiny_recipe(tmp_path, training__steps=40)
    with pytest.raises(DivergedError, match=r"learning_rate.*qk_norm"):
        train(recipe)
    assert len(records.read_metrics(Path(recipe.output), "non_finite")) == 20


def test_batches_of_any_split_give_the_same_run(tmp_path: Path) -> None:
    results = [
        train(tiny_recipe(tmp_path, training__micro_batch_size=size, output=tmp_path / str(size)))
        for size in (1, 8)
    ]
    losses = [[row["loss"] for row in records.read_metrics(r.folder, "train")] for r in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bf16_keeps_fp32_weights_and_learns(tmp_path: Path) -> None:
    result = train(tiny_recipe(tmp_path, training__precision="bf16"))
    assert all(t.dtype == torch.float32 for t in _weights(result.folder / "model").values())
    rows = records.read_metrics(result.folder, "train")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_separate_documents_and_checkpointing_train(tmp_path: Path) -> None:
    options = {"data__separate_documents": "true", "output": tmp_path / "plain"}
    plain = train(tiny_recipe(tmp_path, **options))
    checked = train(
        tiny_recipe(
            tmp_path,
            **{**options, "training__gradient_checkpointing": "true", "output": tmp_path / "b"},
        )
    )
    _assert_same_weights(plain.folder / "model", checked.folder / "model")


def test_trackers_mirror_the_records(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("trackio")
    recipe = tmp_path / "recipe.yaml"
    trackers = {"training__trackers": "[tensorboard, trackio]", "training__checkpoint_every": 10}
    recipe.write_text(dump(tiny_recipe(tmp_path, **trackers)))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "hf_stable", "train", str(recipe)]
    variables = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run(command, env=variables, check=True, capture_output=True)
    folder = next((run / "trackers").rglob("events.out.tfevents*")).parent
    board = events.EventAccumulator(str(folder)).Reload()
    mirrored = {event.step: event.value for event in board.Scalars("train/loss")}
    rows = {row["step"]: row["loss"] for row in records.read_metrics(run, "train")}
    assert mirrored == pytest.approx(rows, rel=1e-6)
    assert [event.step for event in board.Scalars("validation/perplexity")] == [10, 20]
    (database,) = (tmp_path / "trackio").glob("hf_stable*.db")
    with sqlite3.connect(database) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("select metrics from metrics")]
    losses = [entry["train/loss"] for entry in logged if "train/loss" in entry]
    assert losses == pytest.approx(list(rows.values()))
    # A run that goes on, as if it had ended at step 10, goes on there too.
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    subprocess.run(command, env=variables, check=True, capture_output=True)
    with sqlite3.connect(database) as connection:
        names = connection.execute("select distinct run_name from metrics").fetchall()
    assert names == [(records.read_run(run)["tracker_run"],)]


def test_what_cannot_be_used_here_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="wandb, which is not installed: pip install wandb"):
        train(tiny_recipe(tmp_path, training__trackers="[wandb]"))
    monkeypatch.undo()
    for backend in ("flex_attention", "flash_attention_2", "flsh"):
        recipe = tiny_recipe(tmp_path, training__attn_implementation=backend)
        with pytest.raises(RecipeError, match=f"attn_implementation is {backend}"):
            train(recipe)


@pytest.mark.parametrize(
    ("preset", "named", "expected"),
    [
        ("baseline", "null", "sdpa (plain attention)"),
        (
            "soft_cap",
            "null",
            "eager (for a cap or clip; the fused kernels need a CUDA GPU, not a cpu device)",
        ),
        ("baseline", "eager", "eager (the recipe's choice)"),
    ],
)
def test_the_backend_and_why_are_printed_once(
    tmp_path: Path, capsys, preset: str, named: str, expected: str
) -> None:
    options = {"model.preset": preset, "training.attn_implementation": named}
    result = train(tiny_recipe(tmp_path, training__steps=1, **options))
    shown = capsys.readouterr().err
    assert shown.count("attention by") == 1
    assert f"attention by {expected}, loss by eager, not compiled" in shown
    run = records.read_run(result.folder)
    assert expected == f"{run['attn_implementation']} ({run['attn_reason']})"


def test_kernels_on_a_cpu_are_refused_before_any_work(tmp_path: Path, monkeypatch) -> None:
    tiles = pytest.importorskip("hf_stable.kernels.tiles")
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    recipe = tiny_recipe(tmp_path, training__attn_implementation="stable_triton")
    with pytest.raises(RecipeError, match=r"training\.attn_implementation is stable_triton.*CUDA"):
        train(recipe)
    assert not (tmp_path / "cache").exists()


def test_a_step_that_reads_the_text_a_hundred_times_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, training__global_batch_size=10**6)
    with pytest.raises(DataError, match=r"global_batch_size is 1,000,000 .* read them \d{3} times"):
        train(recipe)


def test_too_little_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.\n" * 3, encoding="utf-8")
    with pytest.raises(DataError):
        train(tiny_recipe(tmp_path, data__train=f"[{tmp_path / 'short.txt'}]"))


def test_records_survive_infinities_and_torn_lines(tmp_path: Path) -> None:
    record = records.RunRecord(tmp_path)
    record.append("train", 1, loss=math.inf, grad_norm=math.nan)
    record.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    (row,) = records.read_metrics(tmp_path)
    assert row == {"event": "train", "step": 1, "loss": "inf", "grad_norm": "nan"}
    again = records.RunRecord(tmp_path)
    again.append("train", 2, loss=1.0)
    again.close()
    assert [line["step"] for line in records.read_metrics(tmp_path)] == [1, 2]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"event": "x", "step": 2}) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3 is not JSON"):
        records.read_metrics(tmp_path)


def test_transformers_trainer_trains_it(tmp_path: Path) -> None:
    model = build(sigma_reparam=True, z_loss=1e-4).float()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 61, (8, 16), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=12,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert torch.equal(loaded(rows).logits, model.eval()(rows).logits)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data here")
def test_200_steps_on_english_then_perplexity_on_wikitext(tmp_path: Path) -> None:
    text = SHARED / "english" / "tiny_shakespeare.txt"
    recipe = tiny_recipe(
        tmp_path,
        data__train=f"[{{path: {text}, sample_by: paragraph}}]",
        data__sequence_length=64,
        training__steps=200,
        training__log_every=100,
        training__evaluate_every=0,
    )
    result = train(recipe)
    run = records.read_run(result.folder)
    bigram = run["data"]["bigram_nats_per_token"]
    unigram = run["data"]["unigram_nats_per_token"]
    assert math.log(result.validation_perplexity) < (bigram + unigram) / 2
    report = tmp_path / "wikitext.json"
    wikitext = str(SHARED / "wikitext2" / "test.txt")
    arguments = ["--data", wikitext, "--sample-by", "line", "--limit-documents", "400"]
    assert main(["evaluate", str(result.folder), *arguments, "--output", str(report)]) == 0
    measured = json.loads(report.read_text())
    assert measured["documents"] >= 100 and measured["tokens"] > 10_000
    estimate = measured["per_token"]
    assert estimate["low"] < estimate["value"] < estimate["high"] < 512
