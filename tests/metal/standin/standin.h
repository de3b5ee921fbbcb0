// What the tests set and ask: a C interface, which they load from the extension with ctypes.
#pragma once

#include "Metal/Metal.hpp"

namespace flatstep::standin {

// Runs commands in the order in which a GPU might: those between two barriers in any.
void run(const MTL::Commands& commands);

}  // namespace flatstep::standin

#define STANDIN_API extern "C" __attribute__((visibility("default")))

// 1: updates on the CPU's streams go through the GPU backend; 0: through the CPU's. At first 1.
STANDIN_API void standin_use_gpu(int use);
// 1: the CPU's default stream waits, as for a GPU whose commands are not committed; until 0, or for
// ten seconds at most. Returns whether it has waited that long.
STANDIN_API int standin_hold_stream(int hold);
// The GPU lets go of what it has written so many microseconds after it has run. At first 0.
STANDIN_API void standin_let_go_late(int microseconds);
// The command line, up to the source's path, that compiles Metal source, and a folder for both.
STANDIN_API void standin_set_compiler(const char* command, const char* folder);
// How many threads a GPU runs in a threadgroup at most. At first 1024.
STANDIN_API void standin_set_max_threads(int most);
// The dispatches since the last call: a line each, with the name of
// the library, threadgroups, and whether it came
// after a barrier. Valid until the next call.
STANDIN_API const char* standin_take_log();
// The first error of a kernel since the last call, empty without one. Valid until the next call.
STANDIN_API const char* standin_take_error();
