"""How well heads reproduce labelled frames: errors, tables, parity plots."""

from __future__ import annotations

from .metrics import ErrorAccumulator, Score
from .plots import PLOT_SUFFIXES, parity_plot
from .report import PREDICTION_SUFFIXES, score_table, to_dict, write_csv, write_json, write_predictions
from .run import Evaluation, evaluate_frames

__all__ = [
    "PLOT_SUFFIXES",
    "PREDICTION_SUFFIXES",
    "ErrorAccumulator",
    "Evaluation",
    "Score",
    "evaluate_frames",
    "parity_plot",
    "score_table",
    "to_dict",
    "write_csv",
    "write_json",
    "write_predictions",
]
