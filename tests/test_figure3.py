"""Laws of Figure 3: what growing logits do to a softmax, and what a cap cannot let happen."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import figure3  # noqa: E402

seeds = st.integers(0, 2**31)
keys = st.integers(2, 40)


def lowest_entropy(num_keys: int, cap: float) -> float:
    """The least entropy over log(K) of probabilities whose ratios are at most exp(2 cap).

    Entropy is concave and the set of such probabilities a polytope, so that the least is at a
    corner: some of the keys at the largest probability, the others at the smallest.
    """
    entropies = []
    for at_top in range(1, num_keys):
        logits = torch.zeros(num_keys, dtype=torch.float64)
        logits[:at_top] = 2 * cap
        probs = logits.softmax(dim=0)
        entropies.append(torch.special.entr(probs).sum().item() / math.log(num_keys))
    return min(entropies)


@given(seed=seeds, num_keys=keys)
@settings(max_examples=30, deadline=None)
def test_without_a_cap_the_row_goes_one_hot(seed: int, num_keys: int) -> None:
    logits = figure3.random_logits(num_keys, seed)
    rows = [figure3.row_at(logits, scale, None) for scale in figure3.SCALES]
    for smaller, larger in itertools.pairwise(rows):
        assert larger.entropy <= smaller.entropy + 1e-12
        assert larger.probs.max() >= smaller.probs.max() - 1e-12
    top, second = logits.topk(2).values.tolist()
    far = figure3.row_at(logits, 60 / max(top - second, 1e-9), None)
    assert far.entropy < 1e-12 and far.probs.max() > 1 - 1e-12 and far.gradient < 1e-12


@given(seed=seeds, num_keys=keys, cap=st.floats(0.5, 10), scale=st.sampled_from(figure3.SCALES))
@settings(max_examples=60, deadline=None)
def test_with_a_cap_it_cannot(seed: int, num_keys: int, cap: float, scale: float) -> None:
    row = figure3.row_at(figure3.random_logits(num_keys, seed), scale, cap)
    assert row.probs.max() / row.probs.min() <= math.exp(2 * cap) * (1 + 1e-9)
    assert row.entropy >= lowest_entropy(num_keys, cap) - 1e-12


@given(seed=seeds, num_keys=keys)
@settings(max_examples=20, deadline=None)
def test_small_logits_do_not_notice_the_cap(seed: int, num_keys: int) -> None:
    logits = figure3.random_logits(num_keys, seed)
    plain, capped = (figure3.row_at(logits, 1e-3, cap) for cap in (None, 10.0))
    # tanh(x) is x - x^3 / 3, and here x is below 1e-3.
    torch.testing.assert_close(capped.probs, plain.probs, rtol=1e-8, atol=0)
    assert capped.gradient == pytest.approx(plain.gradient, rel=1e-5)


def test_the_jacobian_is_that_of_a_softmax() -> None:
    row = figure3.row_at(figure3.random_logits(7, 0), 2.0, None)
    expected = torch.diag(row.probs) - torch.outer(row.probs, row.probs)
    assert row.gradient == pytest.approx(torch.linalg.matrix_norm(expected).item(), rel=1e-12)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_command_writes_a_figure_and_a_table(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"figure.{ending}"
    figure3.main(["--output", str(file)])
    assert file.read_bytes().lstrip()[:5] in (b"<?xml", b"\x89PNG\r")
    assert "scale" in capsys.readouterr().out


def test_a_cap_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        figure3.main(["--cap", "0"])
    assert "--cap" in capsys.readouterr().err
