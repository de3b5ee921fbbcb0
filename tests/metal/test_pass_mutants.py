"""The tests of what kernels do besides a rule are tests: mistakes put into the text are found."""

import sys

import advance_checks
import kernel_text
import norms
import pass_updates
import pytest
import simulator
from mutants import mutated

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the simulator runs on Linux")

CLIPPED = """  float scaled = g * scale;
  scaled = scaled > clip_value ? clip_value : scaled;
  return scaled < -clip_value ? -clip_value : scaled;"""
SCALED_AFTER = """  float clipped = g > clip_value ? clip_value : g;
  return scale * (clipped < -clip_value ? -clip_value : clipped);"""
CHANGES = "*(constant uint*)&pass->{} != {}"
KEPT = """if (first >= segment->size) {
        return;
      }
      uint count = uint(min(segment->size - first"""
BUFFERS = """ema [[buffer(FLATSTEP_EMA)]],
    device char* accumulated [[buffer(FLATSTEP_ACCUMULATED)]]"""
TILED_PASS = """has_tiles ? FLATSTEP_TILE_ROWS * FLATSTEP_TILE_COLUMNS / FLATSTEP_RUN"""
COPIED = """auto stored = load_values(p_in + place.p_at, count, place.is_whole);
        store_values(p_out + place.p_at, stored, count, place.is_whole);"""
LARGEST = "FLATSTEP_BITS(uint, g.at[k]) & 0x7fffffffu);\n      float used"
SQUARES = "(g.at[0] + g.at[1]) + (g.at[2] + g.at[3])"

