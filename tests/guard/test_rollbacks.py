"""rollbacks.json is read back as it was written, or refused by name."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_stable.errors import CheckpointError
from hf_stable.guard import Rollback, append_rollback, read_rollbacks

ONE = Rollback(640, 500, (32_000, 51_200), "loss stays at 7.1", 12_345)

rollback = st.builds(
    lambda to, more, start, length, reason, size: Rollback(
        to + more, to, (start, start + length), reason, size
    ),
    st.integers(0, 10**9),
    st.integers(1, 10**6),
    st.integers(0, 2**60),
    st.integers(1, 10**9),
    st.text(),
    st.integers(0, 2**60),
)


@given(st.lists(rollback, max_size=5))
@settings(max_examples=25, deadline=None)
def test_what_is_appended_is_read_in_order(tmp_path_factory, all_of_them: list[Rollback]) -> None:
    run = tmp_path_factory.mktemp("run")
    for count, each in enumerate(all_of_them, start=1):
        assert append_rollback(run, each) == all_of_them[:count]
    assert read_rollbacks(run) == all_of_them


def damaged(change) -> str:
    row = {"at_step": 640, "to_step": 500, "skipped": [1, 2], "reason": "x", "metrics_bytes": 3}
    content = {"format": 1, "rollbacks": [row]}
    change(content, row)
    return json.dumps(content)


BAD = {
    "empty": "",
    "cut off": damaged(lambda content, row: None)[:-9],
    "no object": "[]",
    "bytes": "\udcff",
    "another format": damaged(lambda content, row: content.update(format=2)),
    "no list": damaged(lambda content, row: content.update(rollbacks={})),
    "no row": damaged(lambda content, row: content.update(rollbacks=[1])),
    "missing": damaged(lambda content, row: row.pop("to_step")),
    "no reason": damaged(lambda content, row: row.pop("reason")),
    "unknown": damaged(lambda content, row: row.update(more=1)),
    "fraction": damaged(lambda content, row: row.update(at_step=640.5)),
    "truth": damaged(lambda content, row: row.update(metrics_bytes=True)),
    "forward": damaged(lambda content, row: row.update(to_step=641)),
    "negative": damaged(lambda content, row: row.update(metrics_bytes=-1)),
    "no range": damaged(lambda content, row: row.update(skipped=[2, 2])),
    "three ends": damaged(lambda content, row: row.update(skipped=[1, 2, 3])),
    "null range": damaged(lambda content, row: row.update(skipped=None)),
    "number for a range": damaged(lambda content, row: row.update(skipped=7)),
    "number for a reason": damaged(lambda content, row: row.update(reason=7)),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_damaged_file_is_refused_by_name_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rollbacks.json"
    content = text.encode(errors="surrogateescape")
    file.write_bytes(content)
    for attempt in (read_rollbacks, lambda run: append_rollback(run, ONE)):
        with pytest.raises(CheckpointError, match=r"rollbacks\.json: the record of rollbacks"):
            attempt(tmp_path)
    assert file.read_bytes() == content


def test_a_run_without_the_file_was_never_set_back(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []


def test_a_writer_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    append_rollback(tmp_path, ONE)

    def killed(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        append_rollback(tmp_path, ONE)
    assert read_rollbacks(tmp_path) == [ONE]


@pytest.mark.parametrize(
    "fields", [{"to_step": 640}, {"to_step": -1}, {"skipped": (5, 5)}, {"metrics_bytes": -1}]
)
def test_a_rollback_that_cannot_be_is_refused(fields: dict) -> None:
    known = {"at_step": 640, "to_step": 500, "skipped": (1, 2), "reason": "", "metrics_bytes": 0}
    with pytest.raises(ValueError, match="; write"):
        Rollback(**{**known, **fields})
