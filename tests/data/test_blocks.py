"""Damage to a token file is told, and its blocks lose no token and no boundary."""

import pickle

import numpy as np
import pytest
import torch

from hf_stable.data import BlockDataset, TokenFile, build_token_file, load_tokenizer
from hf_stable.errors import DataError
from tests.data.conftest import FILES


@pytest.fixture
def token_file(sources, bpe, tmp_path):
    return build_token_file(sources, bpe, tmp_path / "cache", progress=False)


def change_bytes(file: TokenFile, name: str, change) -> None:
    path = file.folder / name
    path.write_bytes(change(path.read_bytes()))


DAMAGE = {
    "odd length": ("tokens-00000.bin", lambda data: data[:-1]),
    "a token missing": ("tokens-00000.bin", lambda data: data[:-4]),
    "a token more": ("tokens-00000.bin", lambda data: data + data[:4]),
    "no token": ("tokens-00000.bin", lambda data: b""),
    "id outside": ("tokens-00000.bin", lambda data: data[:400] + b"\xff\xff\xff\xff" + data[404:]),
    "id = vocabulary": ("tokens-00000.bin", lambda data: (400).to_bytes(4, "little") + data[4:]),
    "index cut": ("documents.npy", lambda data: data[:-8]),
    "index empty": ("documents.npy", lambda data: b""),
    "index disordered": ("documents.npy", lambda data: data[:-24] + data[-16:-8] * 2 + data[-8:]),
    "meta cut": ("meta.json", lambda data: data[:50]),
    "meta is a list": ("meta.json", lambda data: b"[]"),
    "later format": ("meta.json", lambda data: data.replace(b'"format": 2', b'"format": 3')),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error(token_file, damage):
    name, change = DAMAGE[damage]
    change_bytes(token_file, name, change)
    with pytest.raises(DataError) as caught:
        TokenFile.open(token_file.folder)
    assert str(token_file.folder / name) in str(caught.value)
    assert "run again" in str(caught.value)


def test_the_offset_of_a_foreign_id_is_named(token_file):
    change_bytes(token_file, *DAMAGE["id outside"])
    with pytest.raises(DataError, match="token 100 is id 4294967295"):
        TokenFile.open(token_file.folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(token_file, name):
    (token_file.folder / name).unlink()
    with pytest.raises(DataError, match=name):
        TokenFile.open(token_file.folder)


def test_a_pickled_file_is_small_and_equal(token_file):
    data = pickle.dumps(token_file)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).tokens[:], token_file.tokens[:])


@pytest.mark.parametrize("length", [1, 7, 64])
def test_every_token_but_the_first_is_a_label_once_and_follows_its_input(token_file, length):
    blocks = BlockDataset(token_file, length)
    everything = [blocks[i] for i in range(len(blocks))]
    inputs = torch.cat([block["input_ids"] for block in everything])
    labels = torch.cat([block["shift_labels"] for block in everything])
    tokens = torch.from_numpy(token_file.tokens[:].astype(np.int64))
    assert torch.equal(inputs, tokens[: len(blocks) * length])
    assert torch.equal(labels, tokens[1 : len(blocks) * length + 1])
    assert len(labels) + blocks.num_unused_tokens == token_file.num_tokens - 1
    assert blocks.num_unused_tokens < length
    assert set(everything[0]) == {"input_ids", "shift_labels"}
    assert all(value.dtype == torch.int64 for value in everything[0].values())


@pytest.fixture
def two_boundaries(sources, bpe_folder, tmp_path):
    tokenizer = load_tokenizer(bpe_folder)
    tokenizer.bos_token = tokenizer.pad_token
    return build_token_file(sources, tokenizer, tmp_path / "two", progress=False)


@pytest.mark.parametrize("separate", [False, True])
def test_only_the_begin_after_an_own_end_is_no_label(two_boundaries, separate):
    blocks = BlockDataset(two_boundaries, 32, separate_documents=separate)
    starts = set(two_boundaries.document_starts.tolist())
    for i in range(len(blocks)):
        for j, label in enumerate(blocks[i]["shift_labels"].tolist()):
            place = i * 32 + 1 + j
            expected = -100 if place in starts else two_boundaries.tokens[place]
            assert label == expected


def test_positions_restart_at_each_document_and_block(token_file):
    blocks = BlockDataset(token_file, 48, separate_documents=True)
    starts = set(token_file.document_starts.tolist())
    for i in range(len(blocks)):
        expected, position = [], 0
        for place in range(i * 48, i * 48 + 48):
            position = 0 if place in starts else position
            expected.append(position)
            position += 1
        assert blocks[i]["position_ids"].tolist() == expected
        assert not (blocks[i]["shift_labels"] == -100).any()


def test_too_few_tokens_say_what_would_fit(token_file):
    fits = token_file.num_tokens - 1
    with pytest.raises(DataError, match=f"at most {fits}"):
        BlockDataset(token_file, fits + 1)
    assert len(BlockDataset(token_file, fits)) == 1
    with pytest.raises(DataError, match="sequence_length"):
        BlockDataset(token_file, 0)


def test_no_block_outside(token_file):
    blocks = BlockDataset(token_file, 8)
    for index in (-1, len(blocks)):
        with pytest.raises(IndexError):
            blocks[index]
