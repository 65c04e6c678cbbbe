# Finds torch's stable-ABI headers and libtorch_cpu.so, without find_package(Torch) (which wants a whole CUDA toolkit).
# Defines the target torch_stable and TORCH_ROOT.
set(_sites ${MAMBA_OPS_SITES})
if(NOT MAMBA_OPS_TORCH_DIR AND NOT _sites)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import sys; print(';'.join(p for p in sys.path if p))"
    OUTPUT_VARIABLE _sites OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
list(TRANSFORM _sites APPEND "/torch" OUTPUT_VARIABLE _roots)
find_path(TORCH_ROOT include/torch/csrc/stable/library.h PATHS ${MAMBA_OPS_TORCH_DIR} ${_roots}
  NO_DEFAULT_PATH NO_CACHE)
if(NOT TORCH_ROOT)
  message(FATAL_ERROR "mamba_ops: torch >= 2.10 not found; pip install torch, or pass -DMAMBA_OPS_TORCH_DIR=<libtorch>")
endif()
message(STATUS "mamba_ops: torch in ${TORCH_ROOT}")
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${TORCH_ROOT}/include)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(torch_stable INTERFACE ${TORCH_ROOT}/lib/libtorch_cpu.so)
