"""Parity plots: predicted values over labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import DataError
from ..files import check_output, replacing
from .metrics import ENERGY_PER_ATOM, FORCES, VIRIAL_PER_ATOM, Array, Quantity
from .report import short_names
from .run import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_SUFFIXES = (".png", ".pdf", ".svg")

_Corner = Literal["upper left", "lower right"]

#: panels, and how each is called
_PANELS = (
    (ENERGY_PER_ATOM, "energy per atom"),
    (FORCES, "force components"),
    (VIRIAL_PER_ATOM, "virial components per atom"),
)
#: told apart by the colour-blind too (Okabe and Ito)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v")
#: points drawn of one series; more only make the file large and slow to draw
_MAX_POINTS = 20_000
#: of these, the ones with the largest errors; the others are drawn by lot
_WORST_POINTS = 1_000
#: series whose errors are written into a panel one by one
_MAX_LINES = 9
#: a constant error of a series is taken out where it exceeds the spread of the labels by this factor
_OFFSET_FACTOR = 3.0


@dataclass(frozen=True, eq=False)
class _Series:
    """The points of one head and dataset in one panel."""

    #: tells the colour and marker
    style: int
    reference: Array
    predicted: Array
    #: of the values as they were before any shift
    rmse: float
    #: constant taken out of the predicted values
    offset: float = 0.0

    @property
    def look(self) -> dict[str, Any]:
        """Colour and marker."""
        marker = _MARKERS[self.style // len(_COLOURS) % len(_MARKERS)]
        return {"color": _COLOURS[self.style % len(_COLOURS)], "marker": marker, "linestyle": "none"}

    def shifted(self, by: float, offset: float) -> _Series:
        """Return the series with `by` taken out of both axes, and `offset` of the predicted values."""
        return replace(
            self, reference=self.reference - by, predicted=self.predicted - by - offset, offset=offset
        )

    def thinned(self) -> tuple[Array, Array]:
        """Return at most `_MAX_POINTS` points, all that are finite if there are no more."""
        errors = np.abs(self.predicted - self.reference)
        kept = np.flatnonzero(np.isfinite(errors))
        if kept.size > _MAX_POINTS:
            kept = kept[np.argsort(errors[kept])]
            lot = np.random.default_rng(0).choice(kept.size, _MAX_POINTS - _WORST_POINTS, replace=False)
            kept = np.union1d(kept[lot], kept[-_WORST_POINTS:])
        return self.reference[kept], self.predicted[kept]


def parity_plot(path: str | Path, evaluation: Evaluation) -> None:
    """Draw predictions over labels, a panel for each quantity that has labels.

    Energies per atom are drawn minus the mean label of their dataset, so that datasets of different
    composition share a panel. Where the predictions of a head differ from the labels by a constant much
    larger than the spread of the labels (as between levels of theory), that constant is taken out too and
    written into the panel. Errors in the panels are those of the unchanged numbers.

    Parameters
    ----------
    path
        Image file; its ending, one of `PLOT_SUFFIXES`, names the format.
    evaluation
        What to draw; colours tell heads and datasets apart.

    Raises
    ------
    DataError
        No frame has a label.
    OutputError
        The file can't be written, or its ending is another.
    """
    from matplotlib.figure import Figure

    check_output(path, suffixes=PLOT_SUFFIXES)
    panels = [(quantity, title, _all_series(evaluation, quantity)) for quantity, title in _PANELS]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        raise DataError("nothing to plot: no frame has an energy, force or virial label; leave the plot out")
    legend_rows = -(-len(_groups(evaluation)) // len(panels))
    figure = Figure(figsize=(4.2 * len(panels), 4.7 + 0.2 * legend_rows), dpi=150, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, *panel)
    _add_legend(figure, evaluation, [series for _, _, series in panels])
    with replacing(path) as partial:
        figure.savefig(partial)


def _groups(evaluation: Evaluation) -> list[tuple[str, str]]:
    return [(head, dataset) for head in evaluation.heads for dataset in evaluation.datasets]


def _all_series(evaluation: Evaluation, quantity: Quantity) -> list[_Series]:
    found = []
    for style, (head, dataset) in enumerate(_groups(evaluation)):
        pairs = [
            pair
            for frame, prediction in zip(evaluation.frames, evaluation.predictions[head], strict=True)
            if frame.dataset == dataset and (pair := quantity.pair(frame, prediction)) is not None
        ]
        if pairs:
            reference, predicted = (np.concatenate(values) for values in zip(*pairs, strict=True))
            rmse = float(np.sqrt(np.mean((predicted - reference) ** 2)))
            found.append(_Series(style, reference, predicted, rmse))
    return found


def _centred(series: list[_Series]) -> list[_Series]:
    """Take the mean label out of each series, and constant errors that would hide everything else."""
    spread = max(float(np.ptp(one.reference)) for one in series)
    centred = []
    for one in series:
        offset = float(np.mean(one.predicted - one.reference))
        hides = spread > 0 and _OFFSET_FACTOR * spread < abs(offset) < np.inf
        centred.append(one.shifted(float(one.reference.mean()), offset if hides else 0.0))
    return centred


def _draw_panel(axes: Axes, quantity: Quantity, title: str, series: list[_Series]) -> None:
    energies = quantity is ENERGY_PER_ATOM
    if energies:
        series = _centred(series)
    points = [one.thinned() for one in series]
    values = np.concatenate([axis for pair in points for axis in pair])
    low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
    margin = 0.06 * (high - low) or 1e-3
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color="0.6", linewidth=0.8, zorder=0)
    # series with small errors come last: under the others they would be hidden
    for one, (x, y) in sorted(zip(series, points, strict=True), key=lambda item: -item[0].rmse):
        axes.plot(x, y, **one.look, markersize=3.5, markeredgewidth=0, alpha=0.6, rasterized=True)
    axes.set(xlim=limits, ylim=limits, title=title, box_aspect=1)
    axes.locator_params(nbins=5)
    minus = " − mean reference" if energies else ""
    axes.set_xlabel(f"reference{minus} ({quantity.unit})")
    axes.set_ylabel(f"predicted{minus} ({quantity.unit})")
    middle = 0.5 * (low + high)
    above = sum(int(((x < middle) & (y > middle)).sum()) for x, y in points)
    below = sum(int(((x > middle) & (y < middle)).sum()) for x, y in points)
    _add_errors(axes, quantity, series, corner="upper left" if above <= below else "lower right")


def _add_errors(axes: Axes, quantity: Quantity, series: list[_Series], *, corner: _Corner) -> None:
    """Write the RMSE of each series into a corner off the diagonal."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **one.look, markersize=5) for one in series]
    labels = [_error_text(one.rmse, one.offset) for one in series]
    title = f"RMSE ({quantity.unit})"
    if len(series) > _MAX_LINES:
        errors = [one.rmse for one in series]
        handles, labels = [], []
        title += f"\n{min(errors):.3g} to {max(errors):.3g}"
        title += "\n(offsets not drawn)" if any(one.offset for one in series) else ""
    axes.legend(
        handles, labels, title=title, loc=corner, fontsize="small",
        title_fontsize="small", handletextpad=0.2, borderpad=0.3, framealpha=0.7, alignment="left",
    )  # fmt: skip


def _error_text(rmse: float, offset: float) -> str:
    return f"{rmse:.3g} (offset {offset:+.3g} not drawn)" if offset else f"{rmse:.3g}"


def _add_legend(figure: Figure, evaluation: Evaluation, panels: list[list[_Series]]) -> None:
    from matplotlib.lines import Line2D

    groups, names = _groups(evaluation), short_names(evaluation.datasets)
    shown = {one.style: one for series in panels for one in series}
    handles = [Line2D([], [], **shown[style].look, markersize=5) for style in sorted(shown)]
    labels = [
        f"head {head}, {names[dataset]}" for head, dataset in (groups[style] for style in sorted(shown))
    ]
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=len(panels), fontsize="small", frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name is a $
