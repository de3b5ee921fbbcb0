"""The kernels on state in codes and on parameters in other storages than plain ones: each access
checked to the byte, each result that of the CPU backend to the bit."""

import sys
from typing import Any

import kernel_text
import numpy as np
import pytest
import simulator
from cases import FULLEST, Case
from stored_updates import (
    ADAMW,
    FEW,
    MOMENTUM,
    STORED,
    Storages,
    StoredUpdate,
    check_blocks_copy,
    check_stored,
    stored_leaves,
)
from unusual_updates import SHIFTED, check_tails
from updates import FLOAT, make_leaf, rule_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="here the GPU itself runs them")

RULES = [*FULLEST, MOMENTUM]


@pytest.fixture(scope="session")
def library() -> Any:
    """Every kernel that this file runs, named as its instance."""
    rules = {rule_of(case).type for case in [*RULES, ADAMW]}
    wanted = [kernel_text.advance(rule) for rule in [*rules, "Shift"]]
    wanted.append(kernel_text.update("Shift", True, SHIFTED))
    wanted += [storages.kernel(rule) for rule in rules for storages in STORED]
    wanted += [storages.kernel(rule_of(case).type, False) for case, storages in FEW]
    return simulator.build(kernel_text.with_instances(kernel_text.source(), set(wanted)))


@pytest.mark.parametrize("storages", STORED, ids=str)
@pytest.mark.parametrize("case", RULES, ids=str)
def test_each_storage_is_the_cpu_backends_to_the_bit(
    case: Case, storages: Storages, library: Any
) -> None:
    check_stored(library, case, storages)


@pytest.mark.parametrize(("threads", "passes"), [(256, 4), (224, 1), (32, 16)])
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("in_place", [False, True])
def test_threads_and_passes_do_not_change_a_block(
    threads: int, passes: int, order: str, in_place: bool, library: Any
) -> None:
    for case, storages in FEW:
        options = {"threads": threads, "passes": passes, "order": order, "in_place": in_place}
        check_stored(library, case, storages, **options)


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 127, 1023, 1025, 4097])
@pytest.mark.parametrize("has_tiles", [False, True])
def test_a_ragged_block_ends_in_zeros(size: int, has_tiles: bool, library: Any) -> None:
    for case, storages in FEW:
        leaf = make_leaf("aligned", (size,), FLOAT, np.random.default_rng(size))
        update = StoredUpdate(case, [leaf], storages)
        update.run_and_check(library, has_tiles=has_tiles)
        tail = -size % 64
        for blocks, offset in [(array, 64 - tail) for array in update.state if tail]:
            per_value = (blocks.shape[1] - 4) // 64
            assert not blocks[-1, offset * per_value : 64 * per_value].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e-42, 0.0])
def test_unusual_gradients_end_in_the_same_bits(value: float, library: Any) -> None:
    for storages in STORED:
        rng = np.random.default_rng(32)
        leaves = stored_leaves(rng)
        for leaf in leaves:
            leaf.memory[leaf.memory.size // 2] = value
        StoredUpdate(ADAMW, leaves, storages).run_and_check(library)


@pytest.mark.parametrize("shape", [(31, 64), (33, 128), (2, 5, 192), (100, 64)])
def test_a_row_of_a_tile_is_a_block(shape: tuple[int, ...], library: Any) -> None:
    for case, storages in FEW:
        rng = np.random.default_rng(33)
        leaves = [make_leaf("transposed", shape, FLOAT, rng) for _ in range(2)]
        StoredUpdate(case, leaves, storages).run_and_check(library, passes=2, threads=96)


def test_blocks_are_copied_as_they_are(library: Any) -> None:
    check_blocks_copy(library)


def test_past_the_end_of_a_leaf_there_is_nothing_whatever_the_rule(library: Any) -> None:
    check_tails(library)
