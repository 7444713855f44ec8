"""Every check of `mtinfer.testing` on every head of every checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from reference_files import FILES, cases, heads, slow_unless_compiled

from mtinfer import Potential
from mtinfer.testing import CONFORMANCE, DERIVATIVE_CHECKS, check_compiled_equals_eager

EAGER_CHECKS = [check for check in CONFORMANCE if check is not check_compiled_equals_eager]


@pytest.mark.parametrize("check", EAGER_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize(("path", "head"), cases(FILES))
def test_head_conforms(
    path: Path,
    head: str,
    check: Callable[[Potential, str], None],
    eager: Callable[..., Potential],
) -> None:
    check(eager(path, "float64" if check in DERIVATIVE_CHECKS else None), head)


@pytest.mark.parametrize("path", slow_unless_compiled(FILES))
def test_compiled_equals_eager(path: Path, eager: Callable[..., Potential]) -> None:
    for head in heads(path):
        check_compiled_equals_eager(eager(path), head)
