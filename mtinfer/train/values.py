"""Values that the keys of a training input take: a key means the same wherever it stands."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, UnsupportedModelError
from ..models.activations import NAMES as ACTIVATIONS
from ..models.activations import known_activation

__all__ = ["BOOL", "NOT_NEGATIVE", "SECTION", "VALUES", "WITHOUT_EFFECT", "Values"]


@dataclass(frozen=True)
class Values:
    """Values that a key takes."""

    #: what follows "expected"
    words: str
    accepts: Callable[[Any], bool]

    def check(self, value: object, where: str) -> None:
        """Refuse a value of another kind.

        Raises
        ------
        ConfigError
            Names the place, the value, and what is allowed.
        """
        if not self.accepts(value):
            raise ConfigError(f"{where} is {value!r}; expected {self.words}")


def _real(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]  # neither NaN nor infinite


def _whole(value: object) -> bool:
    return isinstance(value, int) and _real(value)


def _list(value: object, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(accepts, value))


def _index(value: Any) -> bool:
    return _whole(value) and value >= 0


def _pair(value: Any) -> bool:
    return _list(value, _index) and len(value) == 2


def _energy(value: Any) -> bool:
    return value is None or _real(value) or (_list(value, _real) and len(value) == 1)


def _count(value: Any) -> bool:
    if isinstance(value, str):
        automatic = re.fullmatch(r"auto(:(\d+(\.\d*)?))?", value)
        return automatic is not None and float(automatic[2] or 1) > 0
    return _whole(value) and value > 0


def _batch_size(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"auto|(auto|max|filter):[1-9]\d*", value) is not None
    return all(_whole(n) and n > 0 for n in (value or [None] if isinstance(value, list) else [value]))


def _blocks(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    block = r"; *\d+ *: *\d+ *: *(\d+\.?\d*|\.\d+)([eE][-+]?\d+)? *"
    return re.fullmatch(rf"prob_uniform|prob_sys_size *({block})*", value) is not None


def _activation(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        known_activation(value)
        return _real(float(value.partition(":")[2] or 0))
    except (UnsupportedModelError, ValueError, OverflowError):  # "silut:x", and a threshold far too low
        return False


ANYTHING = Values("anything", lambda _: True)
BOOL = Values("true or false", lambda x: isinstance(x, bool))
NAME = Values("a name", lambda x: isinstance(x, str) and x != "")
NAMES = Values("a list of names", lambda x: _list(x, NAME.accepts))
SECTION = Values("a section {...}", lambda x: isinstance(x, Mapping))
NUMBER = Values("a number", _real)
POSITIVE = Values("a positive number", lambda x: _real(x) and x > 0)
NOT_NEGATIVE = Values("a number that is not negative", lambda x: _real(x) and x >= 0)
SHARE = Values("a number above 0 and up to 1", lambda x: _real(x) and 0 < x <= 1)
DECAY = Values("a number from 0 to below 1", lambda x: _real(x) and 0 <= x < 1)
SIZE = Values("a positive integer", lambda x: _whole(x) and x > 0)
SIZE_OR_ZERO = Values("an integer that is not negative", _index)
SIZES = Values("a list of positive integers", lambda x: bool(x) and _list(x, SIZE.accepts))
SEED = Values("an integer that is not negative, or null", lambda x: x is None or _index(x))
INDICES = Values("a list of indices into type_map", lambda x: _list(x, _index))
PAIRS = Values("a list of pairs of indices into type_map, as in [[0, 1]]", lambda x: _list(x, _pair))
ENERGIES = Values(
    "a list of numbers, one per entry of type_map, or null for none", lambda x: _list(x, _energy)
)
NUMBERS = Values("a list of numbers", lambda x: _list(x, _real))
WEIGHTS = Values("a list of numbers that are not negative", lambda x: _list(x, NOT_NEGATIVE.accepts))
COUNT = Values("a positive integer, 'auto' or 'auto:FACTOR'", _count)
COUNTS = Values(
    "a positive integer, a list of one per entry of type_map, 'auto' or 'auto:FACTOR'",
    lambda x: _count(x) or (_list(x, _index) and sum(x) > 0),
)
#: keys of `training` that change no number here: where files go, what is printed, how it is compiled
WITHOUT_EFFECT = (
    "disp_file",
    "save_dir",
    "disp_training",
    "time_training",
    "disp_avg",
    "profiling",
    "profiling_file",
    "enable_profiler",
    "tensorboard",
    "tensorboard_log_dir",
    "tensorboard_freq",
    "neighbor_graph_method",
    "enable_compile",
    "stat_file",
    "stat_file_mode",
)
#: the same of the section `validating`: they concern a validation that is not supported
VALIDATING_WITHOUT_EFFECT = (
    "validation_freq",
    "save_best",
    "save_best_dir",
    "max_best_ckpt",
    "validation_metric",
    "full_val_file",
    "full_val_start",
    "compiled_infer",
    "tf32_infer",
    "amp_infer",
)
#: key -> values that it takes, in any section. A key whose default is true or false takes these; one whose
#: default is null takes null, too; and one with a list of supported values (`Section.only`) takes these
VALUES: dict[str, Values] = {
    key: kind
    for kind, keys in (
        (
            POSITIVE,
            "rcut three_body_rcut e_rcut a_rcut ln_eps scaling_factor temperature sel_reduce_factor start_lr "
            "numb_epoch",
        ),
        (
            NOT_NEGATIVE,
            "rcut_smth three_body_rcut_smth e_rcut_smth a_rcut_smth env_protection fix_stat_std "
            "start_pref_e start_pref_f start_pref_v limit_pref_e limit_pref_f limit_pref_v stop_lr "
            "stop_lr_ratio warmup_start_factor weight_decay gradient_max_norm",
        ),
        (NUMBER, "update_residual bridging_r_inner bridging_r_outer"),
        (SHARE, "decay_rate decay_phase_ratio"),
        (DECAY, "warmup_ratio adam_beta1 adam_beta2 ema_decay"),
        (
            SIZE,
            "axis_neuron attn tebd_dim nlayers g1_dim g2_dim attn1_hidden attn1_nhead attn2_hidden "
            "attn2_nhead n_dim e_dim a_dim a_compress_e_rate n_multi_edge_message data_stat_nbatch "
            "data_bias_nsample decay_steps numb_btch numb_steps disp_freq save_freq max_ckpt_keep "
            "ema_ckpt_keep",
        ),
        (SIZE_OR_ZERO, "attn_layer a_compress_rate numb_fparam numb_aparam dim_case_embd warmup_steps"),
        (BOOL, "stripped_type_embedding"),
        (SIZES, "neuron three_body_neuron"),
        (COUNT, "nsel three_body_sel e_sel a_sel"),
        (COUNTS, "sel"),
        (SEED, "seed"),
        (PAIRS, "exclude_types pair_exclude_types"),
        (INDICES, "atom_exclude_types"),
        (ENERGIES, "atom_ener"),
        (NUMBERS, "default_fparam"),
        (WEIGHTS, "sys_probs"),
        (NAME, "type precision finetune_head"),
        (NAMES, "type_map model_branch_alias"),
        (SECTION, "loss loss_dict validating optimizer data_dict model_prob num_epoch_dict info"),
        # read elsewhere, which refuses what is wrong
        (
            ANYTHING,
            "model descriptor fitting_net learning_rate training training_data validation_data list repinit "
            "repformer repflow save_ckpt",
        ),
        (ANYTHING, "huber_delta"),  # without effect
    )
    for key in keys.split()
} | {
    **dict.fromkeys((*WITHOUT_EFFECT, *VALIDATING_WITHOUT_EFFECT), ANYTHING),
    "activation_function": Values(f"an activation function: {', '.join(ACTIVATIONS)}", _activation),
    "default_chg_spin": Values("charge and spin, as in [0, 1]", lambda x: _list(x, _real) and len(x) == 2),
    "preset_out_bias": Values(
        "{'energy': [...]}, a number or null per entry of type_map",
        lambda x: isinstance(x, Mapping) and x.keys() == {"energy"} and _list(x["energy"], _energy),
    ),
    "systems": Values(
        "a path or a list of paths", lambda x: bool(x) and (NAME.accepts(x) or NAMES.accepts(x))
    ),
    "batch_size": Values(
        "a positive integer, a list of one per system that is found, 'auto', 'auto:N', 'max:N' or 'filter:N'",
        _batch_size,
    ),
    "auto_prob": Values("prob_uniform or prob_sys_size[;start:end:weight]...", _blocks),
}
