"""Laws of the figures: each is drawn from its numbers, shows every one, or says what is missing."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from hf_stable.telemetry.reading import layer_figures
from hf_stable.telemetry.reading.drawing import curve, exponent_text, plain_text, styled, to_svg
from hf_stable.telemetry.reading.heat import NOT_FINITE
from hf_stable.telemetry.reading.history import History
from hf_stable.telemetry.reading.looks import dress
from hf_stable.telemetry.reading.page import page

from .drawn import LAYERS, drawn, not_a_number, only, small, without, write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[History]:
    return write_pair(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def figures(pair: list[History]) -> dict[str, str]:
    """SVG by key of the pair's figures, of which none is left out; empty except for the tables."""
    found, left_out = drawn(pair, "table-1", "table-2")
    assert not left_out
    return found


LOST = {
    "qkv/output_l2": math.inf,
    "qkv/output_rms": math.nan,
    "attention/max_logit": -math.inf,
    "attention/entropy": math.nan,
    "optimizer/adam_ratio": math.nan,
}


MARKED = ("adam-ratio", "table-1", "qkv-output", "max-logit", "heads-run-0", "entropy", "loss")


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Figures of a small run whose numbers are all finite."""
    return drawn([small(tmp_path_factory.mktemp("fine"))], *MARKED)[0]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Figures of the same run after it lost its loss and the numbers of LOST."""
    changes = {f"layers.1.{name}": not_a_number(20, instead) for name, instead in LOST.items()}
    run = small(
        tmp_path_factory.mktemp("broken"),
        changes=changes,
        loss=lambda step, loss: math.nan if step > 20 else loss,
    )
    return drawn([run], *MARKED)[0]


def test_all_figures_are_there_for_runs_with_all_numbers(figures: dict[str, str]) -> None:
    assert {"loss", "rates", "table-1", "table-2", "head", "adam-ratio"} <= figures.keys()
    assert {each.key for each in layer_figures.MAPS} <= figures.keys()
    assert {"heads-run-0", "heads-run-1"} <= figures.keys()


def test_the_tables_show_the_papers_norms_of_the_second_block(figures: dict[str, str]) -> None:
    for place in ("QKV", "Proj", "FC1", "FC2"):
        for norm in ("‖W‖₂", "‖X‖₂", "‖Y‖₂"):
            assert f"{place}: {norm}" in figures["table-1"]
        for norm in ("‖∂L/∂W‖₂", "‖∂L/∂X‖₂"):
            assert f"{place}: {norm}" in figures["table-2"]
    # Each panel has a curve of each run.
    assert figures["table-1"].count('class="run-0"') == figures["table-1"].count('class="run-1"')
    assert figures["table-1"].count('class="run-0"') == 12


def test_a_missing_series_leaves_its_figure_out_and_says_so(
    fine: dict[str, str], tmp_path: Path
) -> None:
    bare = [without(small(tmp_path / "run"), "attention/entropy", "_bound")]
    figures, left_out = drawn(bare)
    lost = {"entropy", "mlp-bound", "attention-bound", "heads-run-0"}
    assert lost <= fine.keys() and not lost & figures.keys()
    assert "Attention entropy" in left_out and all(left_out.values())
    with only():
        html = page(bare)
    assert 'id="left-out"' in html
    assert all(title.split(" (")[0] in html for title in left_out)


def test_a_run_without_telemetry_still_has_its_loss(tmp_path: Path) -> None:
    figures, left_out = drawn([small(tmp_path / "run", every=0)])
    assert set(figures) == {"loss", "rates"} and len(left_out) > 5


def test_a_panel_that_no_run_has_is_not_an_empty_box(tmp_path: Path) -> None:
    history = without(small(tmp_path / "run"), "fc2/output_l2")
    figures, _ = drawn([history], "table-1")
    assert "FC1: ‖Y‖₂" in figures["table-1"] and "FC2: ‖Y‖₂" not in figures["table-1"]
    assert figures["table-1"].count("patch_2") == 11


def test_other_families_have_their_own_maps(tmp_path: Path) -> None:
    history = small(tmp_path / "run")
    renamed = {
        name.replace("qkv", other): column
        for name, column in history.telemetry.items()
        for other in (("q", "k", "v") if "qkv" in name else ("",))
    }
    figures, left_out = drawn([dataclasses.replace(history, telemetry=renamed)], "table-1")
    assert all(f"{place}: ‖W‖₂" in figures["table-1"] for place in ("q", "k", "v", "Proj"))
    assert "Output of QKV" in left_out


