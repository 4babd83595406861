"""Laws of a push: what goes, what never goes, and that nothing is done that is not said to be."""

import json
import os
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_stable import cli
from hf_stable.checksums import SUMS, sha256_of, write_sums
from hf_stable.errors import CheckpointError, HubError, UserError
from hf_stable.evaluation import load_model
from hf_stable.hub import Destination, ExportCheck, Published, connect, preview, push

from .server import READER, TOKEN, Handler, Hub

REPO = "org/name"


def published(checked: ExportCheck, **options: Any) -> Published:
    return push(checked, Destination(REPO, **options), connect())


def on(hub: Hub, ref: str = "main") -> dict[str, str]:
    """SHA-256 of what a branch, tag or pull request holds, but for the Hub's own file."""
    import hashlib  # noqa: PLC0415

    repo = hub.repos[REPO]
    content = repo.commits[repo.refs[ref]]
    return {
        name: hashlib.sha256(data).hexdigest()
        for name, data in content.items()
        if name != ".gitattributes"
    }


def commits(hub: Hub) -> int:
    return len(hub.repos[REPO].commits)


def test_what_is_pushed_is_what_was_checked_and_a_second_time_no_commit(
    hub: Hub, checked: ExportCheck
) -> None:
    done = published(checked, tag="v1")
    assert on(hub) == on(hub, "tags/v1") == checked.files
    assert done.is_new and done.url.endswith(f"/commit/{done.commit}")
    assert hub.repos[REPO].refs["main"] == done.commit and commits(hub) == 2
    assert len(hub.large) >= 4  # shards, picture and metrics went as large files, others not
    again = published(checked, tag="v1")
    assert again == Published(done.commit, done.url, is_new=False) and commits(hub) == 2


def test_a_later_export_leaves_nothing_of_the_earlier_one(
    hub: Hub, checked: ExportCheck, tmp_path: Path
) -> None:
    """One file of weights after shards: Transformers would find both. What is not ours stays."""
    published(checked)
    repo = hub.repos[REPO]
    repo.commit({**repo.commits[repo.refs["main"]], "model.gguf": b"not ours"}, "main")
    folder = shutil.copytree(checked.folder, tmp_path / "whole")
    for file in folder.glob("model*"):
        file.unlink()
    shutil.copyfile(next(checked.folder.glob("model-*")), folder / "model.safetensors")
    write_sums(folder)
    files = {name: sha256_of(folder / name) for name in [*checked.files, "model.safetensors"]
             if (folder / name).is_file()}  # fmt: skip
    shown = preview(ExportCheck(folder, "", files), Destination(REPO), connect())
    assert set(shown.removed) == {name for name in checked.files if name not in files}
    before = len(hub.large)
    push(ExportCheck(folder, "", files), Destination(REPO), connect())
    assert on(hub).keys() == files.keys() | {"model.gguf"}
    assert len(hub.large) == before  # that shard's bytes were there already


