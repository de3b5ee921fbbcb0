"""The simulator of Metal kernels: what it computes, what threads do together, what it refuses while
a kernel runs. What it refuses before that is in test_simulator_source.py."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import simulator
from simulator import KernelError, bfloat16_bits, from_bfloat16_bits, guarded_array

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the simulator runs on Linux; a Mac has a GPU"
)

SAMPLES = Path(__file__).parent / "kernels" / "samples.metal"
ORDERS = ("forward", "reverse", "shuffled")
SEGMENT = np.dtype([("begin", "u8"), ("length", "u8"), ("learning_rate", "f4"), ("padding", "u4")])
SETTINGS = np.dtype([("beta1", "f4"), ("beta2", "f4"), ("eps", "f4"), ("num_segments", "u4")])


@pytest.fixture(scope="session")
def samples() -> simulator.Library:
    simulator.check(SAMPLES)
    return simulator.build(SAMPLES)


def build(body: str, parameters: str = "device float* x [[buffer(0)]]") -> simulator.Library:
    """One kernel `k` of these parameters and this body, where `i` is the thread's position."""
    position = "uint i [[thread_position_in_grid]]"
    text = "#include <metal_stdlib>\nusing namespace metal;\n"
    text += f"[[kernel]] void k({parameters}, {position}) {{\n{body}\n}}\n"
    simulator.check(text)
    return simulator.build(text)


def compute(expression: str, num_threads: int = 32) -> np.ndarray:
    """What each of the threads, of one threadgroup, gets."""
    x = np.zeros(num_threads, np.float32)
    build(f"x[i] = {expression};").run(
        "k", threadgroups=(1,), threads=(num_threads,), buffers={0: x}
    )
    return x


# ---- Numbers ----


def adam_arguments(dtype, n=1000):
    """A flat buffer with two segments, which lie apart and cover half of it."""
    rng = np.random.default_rng(0)
    p, g = rng.normal(size=(2, n)).astype(np.float32)
    if dtype == "bfloat":
        p, g = bfloat16_bits(p), bfloat16_bits(g)
    elif dtype == "half":
        p, g = p.astype(np.float16), g.astype(np.float16)
    m, v = np.zeros((2, n), np.float32)
    segments = np.array([(64, 136, 1e-2, 0), (500, 364, 1e-3, 0)], SEGMENT)
    settings = np.array([(0.9, 0.99, 1e-8, 2)], SETTINGS)
    return {0: p, 1: m, 2: v, 3: g, 4: segments, 5: settings}


def adam_reference(p, g, segments):
    p = p.astype(np.float64)
    for begin, length, learning_rate, _ in segments:
        part = slice(begin, begin + length)
        gradient = g[part].astype(np.float64)
        change = 0.1 * gradient / (np.sqrt(0.01 * gradient**2) + 1e-8)
        p[part] -= learning_rate * change
    return p


@pytest.mark.parametrize(("dtype", "rounding"), [("float", 0), ("half", 2**-11), ("bfloat", 2**-8)])
def test_an_update_is_that_of_float64(samples, dtype, rounding):
    arguments = adam_arguments(dtype)
    read = from_bfloat16_bits if dtype == "bfloat" else np.asarray
    expected = adam_reference(read(arguments[0]), read(arguments[3]), arguments[4])
    samples.run(f"adam_{dtype}", grid=(500,), threads=(64,), buffers=arguments)
    np.testing.assert_allclose(read(arguments[0]), expected, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (33, 100), (70, 31)])
