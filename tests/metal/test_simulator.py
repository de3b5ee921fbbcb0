"""The simulator of Metal kernels: what it computes, and what threads do together. What it refuses
is in test_simulator_faults.py and, of the source, in test_simulator_source.py."""

import sys
import threading

import numpy as np
import pytest
import simulator
from sample_kernels import adam_arguments, adam_reference, build, compute, samples
from simulator import KernelError, bfloat16_bits, from_bfloat16_bits

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the simulator runs on Linux; a Mac has a GPU"
)

ORDERS = ("forward", "reverse", "shuffled")


# ---- Numbers ----


@pytest.mark.parametrize(("dtype", "rounding"), [("float", 0), ("half", 2**-11), ("bfloat", 2**-8)])
def test_an_update_is_that_of_float64(dtype, rounding):
    arguments = adam_arguments(dtype)
    read = from_bfloat16_bits if dtype == "bfloat" else np.asarray
    expected = adam_reference(read(arguments[0]), read(arguments[3]), arguments[4])
    samples().run(f"adam_{dtype}", grid=(500,), threads=(64,), buffers=arguments)
    np.testing.assert_allclose(read(arguments[0]), expected, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (33, 100), (70, 31)])
def test_a_transpose_through_threadgroup_memory(shape, order):
    rows, columns = shape
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y = np.zeros((columns, rows), np.float32)
    groups = (-(-columns // 32), -(-rows // 32))
    buffers = {0: x, 1: y, 2: np.array([columns, rows], np.uint32)}
    samples().run("transpose", threadgroups=groups, threads=(32, 8), buffers=buffers, order=order)
    np.testing.assert_array_equal(y, x.T)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_threads", [32, 96, 100, 1024])
def test_a_reduction_through_simdgroups(num_threads, order):
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    partial = np.full(3, np.nan, np.float32)
    buffers = {0: x, 1: partial, 2: np.uint32(x.size).tobytes()}
    samples().run(
        "sum_of_squares_float",
        threadgroups=(3,),
        threads=(num_threads,),
        buffers=buffers,
        order=order,
    )
    assert partial.sum() == pytest.approx((x.astype(np.float64) ** 2).sum(), rel=1e-5)


EXPRESSIONS = [
    ("precise::sqrt(float(i))", lambda i: np.sqrt(i)),
    ("fma(float(i), 2.0f, -1.0f)", lambda i: 2 * i - 1),
    ("clamp(int(i), 3, 9)", lambda i: np.clip(i, 3, 9)),
    ("max(uint(4), i) - min(i, 7u)", lambda i: np.maximum(4, i) - np.minimum(i, 7)),
    ("select(1.0f, 2.0f, i > 5)", lambda i: np.where(i > 5, 2, 1)),
    ("float4(float2(1, 2), i, 4).zw.x", lambda i: i),
    ("dot(float3(i), float3(1, 2, 3))", lambda i: 6 * i),
    ("float(vec<half, 2>(i, 2 * i).y)", lambda i: 2 * i),
    ("float(as_type<uint>(float(i)) >> 16)", lambda i: i.view(np.uint32) >> 16),
    ("float(half(0.1h) * half(i))", lambda i: np.float16(0.1) * i.astype(np.float16)),
    ("float(bfloat(float(i) + 256.0f))", lambda i: from_bfloat16_bits(bfloat16_bits(i + 256))),
    ("float(1.5bf) + i / 2 + 0.5", lambda i: 2 + i // 2),
    ("any(isnan(float2(i, NAN))) ? 1 : 0", lambda i: 1 + 0 * i),
    ("numeric_limits<half>::max()", lambda i: 65504 + 0 * i),
    ("float3(packed_float3(float3(1, i, 3))).y", lambda i: i),
    ("fmin(float(i), NAN) + abs(-1.5f)", lambda i: i + 1.5),
]


def test_expressions_are_those_of_numpy():
    body = "\n".join(f"x[{k} * 32 + i] = {text};" for k, (text, _) in enumerate(EXPRESSIONS))
    x = np.zeros((len(EXPRESSIONS), 32), np.float32)
    build(body).run("k", threadgroups=(1,), threads=(32,), buffers={0: x})
    i = np.arange(32, dtype=np.float32)
    for (text, function), found in zip(EXPRESSIONS, x, strict=True):
        np.testing.assert_array_equal(found, function(i).astype(np.float32), err_msg=text)


def test_half_rounds_after_each_operation():
    found = compute("(half(i) + half(2048.0f)) - half(2048.0f)")
    i = np.arange(32, dtype=np.float16)
    np.testing.assert_array_equal(found, (i + np.float16(2048)) - np.float16(2048))


def test_a_product_and_a_sum_round_separately():
    a = np.float32(1 + 2**-12)
    assert compute("(1.0f + 0x1p-12f) * (1.0f + 0x1p-12f * float(i > 99 ? 0 : 1)) - 1.0f")[0] == (
        a * a - np.float32(1)
    )


@pytest.mark.parametrize("flush", [False, True])
def test_subnormals_are_flushed_on_request(flush):
    x = np.full(4, 1e-39, np.float32)
    library = build("x[i] = x[i] * 0.5f;")
    library.run("k", grid=(4,), threads=(4,), buffers={0: x}, flush_to_zero=flush)
    assert (x == 0).all() == flush
    assert np.float32(1e-39) * np.float32(0.5) != 0  # only while the kernel ran


# ---- Where threads are, and what they do together ----


def test_positions_at_the_edge_of_a_grid():
    attributes = [
        "thread_position_in_grid",
        "thread_position_in_threadgroup",
        "threadgroup_position_in_grid",
        "threads_per_threadgroup",
        "dispatch_threads_per_threadgroup",
        "threads_per_grid",
        "threadgroups_per_grid",
    ]
    parameters = ", ".join(f"uint3 a{k} [[{name}]]" for k, name in enumerate(attributes))
    stores = "".join(f"x[7 * at + {k}] = packed_uint3(a{k});" for k in range(len(attributes)))
    text = f"""#include <metal_stdlib>
using namespace metal;
[[kernel]] void k(device packed_uint3* x [[buffer(0)]], {parameters}) {{
  uint at = a0.y * 5 + a0.x; {stores} }}
"""
    simulator.check(text)
    x = np.zeros((3, 5, 7, 3), np.uint32)
    simulator.build(text).run("k", grid=(5, 3), threads=(4, 2), buffers={0: x})
    expected = [(4, 2, 0), (0, 0, 0), (1, 1, 0), (1, 1, 1), (4, 2, 1), (5, 3, 1), (2, 2, 1)]
    assert [tuple(row) for row in x[2, 4].tolist()] == expected


SIMD = [
    ("simd_sum(i)", lambda i: i.sum() + 0 * i),
    ("simd_max(i)", lambda i: 31 + 0 * i),
    ("simd_min(float(i) - 3.0f)", lambda i: 0 * i - 3),
    ("simd_or(1u << i) >> 16", lambda i: 65535 + 0 * i),
    ("simd_sum(float2(i, 1)).y", lambda i: 32 + 0 * i),
    ("simd_prefix_inclusive_sum(i)", np.cumsum),
    ("simd_prefix_exclusive_sum(i)", lambda i: np.cumsum(i) - i),
    ("simd_shuffle(i, 31 - i)", lambda i: 31 - i),
    ("simd_shuffle_xor(i, 4)", lambda i: i ^ 4),
    ("simd_shuffle_up(i, 2)", lambda i: np.where(i < 2, i, i - 2)),
    ("simd_shuffle_down(i, 2)", lambda i: np.where(i > 29, i, i + 2)),
    ("simd_broadcast(i, 7)", lambda i: 7 + 0 * i),
    ("simd_broadcast_first(i)", lambda i: 0 * i),
    ("simd_any(i == 9) ? 1 : 0", lambda i: 1 + 0 * i),
    ("simd_all(i < 9) ? 1 : 0", lambda i: 0 * i),
]


def test_simd_functions_see_all_lanes():
    body = "\n".join(f"x[{k} * 32 + i] = {text};" for k, (text, _) in enumerate(SIMD))
    x = np.zeros((len(SIMD), 32), np.float32)
    for order in ORDERS:
        build(body).run("k", threadgroups=(1,), threads=(32,), buffers={0: x}, order=order)
        i = np.arange(32)
        for (text, function), found in zip(SIMD, x, strict=True):
            np.testing.assert_array_equal(found, function(i), err_msg=text)


def test_atomics_count_every_thread_of_a_grid():
    library = build(
        "atomic_fetch_add_explicit(n, 1u, memory_order_relaxed);",
        "device atomic_uint* n [[buffer(0)]]",
    )
    n = np.zeros(1, np.uint32)
    library.run("k", grid=(1000,), threads=(96,), buffers={0: n}, order="shuffled")
    assert n[0] == 1000


def test_lanes_exchange_through_memory_across_a_simdgroup_barrier():
    library = build("""threadgroup float t[64];
        t[i] = i;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        float other = t[i ^ 1];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        t[i] = other;
        x[i] = t[i];""")
    x = np.zeros(64, np.float32)
    library.run("k", threadgroups=(1,), threads=(64,), buffers={0: x}, order="shuffled")
    np.testing.assert_array_equal(x, np.arange(64) ^ 1)


def test_threadgroup_structs_and_memory_of_a_given_length():
    text = """#include <metal_stdlib>
using namespace metal;
struct Shared { float sum; float values[8]; };
[[kernel]] void k(device float* x [[buffer(0)]], threadgroup float* given [[threadgroup(0)]],
    uint i [[thread_index_in_threadgroup]]) {
  threadgroup Shared shared;
  threadgroup float a[2], b;
  shared.values[i] = i;
  given[i] = i;
  if (i == 0) { shared.sum = 3; a[0] = 1; a[1] = 2; b = 4; }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  x[i] = shared.sum + shared.values[7 - i] + given[i] + a[0] + a[1] + b;
}
"""
    simulator.check(text)
    x = np.zeros(8, np.float32)
    arguments = {"threads": (8,), "threadgroups": (1,), "buffers": {0: x}}
    simulator.build(text).run("k", threadgroup_memory={0: 32}, **arguments)
    assert (x == 17).all()
    with pytest.raises(KernelError, match="threadgroup memory 0 has no length"):
        simulator.build(text).run("k", **arguments)


def test_a_grid_may_have_more_threadgroups_than_the_check_of_races_counts():
    x = np.zeros(600_000, np.float32)
    build("threadgroup float t; t = x[i]; x[i] = t + 1;").run(
        "k", grid=(x.size,), threads=(1,), buffers={0: x}
    )
    assert (x == 1).all()


def test_millions_of_threads_take_seconds():
    x = np.zeros(1 << 20, np.float32)
    library = build("x[i] = x[i] + i;")
    library.run("k", grid=(x.size,), threads=(256,), buffers={0: x})
    np.testing.assert_array_equal(x, np.arange(x.size, dtype=np.float32))


def test_libraries_run_side_by_side_in_threads():
    libraries = [build(f"for (uint k = 0; k < 1000; ++k) x[i] += {n};") for n in (1, 2)]
    arrays = [np.zeros(256, np.float32) for _ in range(4)]

    def work(number):
        libraries[number % 2].run("k", grid=(256,), threads=(64,), buffers={0: arrays[number]})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [float(x.mean()) for x in arrays] == [1000, 2000, 1000, 2000]
