"""Laws of model cards: only what the records hold, nothing that injects, nothing that leaks."""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_stable import StableGPTConfig, cli
from hf_stable.card import Statement, clean, leaks, problems, render_card, write_card
from hf_stable.card.markdown import TEMPLATE, escape
from hf_stable.card.metadata import LICENSES
from hf_stable.card.papers import ANCHOR, PAPERS, STUDIES, TECHNIQUES
from hf_stable.card.texts import KNOWN_TEXTS
from hf_stable.data import write_sample_text
from hf_stable.errors import UserError
from hf_stable.evaluation.result import Estimate, PerplexityResult
from hf_stable.model.configuration_stable_gpt import PRESETS
from hf_stable.recipes import from_dict, load_recipe, to_dict
from hf_stable.records import CONVERSION, RunRecord, write_json

# Written so that this file names no place of one machine.
HOME = "/" + "home/jane"
ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "base" / "tiny.yaml"
HUB_TOKEN = "hf_" + "AbCdEfGhIj" * 3
UNKNOWN_HASH = "0" * 32
KNOWN_HASH = next(iter(KNOWN_TEXTS))


def source(path: str, blake2b: str = UNKNOWN_HASH) -> dict[str, Any]:
    content = {"format": "jsonl", "detail": "text", "blake2b": blake2b, "part": "train"}
    return {"path": path, "bytes": 10, "content": content}


def part(*sources: dict[str, Any]) -> dict[str, Any]:
    return {"tokens": 5000, "documents": 40, "fingerprint": "f" * 32, "sources": list(sources)}


def records(folder: Path, *settings: str, **changes: Any) -> Path:
    """A run's folder as training leaves it, without training: run.json and metrics.jsonl."""
    recipe = load_recipe(TINY, [f"output={folder}", *settings])
    record = RunRecord(folder)
    text = part(source(f"{HOME}/texts/a.jsonl"))
    record.write_run(
        {
            "recipe": to_dict(recipe),
            "model_config": recipe.model_config().to_dict(),
            "parameters": 164288,
            "parameters_of_blocks": 98688,
            "flops_per_token": 811008.0,
            "attn_implementation": "sdpa",
            "attn_reason": "the fastest here",
            "data": {"train": text, "validation": text, "unigram_nats_per_token": 5.0},
            "versions": {"torch": "2.11"},
            "git_revision": "0" * 40,
            "device": "cpu (1 threads)",
            "processes": 2,
            **changes,
        }
    )
    for step in (5, 10, 20):
        row = {"loss": 6.0 - step / 10, "learning_rate": 1e-2, "grad_norm": 1.0}
        record.append("train", step, **row, tokens_per_second=256.0)
    record.append("validation", 10, loss=5.0, perplexity=148.4131)
    record.append("validation", 20, loss=4.0, perplexity=54.5982)
    record.append("finished", 20)
    record.close()
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return records(tmp_path / "run")


def evaluate(run: Path, name: str = "evaluation.json", **changes: Any) -> Path:
    """What `hf-stable evaluate RUN --output` writes."""
    result = PerplexityResult(
        per_token=Estimate(12.5, 11.25, 13.75),
        per_word=Estimate(80.0, 70.0, 90.0),
        bits_per_byte=Estimate(1.5, 1.4, 1.6),
        nll_nats=2525.7,
        tokens=1000,
        words=400,
        bytes=2429,
        documents=40,
        empty_documents=0,
        unscored_tokens=0,
        max_length=32,
        stride=16,
        confidence=0.95,
        interval_note=None,
        document_sums=None,  # pyright: ignore[reportArgumentType]  # not written
    )
    content = {"model": str(run), "data": None, **result.to_dict(), **changes}
    write_json(run / name, content)
    return run / name


