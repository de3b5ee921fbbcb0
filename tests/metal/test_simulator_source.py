"""What the simulator says about source: each mistake that it is there to find, seeded one at a time
into kernels that are right; legal MSL that it must take; its messages, its cache, its command."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simulator
from sample_kernels import SAMPLES, adam_arguments, adam_reference
from simulator import ClangNotFoundError, CompileError, KernelError

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the simulator runs on Linux; a Mac has a GPU"
)

HERE = Path(__file__).parent
TEXT = SAMPLES.read_text()
HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


# ---- Seeded mistakes ----

# What is replaced, by what, and the message.
REFUSED = {
    "pointer without address space": (
        "find_segment(constant Segment*",
        "find_segment(const Segment*",
        "no address space: const Segment \\* segments",
    ),
    "device pointer passed as constant": (
        "find_segment(segments,",
        "find_segment((const device Segment*)g,",
        "no matching function",
    ),
    "thread pointer to device memory": (
        "ulong at = index;",
        "ulong at = index; thread float* q = m;",
        "cannot initialize a variable of type",
    ),
    "thread reference to device memory": (
        "ulong at = index;",
        "ulong at = index; thread float& q = m[at];",
        "changes address space",
    ),
    "write to constant memory": ("ulong at = index;", "ulong at = settings.eps = 1;", "assign"),
    "write to const device memory": ("ulong at = index;", "ulong at = g[0] = T(1);", "assign"),
    "global variable": ("constant float kLargest", "static float kLargest", "constant address"),
    "constant of run-time value": (
        "kLargestStep = 10.0;",
        "kLargestStep = precise::sqrt(10.0);",
        "global constructor",
    ),
    "static local variable": ("ulong at = index;", "static uint n; ulong at = index;", "constant"),
    "array of run-time length": ("ulong at = index;", "float q[s]; ulong at = index;", "array"),
    "double": ("float gradient =", "double gradient =", "MSL has no double"),
    "long long": ("ulong at = index;", "unsigned long long at = index;", "no long long"),
    "lambda": ("ulong at = index;", "auto f = [=](uint q) { return q; };", "lambda"),
    "standard library": ("clamp(change", "std::clamp(change", "C\\+\\+ standard library"),
    "goto": ("ulong at = index;", "ulong at = index; goto out; out:;", "no goto"),
    "new": ("ulong at = index;", "ulong at = *new ulong(1);", "memory of one's own"),
    "virtual function": ("struct Settings {", "struct Settings { virtual void f();", "virtual"),
    "recursion": (
        "  ulong before = 0;",
        "  if (count > 99) return find_segment(segments, count - 1, thread_index);\n"
        "  ulong before = 0;",
        "no recursion: find_segment",
    ),
    "float stored as bfloat": ("p[at] = T(float(p[at])", "p[at] = (float(p[at])", "bfloat"),
    "bfloat made from a literal": ("ulong at = index;", "ulong at = index; T q = 0.0f;", "bfloat"),
    "bfloat as half": ("float value = float(x[i]);", "half value = x[i];", "half"),
    "SIMD-group function of bfloat": ("simd_sum(sum)", "simd_sum(x[0])", "no bfloat"),
    "max of uint and int": ("(num_threads + 31)", "max(num_threads, 1)", "ambiguous"),
    "memory order of a later version": (
        "ulong at = index;",
        "ulong at = memory_order_acquire;",
        "memory_order_acquire",
    ),
    "buffer index past 30": ("g [[buffer(3)]]", "g [[buffer(31)]]", "past 30"),
    "buffer index used twice": ("g [[buffer(3)]]", "g [[buffer(2)]]", "used twice"),
    "buffer index to be computed": ("g [[buffer(3)]]", "g [[buffer(kIndex)]]", "no sum of"),
    "parameter without attribute": (
        "uint index [[thread_position_in_grid]]",
        "uint index",
        "'uint index' has no attribute",
    ),
    "unknown attribute": ("[[thread_position_in_grid]]", "[[position]]", "not know"),
    "buffer by value": ("constant uint& count", "constant uint count", "neither a pointer"),
    "positions of unequal width": ("uint3 inside [[", "uint inside [[", "differ in their width"),
    "positions of unequal type": (
        "uint num_threads [[threads_per",
        "ushort num_threads [[threads_per",
        "differ in their type",
    ),
    "position of a wrong type": ("uint lane [[", "float lane [[", "ushort, uint or their vectors"),
    "threadgroup variable outside of a kernel": (
        "  ulong before = 0;",
        "  threadgroup float t[4];\n  ulong before = 0;",
        "threadgroup variable outside",
    ),
    "threadgroup variable with initializer": (
        "threadgroup float sums[32];",
        "threadgroup float sums[32] = {};",
        "no initializer",
    ),
    "template never instantiated": (
        'instantiate_adam("float"',
        "template <typename T> [[kernel]] void lost(device T* q [[buffer(0)]]) {}\n"
        'instantiate_adam("float"',
        "kernel lost: the template is never instantiated",
    ),
    "instantiation of another function": ("void sum_of_squares<float>", "void lost<float>", "lost"),
    "host name used twice": ('("half", half', '("float", half', "two kernels have the host name"),
    "function constant": (
        "constant float kLargest",
        "constant bool is_large [[function_constant(0)]];\nconstant float kLargest",
        "simulator has no function_constant",
    ),
    "undeclared name": ("settings.eps)", "settings.epsilon)", "epsilon"),
    "character that is not ASCII": ("// of this leaf", "// d'été", ":7: error: .*not ASCII"),
}

B = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SUMS = f"    sums[simdgroup] = sum;\n  }}\n  {B}"

STOPPED = {
    "segment walked too far": ("(thread_index < before)", "(thread_index <= before)", "let it"),
    "segment begun too early": (
        "at += segments[s].begin;",
        "at += segments[s].begin - 1;",
        "let it",
    ),
    "no check at the end": ("if (s == settings.num_segments) {", "if (s > 99) {", "."),
    "one element twice": ("ulong at = index;", "ulong at = index / 2;", "data race"),
    "one result for all threadgroups": ("partial[group] = sum", "partial[0] = sum", "data race"),
    "barrier left out of a transpose": (B, "", "nothing has been written|data race"),
    "barrier left out of a reduction": (SUMS, SUMS.replace(B, ""), "nothing has been|data race"),
    "barrier of a SIMD-group only": (SUMS, SUMS.replace("threadgroup_b", "simdgroup_b"), "race"),
    "barrier of no memory": (SUMS, SUMS.replace("mem_threadgroup", "mem_none"), "data race"),
    "barrier of other memory": (SUMS, SUMS.replace("mem_threadgroup", "mem_device"), "data race"),
    "barrier in a branch": (SUMS, SUMS.replace("}", "").replace(B, B + "}"), "."),
    "return before a barrier": (
        "  threadgroup float sums[32];",
        "  if (inside >= 70) return;\n  threadgroup float sums[32];",
        "threads returned before",
    ),
    "SIMD-group function in a branch": (
        "sum = simd_sum(sum);\n  if (lane",
        "if (lane < 16) sum = simd_sum(sum);\n  if (lane",
        "SIMD-group",
    ),
    "unwritten threadgroup memory": (
        "lane < (num_threads + 31) / 32 ? sums[lane] : 0.0f",
        "sums[lane]",
        "nothing has been written",
    ),
    "threadgroup array too small": ("sums[32]", "sums[2]", "index is outside of its array"),
    "threadgroup memory too large": ("sums[32]", "sums[9000]", "more than the 32768"),
    "tile read across its rows": ("tile[32][33]", "tile[31][33]", "index is outside of its array"),
    "missing check of a column": (
        "if (row < shape.y && column < shape.x) {\n      to[",
        "if (row < shape.y) {\n      to[",
        ".",
    ),
}

WRONG = {
    "wrong constant": ("(1.0f - settings.beta1)", "(1.0f - settings.beta2)"),
    "wrong sign": ("float(p[at]) - seg", "float(p[at]) + seg"),
    "transposed shape": ("to[column * shape.y + row]", "to[column * shape.x + row]"),
}


def seeded(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new, 1)


def run_samples(library: simulator.Library) -> None:
    """Every kernel once, with all that a test of it would look at."""
    arguments = adam_arguments("float")
    expected = adam_reference(arguments[0], arguments[3], arguments[4])
    spans = [(4 * 64, 4 * 200), (4 * 500, 4 * 864)]
    ranges = dict.fromkeys(range(3), spans)
    library.run(
        "adam_float",
        grid=(512,),
        threads=(64,),
        buffers=arguments,
        readable={**ranges, 3: spans},
        writable=ranges,
    )
    np.testing.assert_allclose(arguments[0], expected, atol=1e-7)
    x = np.random.default_rng(0).normal(size=(33, 45)).astype(np.float32)
    y = np.zeros((45, 33), np.float32)
    shape = np.array([45, 33], np.uint32)
    library.run("transpose", threadgroups=(2, 2), threads=(32, 8), buffers={0: x, 1: y, 2: shape})
    np.testing.assert_array_equal(y, x.T)
    partial = np.full(2, np.nan, np.float32)
    library.run(
        "sum_of_squares_float",
        threadgroups=(2,),
        threads=(96,),
        buffers={0: x, 1: partial, 2: np.uint32(x.size).tobytes()},
    )
    np.testing.assert_allclose(partial.sum(), (x.astype(np.float64) ** 2).sum(), rtol=1e-5)


def test_the_samples_are_right():
    simulator.check(SAMPLES)
    run_samples(simulator.build(TEXT))


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_in_the_source_is_refused(mistake):
    old, new, message = REFUSED[mistake]
    with pytest.raises(CompileError, match=message):
        simulator.check(seeded(old, new))


@pytest.mark.parametrize("mistake", STOPPED)
def test_a_mistake_at_run_time_is_an_error(mistake):
    old, new, message = STOPPED[mistake]
    library = simulator.build(seeded(old, new))
    with pytest.raises(KernelError, match=message):
        run_samples(library)


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_in_the_arithmetic_shows_in_the_result(mistake):
    library = simulator.build(seeded(*WRONG[mistake]))
    with pytest.raises((AssertionError, KernelError)):
        run_samples(library)


# ---- Legal MSL ----

LEGAL = {
    "vector declared like a call": "float2 v(1.0f, 2.0f); x[i] = v.x + v.y;",
    "vector of a template": "vec<half, 4> v = vec<half, 4>(half(1)); x[i] = float(v.w);",
    "vectors of bfloat": "vec<bfloat, 4> v; v[0] = bfloat(1.0f); x[i] = float(v[0]);",
    "pointer cast to a vector": "*(device float4*)x = *(const device float4*)(x + 4);",
    "pointer to thread memory": "float a = 1; thread float* q = &a; *q += 1; x[i] = a;",
    "switch": "switch (i) { case 0: x[i] = 1; break; default: x[i] = 2; }",
    "product that looks like a pointer": "float T = 2, a = 3; float b = T * a; x[i] = b;",
    "shift and comparison": "if (i >> 1 >= 1 && i << 1 != 4) { x[i] = i; }",
    "literals": "x[i] = 1.0 + 1e3 + .5 + 2.h + 0x10 + 1.5f + float(3.0bf) + 0x1p-3f;",
    "threadgroup pointer": "threadgroup float t[4]; threadgroup float* q = t; q[i & 3] = 0;",
    "threadgroup array of computed size": "threadgroup float t[2 * (8 + 1)]; t[i] = 0;",
    "pragma": "\n#pragma METAL fp math_mode(safe)\nx[i] = 0;",
}


def test_legal_source_is_taken():
    position = "uint i [[thread_position_in_grid]]"
    kernels = [
        f"[[kernel]] void k{number}(device float* x [[buffer(0)]], {position}) {{ {body} }}\n"
        for number, body in enumerate(LEGAL.values())
    ]
    text = HEADER + "".join(kernels)
    simulator.check(text)
    assert len(simulator.build(text).kernels) == len(LEGAL)


def test_thirty_buffers_and_every_way_to_name_a_kernel():
    buffers = ", ".join(f"const device T* b{k} [[buffer({k})]]" for k in range(30))
    total = " + ".join(f"b{k}[0]" for k in range(30))
    text = f"""{HEADER}
