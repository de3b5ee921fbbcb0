#define FLATSTEP_LOOPS avx2_loops
#define FLATSTEP_LOOPS_NAME "avx2"
#include "backend/cpu_loops.inc"
