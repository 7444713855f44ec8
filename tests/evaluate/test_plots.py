from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from toy_potential import Harmonic, labelled, random_atoms

from mtinfer.data import Frame
from mtinfer.errors import DataError, OutputError
from mtinfer.evaluate import Evaluation, evaluate_frames, parity_plot, plots


class Shifted(Harmonic):
    """Adds a constant energy per atom that is the head's own."""

    def __init__(self, shift: dict[str, float]) -> None:
        super().__init__(dict.fromkeys(shift, 1.05))
        self.shift = shift

    def evaluate(self, atoms, head=None):
        predictions = super().evaluate(atoms, head)
        return [
            replace(prediction, energy=prediction.energy + len(structure) * self.shift[head])
            for structure, prediction in zip(atoms, predictions, strict=True)
        ]


def drawn(evaluation: Evaluation, path: Path) -> Figure:
    """Return the figure whose image is written to `path`."""
    figures = []
    save = Figure.savefig

    def spy(self: Figure, *args: object, **kwargs: object) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    with patch.object(Figure, "savefig", spy):
        parity_plot(path, evaluation)
    return figures[0]


def frames(n_frames: int = 6, **options: object) -> list[Frame]:
    return [labelled(random_atoms(8, seed=i), index=i, **options) for i in range(n_frames)]


def test_a_panel_for_each_quantity_with_labels(tmp_path: Path) -> None:
    evaluation = evaluate_frames(Harmonic({"a": 1.1}), ["a"], frames())
    figure = drawn(evaluation, tmp_path / "parity.png")
    image = matplotlib.image.imread(tmp_path / "parity.png")
    assert image.shape[1] > image.shape[0] > 500
    assert image[..., :3].std() > 0.05
    assert [axes.get_title() for axes in figure.axes] == [
        "energy per atom",
        "force components",
        "virial components per atom",
    ]
    forces = figure.axes[1]
    rmse = next(score.rmse for score in evaluation.scores if score.quantity == "forces")
    assert forces.get_legend().get_texts()[0].get_text() == f"{rmse:.3g}"
    assert (forces.get_xlabel(), forces.get_ylabel()) == ("reference (eV/Å)", "predicted (eV/Å)")
    assert forces.get_xlim() == forces.get_ylim()
    assert forces.get_box_aspect() == 1
    diagonal, points = forces.lines
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    np.testing.assert_allclose(points.get_ydata(), 1.1 * points.get_xdata(), rtol=1e-12)
    only_forces = evaluate_frames(Harmonic({"a": 1.1}), ["a"], frames(labels="forces"))
    assert len(drawn(only_forces, tmp_path / "parity.png").axes) == 1


def test_constant_energy_errors_leave_the_panel_readable(tmp_path: Path) -> None:
    evaluation = evaluate_frames(Shifted({"same": 0.0, "far": -500.0}), ["same", "far"], frames())
    energies = drawn(evaluation, tmp_path / "parity.png").axes[0]
    low, high = energies.get_xlim()
    assert high - low < 3 * np.ptp([frame.energy / 8 for frame in evaluation.frames])
    texts = [text.get_text() for text in energies.get_legend().get_texts()]
    assert "offset" not in texts[0]
    assert texts[1] == "500 (offset -500 not drawn)"


def test_small_constant_errors_are_shown(tmp_path: Path) -> None:
    evaluation = evaluate_frames(Shifted({"a": 0.3}), ["a"], frames())
    energies = drawn(evaluation, tmp_path / "parity.png").axes[0]
    errors = energies.lines[1].get_ydata() - energies.lines[1].get_xdata()
    assert errors.mean() > 0.3


@pytest.mark.parametrize("sign", [1, -1])
def test_errors_stand_in_the_emptier_corner(tmp_path: Path, sign: int) -> None:
    (frame,) = frames(1, labels="forces")
    evaluation = evaluate_frames(Harmonic({"a": 1.0}), ["a"], [frame])
    (prediction,) = evaluation.predictions["a"]
    outlier = prediction.forces.copy()
    outlier[0, 0] = sign * 100
    frame.forces[0, 0] = -sign
    broken = replace(evaluation, predictions={"a": (replace(prediction, forces=outlier),)})
    (axes,) = drawn(broken, tmp_path / "parity.png").axes
    box = axes.get_legend().get_window_extent().transformed(axes.transAxes.inverted())
    assert (box.x1 < 0.5, box.y0 > 0.5) == ((sign < 0,) * 2)


