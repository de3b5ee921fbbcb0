# A Mac as seen from Linux: clang, LLD and the SDK that prepare.py has put into build/macos.

get_filename_component(macos "${CMAKE_CURRENT_LIST_DIR}/../../build/macos" ABSOLUTE)

set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_VERSION 23.0) # of the kernel: macOS 14
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_OSX_ARCHITECTURES arm64)
set(CMAKE_OSX_SYSROOT "${macos}/sdk")

set(CMAKE_CXX_COMPILER "${macos}/bin/clang++")
set(CMAKE_CXX_COMPILER_TARGET arm64-apple-macos)
set(CMAKE_AR "${macos}/bin/ar")
set(CMAKE_RANLIB "${macos}/bin/ranlib")
set(CMAKE_INSTALL_NAME_TOOL false) # needed only to change a file's rpath, which nothing here does

# A symbol that some later macOS brings, or that a library does not have, is an error.
set(CMAKE_CXX_FLAGS_INIT "-Werror=unguarded-availability-new")
foreach(kind EXE SHARED MODULE)
  set(CMAKE_${kind}_LINKER_FLAGS_INIT "-B${macos}/bin -fuse-ld=lld -Wl,-fatal_warnings")
endforeach()

set(CMAKE_FIND_ROOT_PATH "${macos}/sdk")
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER) # programs run here