# What is changed, and into what.
MUTANTS = {
    # Constants and scalars
    "the seed ignored": ("c.seed = s.seed;", "c.seed = 0;"),
    "the key of the step before": (
        "c.tick = uint32_t(now.step);",
        "c.tick = uint32_t(now.step) - 1;",
    ),
    "what is not there is written": (
        "if ((written >> SCALAR_##name & 1u) != 0) {",
        "if (true) {",
    ),
    "what is not there is read": ("if ((read >> SCALAR_##name & 1u) != 0) {", "if (true) {"),
    "learning rate not written": (
        "next.learning_rate = is_taken ?",
        "now.learning_rate = is_taken ?",
    ),
    "not counted": ("next.step += c.action == ACTION_UPDATE;", ""),
    "all groups count": (
        "group_learning_rates[group - 1];\n    return;",
        "group_learning_rates[group - 1];",
    ),
    "held rates move on": ("is_taken ? rate : group_learning_rates[group - 1]", "rate"),
    "another group's rate": (
        "rate = group_learning_rates[group - 1];",
        "rate = group_learning_rates[group];",
    ),
    "a rate where another's lies": (
        "next_group_learning_rates[group - 1]",
        "next_group_learning_rates[group]",
    ),
    "a group's own schedule ignored": ("of_group.source == RATE_SCHEDULE", "false"),
    "a group's own rate ignored": ("of_group.source == RATE_OWN", "false"),
    "a schedule where none lies": ("(groups + of_group.schedule)", "(words + of_group.schedule)"),
    "a group's scale ignored": ("rate, of_group.scale);", "rate, 1.0f);"),
    "its own rate scaled": ("source == RATE_OWN ? rate : scale * rate", "scale * rate"),
    "the rate of all moves on": ("is_taken ? rate_of_all : now.learning_rate", "rate_of_all"),
    "no scale is zero": ("  now.grad_scale = 1.0f;", ""),
    "rates read as a scalar": (
        "uint is_scalar = ~(1u << SCALAR_group_learning_rates);",
        "uint is_scalar = ~0u;",
    ),
    "buffers of scalars swapped": ("ADVANCE_WRITTEN + SCALAR_", "ADVANCE_WRITTEN + 0 * SCALAR_"),
    "sums not divided": (
        "now.grad_scale / float(now.accumulated)",
        "now.grad_scale",
    ),
    "what is added is divided": (
        "s.is_accumulation != 0 ? 1.0f : scale_of(s, now)",
        "scale_of(s, now)",
    ),
    "held a gradient longer": (
        "now.accumulated < s.accumulate_steps",
        "now.accumulated <= s.accumulate_steps",
    ),
    "not skipped": ("s.skips_nonfinite != 0 && !is_finite(norm) ?", "false ?"),
    "skipped where it should not be": (
        "s.skips_nonfinite != 0 && !is_finite(norm)",
        "!is_finite(norm)",
    ),
    "taken while it is held": ("holds(s, now) ? uint32_t(ACTION_HOLD) : c.action", "c.action"),
    "sums that are dropped still count": ("next.accumulated = 0;", ""),
    "skipped steps not counted": ("next.skipped_steps += c.action == ACTION_DROP;", ""),
    "the norm of a skipped step": (
        "c.action == ACTION_UPDATE ? FLATSTEP_SQRT",
        "true ? FLATSTEP_SQRT",
    ),
    "gradients added not counted": ("next.accumulated += 1;", ""),
    "one tick for all gradients": ("* 4099u + uint32_t(now.accumulated)", "* 4099u"),
    "a step's seed for what is added": ("c.seed = s.seed ^ 0x5bd1e995u;", ""),
    "an average starts early": (
        "c.ema_weight = after <= s.ema_start",
        "c.ema_weight = after < s.ema_start",
    ),
    "an average at every step": ("(s.ema_every > 0 ? s.ema_every : 1) == 0", "1 == 0"),
    "an average counts from zero": ("(after - s.ema_start) %", "after %"),
    "all of a norm": (
        "factor >= 1.0f || !is_finite(s.max_grad_norm) ? 1.0f : factor",
        "factor",
    ),
    # Gradients
    "clipped before it is scaled": (CLIPPED, SCALED_AFTER),
    "no upper limit": ("scaled > clip_value ? clip_value : scaled", "scaled"),
    "no lower limit": ("scaled < -clip_value ? -clip_value : scaled", "scaled"),
    "clipped by the norm first": (
        "scaled_gradient(c.grad_scale, c.clip_value, g) * c.clip_factor",
        "scaled_gradient(c.grad_scale * c.clip_factor, c.clip_value, g)",
    ),
    "gradients as they are": ("if (changes_gradients) {", "if (false) {"),
    "a scale alone": (CHANGES.format("grad_scale", "0x3f800000u"), "false"),
    "a limit alone": (CHANGES.format("clip_value", "0x7f800000u"), "false"),
    "a factor alone": (CHANGES.format("clip_factor", "0x3f800000u"), "false"),
    # Averages
    "an average of gradients": ("update(ema, place, p, pass,", "update(ema, place, g, pass,"),
    "an average of parameters before": (
        "update(ema, place, p, pass,",
        "update(ema, place, ParameterRun<P>::load(p_in, rests, place), pass,",
    ),
    "an average forgets": ("c.ema_decay * average + c.ema_weight * p", "c.ema_weight * p"),
    "an average of what was before": ("c.ema_weight == 1.0f ? p : mixed", "mixed"),
    "a state's key for the average": ("#define FLATSTEP_EMA_KEY 4", "#define FLATSTEP_EMA_KEY 3"),
    "no key for the average": ("#define FLATSTEP_NUM_KEYS 5", "#define FLATSTEP_NUM_KEYS 4"),
    "the average in a state's buffer": ("work.ema = ema;", "work.ema = state2;"),
    "average and sums swapped": (
        BUFFERS,
        BUFFERS.replace("ema [", "sum [")
        .replace("accumulated [", "ema [")
        .replace("sum [", "accumulated ["),
    ),
    # Sums
    "sums not cleared": ("if (clears_sums) {", "if (false) {"),
    "sums not known": ("segment.source == FLATSTEP_SUM_AS_SOURCE;", "false;"),
    "sums in another buffer": ("source = accumulated;", "source = ema;"),
    "sums cleared past their end": (
        "zeros, place.count, place.is_whole",
        "zeros, FLATSTEP_RUN, place.is_whole",
    ),
    "sums cleared as floats": (
        "switch (StorageNumber(storage)) { FLATSTEP_STORAGES(FLATSTEP_CLEAR_RUN) }",
        "switch (STORAGE_Float32 + 0 * storage) { FLATSTEP_STORAGES(FLATSTEP_CLEAR_RUN) }",
    ),
    "sums cleared where p lies": (
        "store_values(to + place.state_at, zeros",
        "store_values(to + place.p_at, zeros",
    ),
    "gradients replace their sum": ("e.p += g;", "e.p = g;"),
    # Steps that are not taken
    "taken all the same": ("work.pass.action != ACTION_UPDATE", "false"),
    "held sums dropped": ("clears_sums && pass.action == ACTION_DROP", "clears_sums"),
    "sums not dropped": ("clears_sums && pass.action == ACTION_DROP", "false"),
    "parameters not kept": ("if (!is_in_place) {", "if (false) {"),
    "parameters kept from where state lies": (
        COPIED,
        COPIED.replace("p_in + place.p_at", "p_in + place.state_at"),
    ),
    "kept past the end": (KEPT, KEPT[KEPT.index("uint count") :]),
    "kept in short passes of tiles": (TILED_PASS, "has_tiles ? FLATSTEP_THREADS"),
    # Norms
    "a mask left out": (
        "mask < FLATSTEP_SIMD_WIDTH; mask *= 2",
        "mask < FLATSTEP_SIMD_WIDTH; mask *= 4",
    ),
    "half a SIMD-group": ("mask < FLATSTEP_SIMD_WIDTH;", "mask < FLATSTEP_SIMD_WIDTH / 2;"),
    "every lane's sum": ("if (thread_index % FLATSTEP_SIMD_WIDTH == 0) {", "{"),
    "no barrier before the sums": (
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n  Pair total",
        "Pair total",
    ),
    "one SIMD-group": ("k < num_threads / FLATSTEP_SIMD_WIDTH", "k < 1"),
    "more SIMD-groups than there are": (
        "k < num_threads / FLATSTEP_SIMD_WIDTH",
        "k <= num_threads / FLATSTEP_SIMD_WIDTH",
    ),
    "no end of a source": ("if (first >= segment.size) {\n      break;\n    }", ""),
    "a source's tail": (
        "uint count = uint(min(segment.size - first, uint64_t(FLATSTEP_RUN)));",
        "uint count = FLATSTEP_RUN;",
    ),
    "a part's start": ("segment.p_offset + first, count)", "first, count)"),
    "a source's start": ("  source += segment.source_offset;\n", ""),
    "another segment's groups": (
        "start_of_run(group - segment.first_group,",
        "start_of_run(group,",
    ),
    "another source's dimensions": (
        "own_dimensions = dimensions + segment.first_dimension",
        "own_dimensions = dimensions",
    ),
    "a norm without scale": ("scaled_gradient(scale, settings", "scaled_gradient(1.0f, settings"),
    "a norm without limit": ("scale, settings.clip_value, g", "scale, 1e30f, g"),
    "sums of what is not squared": ("g.at[k] = used * used;", "g.at[k] = used;"),
    "an element left out": (SQUARES, SQUARES.replace("g.at[3]", "0.0f")),
    "finite once it is clipped": (
        LARGEST,
        LARGEST.replace("g.at[k]", "scaled_gradient(scale, settings.clip_value, g.at[k])"),
    ),
    "infinity is finite": ("largest >= 0x7f800000u", "largest > 0x7f800000u"),
    "not finite at all times": ("settings.skips_nonfinite != 0 && largest", "largest"),
    "never not finite": ("is_nan ? FLATSTEP_BITS(float, 0x7fc00000u) : total.hi", "total.hi"),
    "added up in floats": (f"with_value(total, {SQUARES})", f"pair(total.hi + {SQUARES})"),
    "infinity and what is left of it": ("is_finite(plain) ? sum(total", "true ? sum(total"),
    "every group's sum in one place": ("sums[group] = of_group.hi", "sums[0] = of_group.hi"),
    "held sums of squares": ("has_sums && k <", "k <"),
    "a sum too many": ("k < arguments.num_sums", "k <= arguments.num_sums"),
    "an earlier count": ("arguments.has_accumulated != 0 ? accumulated[0] : 0", "0"),
    "a scale that is not there": ("arguments.has_grad_scale != 0 ?", "true ?"),
}


def battery(text: str) -> None:
    """Raises what the tests of the kernels would raise."""
    text = kernel_text.with_instances(text, pass_updates.kernels())
    simulator.check(text)
    library = simulator.build(text)
    for check in (*advance_checks.CHECKS, *norms.CHECKS, *pass_updates.CHECKS):
        check(library)


def test_the_battery_passes_without_a_mistake() -> None:
    battery(kernel_text.source())


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_in_the_kernels_is_found(mistake: str) -> None:
    text = mutated(kernel_text.source(), *MUTANTS[mistake])
    with pytest.raises((simulator.CompileError, simulator.KernelError, AssertionError)):
        battery(text)
