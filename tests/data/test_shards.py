"""Many files read like one array, however few may be open; damage is told where it is read."""

import itertools
import os
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_stable.data import BlockDataset, DataOrder, TokenFile, build_token_file, shards
from hf_stable.errors import DataError
from hf_stable.records import write_json


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "sync", lambda file: file.flush())
        yield


def write_file(folder, tokens, shard_tokens, vocab_size=2**17):
    """A finished token file of one document, in shards of `shard_tokens`."""
    folder.mkdir()
    writer = shards.ShardWriter(folder, 0, shard_tokens)
    writer.write(tokens.astype(shards.TOKEN))
    writer.close()
    np.save(folder / "documents.npy", np.zeros(1, dtype=np.int64))
    meta = {
        **{"format": 2, "fingerprint": "0", "tokens": len(tokens), "documents": 1},
        **{"shards": writer.shards, "vocab_size": vocab_size, "prefix": [0], "suffix": []},
    }
    write_json(folder / "meta.json", meta)
    return TokenFile.open(folder, verify=False)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("cut") / "file", np.arange(101), 7)


@given(start=st.integers(-120, 120), stop=st.integers(-120, 120))
def test_a_slice_is_that_of_one_array(cut, start, stop):
    assert cut.tokens[start:stop].tolist() == list(range(101))[start:stop]


@given(index=st.integers(-101, 100))
def test_a_token_is_that_of_one_array(cut, index):
    assert cut.tokens[index] == list(range(101))[index]


def test_what_an_array_refuses_is_refused(cut):
    for outside in (101, -102):
        with pytest.raises(IndexError):
            cut.tokens[outside]
    with pytest.raises(IndexError, match="steps of 1"):
        cut.tokens[::2]


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=6), resumed=st.integers(0, 200))
def test_writing_in_any_pieces_and_from_any_point_gives_the_same_files(
    tmp_path_factory, cuts, resumed
):
    tokens = np.arange(sum(cuts), dtype=shards.TOKEN)
    folder = tmp_path_factory.mktemp("pieces")
    for start in (0, min(resumed, len(tokens))):
        writer = shards.ShardWriter(folder, start, 10)
        ends = np.maximum(np.cumsum([0, *cuts]), start)
        for begin, end in itertools.pairwise([start, *ends]):
            writer.write(tokens[begin:end])
        writer.close()
        found = sorted(folder.glob("tokens-*.bin"))
        assert [(path.name, path.stat().st_size // 4) for path in found] == writer.shards
        assert b"".join(path.read_bytes() for path in found) == tokens.tobytes()


def test_five_thousand_shards_are_read_with_few_files_open(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 2**17, 5000 * 48)
    file = write_file(tmp_path / "file", tokens, 48)
    assert len(file.meta["shards"]) == 5000
    blocks = BlockDataset(file, 32)
    order = DataOrder(0, len(blocks)).blocks(np.arange(len(blocks)))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards._mapped.cache_clear()
    allowed = len(os.listdir("/proc/self/fd")) + shards._OPEN_SHARDS + 10
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, before[1]))
    try:
        for index in order.tolist():
            block = blocks[index]
            assert np.array_equal(block["input_ids"], tokens[index * 32 : index * 32 + 32])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_opening_maps_nothing(tmp_path):
    shards._mapped.cache_clear()
    file = write_file(tmp_path / "file", np.arange(100), 10)
    assert shards._mapped.cache_info().currsize == 0
    _ = file.tokens[25:35]
    assert shards._mapped.cache_info().currsize == 2


@pytest.mark.parametrize("change", ["missing", "short", "long"])
def test_a_damaged_shard_is_named_on_opening(tmp_path, change):
    path = write_file(tmp_path / "file", np.arange(100), 10).folder / "tokens-00003.bin"
    data = path.read_bytes()
    path.unlink()
    if change != "missing":
        path.write_bytes(data[:-4] if change == "short" else data + data)
    with pytest.raises(DataError, match=r"tokens-00003\.bin .* run again"):
        TokenFile.open(path.parent, verify=False)


def test_a_foreign_id_is_named_when_its_block_is_read(tmp_path):
    file = write_file(tmp_path / "file", np.arange(100), 10, vocab_size=75)
    blocks = BlockDataset(file, 8)
    assert blocks[0]["shift_labels"][-1] == 8
    for read in (lambda: blocks[9], lambda: TokenFile.open(file.folder)):
        with pytest.raises(DataError, match=r"tokens-00007\.bin: token 5 is id 75"):
            read()


def test_document_starts_out_of_order_are_told_when_their_block_is_read(sources, bpe, tmp_path):
    file = build_token_file(sources, bpe, tmp_path / "cache", progress=False)
    starts = np.load(file.folder / "documents.npy")
    starts[2] = starts[1]
    np.save(file.folder / "documents.npy", starts)
    blocks = BlockDataset(TokenFile.open(file.folder, verify=False), 200, separate_documents=True)
    with pytest.raises(DataError, match=r"documents\.npy: document starts do not increase"):
        blocks[int(starts[1]) // 200]


def test_a_token_file_of_another_format_is_refused(sources, bpe, tmp_path):
    file = build_token_file(sources, bpe, tmp_path / "cache", progress=False)
    write_json(file.folder / "meta.json", {**file.meta, "format": 1})
    with pytest.raises(DataError, match=r"meta\.json has format 1, but this version reads 2"):
        TokenFile.open(file.folder)
