"""Laws of the head's kernel: as exact as plain torch, in chunks, without waiting for the host."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stable.kernels import linear_cross_entropy as kernels
from hf_stable.kernels.linear_cross_entropy import cross_entropy_rows, linear_cross_entropy
from hf_stable.model import loss_stable_gpt as plain
from hf_stable.model.configuration_stable_gpt import StableGPTConfig
from hf_stable.model.slots_stable_gpt import StableGPTHead

from ..techniques import relative_error
from .head_worker import head_inputs
from .reference import DEVICE

# 37 is a multiple of nothing; rows of 40 begin at multiples of eight.
VOCABS = (37, 40)
TERMS = ("loss", "cross entropy", "z-loss", "grad hidden", "grad weight")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_BYTES, LANES = kernels.BLOCK_BYTES, kernels.LAUNCH["LANES"]
ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None:
    assert torch.empty(3).isnan().all()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 to 64 logits: several a row, and none divides a vocabulary."""
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 128)
    monkeypatch.setitem(kernels.LAUNCH, "LANES", 8)


def _inputs(
    tokens: int = 11, vocab: int = 37, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head, labels; labels hold the first and the last id, and none at 2 and 7."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 16, generator=generator) * scale
    weight = torch.randn(vocab, 16, generator=generator)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[0], labels[1] = 0, vocab - 1
    labels[2::5] = torch.tensor(-100)
    hidden, weight = (x.to(DEVICE, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, labels.to(DEVICE)


def _direct(hidden, weight, labels, cap=None, z_loss=0.0, num_items=None) -> list[torch.Tensor]:
    """Loss, cross entropy, z-loss and both gradients by float64 autograd of the formula."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    kept = labels >= 0
    log_z = logits.logsumexp(-1)
    items = kept.sum() if num_items is None else num_items
    picked = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    ce = (log_z - picked)[kept].sum() / items
    z = z_loss * log_z[kept].square().sum() / items
    gradients = torch.autograd.grad(ce + z, (hidden, weight))
    return [(ce + z).detach(), ce.detach(), z.detach(), *gradients]


def _with_gradients(function, hidden, weight, labels, **options) -> list[torch.Tensor]:
    losses = function(hidden, weight, labels, **options)
    gradients = torch.autograd.grad(losses[0], (hidden, weight))
    return [losses[0].detach(), *losses[1:], *gradients]


def _assert_as_exact_as_plain(inputs, exact=None, **options) -> None:
    """Errors at most twice those of plain torch in the same dtype, or a few roundings."""
    formula = {name: value for name, value in options.items() if name != "chunk_bytes"}
    exact = exact or _direct(*inputs, **formula)
    ours = _with_gradients(linear_cross_entropy, *inputs, **options)
    theirs = _with_gradients(plain.linear_cross_entropy, *inputs, **options)
    roundings = 2 * torch.finfo(inputs[0].dtype).eps
    for name, got, other, want in zip(TERMS, ours, theirs, exact, strict=True):
        bound = max(2 * relative_error(other, want), roundings)
        assert relative_error(got, want) <= bound or (got == want).all(), name


# Every cap, z-loss and chunk together, and every pair of these with what counts the targets.
FORMS = [
    ((None, 1.5)[c], (0.0, 0.3)[z], (None, 5)[(c + z + r) % 2], bool((z + r) % 2), (1, 3, 100)[r])
    for c, z, r in itertools.product(range(2), range(2), range(3))
]


@pytest.mark.parametrize(("cap", "z_loss", "num_items", "ignored", "rows"), FORMS)
def test_all_forms_equal_float64_autograd(cap, z_loss, num_items, ignored, rows) -> None:
    hidden, weight, labels = _inputs(7)
    labels = labels if ignored else labels.clamp(min=0)
    _assert_as_exact_as_plain(
        (hidden, weight, labels),
        cap=cap,
        z_loss=z_loss,
        num_items=num_items,
        chunk_bytes=4 * 37 * rows,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("cap", [None, 1.5])
def test_all_dtypes_are_as_exact_as_plain_torch(dtype, vocab, cap) -> None:
    inputs = _inputs(8, vocab, dtype)
    bytes_of_five = dtype.itemsize * vocab * 5
    _assert_as_exact_as_plain(inputs, cap=cap, z_loss=1e-2, chunk_bytes=bytes_of_five)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("vocab", [70_001, 70_008])
def test_blocks_of_the_gpu_and_a_large_vocabulary(cap, vocab, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_BYTES", BLOCK_BYTES)
    monkeypatch.setitem(kernels.LAUNCH, "LANES", LANES)
    _assert_as_exact_as_plain(_inputs(4, vocab), cap=cap, z_loss=1e-4)
    _assert_as_exact_as_plain(_inputs(4, vocab, torch.float16), cap=cap, z_loss=1e-4)


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_of_ten_thousand(cap, sign) -> None:
    hidden, weight, labels = _inputs()
    logits = (hidden @ weight.T).detach()
    hidden = (hidden.detach() * (sign * 1e4 / logits.abs().max())).requires_grad_()
    assert (hidden @ weight.T).abs().max() > 9_999
    losses = _with_gradients(linear_cross_entropy, hidden, weight, labels, cap=cap, z_loss=1e-4)
    assert all(tensor.isfinite().all() for tensor in losses)
    _assert_as_exact_as_plain((hidden, weight, labels), cap=cap, z_loss=1e-4)


def test_rows_on_the_cap_have_a_loss_and_no_gradient() -> None:
    hidden, weight, labels = _inputs(scale=1e3)
    weight = weight.detach().sign().requires_grad_()
    hidden = hidden.detach().abs().requires_grad_()
    exact = _direct(hidden, weight, labels, cap=1.0)
    got = _with_gradients(linear_cross_entropy, hidden, weight, labels, cap=1.0)
    assert relative_error(got[0], exact[0]) < 1e-6
    free = _with_gradients(linear_cross_entropy, hidden, weight, labels, cap=1e6)
    for saturated, free_gradient in zip(got[3:], free[3:], strict=True):
        assert saturated.norm() < 1e-5 * free_gradient.norm()


@pytest.mark.parametrize("tokens", [0, 6])
def test_without_targets_the_loss_is_nan_and_gradients_are_zero(tokens: int) -> None:
    hidden, weight, labels = (x[:tokens] if i != 1 else x for i, x in enumerate(_inputs()))
    labels = torch.full_like(labels, -100)
    loss, _, _, *gradients = _with_gradients(linear_cross_entropy, hidden, weight, labels)
    assert math.isnan(loss)
    assert all((gradient == 0).all() for gradient in gradients)
    loss, *_ = _with_gradients(linear_cross_entropy, hidden, weight, labels, num_items=3)
    assert loss == 0


def test_a_row_without_target_reads_nothing() -> None:
    """Whatever its logits are, and they may be NaN, it adds no loss and no gradient."""
    logits = torch.randn(3, 37, device=DEVICE)
    logits[1] = math.nan
    ce, squares = cross_entropy_rows(
        logits, torch.tensor([4, -1, 36], device=DEVICE), 2.0, 0.1, True
    )
    assert ce[1] == 0 and squares[1] == 0 and (logits[1] == 0).all()
    assert ce.isfinite().all() and logits.isfinite().all()


@pytest.mark.parametrize("label", [37, 38, 2**40])
def test_a_label_beyond_the_vocabulary_makes_loss_and_gradient_nan(label: int) -> None:
    """No host is asked, and no optimizer may step on it."""
    hidden, weight, labels = _inputs()
    labels[3] = label
    loss, _, _, *gradients = _with_gradients(linear_cross_entropy, hidden, weight, labels)
    assert loss.isnan() and gradients[0][3].isnan().all() and gradients[1].isnan().any()


def test_hidden_minus_infinity_is_a_word_that_cannot_come() -> None:
    logits = torch.randn(2, 37, device=DEVICE)
    logits[0, :20], logits[1, 20:] = -math.inf, -math.inf
    labels = torch.tensor([30, 3], device=DEVICE)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    ce, _ = cross_entropy_rows(logits, labels, None, 0.0, True)
    torch.testing.assert_close(ce, expected)
    assert (logits[0, :20] == 0).all() and (logits[1, 20:] == 0).all()


def test_a_shift_of_all_logits_changes_no_loss_and_no_gradient() -> None:
    """Eighths and 8192 have exact sums in fp32; log Z - logit would lose the loss's last digits."""
    labels = torch.tensor([3, 36, 0], device=DEVICE)
    logits = (torch.randn(3, 37, device=DEVICE) * 8).round() / 8
    shifted = logits + 8192
    losses = [cross_entropy_rows(x, labels, None, 0.0, True)[0] for x in (logits, shifted)]
    assert torch.equal(*losses) and torch.equal(logits, shifted)


def test_strided_hidden_states_and_labels() -> None:
    hidden, weight, labels = _inputs()
    wide = torch.empty(11, 2, 16, device=DEVICE)
    wide[:, 1] = hidden.detach()
    strided = wide[:, 1].requires_grad_()
    pairs = torch.stack((labels, labels), dim=1)
    expected = _with_gradients(linear_cross_entropy, hidden, weight, labels)
    actual = _with_gradients(linear_cross_entropy, strided, weight, pairs[:, 0])
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_float64_goes_the_way_of_plain_torch() -> None:
    inputs = _inputs(dtype=torch.float64)
    got = _with_gradients(linear_cross_entropy, *inputs, cap=2.0, z_loss=0.1)
    for tensor, want in zip(got, _direct(*inputs, cap=2.0, z_loss=0.1), strict=True):
        assert tensor.dtype == torch.float64 and relative_error(tensor, want) < 1e-12


@pytest.mark.skipif(DEVICE == "cuda", reason="compares with the GEMMs of a CPU")
def test_it_follows_autocast() -> None:
    hidden, weight, labels = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _with_gradients(linear_cross_entropy, hidden, weight, labels, z_loss=1e-3)
        want = _with_gradients(plain.linear_cross_entropy, hidden, weight, labels, z_loss=1e-3)
    exact = _direct(hidden, weight, labels, z_loss=1e-3)
    for ours, theirs, truth in zip(got, want, exact, strict=True):
        assert ours.dtype == torch.float32
        assert 1e-5 < relative_error(ours, truth) < 2 * max(relative_error(theirs, truth), 1e-4)


def test_a_large_scale_of_a_grad_scaler_reaches_fp16_gradients() -> None:
    """Rare words: gradients of 1 / tokens would be 0 in fp16, and the scale itself is inf in it."""
    hidden, weight, labels = _inputs(dtype=torch.float16)
    scale, items = 2.0**17, 2**24
    loss, *_ = linear_cross_entropy(hidden, weight, labels, num_items=items)
    scaled = torch.autograd.grad(loss * scale, (hidden, weight))
    exact = _direct(hidden, weight, labels, num_items=items)[3:]
    for got, want in zip(scaled, exact, strict=True):
        assert relative_error(got, want * scale) < 5e-3


class _Operations(TorchDispatchMode):
    """Names of all operations, and the number of elements of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result

    def count(self, name: str) -> int:
        return sum(name in found for found in self.names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tensor_holds_the_logits_of_all_tokens(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 4096)
    monkeypatch.setitem(kernels.LAUNCH, "LANES", 256)
    vocab, rows, largest = 1000, 16, []
    for tokens in (32, 40):
        inputs = _inputs(tokens, vocab, dtype)
        with _Operations() as operations:
            loss, *_ = linear_cross_entropy(
                *inputs, cap=30.0, z_loss=1e-4, chunk_bytes=dtype.itemsize * vocab * rows
            )
            loss.backward()
        largest.append(operations.largest)
    # A chunk of logits, and as many elements in the head's gradient, which has 16 columns.
    assert largest == [vocab * rows] * 2


def test_the_host_waits_for_nothing() -> None:
    inputs = _inputs()
    for num_items in (None, 7, torch.tensor(7, device=DEVICE)):
        with _Operations() as operations:
            loss, *_ = linear_cross_entropy(*inputs, cap=2.0, z_loss=0.1, num_items=num_items)
            loss.backward()
        assert operations.count("cross_entropy_rows") == 1
        # A scalar read, a branch on a tensor, or a number copied to the device.
        for name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "lift_fresh"):
            assert operations.count(f"aten::{name}") == 0, name


def test_evaluation_computes_the_same_loss_and_nothing_else() -> None:
    hidden, weight, labels = _inputs()
    trained = linear_cross_entropy(hidden, weight, labels, cap=2.0, z_loss=0.1)
    with torch.no_grad(), _Operations() as operations:
        evaluated = linear_cross_entropy(hidden, weight, labels, cap=2.0, z_loss=0.1)
    assert all(torch.equal(a, b) for a, b in zip(trained, evaluated, strict=True))
    assert not evaluated[0].requires_grad
    # The logits' GEMM alone, and logits that nobody overwrites.
    assert operations.count("aten::mm") == 1 and operations.count("addmm") == 0
    logits = (hidden @ weight.T).detach()
    before = logits.clone()
    cross_entropy_rows(logits, labels, 2.0, 0.1, False)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_costs_none(frozen: str) -> None:
    hidden, weight, labels = _inputs()
    both = _with_gradients(linear_cross_entropy, hidden, weight, labels)[3:]
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    with _Operations() as operations:
        linear_cross_entropy(hidden, weight, labels)[0].backward()
    assert operations.count("aten::mm") + operations.count("aten::addmm") == 2
    expected = [None, both[1]] if frozen == "hidden" else [both[0], None]
    for leaf, want in zip((hidden, weight), expected, strict=True):
        assert (leaf.grad is None) if want is None else torch.equal(leaf.grad, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_the_head_is_summed_over_chunks_in_fp32(dtype: torch.dtype) -> None:
    """A rare word after a frequent one: 448 + 7 / 8 is 448 in bf16, however often."""
    hidden = torch.ones(21, 1, device=DEVICE, dtype=dtype)
    hidden[0] = 512
    weight = torch.zeros(8, 1, device=DEVICE, dtype=dtype, requires_grad=True)
    labels = torch.zeros(21, dtype=torch.int64, device=DEVICE)
    loss, *_ = linear_cross_entropy(
        hidden, weight, labels, num_items=1, chunk_bytes=dtype.itemsize * 8
    )
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = -(512 + 20) * 7 / 8
    assert gradient[0].item() == pytest.approx(expected, rel=torch.finfo(dtype).eps)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_operator_is_known_to_torch(cap, gradient) -> None:
    logits, labels = torch.randn(3, 37, device=DEVICE), torch.tensor([0, -1, 36], device=DEVICE)
    torch.library.opcheck(cross_entropy_rows, (logits, labels, cap, 0.1, gradient))


def _head(vocab: int = 37) -> StableGPTHead:
    config = StableGPTConfig(
        vocab_size=vocab,
        hidden_size=16,
        num_attention_heads=2,
        final_logit_softcapping=5.0,
        z_loss=1e-2,
    )
    head = StableGPTHead(config).to(DEVICE)
    torch.nn.init.normal_(head.weight)
    return head


def test_the_head_compiles_to_one_graph_around_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plain.LINEAR_CROSS_ENTROPY_FUNCTIONS, DEVICE, linear_cross_entropy)
    monkeypatch.setitem(plain.CHUNK_BYTES, "cuda", 4 * 37 * 4)
    head, (hidden, _, labels) = _head(), _inputs(6)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    expected, actual = [], []
    for call, found in ((head, expected), (compiled, actual)):
        losses = call(hidden[None], labels[None])
        found += [*losses, *torch.autograd.grad(losses[0], (hidden, head.weight))]
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_the_head_asks_the_interface_and_otherwise_takes_plain_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return linear_cross_entropy(*args, **options)

    head, (hidden, _, labels) = _head(), _inputs()
    monkeypatch.setitem(plain.LINEAR_CROSS_ENTROPY_FUNCTIONS, "meta", counted)
    absent = head(hidden[None], labels[None])
    assert not calls
    monkeypatch.setitem(plain.LINEAR_CROSS_ENTROPY_FUNCTIONS, DEVICE, counted)
    present = head(hidden[None], labels[None])
    assert calls == [{"num_items": None, "cap": 5.0, "z_loss": 1e-2}]
    for got, want in zip(present, absent, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulation_adds_an_outer_product(first: bool, dtype: torch.dtype) -> None:
    total = torch.full((5, 3), math.nan if first else 2.0, device=DEVICE)
    grad = torch.randn(4, 5, device=DEVICE).to(dtype)
    tokens = torch.randn(4, 3, device=DEVICE).to(dtype)
    expected = grad.double().T @ tokens.double() + (0 if first else 2)
    plain._accumulate(total, grad, tokens, first)
    assert relative_error(total, expected) < 2 * torch.finfo(dtype).eps


def _run(arguments: list[str], **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.skipif(DEVICE == "cuda", reason="two gloo processes on one CPU")
def test_two_processes_with_the_kernel_are_one_without() -> None:
    """DDP and FSDP2 (sharded head), each half of the tokens, against all tokens in plain torch."""
    worker = str(Path(__file__).with_name("head_worker.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker]
    found = json.loads(_run(launcher, OMP_NUM_THREADS="1"))
    hidden, weight, labels = head_inputs()
    expected = _with_gradients(
        plain.linear_cross_entropy, hidden, weight, labels, cap=5.0, z_loss=1e-2
    )
    for sharding in ("ddp", "fsdp2"):
        assert found[sharding]["loss"] == pytest.approx(expected[0].item(), rel=1e-6)
        for name, want in zip(("hidden", "weight"), expected[3:], strict=True):
            assert relative_error(torch.tensor(found[sharding][name]), want.cpu()) < 1e-6