template <typename T, bool TWICE, int OFFSET = 0>
[[kernel]] void add({buffers}, device T* out [[buffer(30)]], uint i [[thread_position_in_grid]]) {{
  out[i] = T(({total}) * (TWICE ? 2 : 1) + OFFSET);
}}
template [[host_name("once")]] [[kernel]] decltype(add<float, false>) add<float, false>;
template [[host_name("twice" "_int")]] [[kernel]] decltype(add<int, true, 3>) add<int, true, 3>;
[[host_name("plain")]] [[kernel]] void other(device float* x [[buffer(0)]]) {{ x[0] = 1; }}
kernel void old(device float* x [[buffer(0)]]) {{ x[0] = 1; }}
"""
    simulator.check(text)
    library = simulator.build(text)
    assert sorted(library.kernels) == ["old", "once", "plain", "twice_int"]
    for name, dtype, expected in (("once", np.float32, 435), ("twice_int", np.int32, 873)):
        arrays = {k: np.full(1, k, dtype) for k in range(30)}
        out = np.zeros(1, dtype)
        library.run(name, grid=(1,), threads=(1,), buffers={**arrays, 30: out})
        assert out[0] == expected


def test_the_engines_rules_and_storages_compile_as_they_are(tmp_path):
    source = tmp_path / "rules.metal"
    source.write_text("""#include <metal_stdlib>
