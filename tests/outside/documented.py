"""The commands of README, docs and `--help`, and what a test runs for those too large for one."""

import re
from pathlib import Path
from typing import NamedTuple

from hf_stable.cli.parsers import build_parser

ROOT = Path(__file__).parents[2]

# What makes the quickstart's recipe a matter of seconds.
SMALL = (
    "model.hidden_size=32 model.num_hidden_layers=1 tokenizer.vocab_size=300 "
    "data.sequence_length=32 training.steps=4 training.global_batch_size=4 "
    "training.micro_batch_size=2 schedule.warmup=1 telemetry.every=2 training.evaluate_blocks=8"
)
_OWN_TEXT = "'data.train=[more.jsonl]' 'data.validation=[]'"


class Block(NamedTuple):
    """A block of commands, run from its first line to its last in one folder."""

    place: str
    lines: list[str]


class Elsewhere(NamedTuple):
    """A command that cannot run here: the reason, and the file whose tests run it."""

    reason: str
    file: str


def _lines(block: str) -> list[str]:
    """The commands of a block: continued lines joined, comments and output left out."""
    joined = re.sub(r"\\\n\s*", "", block)
    lines = [re.sub(r"\s+#\s.*$", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]


def blocks_of_documents() -> list[Block]:
    """Return the blocks of commands in README and docs."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        heading = ""
        for part in re.split(r"^(?=#+ )", path.read_text(encoding="utf-8"), flags=re.M):
            heading = part.splitlines()[0].lstrip("# ") if part.startswith("#") else heading
            for code in re.findall(r"^```bash\n(.*?)^```", part, re.M | re.S):
                found.append(Block(f"{path.name}, {heading}", _lines(code)))
    return found


def blocks_of_help() -> list[Block]:
    """Return the examples of every `--help`: lines that begin with two blanks and `hf-stable`."""
    parser = build_parser("0")
    subcommands = next(each.choices for each in parser._actions if each.dest == "subcommand")
    found = []
    for name, each in {"": parser, **subcommands}.items():
        text = re.sub(r"\\\n\s*", "", f"{each.description or ''}\n{each.epilog or ''}")
        examples = re.findall(r"^  (hf-stable (?!SUBCOMMAND).*)$", text, re.M)
        if examples:
            found.append(Block(f"hf-stable {name or ''} --help", _lines("\n".join(examples))))
    return found


# The commands with which --help begins: sample-text, check, train, generate.
QUICKSTART = blocks_of_help()[0].lines

# Documented command -> the same with other sizes, texts or folders, or where it is run instead. A
# command that is not here runs as it stands.
_CHECKOUT = Elsewhere("needs a checkout", ".ci/run")
_BENCH = Elsewhere("needs a GPU", "tests/test_gpu_first.py")
_HUB = Elsewhere("needs the Hub", "tests/hub/test_push.py")
_SERVER = Elsewhere("serves until it is stopped", "tests/clients/test_generation.py")
_SURVIVAL = SMALL.replace("training.steps=4", "training.steps=60") + " output=runs/survival"
INSTEAD: dict[str, str | Elsewhere] = {
    "git clone <this repository> hf_stable && cd hf_stable": _CHECKOUT,
    "scripts/quickstart.sh": _CHECKOUT,
    "source .venv/bin/activate": _CHECKOUT,
    QUICKSTART[0]: f"{QUICKSTART[0]} && sed -i '101,$d' runs/quickstart-text.jsonl",
    "hf-stable train quickstart": f"hf-stable train quickstart --set {SMALL}",
    "hf-stable train base/10m techniques/qk_norm --set optimizer.learning_rate=1e-2": (
        f"hf-stable train base/10m techniques/qk_norm --set {SMALL} {_OWN_TEXT} "
        "optimizer.learning_rate=1e-2 model.num_attention_heads=2 output=runs/10m"
    ),
    "hf-stable train base/10m techniques/qk_norm --set optimizer.learning_rate=1e-2 "
    "training.steps=600": (
        f"hf-stable train base/10m techniques/qk_norm --set {SMALL} {_OWN_TEXT} "
        "optimizer.learning_rate=1e-2 model.num_attention_heads=2"
    ),
    "hf-stable train quickstart --set training.steps=600 --resume longer": (
        f"hf-stable train quickstart --set {SMALL.replace('steps=4', 'steps=6')} --resume longer"
    ),
    "hf-stable train mine.yaml --set 'data.train=[my/texts, more.jsonl]' output=runs/mine": (
        f"hf-stable train mine.yaml --set {SMALL} 'data.train=[my/texts, more.jsonl]' "
        "output=runs/mine"
    ),
    "torchrun --nproc_per_node 8 -m hf_stable train base/830m --set training.sharding=fsdp2": (
        f"torchrun --nproc_per_node 2 -m hf_stable train base/830m --set {SMALL} {_OWN_TEXT} "
        "training.sharding=fsdp2 model.num_attention_heads=2 training.tokens=null "
        "tokenizer.kind=bpe data.holdout=0.05 training.compile=false output=runs/830m"
    ),
    "hf-stable evaluate <any causal LM> --data text.txt": (
        "hf-stable evaluate path/to/llama --data text.txt"
    ),
    "hf-stable train quickstart --set model.preset=baseline output=runs/quickstart-baseline": (
        f"hf-stable train quickstart --set {SMALL} model.preset=baseline "
        "output=runs/quickstart-baseline"
    ),
    "hf-stable train warm_start/qk_norm": f"hf-stable train warm_start/qk_norm --set {SMALL}",
    "kill -TERM %1; wait": (
        "until grep -q loss runs/survival/metrics.jsonl; do sleep 0.1; done; kill -TERM %1; wait"
    ),
    "hf-stable sweep sweeps/table3_cpu --workers 2": "hf-stable sweep small.yaml --workers 2",
    "hf-stable-lm-eval run --model hf --model_args pretrained=runs/quickstart/model "
    "--include_path tasks --tasks my_documents --device cpu --output_path scores": Elsewhere(
        "needs a task", "tests/clients/test_lm_eval.py"
    ),
    "scripts/study_gpu.sh": Elsewhere("needs a GPU", "tests/sweep/test_study_gpu.py"),
    "scripts/gpu_first.sh --call 1 runs/gpu_first": _BENCH,
    "scripts/gpu_first.sh --call 2 runs/gpu_first": _BENCH,
    "scripts/gpu_first.sh --dry runs/rehearsal": _BENCH,
    "hf-stable-serve runs/quickstart/model --device cpu --port 8000": _SERVER,
    "transformers chat runs/quickstart/model http://localhost:8000 max_new_tokens=8": _SERVER,
    "accelerate estimate-memory org/name --library_name transformers --trust_remote_code": (
        Elsewhere("needs the Hub", "tests/clients/test_loading.py")
    ),
    "hf-stable push exports/quickstart --output OWNER/NAME --private --tag v1": _HUB,
}
_SURVIVAL_TAIL = "training.checkpoint_every=20 training.micro_batch_size=4"
_TORCHRUN = (
    "torchrun --nproc_per_node 2 -m hf_stable train quickstart --set training.sharding=fsdp2 "
)
for documented in (
    f"PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1 {_TORCHRUN}{_SURVIVAL_TAIL} &",
    f"{_TORCHRUN}{_SURVIVAL_TAIL}",
    "hf-stable train quickstart --set training.checkpoint_every=20",
):
    INSTEAD[documented] = documented.replace(
        "--set ", f"--set {_SURVIVAL} training.global_batch_size=8 "
    )

# What a command is said to do: expressions that its block's output has.
CLAIMS = {
    "hf-stable check quickstart": ["this recipe works"],
    "hf-stable check mine.yaml": ["this recipe works"],
    "hf-stable check base/830m --gpus 32": ["826.4 M", "GFLOP", "memory", "steps"],
    "hf-stable recipes list": ["base/10m ", "slurm/train.sh "],
    "hf-stable recipes show techniques/qk_norm": ["preset: qk_norm"],
    "hf-stable evaluate runs/quickstart": ["perplexity", "bigram table", "unigram table"],
    "hf-stable convert path/to/llama --output runs/ours": ["logits differ by"],
    "hf-stable train warm_start/qk_norm": ["perplexity .* before", "after"],
    "hf-stable diagnose runs/a": ["alarm"],
    "hf-stable sweep sweeps/table3_cpu --dry-run": ["240", "FLOP", "time|hours|minutes"],
    "hf-stable push exports/quickstart --output OWNER/NAME --private --dry-run": [
        "model.safetensors"
    ],
}