def test_a_transpose_through_threadgroup_memory(samples, shape, order):
    rows, columns = shape
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y = np.zeros((columns, rows), np.float32)
    groups = (-(-columns // 32), -(-rows // 32))
    buffers = {0: x, 1: y, 2: np.array([columns, rows], np.uint32)}
    samples.run("transpose", threadgroups=groups, threads=(32, 8), buffers=buffers, order=order)
    np.testing.assert_array_equal(y, x.T)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_threads", [32, 96, 100, 1024])
def test_a_reduction_through_simdgroups(samples, num_threads, order):
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    partial = np.full(3, np.nan, np.float32)
    buffers = {0: x, 1: partial, 2: np.uint32(x.size).tobytes()}
    samples.run(
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


def test_millions_of_threads_take_seconds():
    x = np.zeros(1 << 20, np.float32)
    library = build("x[i] = x[i] + i;")
    library.run("k", grid=(x.size,), threads=(256,), buffers={0: x})
    np.testing.assert_array_equal(x, np.arange(x.size, dtype=np.float32))


# ---- Memory ----


def test_arrays_are_touched_where_they_lie():
    flat = np.zeros(100, np.float32)
    build("x[i] = 1;").run("k", grid=(7,), threads=(7,), buffers={0: flat[10:17]})
    assert flat.nonzero()[0].tolist() == list(range(10, 17))


@pytest.mark.parametrize("at", ["start", "end"])
def test_nothing_beyond_an_array_is_touched(at):
    x = guarded_array(13, np.float32, at)
    build("x[i] += 1;").run("k", grid=(13,), threads=(4,), buffers={0: x}, check_memory=False)
    assert (x == 1).all()


def test_a_segment_may_be_all_that_a_kernel_touches(samples):
    arguments = adam_arguments("float")
    spans = [(4 * 64, 4 * 200), (4 * 500, 4 * 864)]
    ranges = dict.fromkeys(range(3), spans)
    dispatch = {"grid": (500,), "threads": (64,), "buffers": arguments}
    samples.run("adam_float", **dispatch, readable=ranges, writable=ranges)
    for limits in ("readable", "writable"):
        narrowed = {**ranges, 1: [spans[0], (4 * 500, 4 * 864 - 1)]}
        with pytest.raises(KernelError, match=r"at byte 3452 of buffer 1 .* does not let it"):
            samples.run("adam_float", **dispatch, **{limits: narrowed})


def test_input_and_output_may_be_the_same_memory():
    parameters = "const device float* from [[buffer(0)]], device float* to [[buffer(1)]]"
    x = np.arange(8, dtype=np.float32)
    library = build("to[i] = 2 * from[i];", parameters)
    library.run("k", grid=(8,), threads=(8,), buffers={0: x, 1: x})
    np.testing.assert_array_equal(x, 2 * np.arange(8))
    with pytest.raises(KernelError, match="data race"):
        build("to[i] = from[i ^ 1];", parameters).run(
            "k", grid=(8,), threads=(4,), buffers={0: x, 1: x}
        )


# Bodies of a kernel that runs as four threads on four floats; lines count from 1.
FAULTS = [
    ("x[i + 1] = 0;", "writes 4 bytes 0 bytes past the end of buffer 0 .* outside of what is"),
    ("x[i] += x[-1];", "reads 4 bytes 4 bytes before buffer 0"),
    ("if (i == 0) *(device packed_float2*)(x + 3) = float2(1);", "past the end"),
    ("if (i == 0) *(device float2*)(x + 1) = float2(1);", "at byte 4 of .* not aligned"),
    ("*(device float*)((device char*)x + 1) = 0;", "at byte 1 of .* not aligned"),
    ("x[i / 2] = i;", "writes 4 bytes at byte [04] of buffer 0 .*data race"),
    ("if (i == 0) x[1] = 2; else x[0] = x[1];", "data race"),
    ("const device float* y = x; *(device float*)(y + 9999999) = 0;", "near no buffer"),
    ("threadgroup float t[2]; t[i & 1] = 0; x[i] = t[i & 1];", "data race"),
    ("threadgroup float t[2]; x[i] = t[0];", "nothing has been written to"),
    (
        "threadgroup float t[3]; threadgroup float* q = t; q[i] = 0; x[i] = q[i];",
        "at byte 12 .* variable of 12 bytes",
    ),
    ("threadgroup float t[9000]; t[i] = 0; x[i] = t[i];", "36000 bytes, more than the 32768"),
    ("float a[3] = {x[i], 1, 2}; x[i] = a[i];", r"index is outside of its array\s+fault:1"),
    ("x[i] = 7 / (int(i) - 2);", r"divided by zero[^\n]*\s+fault:1"),
    ("x[i] = INT_MAX - 2 + int(i);", "sum of signed integers overflows"),
    ("if (i < 2) threadgroup_barrier(mem_flags::mem_none);", "2 of 4 threads returned"),
    ("if (i < 2) return; threadgroup_barrier(mem_flags::mem_none);", "2 of 4 threads returned"),
    (
        "if (i < 2) { threadgroup_barrier(mem_flags::mem_none); }\n"
        "else { threadgroup_barrier(mem_flags::mem_none); }",
        "waits at the threadgroup_barrier of line 2, others at that of line 1",
    ),
    ("if (i < 2) { x[i] = simd_sum(x[i]); }\nelse { simd_sum(1); }", "others of its SIMD-group"),
    ("if (i < 2) x[i] = simd_sum(x[i]);\nsimdgroup_barrier(mem_flags::mem_none);", "SIMD-group"),
    ("x[i] = simd_shuffle(x[i], 9);", "reads a lane that is not active"),
]


@pytest.fixture(scope="module")
def faults() -> simulator.Library:
    text = "#include <metal_stdlib>\nusing namespace metal;\n"
    for number, (body, _) in enumerate(FAULTS):
        text += f"[[kernel]] void fault_{number}(device float* x [[buffer(0)]],\n"
        text += f'uint i [[thread_position_in_grid]]) {{\n#line 1 "fault"\n{body}\n}}\n'
    simulator.check(text)
    return simulator.build(text)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[body for body, _ in FAULTS])
def test_a_kernel_that_misbehaves_says_how(faults, number, order):
    x = np.zeros(4, np.float32)
    with pytest.raises(KernelError, match=f"kernel fault_{number}.*({FAULTS[number][1]})"):
        faults.run(f"fault_{number}", grid=(4,), threads=(4,), buffers={0: x}, order=order)


@pytest.mark.parametrize(
    ("flags", "is_race"), [("mem_none", True), ("mem_threadgroup", True), ("mem_device", False)]
)
def test_a_barrier_orders_only_the_memory_that_it_names(flags, is_race):
    library = build(f"x[i] = 1; threadgroup_barrier(mem_flags::{flags}); x[63 - i] += 1;")
    x = np.zeros(64, np.float32)
    arguments = {"threadgroups": (1,), "threads": (64,), "buffers": {0: x}}
    if is_race:
        with pytest.raises(KernelError, match="data race"):
            library.run("k", **arguments)
    else:
        library.run("k", **arguments)
        assert (x == 2).all()


def test_no_barrier_orders_threads_of_two_threadgroups():
    library = build("x[i % 32] = 1; threadgroup_barrier(mem_flags::mem_device);")
    with pytest.raises(KernelError, match=r"threadgroup \(1, 0, 0\): .*data race"):
        library.run("k", grid=(64,), threads=(32,), buffers={0: np.zeros(32, np.float32)})


def test_an_error_names_the_line_of_the_source():
    with pytest.raises(KernelError) as caught:
        build("uint j = i;\nx[j + 5] = 0;").run(
            "k", grid=(1,), threads=(1,), buffers={0: np.zeros(1, np.float32)}
        )
    assert str(caught.value).endswith("\n  program_source:5")


# ---- Dispatches ----

TAKES_STRUCT = "constant float4& c [[buffer(1)]], device float* x [[buffer(0)]]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buffers": {0: np.zeros(4, np.float32)}}, "buffer 1 is not bound"),
        (
            {"buffers": {0: np.zeros(4, np.float32), 1: bytes(15)}},
            "buffer 1 has 15 bytes, and the kernel takes a reference to 16",
        ),
        (
            {"buffers": {0: np.zeros(9, np.uint8)[1:], 1: bytes(16)}},
            "buffer 0 is not aligned to the 4 bytes",
        ),
        ({"threads": (1025,)}, "1 to 1024 threads, not 1025"),
        ({"threadgroup_memory": {0: 20}}, "no multiple of 16"),
        ({"threadgroup_memory": {0: 32768, 1: 16}}, "32784 bytes, more than the 32768"),
    ],
)
def test_a_wrong_dispatch_is_refused(arguments, message):
    library = build("x[i] = c.x;", TAKES_STRUCT)
    usual = {
        "threads": (4,),
        "threadgroups": (1,),
        "buffers": {0: np.zeros(4, np.float32), 1: bytes(16)},
    }
    library.run("k", **usual)
    with pytest.raises(KernelError, match=message):
        library.run("k", **{**usual, **arguments})


def test_what_is_const_is_not_written_even_through_a_cast():
    library = build("*(device float*)(x) = i;", "const device float* x [[buffer(0)]]")
    with pytest.raises(KernelError, match="read-only"):
        library.run("k", grid=(1,), threads=(1,), buffers={0: np.zeros(1, np.float32)})


def test_a_library_tells_what_its_kernels_take(samples):
    assert samples.kernels == [
        "transpose",
        *(f"adam_{name}" for name in ("float", "float_clipped", "half", "bfloat")),
        *("sum_of_squares_float", "sum_of_squares_bfloat"),
    ]
    parameters = samples.parameters("adam_half")[:6]
    assert [(p.index, p.size, p.is_reference, p.is_writable) for p in parameters] == [
        (0, 2, False, True),
        (1, 4, False, True),
        (2, 4, False, True),
        (3, 2, False, False),
        (4, 24, False, False),
        (5, 16, True, False),
    ]


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