#include "rules.h"
#include "schedule.h"
#include "storage.h"
using namespace flatstep;
template <typename R>
static float updated(float p) {
  typename R::Hyperparameters h = {};
  Element<R::NUM_STATES> e = {};
  e.p = p;
  return R::update(R::prepare(h, 1.0f, 3), e, 1.0f).p;
}
#define UPDATE(Type, name) p[i] = updated<Type>(p[i]);
#define ROUND(Type, dtype) p[i] = Type::load(Type::store(p[i], RoundingKey{i}));
[[kernel]] void k(device float* p [[buffer(0)]], constant Schedule& schedule [[buffer(1)]],
    uint i [[thread_position_in_grid]]) {
  FLATSTEP_RULES(UPDATE)
  FLATSTEP_STORAGES(ROUND)
  SchedulePiece piece = {};
  p[i] += float(active_piece(schedule, 3)) + piece_value(piece, 3);
}
""")
    simulator.check(source, [HERE.parents[1] / "csrc"])


# ---- Messages, cache, command ----


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(HERE), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_messages_name_the_files_and_lines_of_the_source(tmp_path):
    (tmp_path / "inner.h").write_text("// one\nstatic float f() {\n  return missing;\n}\n")
    source = tmp_path / "outer.metal"
    body = "[[kernel]] void k(device float* x [[buffer(0)]]) { x[0] = f(); }\n"
    source.write_text(f'{HEADER}#include "inner.h"\n{body}')
    with pytest.raises(CompileError, match=r"inner.h:3:10: error: .*missing"):
        simulator.build(source)
    source.write_text(f'{HEADER}{body}#line 100 "other.metal"\n{body.replace("f()", "other_f()")}')
    with pytest.raises(CompileError) as caught:
        simulator.check(source)
    assert "outer.metal:3:" in str(caught.value) and "other.metal:100:" in str(caught.value)
    with pytest.raises(CompileError, match=r"program_source:1:10: .*nothing\.h"):
        simulator.build('#include "nothing.h"\n')
    with pytest.raises(CompileError, match="program_source: error: there is no kernel"):
        simulator.build(HEADER)


def test_a_build_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FLATSTEP_SIMULATOR_CACHE", str(tmp_path))
    path = simulator.build_file(TEXT)
    made = path.stat().st_mtime_ns
    monkeypatch.setattr("simulator.compiler._compile_library", None)
    assert simulator.build_file(TEXT) == path and path.stat().st_mtime_ns == made
    assert simulator.build_file(TEXT + "// a comment changes no kernel\n") == path
    with pytest.raises(TypeError):
        simulator.build_file(TEXT.replace("10.0", "11.0"))
    assert not list(tmp_path.glob("making-*"))


def test_the_command_builds_what_a_host_can_load(tmp_path):
    output = tmp_path / "samples.so"
    result = command("simulator", "build", SAMPLES, "-o", output)
    assert (result.returncode, result.stderr) == (0, "")
    run_samples(simulator.Library(output))


def test_the_command_fails_with_the_compilers_message(tmp_path):
    source, output = tmp_path / "wrong.metal", tmp_path / "out.so"
    source.write_text(seeded("float gradient =", "double gradient ="))
    result = command("simulator", "build", source, "-o", output)
    assert result.returncode != 0 and not output.exists()
    assert "wrong.metal:52: error: MSL has no double" in result.stderr
    assert command("simulator", "build", source, "-o", output, "--no-check").returncode == 0
    source.write_text(seeded("float gradient =", "float gradient = missing +"))
    result = command("simulator", "build", source, "-o", output, "--no-check")
    assert result.returncode != 0 and "wrong.metal:52:20: error:" in result.stderr


def test_processes_share_a_cache(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "FLATSTEP_SIMULATOR_CACHE": str(tmp_path / "cache"),
    }
    arguments = [sys.executable, "-m", "simulator", "build", str(SAMPLES), "--no-check", "-o"]
    outputs = [tmp_path / f"{n}.so" for n in range(2)]
    running = [subprocess.Popen([*arguments, str(out)], env=environment) for out in outputs]
    assert [process.wait() for process in running] == [0, 0]
    assert len(list((tmp_path / "cache").glob("kernels-*"))) == 1


def test_the_compiler_is_the_one_that_was_asked_for(monkeypatch):
    found = command("simulator.clang")
    assert found.returncode == 0 and shlex.split(found.stdout) == simulator.find_clang()
    assert command("simulator.clang", FLATSTEP_CLANG="false").returncode != 0
    monkeypatch.setenv("FLATSTEP_CLANG", "false")
    with pytest.raises(ClangNotFoundError, match="FLATSTEP_CLANG=false is no clang"):
        simulator.find_clang()