def test_work_that_was_done_on_the_hub_stays(
    hub: Hub, checked: ExportCheck, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A card while the model is the same, and files that no push put there always."""
    monkeypatch.setattr("hf_stable.hub.check_export", lambda _: checked)
    published(checked)
    repo = hub.repos[REPO]
    added = {"chat_template.jinja": b"{{ x }}", "records/note.json": b"{}"}
    pushed = repo.commits[repo.refs["main"]]
    edited = {**pushed, **added, "README.md": pushed["README.md"] + b"\nBy hand.\n"}
    repo.commit(edited, "main")
    command = ["push", str(checked.folder), "--output", REPO]
    assert cli.main(command) == 0
    assert "differs (--overwrite-card): README.md" in capsys.readouterr().out
    assert repo.commits[repo.refs["main"]] == edited and commits(hub) == 3
    # What was damaged there is mended, and the card stays then too.
    repo.commit({**edited, "config.json": b"{}"}, "main")
    assert published(checked).kept == ("README.md",)
    assert repo.commits[repo.refs["main"]] == edited
    assert cli.main([*command, "--overwrite-card"]) == 0
    assert repo.commits[repo.refs["main"]] == {**pushed, **added}
    assert "overwrite" not in capsys.readouterr().out
    # Another model comes with its own card and without the earlier one's files.
    repo.commit(edited, "main")
    (checked.folder / "generation_config.json").unlink()
    write_sums(checked.folder)
    del checked.files["generation_config.json"]
    checked.files[SUMS] = sha256_of(checked.folder / SUMS)
    assert published(checked).kept == ()
    assert on(hub) == {**checked.files, **{name: on(hub)[name] for name in added}}


def test_sums_that_are_none_of_ours_are_no_leave_to_write(hub: Hub, checked: ExportCheck) -> None:
    connect().create_repo(REPO)
    repo = hub.repos[REPO]
    repo.commit({"config.json": b"{}", SUMS: b"see the website\n"}, "main")
    for act in (push, preview):
        with pytest.raises(HubError, match="is taken: hf-stable did not write its SHA256SUMS"):
            act(checked, Destination(REPO), connect())
    assert on(hub).keys() == {"config.json", SUMS}


def test_a_dry_run_lists_exactly_what_would_go_and_writes_nothing(
    hub: Hub, checked: ExportCheck, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("hf_stable.hub.check_export", lambda _: checked)
    dry = ["push", str(checked.folder), "--output", REPO, "--dry-run"]

    def shown() -> dict[str, list[str]]:
        assert cli.main(dry) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {row[-1]: row[:-1] for row in rows if row[-1] in checked.files}

    sizes = {name: f"{(checked.folder / name).stat().st_size:,}" for name in checked.files}
    new = {name: ["new", sizes[name], sha256] for name, sha256 in checked.files.items()}
    assert shown() == new and hub.repos == {}
    published(checked)
    assert {row[0] for row in shown().values()} == {"same"}
    card = checked.folder / "README.md"
    card.write_text(card.read_text() + "\nOne more sentence.\n")
    checked.files["README.md"] = sha256_of(card)
    assert shown()["README.md"][0] == "kept"
    dry.append("--overwrite-card")
    changed = shown()
    assert [name for name, row in changed.items() if row[0] != "same"] == ["README.md"]
    assert changed["README.md"][0] == "changed" and commits(hub) == 2
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert shown() == {name: row[1:] for name, row in new.items()} | {
        "README.md": [f"{card.stat().st_size:,}", checked.files["README.md"]]
    }
    writes = [each for each in hub.asked if not each.startswith(("GET", "HEAD"))]
    hub.asked.clear()
    assert shown() and hub.asked == [] and any("commit" in each for each in writes)


def test_branch_private_message_and_pull_request(hub: Hub, checked: ExportCheck) -> None:
    done = published(checked, private=True, branch="try", message="First try")
    repo = hub.repos[REPO]
    assert repo.private and repo.refs["try"] == done.commit != repo.refs["main"]
    assert on(hub) == {} and on(hub, "try") == checked.files
    proposed = published(checked, create_pr=True, message="Have a look")
    assert repo.pulls == ["Have a look"] and on(hub, "refs/pr/1") == checked.files
    assert proposed.url.endswith("/discussions/1") and on(hub) == {}
    again = published(checked, create_pr=True)
    assert repo.pulls == ["Have a look"] and again.commit == proposed.commit and not again.is_new


def test_a_private_push_never_goes_to_a_public_repository(hub: Hub, checked: ExportCheck) -> None:
    connect().create_repo(REPO)
    with pytest.raises(HubError, match="exists and is public"):
        published(checked, private=True)
    assert on(hub) == {} and not hub.large


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"repo": "name"}, "names no owner"),
        ({"repo": "org/na me"}, "no OWNER/NAME"),
        ({"repo": "a/b/c"}, "no OWNER/NAME"),
        ({"repo": REPO, "create_pr": True, "tag": "v1"}, "pull request"),
        ({"repo": REPO, "create_pr": True, "branch": "b"}, "pull request"),
        ({"repo": REPO, "message": " "}, "message is empty"),
        ({"repo": REPO, "message": "with hf_" + "Ab1" * 10}, "message holds a secret: take it out"),
        *(
            ({"repo": REPO, kind: name}, f"cannot be the name of a {kind}")
            for kind in ("tag", "branch")
            for name in (
                "",
                "a b",
                "bad~name",
                "a..b",
                ".a",
                "a/.b",
                "a.lock",
                "a/",
                "/a",
                "a//b",
                "a.",
                "@",
                "a@{1}",
                "-a",
                "a\\b",
                "a\n",
            )
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        Destination(**options)
    assert "Ab1Ab1" not in str(refused.value)


def test_names_that_git_takes_are_taken() -> None:
    for name in ("main", "v1.0", "try/this-one", "a@b", "lock", "größe"):
        assert Destination(REPO, branch=name, tag=name).tag == name


@pytest.mark.parametrize("bad", ["\u2026", "\x01x", " x"])
def test_what_cannot_be_a_token_is_not_sent_and_not_shown(
    bad: str, monkeypatch: pytest.MonkeyPatch, hub: Hub, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong" + bad)
    with pytest.raises(HubError, match="HF_TOKEN holds something that no token") as refused:
        connect()
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_wrong" + bad, encoding="utf-8")
    with pytest.raises(HubError, match="the file of `hf auth login` holds") as also:
        connect(anonymously=True)
    assert "hf_wrong" not in str(refused.value) + str(also.value) and hub.asked == []


def _plant(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("optimizer.pt", "x", "not part of the model: optimizer.pt"),
        ("records/weights.bin", "x", "not part of the model: records/weights.bin"),
        (".env", "x", "not part of the model: .env"),
        (
            "README.md",
            "see " + "/" + "home/jane/texts/a.txt",
            "line 1 holds a path on this machine",
        ),
        ("README.md", "\n\nghp_" + "a1B2" * 9, "line 3 holds a secret"),
        ("config.json", json.dumps({"key": "hf_" + "Ab1" * 10}), "line 1 holds a secret"),
        ("modeling_stable_gpt.py", "K = 'AKIA" + "ABCD" * 4 + "'", "line 1 holds a secret"),
        ("tokenizer.json", '{"model": {}, "note": "' + "/" + 'data/me/corpus.txt"}', "a path on"),
        ("records/run.json", "{'wandb': '0123456789abcdef0123'}", "a secret"),
        ("README.md", "no header", "Hub would refuse the card: library_name is None"),
        ("README.md", "---\na: [\n---\n", "header cannot be read"),
    ],
)
def test_what_must_not_be_published_is_refused_before_the_hub_is_asked(
    name: str, text: str, reason: str, hub: Hub, checked: ExportCheck,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    _plant(checked.folder, name, text)
    for act in (push, preview):
        with pytest.raises(UserError, match=reason) as refused:
            act(checked, Destination(REPO), connect())
        assert "Ab1Ab1" not in str(refused.value) and "0123456789abcdef" not in str(refused.value)
    assert hub.asked == []


def test_links_and_compressed_secrets_are_found(hub: Hub, checked: ExportCheck) -> None:
    import gzip  # noqa: PLC0415

    metrics = checked.folder / "records" / "metrics.jsonl.gz"
    good = metrics.read_bytes()
    metrics.write_bytes(gzip.compress(b'{"reason": "password=hunter2"}'))
    with pytest.raises(UserError, match=r"metrics.jsonl.gz: line 1 holds a secret"):
        published(checked)
    metrics.write_bytes(good)
    (checked.folder / "LICENSE").unlink()
    (checked.folder / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="not part of the model: LICENSE"):
        published(checked)
    assert hub.asked == []


def test_a_card_without_metrics_is_pushed_only_when_that_is_meant(
    hub: Hub, checked: ExportCheck
) -> None:
    card = checked.folder / "README.md"
    text = card.read_text()
    begin, end = text.index("model-index:"), text.index("---\n", 4)
    card.write_text(text[:begin] + text[end:])
    checked.files["README.md"] = sha256_of(card)
    with pytest.raises(UserError, match=r"README.md has no measured metrics \(model-index\)"):
        published(checked)
    card.write_text(text.replace("      value: 12.5\n", ""))
    with pytest.raises(UserError, match=r"metrics\[0\]: write a type and a finite value|header"):
        published(checked)
    card.write_text(text[:begin] + text[end:])
    assert published(checked, unevaluated=True).is_new and on(hub) == checked.files


def test_tampering_is_found_before_anything_runs(checked: ExportCheck, capsys: Any) -> None:
    """By push and by everything that loads a folder: each kind of file, and files beside them."""
    code = checked.folder / "modeling_stable_gpt.py"
    good = code.read_text()
    code.write_text("raise SystemExit('ran')\n" + good)
    assert cli.main(["push", str(checked.folder), "--output", REPO, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {code}: its SHA-256 is not the one") and error.count("\n") == 1
    code.write_text(good)
    load_model(checked.folder)
    shard = next(checked.folder.glob("model-*"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shard.name}: its SHA-256"):
        load_model(checked.folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: missing"):
        load_model(checked.folder)
    content[-3] ^= 1
    shard.write_bytes(content)
    (checked.folder / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"model.safetensors: not in SHA256SUMS"):
        load_model(checked.folder)
    (checked.folder / SUMS).write_text("0" * 64 + "  ../outside\n")
    with pytest.raises(CheckpointError, match="SHA256SUMS: line 1"):
        load_model(checked.folder)


def test_sums_are_those_of_coreutils(checked: ExportCheck) -> None:
    import subprocess  # noqa: PLC0415

    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not there")
    command = ["sha256sum", "--check", "--strict", "--quiet", SUMS]
    assert subprocess.run(command, cwd=checked.folder, check=False).returncode == 0
    (checked.folder / "LICENSE").write_text("mine")
    done = subprocess.run(command, cwd=checked.folder, check=False, capture_output=True)
    assert done.returncode != 0


def cut_request(handler: Handler) -> None:
    """The connection breaks when half of the body has come."""
    handler.rfile.read(int(handler.headers.get("Content-Length") or 0) // 2)
    handler.cut()


def lose_answer(handler: Handler) -> None:
    """The commit is made, and the client never hears of it."""
    handler.body = handler.rfile.read(int(handler.headers["Content-Length"]))
    answer, handler.answer = handler.answer, lambda *_, **__: handler.cut()  # type: ignore
    handler.commit(REPO, "main")
    handler.answer = answer  # type: ignore


def wrong_hash(handler: Handler) -> None:
    """A tree in which one small file is another."""
    repo = handler.server.repos[REPO]
    files = repo.commits[repo.refs["main"]]
    entries = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
               for name, data in files.items()]  # fmt: skip
    handler.answer(entries)


FAULTS = {
    "server error while looking": ("GET /api/models/org/name/tree", 500, 9, "HTTP 500"),
    "server error while uploading": ("PUT /large", 503, 99, "HTTP 503"),
    "server error while committing": ("POST /api/models/org/name/commit", 500, 1, "HTTP 500"),
    "cut while uploading": ("PUT /large", cut_request, 99, "uploading failed"),
    "cut while committing": ("POST /api/models/org/name/commit", cut_request, 1, "tries again"),
    "answer of the commit lost": ("POST /api/models/org/name/commit", lose_answer, 1, "again"),
    "no longer signed in": ("/preupload/", 401, 1, "does not accept the token"),
    "no right to write": ("POST /api/models/org/name/commit", 403, 1, "may not write there"),
    "too many requests": ("POST /api/models/org/name/commit", 429, 1, "too many requests"),
    "pushed by others meanwhile": ("POST /api/models/org/name/commit", 412, 1, "somebody else"),
    "no answer about tags": ("GET /api/models/org/name/refs", 500, 1, "HTTP 500"),
    "no tag": ("POST /api/models/org/name/tag", 500, 1, "tagging commit"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_one_sentence_and_the_next_try_succeeds(
    name: str, hub: Hub, checked: ExportCheck, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """By the command: exit code 2, one line, nothing called done; then one state, tagged."""
    pattern, act, times, reason = FAULTS[name]
    monkeypatch.setattr("hf_stable.hub.check_export", lambda _: checked)
    hub.fault(pattern, act, times)
    command = ["push", str(checked.folder), "--output", REPO, "--tag", "v1"]
    assert cli.main(command) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and reason in printed.err
    assert TOKEN not in printed.err and "Signature" not in printed.err
    assert "tags/v1" not in hub.repos[REPO].refs
    hub.faults.clear()
    assert cli.main(command) == 0
    assert on(hub, "tags/v1") == on(hub) == checked.files
    assert commits(hub) == 2
    shown = capfd.readouterr().out
    assert "verified" in shown and "tagged: v1" in shown and TOKEN not in shown


def test_one_error_of_the_server_is_not_even_seen(hub: Hub, checked: ExportCheck) -> None:
    hub.fault("PUT /large", 503)
    hub.fault("PUT /large", cut_request)
    hub.fault("/preupload/", 500)
    assert published(checked).is_new and on(hub) == checked.files


def test_what_the_hub_holds_is_read_back_before_it_counts(hub: Hub, checked: ExportCheck) -> None:
    """A commit whose tree is another: an error, no tag; then the next push mends it."""

    def later(handler: Handler) -> None:
        hub.fault("/tree/", wrong_hash)
        handler.body = handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.commit(REPO, "main")

    hub.fault("POST /api/models/org/name/commit", later)
    with pytest.raises(HubError, match=r"is not what was pushed: .* differs there"):
        published(checked, tag="v1")
    assert "tags/v1" not in hub.repos[REPO].refs
    repo = hub.repos[REPO]
    bad = {**repo.commits[repo.refs["main"]], "config.json": b"{}"}
    repo.commit(bad, "main")
    assert published(checked, tag="v1").is_new and on(hub, "tags/v1") == checked.files


def test_tokens(
    hub: Hub, checked: ExportCheck, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    """None, unknown, without rights: an error each; one from the login file: as from HF_TOKEN."""
    monkeypatch.setattr("hf_stable.hub.check_export", lambda _: checked)
    command = ["push", str(checked.folder), "--output", REPO]
    wrong = "hf_" + "wrongWrong" * 4
    for token, reason in (
        (None, "no token for the Hub: run `hf auth login`, or set HF_TOKEN"),
        (wrong, "the Hub does not accept the token"),
        (READER, "the token may not write there"),
    ):
        if token is None:
            monkeypatch.delenv("HF_TOKEN")
        else:
            monkeypatch.setenv("HF_TOKEN", token)
        assert cli.main(command) == 2
        printed = capfd.readouterr()
        assert reason in printed.err and printed.err.count("\n") == 1 and printed.out == ""
        assert "hf_" not in printed.err
    assert hub.repos == {}
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN)
    assert cli.main(command) == 0
    printed = capfd.readouterr()
    assert TOKEN not in printed.out + printed.err and on(hub) == checked.files


def test_a_name_that_is_taken(hub: Hub, checked: ExportCheck) -> None:
    """By what the token may not see, or by a model that is not ours; ours may be pushed over."""
    hub.hidden.add(REPO)
    with pytest.raises(HubError, match="is taken by a repository that the token cannot read"):
        published(checked)
    hub.hidden.clear()
    connect().create_repo(REPO)
    repo = hub.repos[REPO]
    repo.commit({"README.md": b"x", "pytorch_model.bin": b"x", "config.json": b"{}"}, "main")
    for act in (push, preview):
        with pytest.raises(HubError, match=r"is taken: it holds config.json"):
            act(checked, Destination(REPO), connect())
    assert on(hub).keys() == {"README.md", "pytorch_model.bin", "config.json"}


def test_a_tag_is_never_moved(hub: Hub, checked: ExportCheck) -> None:
    published(checked, tag="v1")
    before = on(hub)
    card = checked.folder / "README.md"
    card.write_text(card.read_text() + "\nMore.\n")
    checked.files["README.md"] = sha256_of(card)
    with pytest.raises(HubError, match="has a tag v1 already"):
        published(checked, tag="v1", overwrite_card=True)
    assert on(hub) == before and commits(hub) == 2
    published(checked, tag="v2", overwrite_card=True)
    assert on(hub, "tags/v1") == before and on(hub, "tags/v2") == checked.files


@pytest.mark.parametrize("where", ["PUT /large", "POST /api/models/org/name/commit", "/tag/"])
def test_a_push_that_is_killed_leaves_nothing_and_the_next_one_succeeds(
    where: str, hub: Hub, checked: ExportCheck
) -> None:
    """SIGKILL in the middle of an upload, of the commit, and before the tag."""
    reached = threading.Event()
    pid = 0

    def kill(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0) // 2)
        reached.wait(10)
        os.kill(pid, signal.SIGKILL)
        handler.cut()

    hub.fault(where, kill)
    pid = os.fork()
    if pid == 0:
        try:
            published(checked, tag="v1")
        finally:
            os._exit(1)
    reached.set()
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert "tags/v1" not in hub.repos[REPO].refs
    assert on(hub) == ({} if where != "/tag/" else checked.files)
    there = len(hub.large)
    hub.asked.clear()
    published(checked, tag="v1")
    sent = sum(each.startswith("PUT /large") for each in hub.asked)
    assert sent == len(hub.large) - there and (sent > 0) == (where == "PUT /large")
    assert on(hub, "tags/v1") == on(hub) == checked.files and commits(hub) == 2


def test_loading_from_the_hub_is_verified_and_pinned(
    hub: Hub, checked: ExportCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By load_model, without trust_remote_code: equal weights, of the tag that was asked for."""
    published(checked, tag="v1")
    repo = hub.repos[REPO]
    other = {**repo.commits[repo.refs["main"]], "config.json": b"{}"}
    repo.commit(other, "main")
    expected = load_model(checked.folder)[0].state_dict()
    loaded = load_model(REPO, revision="v1")[0].state_dict()
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    with pytest.raises(CheckpointError, match=r"config.json from the Hub differs from the export"):
        load_model(REPO)
    with pytest.raises(CheckpointError, match="org/name has no revision 'v3'"):
        load_model(REPO, revision="v3")
    with pytest.raises(CheckpointError, match="revision 'v1' would be ignored"):
        load_model(checked.folder, revision="v1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_model(REPO, revision="v1")  # from the cache


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_nothing_is_loaded_while_the_hub_does_not_say_whether_there_are_sums(
    status: int, hub: Hub, checked: ExportCheck
) -> None:
    """Also where all else would load: the weights on the Hub are not those that were pushed."""
    published(checked)
    corrupt(hub, sorted(checked.folder.glob("model-*"))[0].name)
    hub.fault(f"/{SUMS}", status, times=99)
    with pytest.raises(
        CheckpointError, match=rf"{REPO}: it is unknown whether it has {SUMS}.*nothing of it"
    ):
        load_model(REPO)
    assert not any("/model-" in each for each in hub.asked if each.startswith(("GET", "HEAD")))
    hub.faults.clear()
    with pytest.raises(CheckpointError, match="differs from the export"):
        load_model(REPO)
    hub.served.clear()
    load_model(REPO)


def test_a_repository_without_sums_loads_and_one_that_is_not_there_is_named(
    hub: Hub, checked: ExportCheck
) -> None:
    published(checked)
    repo = hub.repos[REPO]
    files = dict(repo.commits[repo.refs["main"]])
    del files[SUMS]
    repo.commit(files, "main")
    load_model(REPO)
    weights = b"%b  model.safetensors" % (b"0" * 64)
    repo.commit({**files, SUMS: weights}, "main")  # somebody else's
    load_model(REPO)
    with pytest.raises(CheckpointError, match=r"org/none.*no such repository"):
        load_model("org/none")


def corrupt(hub: Hub, name: str) -> None:
    repo = hub.repos[REPO]
    content = bytearray(repo.commits[repo.refs["main"]][name])
    content[-3] ^= 1
    hub.served[name] = bytes(content)


def test_faults_of_a_download_are_one_sentence_and_the_next_try_succeeds(
    hub: Hub, checked: ExportCheck, capfd: Any
) -> None:
    """Wrong bytes of the right length, a body that is cut, and a disk that is full."""
    published(checked)
    shard = sorted(checked.folder.glob("model-*"))[0].name
    command = ["generate", REPO, "--prompt", "x", "--max-new-tokens", "1"]

    def fails(reason: str) -> None:
        assert cli.main(command) == 2
        printed = capfd.readouterr()
        assert printed.out == ""
        assert printed.err.splitlines()[-1].startswith("error: ") and reason in printed.err
        assert "Traceback" not in printed.err

    corrupt(hub, shard)
    fails(f"{shard} from the Hub differs from the export")
    hub.served.clear()
    large = hub.large[checked.files[shard]]
    hub.fault(f"GET /org/name/resolve/{hub.repos[REPO].refs['main']}/{shard}",
              lambda handler: handler.cut(large[:1000]), times=99)  # fmt: skip
    fails("the download failed")
    hub.faults.clear()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        fails("File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cli.main(command) == 0
    assert capfd.readouterr().out.startswith("x")
