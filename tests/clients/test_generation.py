"""Laws of generating by clients: a pipeline, and a server that speaks OpenAI's protocol."""

import importlib.util
import os
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..warm import python

PACKAGE = str(Path(__file__).parents[2])
START_SECONDS = 300


def greedy(folder: Path, prompt: str, count: int) -> str:
    """What the model says by argmax over whole passes, without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_the_guides_pipeline_is_single_batched_and_streamed(
    lines: Callable[[str, str], str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scope: dict[str, Any] = {}
    exec(lines("pipeline", "python"), scope)
    prompts = ("In the beginning", "And God said")
    wanted = [prompt + greedy(folder, prompt, 8) for prompt in prompts]
    assert scope["one"][0]["generated_text"] == wanted[0]
    # The shorter prompt is padded.
    assert [each[0]["generated_text"] for each in scope["two"]] == wanted
    assert wanted[0] in capsys.readouterr().out


def commands(lines: Callable[[str, str], str]) -> list[list[str]]:
    block = lines("transformers serve", "bash")
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.fixture
def server(lines: Callable[[str, str], str], folder: Path) -> Iterator[int]:
    """The guide's server, on a free port."""
    for package in ("fastapi", "openai", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is absent")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    script, *arguments = commands(lines)[0]
    assert script == "hf-stable-serve"
    arguments[arguments.index("8000")] = str(port)
    program = "from hf_stable.clients import serve; serve()"
    environment = {**os.environ, "PYTHONPATH": PACKAGE, "HF_HUB_OFFLINE": "1"}
    with Path("serve.log").open("w") as log:
        process = subprocess.Popen(
            [python(), "-c", program, *arguments],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        _wait(f"http://localhost:{port}/health", process)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(address: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail(Path("serve.log").read_text()[-2000:])


def test_the_guides_server_answers(
    lines: Callable[[str, str], str], folder: Path, server: int
) -> None:
    scope: dict[str, Any] = {}
    exec(lines("transformers serve", "python").replace("8000", str(server)), scope)
    answer = scope["answer"]
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].message.role == "assistant"
    completion = scope["client"].completions.create(
        model=str(folder), prompt="In the beginning", max_tokens=8, temperature=0.0
    )
    assert completion.choices[0].text == greedy(folder, "In the beginning", 8)
    # Without main(), which looks for a newer version; and a Hub that is off would be localhost too.
    script, *arguments = shlex.split(shlex.join(commands(lines)[1]).replace("8000", str(server)))
    program = f"import sys; from {script}.cli.{script} import app; app()"
    chat = subprocess.run(
        [python(), "-c", program, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
        input="In the beginning\n",
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert "8 tokens in" in chat.stdout, chat.stdout + chat.stderr