def section(card: ModelCard, title: str) -> str:
    """The text of one section."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", card.text, re.M | re.S)
    assert found is not None, f"no section {title}"
    return found[1]


def test_header_is_what_the_hub_accepts_and_survives_it(run: Path) -> None:
    evaluate(run)
    card = render_card(run)
    header = yaml.safe_load(card.content.split("---\n")[1])
    assert problems(header) == []
    assert header["pipeline_tag"] == "text-generation"
    # The records hold none of these, and nobody stated them.
    assert not {"language", "datasets", "license"} & header.keys()
    stated = render_card(run, statement=Statement(license="cc-by-4.0"))
    assert stated.data.to_dict()["license"] == "cc-by-4.0"
    again = ModelCard(str(card))
    assert again.data.to_dict() == header and again.text == card.text
    results = header["model-index"][0]["results"]
    assert [metric["value"] for metric in results[0]["metrics"]] == [12.5, 80.0, 1.5]
    assert results[0]["metrics"][0]["args"] == {
        "documents": 40, "low": 11.25, "high": 13.75, "confidence": 0.95,
    }  # fmt: skip
    assert "| perplexity per token | 12.5000 | 11.2500 to 13.7500 |" in section(card, "Results")


def test_two_texts_are_two_results(run: Path) -> None:
    evaluate(run)
    other = evaluate(run, "evaluation-other.json", data=[f"{HOME}/wiki test.txt"])
    results = render_card(run).data.to_dict()["model-index"][0]["results"]
    assert [each["dataset"]["name"] for each in results] == [
        "wiki test.txt",
        "validation part of a.jsonl",
    ]
    assert results[0]["dataset"]["type"] == "wiki-test.txt"
    assert "split" not in results[0]["dataset"]
    only = render_card(run, evaluations=[other]).data.to_dict()["model-index"][0]["results"]
    assert len(only) == 1


def test_study_scores_have_the_intervals_of_evaluate(run: Path) -> None:
    """Sums by document, from which evaluation's own bootstrap is made again."""
    rows = [[2.0 * n, n, n / 2, 3 * n] for n in range(10, 40)]
    write_json(run / "scores.json", {"id": "run", "documents": rows})
    card = render_card(run, evaluations=[run / "scores.json"])
    metrics = card.data.to_dict()["model-index"][0]["results"][0]["metrics"]
    value = metrics[0]["value"]
    assert value == pytest.approx(2.718281828**2)  # 2 nats in every document
    assert metrics[0]["args"]["low"] == pytest.approx(value)
    assert metrics[0]["args"]["documents"] == 30


def test_a_number_that_is_not_finite_is_in_no_header(run: Path) -> None:
    evaluate(run, per_word={"value": "inf", "low": None, "high": None})
    card = render_card(run)
    metrics = card.data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["perplexity", "bits_per_byte"]
    assert "| perplexity per word | inf | – |" in section(card, "Results")


def test_numbers_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    other = records(tmp_path / "other")
    with pytest.raises(UserError, match="is of 'other', not of 'run'"):
        render_card(run, evaluations=[evaluate(other)])
    write_json(run / "scores.json", {"id": "x", "documents": [[1, 1, 1, 1]]})
    with pytest.raises(UserError, match="is of 'x', not of 'run'"):
        render_card(run, evaluations=[run / "scores.json"])


