"""Options of the repformer that can't be."""

from __future__ import annotations

import pytest

from mtinfer.errors import UnsupportedModelError
from mtinfer.models.repformer import RepformerOptions

SECTION = {
    "rcut": 4.0,
    "rcut_smth": 3.5,
    "nsel": 20,
    "update_g1_has_grrg": False,
    "update_g1_has_drrd": False,
}


def test_a_layer_without_input_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="its linear layer no input; update_g1_has_grrg"):
        RepformerOptions.from_config(SECTION)
    for option in ({"g1_out_conv": False}, {"g1_out_mlp": False}, {"update_g1_has_grrg": True}):
        RepformerOptions.from_config(SECTION | option)
