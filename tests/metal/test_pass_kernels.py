"""What the kernels do besides a rule: constants of groups, clipping, skipping, sums of gradients,
averages and norms, each access checked to the byte, against float64."""

import sys
from typing import Any

import advance_checks
import kernel_text
import norms
import pass_updates
import pytest
import simulator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="here the GPU itself runs them")


@pytest.fixture(scope="session")
def library() -> Any:
    return simulator.build(kernel_text.with_instances(kernel_text.source(), pass_updates.kernels()))


@pytest.mark.parametrize("check", advance_checks.CHECKS, ids=lambda check: check.__name__)
def test_constants_are_made_of_all_scalars(check: Any, library: Any) -> None:
    check(library)


@pytest.mark.parametrize("check", pass_updates.CHECKS, ids=lambda check: check.__name__)
def test_an_update_does_what_its_constants_say(check: Any, library: Any) -> None:
    check(library)


@pytest.mark.parametrize("check", norms.CHECKS, ids=lambda check: check.__name__)
def test_a_norm_is_what_float64_says(check: Any, library: Any) -> None:
    check(library)
