"""CPU training step of StableGPT against Transformers' Llama and Gemma 2 of the same shape.

Goals: the baseline is no slower than the peers; each technique adds at most 10 % to a
step, sigma-Reparam, caps and clips (which no fused CPU kernel knows) at most 25 %.

    python scripts/bench/cpu_step.py --output scripts/bench/results/cpu_step.json

Every round times each model once, in an order that changes, so that a machine that slows down slows
all of them; a ratio is taken within a round, and the median over rounds is reported.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_stable import StableGPTConfig, StableGPTForCausalLM
from hf_stable.model.configuration_stable_gpt import PRESETS
from hf_stable.optim import adamw, parameter_groups
from hf_stable.records import git_revision, versions, write_json

HIDDEN, LAYERS, HEADS, SEQUENCE, VOCAB = 256, 4, 4, 256, 8192
# Without a technique's fused kernel the score matrix is materialised, and sigma is computed anew.
LOOSE = {"soft_cap", "soft_clip", "qk_norm_cap", "sigma_reparam"}


def build(name: str) -> torch.nn.Module:
    """A StableGPT preset, or a peer with two-matrix work in its MLP equal to ours.

    A gated MLP has three matrices, so the peers' is 8/3 wide where ours is 4 wide.
    """
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": SEQUENCE,
        "tie_word_embeddings": False,
    }
    gated = {**shape, "intermediate_size": 8 * HIDDEN // 3 // 8 * 8}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**gated))
    if name == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**gated, sliding_window=SEQUENCE))
    sizes = gated if name == "gated_mlp" else shape
    return StableGPTForCausalLM(StableGPTConfig.from_preset(name, **sizes))


class Step:
    """One model's training step: forward, backward, clipping and AdamW, on one batch."""

    def __init__(self, name: str, batch_size: int) -> None:
        self.model = build(name).train()
        groups = parameter_groups(self.model, learning_rate=1e-3, weight_decay=0.1)
        self.optimizer = adamw(groups)
        self.ids = torch.randint(0, VOCAB, (batch_size, SEQUENCE))

    def seconds(self) -> float:
        start = time.perf_counter()
        self.model(self.ids, labels=self.ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start


def measure(names: list[str], batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round's step by model; two rounds of warm-up are left out."""
    steps = {name: Step(name, batch_size) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for round_number in range(rounds + 2):
        order.shuffle(names)
        for name in names:
            elapsed = steps[name].seconds()
            if round_number >= 2:
                seconds[name].append(elapsed)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of one model's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of 256 tokens")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    peers = ["llama", "gemma2"]
    seconds = measure([*PRESETS, *peers], arguments.batch_size, arguments.rounds)
    rows = []
    for name in [*peers, *PRESETS]:
        bound = None if name in (*peers, "baseline") else 1.25 if name in LOOSE else 1.10
        rows.append(
            {
                "model": name,
                "median_ms": 1e3 * statistics.median(seconds[name]),
                "over_llama": ratio(seconds, name, "llama"),
                "over_gemma2": ratio(seconds, name, "gemma2"),
                "over_baseline": ratio(seconds, name, "baseline"),
                "bound_over_baseline": bound,
            }
        )
    table = Table("model", "ms/step", "/ llama", "/ gemma2", "/ baseline", "goal")
    for row in rows:
        bound = row["bound_over_baseline"]
        table.add_row(
            row["model"],
            f"{row['median_ms']:.1f}",
            *(f"{row[f'over_{base}']:.3f}" for base in (*peers, "baseline")),
            "" if bound is None else f"<= {bound:.2f}",
        )
    Console().print(table)
    if arguments.output:
        shape = {
            "hidden": HIDDEN,
            "layers": LAYERS,
            "heads": HEADS,
            "sequence": SEQUENCE,
            "vocabulary": VOCAB,
            "batch_size": arguments.batch_size,
        }
        write_json(
            arguments.output,
            {
                "device": f"cpu, {arguments.threads} threads",
                "shape": shape,
                "rounds": arguments.rounds,
                "versions": versions(),
                "git_revision": git_revision(),
                "results": rows,
            },
        )


if __name__ == "__main__":
    main()