def test_heads_and_datasets_are_told_apart(tmp_path: Path) -> None:
    names = [r"_a$\q$", *"cdefghi"]  # no mathematics, and no entry to be hidden
    data = [replace(frame, dataset=f"sets/{i % 2}") for i, frame in enumerate(frames())]
    evaluation = evaluate_frames(Harmonic(dict(zip(names, range(8), strict=True))), names, data)
    figure = drawn(evaluation, tmp_path / "parity.png")
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == [f"head {name}, {dataset}" for name in names for dataset in "01"]
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[1].lines[1:]}
    assert len(looks) == 16
    assert " to " in figure.axes[1].get_legend().get_title().get_text()


def test_every_series_shows_the_points_of_its_own_dataset(tmp_path: Path) -> None:
    """As many series as there are looks, and one more."""
    data = [labelled(random_atoms(n, seed=n), dataset=f"{n}", labels="forces") for n in range(1, 7)]
    stiffness = dict(zip("abcdef", range(2, 8), strict=True))
    evaluation = evaluate_frames(Harmonic(stiffness), list(stiffness), data)
    (axes,) = drawn(evaluation, tmp_path / "parity.png").axes
    lines = axes.lines[1:]
    shown = sorted((line.get_xdata().tolist(), line.get_ydata().tolist()) for line in lines)
    forces = [frame.forces.ravel() for frame in data]
    assert shown == sorted((f.tolist(), (f * k).tolist()) for f in forces for k in stiffness.values())
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 35


def test_many_points_are_thinned_but_not_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "_MAX_POINTS", 50)
    monkeypatch.setattr(plots, "_WORST_POINTS", 5)
    evaluation = evaluate_frames(Harmonic({"a": 2.0}), ["a"], frames())
    points = drawn(evaluation, tmp_path / "parity.png").axes[1].lines[1]
    assert 45 <= len(points.get_xdata()) <= 50
    label = np.concatenate([frame.forces.ravel() for frame in evaluation.frames])
    assert set(label[np.argsort(np.abs(label))[-5:]]) <= set(points.get_xdata())


def test_single_point(tmp_path: Path) -> None:
    evaluation = evaluate_frames(Harmonic({"a": 1.0}), ["a"], frames(1, labels="energy"))
    (axes,) = drawn(evaluation, tmp_path / "parity.png").axes
    assert axes.lines[1].get_xdata().tolist() == [0]


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("n_frames", [1, 2])
def test_values_that_are_not_finite_are_left_out(tmp_path: Path, value: str, n_frames: int) -> None:
    evaluation = evaluate_frames(Harmonic({"a": 1.0}), ["a"], frames(n_frames, labels="energy"))
    first, *others = evaluation.predictions["a"]
    broken = replace(evaluation, predictions={"a": (replace(first, energy=float(value)), *others)})
    (axes,) = drawn(broken, tmp_path / "parity.png").axes
    assert len(axes.lines[1].get_xdata()) == n_frames - 1
    assert axes.get_legend().get_texts()[0].get_text() == value


def test_what_can_not_be_plotted(tmp_path: Path) -> None:
    bare = evaluate_frames(Harmonic({"a": 1.0}), ["a"], frames(labels=""))
    with pytest.raises(DataError, match=r"nothing to plot: no frame has an energy, force or virial label"):
        parity_plot(tmp_path / "parity.png", bare)
    good = evaluate_frames(Harmonic({"a": 1.0}), ["a"], frames())
    with pytest.raises(OutputError, match=r"parity\.gif: the name ends in '\.gif', allowed are \.png, \.pdf"):
        parity_plot(tmp_path / "parity.gif", good)
    assert not list(tmp_path.iterdir())
    for suffix in (".pdf", ".svg"):
        parity_plot(tmp_path / f"parity{suffix}", good)
        assert (tmp_path / f"parity{suffix}").stat().st_size > 1000


def test_no_state_is_left_in_pyplot(tmp_path: Path) -> None:
    import matplotlib.pyplot

    parity_plot(tmp_path / "parity.png", evaluate_frames(Harmonic({"a": 1.0}), ["a"], frames()))
    assert matplotlib.pyplot.get_fignums() == []