def test_what_is_not_finite_is_marked(fine: dict[str, str], broken: dict[str, str]) -> None:
    assert 'class="run-0"' in broken["adam-ratio"] and '"run-0"' not in fine["adam-ratio"]
    # One more element of the run: crosses. Heat maps say what their colour means.
    count = broken["table-1"].count('class="run-0"')
    assert count == fine["table-1"].count('class="run-0"') + 1
    for key in ("qkv-output", "max-logit", "heads-run-0", "entropy"):
        assert NOT_FINITE in broken[key] and NOT_FINITE not in fine[key]


@pytest.mark.parametrize(("lost", "border"), [(math.nan, 1), (math.inf, 1), (-math.inf, 0)])
def test_crosses_are_at_the_border_it_left_by(
    lost: float, border: int, pair: list[History]
) -> None:
    with styled("test"):
        axes = Figure().subplots()
        curve(axes, dress(pair)[0], np.arange(4.0), np.array([1.0, lost, lost, 2.0]))
    crosses = axes.lines[-1]
    assert crosses.get_marker() == "x"
    np.testing.assert_array_equal(crosses.get_xydata(), [[1, border], [2, border]])


def test_a_loss_that_is_not_finite_is_marked(fine: dict[str, str], broken: dict[str, str]) -> None:
    assert broken["loss"].count('class="run-0"') > fine["loss"].count('class="run-0"')


def test_a_layer_that_never_had_a_number_is_white_and_a_lost_one_is_not(tmp_path: Path) -> None:
    history = small(tmp_path / "run", changes={"layers.1.qkv/output_rms": not_a_number(1)})
    steps, cells = dress([history])[0].layers("qkv/output_rms")
    assert (
        len(steps) == len(cells) and np.isinf(cells[:, 1]).all() and np.isfinite(cells[:, 0]).all()
    )
    column = history.telemetry["layers.*.qkv/output_rms"].copy()
    telemetry = {**history.telemetry, "layers.*.qkv/output_rms": column}
    absent = dataclasses.replace(history, telemetry=telemetry, non_finite=[])
    assert np.isnan(dress([absent])[0].layers("qkv/output_rms")[1][:, 1]).all()


def test_bounds_are_drawn_at_the_steps_that_have_them(pair: list[History]) -> None:
    steps, cells = dress(pair)[0].layers("stream/mlp_bound")
    assert 1 < len(steps) < len(pair[0].steps)
    assert cells.shape == (len(steps), LAYERS) and np.isfinite(cells).all()


def test_updates_are_divided_by_the_rate_of_their_step(pair: list[History]) -> None:
    steps, cells = next(m for m in layer_figures.MAPS if m.key == "update").read(dress(pair)[0])
    train = pair[0].train
    for step, row in zip(steps[1:], cells[1:], strict=True):
        rate = train["learning_rate"][train["step"] == step].item()
        sample = pair[0].telemetry["layers.*.optimizer/update_l2"][pair[0].steps == step][0]
        np.testing.assert_allclose(row, sample / rate)


def test_a_long_series_keeps_its_extremes(pair: list[History]) -> None:
    values = np.ones(20_000)
    values[12_345] = 50.0
    with styled("test"):
        figure = Figure()
        axes = figure.subplots()
        curve(axes, dress(pair)[0], np.arange(20_000.0), values)
        assert axes.dataLim.ymax == 50
        assert len(to_svg(figure, "test")) < 60_000


@pytest.mark.parametrize("num_layers", [1, 2, 8, 9, 24, 126])
def test_chosen_layers_are_in_order_and_have_the_ends_and_the_lowest(num_layers: int) -> None:
    entropy = np.full((5, num_layers, 2), 0.5)
    entropy[3, num_layers // 3] = 0.1
    chosen = layer_figures.chosen_layers(entropy)
    assert chosen == sorted(set(chosen)) and {0, num_layers // 3, num_layers - 1} <= set(chosen)
    assert len(chosen) <= 8


def test_numbers_are_read_back_as_they_were() -> None:
    for value in (0.25, 2e-5, 1.5e6, -3e-8, 0.0, 600.0):
        assert float(plain_text(value).replace(",", "")) == value
    assert (plain_text(math.nan), exponent_text(1e-12), exponent_text(100)) == (
        "nan",
        "10⁻¹²",
        "100",
    )


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    labels = [run.label for run in dress([small(tmp_path / "a"), small(tmp_path / "b")])]
    assert len(set(labels)) == 2 and "a" in labels[0]


def test_one_sample_is_said_and_not_drawn(tmp_path: Path) -> None:
    one, two = (small(tmp_path / name, every=every) for name, every in (("one", 100), ("two", 20)))
    assert len(one.steps) == 1
    figures, left_out = drawn([one])
    assert set(figures) == {"loss", "rates"}
    assert len(left_out) > 5
    assert all("one sample" in reason for reason in left_out.values())
    assert len(drawn([one, two])[0]) > 5
