#define FLATSTEP_LOOPS avx512_loops
#define FLATSTEP_LOOPS_NAME "avx512"
#include "backend/cpu_loops.inc"
