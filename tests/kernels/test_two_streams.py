"""Head and loss on two CUDA streams, whose order is proved on a CPU: it never ran on a GPU.

Streams that remember what each of them has waited for stand for CUDA's. Every operator notes the
bytes it reads and writes; two accesses of the same bytes, one of them a write, must be ordered.
"""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_stable.kernels import linear_cross_entropy as kernels
from hf_stable.model import loss_stable_gpt as plain


class Stream:
    """Knows of each stream how many of its operators have ended when the next one here begins."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: dict[str, int] = {name: 0}

    def _join(self, event: dict[str, int]) -> None:
        for name, count in event.items():
            self.seen[name] = max(self.seen.get(name, 0), count)

    def wait_event(self, event: dict[str, int]) -> None:
        self._join(event)

    def wait_stream(self, other: "Stream") -> None:
        self._join(other.record_event())

    def record_event(self) -> dict[str, int]:
        return dict(self.seen)


class Races(TorchDispatchMode):
    """Accesses that nothing orders, by operator and stream."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = Stream("main"), Stream("side")
        self.current = self.main
        self.accesses: list[tuple[range, bool, str, int, str]] = []
        self.found: list[str] = []
        self.alive: list[torch.Tensor] = []  # bytes that are given away would look shared
        self.recorded: set[int] = set()

    @contextmanager
    def use(self, stream: Stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or "empty" in str(func):
            return result
        arguments = func._schema.arguments
        named = list(zip(arguments, args, strict=False))
        named += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
        self.current.seen[self.current.name] += 1
        for argument, value in named:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            self._note(value, writes, str(func))
        self._note(result, True, str(func))
        return result

    def _note(self, value: Any, writes: bool, operator: str) -> None:
        name, place = self.current.name, self.current.seen[self.current.name]
        for tensor in tree_leaves(value):
            if not isinstance(tensor, torch.Tensor) or not tensor.numel():
                continue
            self.alive.append(tensor)
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start, size = tensor.data_ptr(), tensor.element_size()
            touched = range(start, start + (last + 1) * size)
            for other, wrote, stream, order, what in self.accesses:
                overlap = other.start < touched.stop and touched.start < other.stop
                ordered = stream == name or self.current.seen.get(stream, 0) >= order
                if overlap and (wrote or writes) and not ordered:
                    self.found.append(f"{operator} on {name} and {what} on {stream}")
            self.accesses.append((touched, writes, name, place, operator))


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> Races:
    mode = Races()
    monkeypatch.setattr(kernels, "_side_stream", lambda _: mode.side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: mode.current)
    monkeypatch.setattr(torch.cuda, "stream", mode.use)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, _: mode.recorded.add(self.data_ptr())
    )
    return mode


def _run(chunk_function: plain.ChunkFunction, tokens: int) -> list[torch.Tensor]:
    """Losses and gradients in three chunks, the last one short."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 8, generator=generator).requires_grad_()
    weight = torch.randn(23, 8, generator=generator).requires_grad_()
    labels = torch.randint(0, 23, (tokens,), generator=generator)
    losses = plain.chunked_linear_cross_entropy(
        hidden, weight, labels,
        num_items=None, cap=5.0, z_loss=1e-2, rows=300,
        row_function=plain.cross_entropy_rows, chunk_function=chunk_function,
    )  # fmt: skip
    return [*losses, *torch.autograd.grad(losses[0], (hidden, weight))]


def test_no_operator_touches_what_the_other_stream_works_on(races: Races) -> None:
    with races:
        _run(kernels.chunk_on_two_streams, 650)
    assert races.found == []
    assert {name for _, _, name, _, _ in races.accesses} == {"main", "side"}
    assert races.recorded


@pytest.mark.parametrize("method", ["wait_stream", "wait_event"])
def test_each_wait_is_needed(method: str, races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof above can fail: without either kind of wait there are races."""
    monkeypatch.setattr(Stream, method, lambda *_: None)
    with races:
        _run(kernels.chunk_on_two_streams, 650)
    assert races.found


def test_row_kernels_run_beside_gemms(races: Races, monkeypatch: pytest.MonkeyPatch) -> None:
    """GEMMs wait for a half of the rows after all logits are on their way, never before."""
    waits: list[str] = []
    for method in ("wait_event", "wait_stream"):
        original = getattr(Stream, method)

        def note(stream: Stream, other: Any, method=method, original=original) -> None:
            waits.append(f"{stream.name} {method}")
            original(stream, other)

        monkeypatch.setattr(Stream, method, note)
    _run(kernels.chunk_on_two_streams, 300)
    assert waits == ["side wait_stream"] * 2 + ["main wait_event"] * 2


@pytest.mark.parametrize("tokens", [0, 1, 300, 650])
def test_two_streams_compute_what_one_does(tokens: int, races: Races) -> None:
    found = _run(kernels.chunk_on_two_streams, tokens)
    expected = _run(plain.chunk_in_order, tokens)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_cpu_has_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "chunk_on_two_streams", None)
    inputs = torch.randn(5, 16), torch.randn(40, 16), torch.arange(5)
    one, two = (kernels.linear_cross_entropy(*inputs, two_streams=two) for two in (False, True))
    assert torch.equal(one[0], two[0])
