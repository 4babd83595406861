"""Tokens a second of the data loader alone, against what one H100 could train at 830m.

Goal: at least ten times the model's speed, without workers.

    python scripts/bench/loader.py --output scripts/bench/results/cpu_loader.json

The text is synthetic (random ids, documents of 600 tokens) and in the page cache: what is measured
is the loader's own work, order included. The model's speed is computed, not measured: the H100's
peak (989 TFLOP/s, dense bf16) over the recipe's FLOPs a token, which no training reaches. A round
times every case once, in an order that changes; the median over rounds is reported.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import PEAK_FLOPS
from rich.console import Console
from rich.table import Table
from torch.utils.data import ConcatDataset

from hf_stable.check import check
from hf_stable.data import BlockDataset, DataOrder, MixtureOrder, Order, TokenFile, data_loader
from hf_stable.data.shards import TOKEN, ShardWriter
from hf_stable.data.token_file import FORMAT
from hf_stable.recipes import Recipe, load_recipe
from hf_stable.records import git_revision, versions, write_json

RECIPE = Path(__file__).parents[2] / "recipes" / "base" / "830m.yaml"
BAR = 10.0
SOURCES = 91  # of recipes/data/paper_languages.yaml
DOCUMENT = 600


def write_tokens(folder: Path, tokens: int, shards: int, vocab_size: int) -> TokenFile:
    """A token file of random ids, as `build_token_file` would leave it."""
    folder.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(0, vocab_size, tokens, dtype=TOKEN)
    writer = ShardWriter(folder, 0, -(-tokens // shards))
    writer.write(ids)
    writer.close()
    starts = np.arange(0, tokens, DOCUMENT, dtype=np.int64)
    np.save(folder / "documents.npy", starts)
    meta = {
        **{"format": FORMAT, "fingerprint": "synthetic", "tokens": tokens},
        **{"documents": len(starts), "shards": writer.shards, "vocab_size": vocab_size},
        **{"prefix": [0], "suffix": []},
    }
    write_json(folder / "meta.json", meta)
    return TokenFile.open(folder, verify=False)


class Case:
    """One kind of data, loaded on and on as training would."""

    def __init__(self, recipe: Recipe, dataset: Any, order: Order, num_workers: int) -> None:
        self._batch_tokens = recipe.training.micro_batch_size * recipe.data.sequence_length
        self._batches: Iterator[Any] = iter(
            data_loader(
                dataset,
                order,
                num_workers=num_workers,
                start_step=1000,
                num_steps=recipe.num_steps - 1000,
                global_batch_size=recipe.training.global_batch_size,
                micro_batch_size=recipe.training.micro_batch_size,
                rank=0,
                world_size=1,
            )
        )

    def tokens_per_second(self, num_batches: int) -> float:
        start = time.perf_counter()
        for _ in range(num_batches):
            next(self._batches)
        return num_batches * self._batch_tokens / (time.perf_counter() - start)


def cases(recipe: Recipe, folder: Path, tokens: int, num_workers: int) -> dict[str, Case]:
    """One file, thousands of shards, the paper's number of sources, and separate documents."""
    length, vocab_size = recipe.data.sequence_length, recipe.tokenizer.vocab_size
    one = write_tokens(folder / "one", tokens, 1, vocab_size)
    many = write_tokens(folder / "many", tokens, 5000, vocab_size)
    sources = [
        BlockDataset(write_tokens(folder / f"s{i}", tokens // SOURCES, 1, vocab_size), length)
        for i in range(SOURCES)
    ]
    weights = [70.0] + [15 / 45] * (SOURCES - 1)
    mixture = MixtureOrder(0, [len(source) for source in sources], weights)
    blocks = BlockDataset(one, length)
    order = DataOrder(0, len(blocks))
    datasets = {
        "one shard": (blocks, order),
        "5,000 shards": (BlockDataset(many, length), order),
        f"mixture of {SOURCES} sources": (ConcatDataset(sources), mixture),
        "separate documents": (BlockDataset(one, length, separate_documents=True), order),
    }
    return {name: Case(recipe, *parts, num_workers) for name, parts in datasets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=2**25, help="of each synthetic text")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=20, help="micro batches of a timing")
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(RECIPE)
    flops = check(recipe).flops_per_token
    model = PEAK_FLOPS / flops
    with tempfile.TemporaryDirectory() as folder:
        found = cases(recipe, Path(folder), arguments.tokens, arguments.num_workers)
        names, rates = list(found), {name: list[float]() for name in found}
        order = random.Random(0)
        for round_number in range(arguments.rounds + 2):
            order.shuffle(names)
            for name in names:
                rate = found[name].tokens_per_second(arguments.batches)
                if round_number >= 2:  # the first ones warm up
                    rates[name].append(rate)
    table = Table("data", "tokens/s", "/ model's", "goal")
    rows = []
    for name in found:
        rate = statistics.median(rates[name])
        verdict = "met" if rate >= BAR * model else "missed"
        quartiles = statistics.quantiles(rates[name])[::2]
        rows.append(
            {
                "data": name,
                "tokens_per_second": rate,
                "tokens_per_second_quartiles": quartiles,
                "over_model": rate / model,
                "bar_over_model": BAR,
                "verdict": verdict,
            }
        )
        table.add_row(name, f"{rate:,.0f}", f"{rate / model:,.1f}", f">= {BAR:g}: {verdict}")
    Console().print(f"model (computed): {model:,.0f} tokens/s on one H100 at its peak")
    Console().print(table)
    if arguments.output:
        write_json(
            arguments.output,
            {
                "device": f"cpu, {arguments.threads} threads",
                "recipe": recipe.name,
                "sequence_length": recipe.data.sequence_length,
                "micro_batch_size": recipe.training.micro_batch_size,
                "num_workers": arguments.num_workers,
                "rounds": arguments.rounds,
                "model": {
                    "kind": "computed, not measured: peak FLOP/s of one H100 over FLOPs a token",
                    "peak_flops": PEAK_FLOPS,
                    "flops_per_token": flops,
                    "tokens_per_second": model,
                },
                "versions": versions(),
                "git_revision": git_revision(),
                "results": rows,
            },
        )


if __name__ == "__main__":
    main()
