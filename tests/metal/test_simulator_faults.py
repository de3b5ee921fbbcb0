"""What the simulator refuses while a kernel runs: accesses to memory that is not its own, races,
overlaps, barriers that not all threads reach, dispatches that bind the wrong things."""

import sys

import numpy as np
import pytest
import simulator
from sample_kernels import adam_arguments, build, samples
from simulator import KernelError, guarded_array

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the simulator runs on Linux; a Mac has a GPU"
)

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


def test_a_segment_may_be_all_that_a_kernel_touches():
    arguments = adam_arguments("float")
    spans = [(4 * 64, 4 * 200), (4 * 500, 4 * 864)]
    ranges = dict.fromkeys(range(3), spans)
    dispatch = {"grid": (500,), "threads": (64,), "buffers": arguments}
    samples().run("adam_float", **dispatch, readable=ranges, writable=ranges)
    for limits in ("readable", "writable"):
        narrowed = {**ranges, 1: [spans[0], (4 * 500, 4 * 864 - 1)]}
        with pytest.raises(KernelError, match=r"at byte 3452 of buffer 1 .* does not let it"):
            samples().run("adam_float", **dispatch, **{limits: narrowed})


# Bodies of a kernel that runs as four threads on four floats; lines count from 1.
FAULTS = [
    ("x[i + 1] = 0;", "writes 4 bytes, 0 bytes past the end of buffer 0 .* outside of what is"),
    ("x[i] += x[-1];", "reads 4 bytes, 4 bytes before buffer 0"),
    ("if (i == 0) *(device packed_float2*)(x + 3) = float2(1);", "past the end"),
    ("if (i == 0) *(device float2*)(x + 1) = float2(1);", "at byte 4 of .* not aligned"),
    ("*(device float*)((device char*)x + 1) = 0;", "at byte 1 of .* not aligned"),
    ("x[i / 2] = i;", "writes 4 bytes, at byte [04] of buffer 0 .*data race"),
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


def build_bodies(name: str, parameters: str, bodies: list[str]) -> simulator.Library:
    text = "#include <metal_stdlib>\nusing namespace metal;\n"
    for number, body in enumerate(bodies):
        text += f"[[kernel]] void {name}_{number}({parameters},\n"
        text += f'uint i [[thread_position_in_grid]]) {{\n#line 1 "{name}"\n{body}\n}}\n'
    simulator.check(text)
    return simulator.build(text)


@pytest.fixture(scope="module")
def faults() -> simulator.Library:
    return build_bodies("fault", "device float* x [[buffer(0)]]", [body for body, _ in FAULTS])


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


# ---- Overlaps ----

# Bodies of a kernel that runs as two threadgroups of four on sixteen floats, 0 to 15, which all its
# buffers have in common.
ALL_THE_SAME = """const device float* from [[buffer(0)]], device float* to [[buffer(1)]],
    device float* other [[buffer(2)]], device atomic_uint* n [[buffer(3)]],
    constant float* c [[buffer(4)]]"""
BARRIER = "threadgroup_barrier(mem_flags::mem_device);"
ADD = "atomic_fetch_add_explicit(n + 15, 1u, memory_order_relaxed);"

OVERLAPS = [
    (
        "to[i] = 2 * from[i];",
        r"writes 4 bytes, at byte \d+ of buffer 1 .* also read through buffer 0",
    ),
    ("to[i] = 1; to[i] += from[i];", "reads 4 bytes, .* buffer 0 .* also written through buffer 1"),
    ("if (i == 0) to[9] = from[8]; if (i == 3) to[8] = 0;", "through buffer [01]"),
    ("if (i == 0) to[9] = from[8]; if (i == 7) to[8] = 0;", "through buffer [01]"),
    (f"if (i == 3) to[8] = 0; {BARRIER} if (i == 0) to[9] = from[8];", "also written"),
    (f"if (i == 3) to[9] = from[8]; {BARRIER} if (i == 0) to[8] = 0;", "also read"),
    ("to[i] = 1; other[i] = 2;", "writes 4 bytes, .* buffer 2 .* also written through buffer 1"),
    ("to[i + 8] = from[i] + other[i]; other[i] = 0;", "buffer 2 .* also read through buffer 0"),
    ("to[i] = c[i];", "also read through buffer 4"),
    ("to[i] = ((const device float*)((const device char*)from + 4 * i))[0];", "through buffer 0"),
    ("const device float* p = i < 8 ? from : to; to[i] = p[i];", "through buffer 0"),
    ("((device float2*)to)[i] = from[i];", "writes 8 bytes.* also read through buffer 0"),
    (f"{ADD} other[15] = 1;", "buffer 2 .* also written through buffer 3"),
    (f"if (from[15] > 0) {ADD}", "writes 4 bytes, .* buffer 3 .* also read through buffer 0"),
]

# And what it makes of the first eight and the last eight floats.
APART = [
    ("to[i + 8] = from[i];", lambda x, y: (x, x)),
    ("to[i] += 1;", lambda x, y: (x + 1, y)),
    ("to[i + 8] = from[i] + other[i] + c[i];", lambda x, y: (x, 3 * x)),
    ("to[i] = 0; other[i + 8] = 1;", lambda x, y: (0 * x, 0 * y + 1)),
    ("const device float* p = to; to[i] = 2 * p[i];", lambda x, y: (2 * x, y)),
    ("device float* p = i < 4 ? to : other; p[i] *= 2;", lambda x, y: (2 * x, y)),
    ("atomic_fetch_add_explicit(n + 1, 0u, memory_order_relaxed);", lambda x, y: (x, y)),
]


@pytest.fixture(scope="module")
def overlaps() -> simulator.Library:
    return build_bodies("overlap", ALL_THE_SAME, [body for body, _ in [*OVERLAPS, *APART]])


def run_on_one_array(library, number, x, order):
    buffers = dict.fromkeys(range(5), x)
    library.run(f"overlap_{number}", grid=(8,), threads=(4,), buffers=buffers, order=order)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("number", range(len(OVERLAPS)), ids=[body for body, _ in OVERLAPS])
def test_what_one_buffer_writes_is_not_touched_through_another(overlaps, number, order):
    x = np.arange(16, dtype=np.float32)
    with pytest.raises(KernelError, match=f"({OVERLAPS[number][1]}) .*do not overlap"):
        run_on_one_array(overlaps, number, x, order)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("number", range(len(APART)), ids=[body for body, _ in APART])
def test_buffers_may_overlap_where_one_alone_touches_what_it_writes(overlaps, number, order):
    x = np.arange(16, dtype=np.float32)
    expected = APART[number][1](x[:8].copy(), x[8:].copy())
    run_on_one_array(overlaps, len(OVERLAPS) + number, x, order)
    np.testing.assert_array_equal(x, np.concatenate(expected))


def test_buffers_that_share_some_bytes_overlap_there_alone():
    parameters = "const device float* from [[buffer(0)]], device float* to [[buffer(1)]]"
    library = build("to[i] = from[i] + 1;", parameters)
    x = np.arange(2048, dtype=np.float32)
    library.run("k", grid=(3,), threads=(3,), buffers={0: x[2:2000], 1: x[5:]})
    np.testing.assert_array_equal(x, [0, 1, 2, 3, 4, 3, 4, 5, *range(8, 2048)])
    with pytest.raises(KernelError, match=r"at byte 12 of buffer 0 .* through buffer 1"):
        library.run("k", grid=(4,), threads=(4,), buffers={0: x[2:2000], 1: x[5:]})
    with pytest.raises(KernelError, match="0 bytes past the end of buffer 1"):
        library.run("k", grid=(4,), threads=(4,), buffers={0: x, 1: x[1000:1003]})


def test_an_error_names_its_line_where_kernels_end_alike(overlaps):
    buffers = dict.fromkeys(range(5), np.zeros(16, np.float32))
    with pytest.raises(KernelError, match=r"\n  overlap:1$"):
        overlaps.run("overlap_0", grid=(1,), threads=(1,), buffers=buffers)


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


def test_a_library_tells_what_its_kernels_take():
    assert samples().kernels == [
        "transpose",
        *(f"adam_{name}" for name in ("float", "float_clipped", "half", "bfloat")),
        *("sum_of_squares_float", "sum_of_squares_bfloat"),
    ]
    parameters = samples().parameters("adam_half")[:6]
    assert [(p.index, p.size, p.is_reference, p.is_writable) for p in parameters] == [
        (0, 2, False, True),
        (1, 4, False, True),
        (2, 4, False, True),
        (3, 2, False, False),
        (4, 24, False, False),
        (5, 16, True, False),
    ]