@pytest.mark.parametrize(
    "content", ["{", "[]", '"x"', '{"model": "run"}', '{"id": "run", "documents": [[1, 2]]}']
)
def test_a_damaged_evaluation_is_named(content: str, run: Path) -> None:
    (run / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json"):
        render_card(run)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", ["{\n\n", "[1]\n\n", '{"recipe": 3}\n\n'])
def test_damaged_records_are_one_error(name: str, content: str, run: Path) -> None:
    (run / name).write_text(content)
    with pytest.raises(UserError, match="damaged"):
        render_card(run)


def test_missing_records_are_named_with_what_to_run(run: Path) -> None:
    """With less and less in the folder, the card holds less and says what makes the rest."""
    complete = render_card(run)
    assert "hf-stable evaluate RUN" in section(complete, "Results")
    assert "at step 20" in section(complete, "Results")
    assert "54.5982" in section(complete, "Results")
    assert "model-index" not in complete.data.to_dict()
    (run / "metrics.jsonl").unlink()
    without = render_card(run)
    for title, words in (
        ("Results", "the records hold none. `hf-stable train RECIPE`"),
        ("Training curve", "`hf-stable train RECIPE` logs it"),
        ("Hardware and energy", "no training time. `hf-stable train RECIPE`"),
        ("Limits", "do not say that training was finished"),
    ):
        assert words in section(without, title)
    assert "54.5982" not in without.text and "trained for" not in without.text
    (run / "run.json").unlink()
    with pytest.raises(UserError, match=r"neither run\.json, metrics\.jsonl nor config\.json"):
        render_card(run)
    write_json(run / "config.json", StableGPTConfig.from_preset("qk_norm").to_dict())
    bare = render_card(run)
    for title in ("Data", "Recipe", "Hardware and energy"):
        assert re.search(r"The records hold n.*`hf-stable train RECIPE`", section(bare, title))
    assert "| qk\\_norm | head |" in section(bare, "Techniques")
    assert not re.search(r"\d", section(bare, "Data") + section(bare, "Recipe"))
    for card in (complete, without, bare):
        assert not re.search(r"\bNone\b(?!:)|undefined|nan", card.text)


def test_an_unfinished_or_troubled_run_says_so(run: Path) -> None:
    assert "finished" not in section(render_card(run), "Limits")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["event"] == "train" and row["step"] < 20]
    rows.append({"event": "non_finite", "step": 11, "loss": "nan", "grad_norm": "inf"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = section(render_card(run), "Limits")
    assert "do not say that training was finished at step 10 of 20" in limits
    assert "1 updates were refused" in limits


def test_energy_is_time_times_stated_power_or_nothing(run: Path) -> None:
    """20 steps of 256 tokens at 256 tokens a second on two processes."""
    silent = section(render_card(run), "Hardware and energy")
    assert "20.0 seconds" in silent and "no estimate" in silent and "kWh" not in silent
    stated = section(render_card(run, statement=Statement(watts=360.0)), "Hardware and energy")
    assert "an estimate and no measurement: 0.004 kWh, at an assumed 360 W" in stated


def test_the_recipe_in_the_card_is_the_run_s(run: Path) -> None:
    shown = re.search(r"```yaml\n(.*?)```", render_card(run).text, re.S)
    assert shown is not None
    recipe = to_dict(from_dict(yaml.safe_load(shown[1])))
    expected = json.loads((run / "run.json").read_text())["recipe"]
    assert recipe == {**expected, "output": "run"}


@pytest.mark.parametrize("preset", PRESETS)
def test_each_technique_has_its_row_paper_and_entry(preset: str, tmp_path: Path) -> None:
    run = records(tmp_path / "run", f"model.preset={preset}")
    card = render_card(run, statement=Statement(repository="https://example.org/code/"))
    table = section(card, "Techniques")
    neutral = StableGPTConfig()
    for field, value in PRESETS[preset].items():
        if value != getattr(neutral, field):
            assert f"| {escape(field)} | {escape(value)} |" in table
    assert table.count("\n| ") == (2 + len(PRESETS[preset]) if PRESETS[preset] else 0)
    cited = set(re.findall(r"arxiv\.org/abs/(\d+\.\d+)", table))
    bibtex = section(card, "How to cite")
    assert set(re.findall(r"arXiv:(\d+\.\d+)", bibtex)) == cited | {"2410.16682"}
    for study, row in re.findall(r"code/scripts/studies/(\w+)/report\.md#", table) and re.findall(
        r"\[row `(\w+)` of (\S+)\]", table
    ):
        assert study in STUDIES[row.replace("\\", "")]


def test_techniques_of_the_optimizer_are_told_too(tmp_path: Path) -> None:
    run = records(tmp_path / "run", "optimizer.name=stable_adamw", "optimizer.qk_clip=100")
    card = render_card(run)
    assert "| optimizer.name | stable\\_adamw | [Wortsman et al. 2023]" in card.text
    assert "arXiv:2304.13013" in card.text and "arXiv:2507.20534" in card.text


def test_technique_table_has_every_field_with_its_neutral_value() -> None:
    names = [field.name for field in fields(StableGPTConfig)]
    rooms = names[names.index("norm") :]
    config = StableGPTConfig()
    table = {each.field: each.neutral for each in TECHNIQUES if "." not in each.field}
    assert table == {name: getattr(config, name) for name in rooms}
    recipe = load_recipe(TINY)
    for each in TECHNIQUES:
        if "." in each.field:
            outer, inner = each.field.split(".")
            assert getattr(getattr(recipe, outer), inner) == each.neutral, each.field
        assert set(each.papers) <= PAPERS.keys()


def test_evidence_is_in_the_committed_reports() -> None:
    for study, rows in STUDIES.items():
        report = (ROOT / "scripts" / "studies" / study / "report.md").read_text()
        headings = re.findall(r"^#+ (.*)$", report, re.M)
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
        assert ANCHOR in anchors
        for row in rows:
            assert re.search(rf"^\| {row} \| \d/\d", report, re.M), (study, row)
    known = {row for rows in STUDIES.values() for row in rows}
    for each in TECHNIQUES:
        if each.row:  # a row in which this very field is on
            assert each.row in known
            assert PRESETS[each.row].get(each.field, each.neutral) != each.neutral, each.field


def test_known_text_is_the_one_that_sample_text_writes(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    written = write_sample_text(file)
    known = KNOWN_TEXTS[hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()]
    assert (known.title, known.licence, known.origin) == (
        written.title,
        written.licence,
        written.origin,
    )


def test_licence_and_language_come_from_the_hash_of_the_text(tmp_path: Path) -> None:
    """A file of the same name with another content is unknown; one unknown file hides the rest."""
    known, unknown = source("b.jsonl", KNOWN_HASH), source("b.jsonl")
    for number, (sources, language) in enumerate(
        [([known], ["en"]), ([unknown], None), ([known, unknown], None)]
    ):
        data = {"train": part(*sources), "validation": part(*sources)}
        card = render_card(records(tmp_path / str(number), data=data))
        assert card.data.to_dict().get("language") == language
        assert ("public domain" in section(card, "Data")) == (known in sources)
        assert ("not in the records: see" in section(card, "Data")) == (unknown in sources)


def test_a_stated_licence_is_in_the_card_of_one_text_and_of_a_mixture(tmp_path: Path) -> None:
    stated, known = {**source("a.jsonl"), "license": "odc-by"}, source("b.jsonl", KNOWN_HASH)
    mixed = {"tokens": 9, "documents": 2, "mixture": [part(stated), part(known)]}
    for number, data in enumerate([{"train": part(stated, known)}, {"train": mixed}]):
        shown = section(render_card(records(tmp_path / str(number), data=data)), "Data")
        assert "odc-by (stated in the recipe); public domain" in shown
        assert "not in the records" not in shown
        assert "a.jsonl" in shown and "King James" in shown


def test_a_dataset_of_the_hub_is_in_the_header(tmp_path: Path) -> None:
    content = {"dataset": "owner/name", "split": "train", "hash": "x"}
    data = {
        key: part({"path": "owner/name", "content": content}) for key in ("train", "validation")
    }
    run = records(tmp_path / "run", data=data)
    evaluate(run)
    header = render_card(run).data.to_dict()
    assert header["datasets"] == ["owner/name"]
    assert header["model-index"][0]["results"][0]["dataset"]["type"] == "owner/name"


EVIL = (
    "x\n---\nlicense: mit\n---\n# Owned <script>alert(1)</script> [click](javascript:alert(1)) "
    "| a | `b` ![i](https://evil.example/p.png) {{ 7 * 7 }} https://evil.example ```\n<img src=x>"
)


def test_strings_of_records_are_only_shown(tmp_path: Path) -> None:
    """Every string of run.json that may be anything is hostile, and so is what is stated."""
    hostile = part(source(EVIL))
    hostile["fingerprint"] = EVIL
    run = records(
        tmp_path / "run",
        attn_reason=EVIL,
        device=EVIL,
        git_revision=EVIL,
        versions={EVIL: EVIL},
        data={"train": hostile, "validation": hostile},
    )
    content = json.loads((run / "run.json").read_text())
    content["recipe"]["data"]["train"][0]["column"] = EVIL
    content["recipe"]["name"] = EVIL
    content["model_config"]["norm"] = EVIL
    write_json(run / "run.json", content)
    evaluate(run, data=[EVIL], interval_note=EVIL)
    card = render_card(run, statement=Statement(notes=(EVIL,)))
    header = card.data.to_dict()
    assert problems(header) == []
    fenced = re.compile(r"^(`{3,})\w*\n.*?^\1$", re.M | re.S)
    assert len(fenced.findall(card.text)) == 3  # code, recipe, BibTeX: none was closed early
    shown = fenced.sub("", card.text)
    for injected in ("<script", "<img", "[click]", "![i]", "https://evil", "49"):
        assert injected not in shown
    titles = re.findall(r"^#+ (.*)$", shown, re.M)
    assert len(titles) == 10 and "Owned" not in "".join(titles[1:])
    for line in shown.splitlines():
        if line.startswith("|"):  # no cell was split
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 6)


SECRETS = {
    "hub": HUB_TOKEN,
    "github": "ghp_" + "a1B2" * 9,
    "amazon": "AKIA" + "ABCD" * 4,
    "openai": "sk-" + "abcd1234" * 4,
    "address": "https://jane:hunter2@example.org/data.jsonl",
    "query": "https://example.org/data.jsonl?token=hunter2",
    "assigned": "reason: password=hunter2",
    "variable": "0123456789abcdef0123456789abcdef01234567",
}
PLACES = [
    f"{HOME}/texts/a.jsonl",
    "~/texts/a.jsonl",
    "C:\\Users\\jane\\texts\\a.jsonl",
    "\\\\server\\jane\\a.jsonl",
    f"file://{HOME}/a.jsonl",
    f"../..{HOME}/a.jsonl",
    f"{HOME} doe/a.jsonl",
]


def test_planted_secrets_and_paths_never_get_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted in sources, recipe, reasons and evaluations, alone and inside of sentences."""
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["variable"])
    planted = [*SECRETS.values(), *PLACES, f"failed to read {PLACES[0]} with {HUB_TOKEN}"]
    data = {key: part(*map(source, planted)) for key in ("train", "validation")}
    run = records(
        tmp_path / "run", data=data, attn_reason=" and ".join(planted[:-2]), device=planted[0]
    )
    content = json.loads((run / "run.json").read_text())
    content["recipe"]["data"]["cache"] = str(tmp_path / "cache")
    content["recipe"]["data"]["train"] = [
        {**content["recipe"]["data"]["train"][0], "path": path} for path in planted
    ]
    content["recipe"]["hub_token"] = "hunter2"
    content["recipe"]["tokenizer"]["path"] = PLACES[0]
    write_json(run / "run.json", content)
    evaluate(run, data=planted)
    card = write_card(run, tmp_path / "out" / "README.md").read_text()
    assert leaks(card) == []
    for secret in ("hunter2", "jane", "Users", "server", "home", str(tmp_path), "/tmp"):
        assert secret not in card
    for secret in SECRETS.values():
        assert secret not in card
    assert "a.jsonl" in card  # what is left says which text it was


@pytest.mark.parametrize("text", [*SECRETS.values(), *(f"see {place}" for place in PLACES[:5])])
def test_leaks_are_found_and_cleaning_ends_them(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["variable"])
    assert leaks(text)
    assert leaks(clean(text)) == [] and clean(clean(text)) == clean(text)


@pytest.mark.parametrize(
    "text",
    [
        "runs/quickstart-text.jsonl",
        "owner/name",
        "https://arxiv.org/abs/2410.16682",
        "hf_stable 0.1.0, 2,000 tokens/s, a cap or clip",
        "0" * 40,
        "max_tokens: 5, tokenizer: bpe",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert clean(text) == text and leaks(text) == []


def test_a_leak_in_what_is_stated_is_refused_by_its_kind(run: Path) -> None:
    with pytest.raises(UserError, match="a path on this machine") as refused:
        render_card(run, statement=Statement(repository=f"{HOME}/code"), picture=f"{HOME}/y.png")
    assert "jane" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"license": "mine"}, "license"),
        ({"license": "other"}, "license is other"),
        ({"license": None}, "license"),
        ({"tags": ["a", ""]}, "tags"),
        ({"tags": []}, "tags"),
        ({"datasets": [None]}, "datasets"),
        ({"datasets": ["a text in prose"]}, "datasets"),
        ({"language": ["English"]}, "language"),
        ({"language": "en"}, "language"),
        ({"pipeline_tag": "text"}, "pipeline_tag"),
        ({"model-index": [{"name": "x", "results": []}]}, "model-index"),
        ({"model-index": "x"}, "model-index"),
    ],
)
def test_a_header_that_the_hub_refuses_is_refused_here(
    change: dict[str, Any], named: str, run: Path
) -> None:
    header = render_card(run).data.to_dict()
    found = problems({**header, **change})
    assert len(found) == 1 and found[0].startswith(named)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("task", "type"), None),
        (("dataset", "type"), "/a/b/c"),
        (("dataset", "name"), ""),
        (("metrics", 0, "type"), None),
        (("metrics", 0, "value"), float("inf")),
        (("metrics",), []),
    ],
)
def test_a_result_that_the_hub_refuses_is_refused_here(
    place: tuple[Any, ...], value: Any, run: Path
) -> None:
    evaluate(run)
    header = render_card(run).data.to_dict()
    holder = header["model-index"][0]["results"][0]
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    (problem,) = problems(header)
    assert problem.startswith("model-index[0].results[0]." + str(place[0]))


def test_a_license_that_the_hub_does_not_know_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="license is 'mine'"):
        render_card(run, statement=Statement(license="mine"))
    assert {"apache-2.0", "mit", "other"} <= LICENSES


def test_a_license_of_its_own_has_a_name(run: Path) -> None:
    with pytest.raises(UserError, match="license is other: name it in license_name"):
        render_card(run, statement=Statement(license="other"))
    with pytest.raises(UserError, match="license_link is 'mine', but license is 'mit'"):
        Statement(license="mit", license_name="mine")
    place = "https://example.org/licence"
    stated = Statement(license="other", license_name="mine", license_link=place)
    header = render_card(run, statement=stated).data.to_dict()
    assert header["license_name"] == "mine" and header["license_link"] == place


@pytest.mark.parametrize(("revision", "base"), [("a" * 40, "org/base"), (None, None)])
def test_a_converted_model_names_the_one_on_the_hub(
    revision: str | None, base: str | None, run: Path
) -> None:
    made = {"source": "org/base", "revision": revision, "model_type": "llama", "dtype": "float32",
            "difference": 1e-9, "saved_difference": 1e-9}  # fmt: skip
    (run / CONVERSION).write_text(json.dumps(made))
    assert render_card(run).data.to_dict().get("base_model") == base


def test_equal_records_give_equal_cards_with_a_picture(run: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_card(run, folder / "README.md")
    files = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert set(files[0]) == {"README.md", "training_curve.png"}
    assert files[0]["training_curve.png"].startswith(b"\x89PNG")
    assert b"](training_curve.png)" in files[0]["README.md"]
    (run / "metrics.jsonl").unlink()
    write_card(run, tmp_path / "c" / "README.md")
    assert [file.name for file in (tmp_path / "c").iterdir()] == ["README.md"]


def test_template_is_one_file_inside_the_package() -> None:
    assert TEMPLATE.is_file()
    assert (ROOT / "model_cards" / TEMPLATE.name).resolve() == TEMPLATE.resolve()


def test_card_command_needs_neither_torch_nor_network(run: Path, tmp_path: Path) -> None:
    """The whole command in a process where torch and sockets cannot be had."""
    evaluate(run)
    script = (
        "import sys, socket\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "def refuse(*_, **__): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "sys.orig_argv = ['python', '-m', 'hf_stable', *sys.argv[1:]]\n"
        "from hf_stable.cli import main\n"
        "sys.exit(main())\n"
    )
    command = ["card", str(run), "--output", str(tmp_path / "out"), "--watts", "100"]
    ended = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    written = (tmp_path / "out" / "README.md").read_text()
    assert written == str(
        render_card(run, statement=Statement(watts=100.0), picture="training_curve.png")
    )


def test_card_command_refuses_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([str(tmp_path / "none")], [str(run), "--license", "mine"]):
        assert cli.main(["card", *arguments, "--output", str(tmp_path / "out")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out" / "README.md").exists()


def study_of(folder: Path, perplexities: dict[str, float]) -> Path:
    """A study's folder with kept models: each run's perplexity on six documents of ten tokens."""
    ids = {}
    for name in perplexities:
        method, seed = name.split("/")
        ids[name] = f"{method}_lr-0.01_seed-{seed}"
    methods = list(dict.fromkeys(name.split("/")[0] for name in perplexities))
    plan = {
        "name": "small", "methods": methods, "variants": [""], "learning_rates": [0.01],
        "seeds": [0, 1], "runs": list(ids.values()), "thresholds": {},
    }  # fmt: skip
    write_json(folder / "plan.json", plan)
    for name, identity in ids.items():
        method, seed = name.split("/")
        run = records(folder / "runs" / identity, f"model.preset={method}", f"seed={seed}")
        write_json(run / "model" / "config.json", {})
        result = {
            "id": identity, "method": method, "variant": "", "learning_rate": 0.01,
            "seed": int(seed), "status": "finished", "verdict": {"diverged": False},
        }  # fmt: skip
        write_json(run / "result.json", result)
        rows = [[10 * perplexities[name], 10, 5, 40]] * 6
        write_json(folder / "perplexity" / f"{identity}.json", {"id": identity, "documents": rows})
    return folder


def test_best_checkpoint_of_a_study_gets_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one with the lowest perplexity that is stable and kept its model; its seed is named."""
    nats = {"baseline/0": 2.0, "qk_norm/0": 1.0, "qk_norm/1": 1.5, "soft_cap/0": 1.4}
    study = study_of(tmp_path / "study", nats)
    shutil.rmtree(study / "runs" / "qk_norm_lr-0.01_seed-0" / "model")
    file = study / "runs" / "soft_cap_lr-0.01_seed-0" / "result.json"
    write_json(file, {**json.loads(file.read_text()), "verdict": {"diverged": True}})
    spec = importlib.util.spec_from_file_location("cards", ROOT / "scripts/studies/cards.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    command = ["cards.py", str(study), str(tmp_path / "cards")]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    (card,) = (tmp_path / "cards").glob("*.md")
    assert card.name == "small_qk_norm_lr-0.01_seed-1.md"
    text = card.read_text()
    assert "Best of 2 checkpoints" in text and "seed 1" in text
    assert f"]({card.stem}.png)" in text and (card.parent / f"{card.stem}.png").is_file()
    assert "](../scripts/studies/table3_cpu/report.md#" in text
    monkeypatch.setattr(sys, "argv", [*command, "0.5"])
    with pytest.raises(UserError, match=r"name one of the study's, \[0.01\]"):
        script.main()
