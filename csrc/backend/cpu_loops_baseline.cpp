#define FLATSTEP_LOOPS baseline_loops
#define FLATSTEP_LOOPS_NAME "baseline"
#include "backend/cpu_loops.inc"
