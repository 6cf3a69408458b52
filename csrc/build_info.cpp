// build_info(): what the native library was compiled with.  The facts come from setup.py as macros.

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(build_info, m) {
  m.doc() = "What the native library of decomp_kernels was compiled with.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = DK_COMPILER;
        info["cpu_levels"] = DK_CPU_LEVELS;
        info["nvcc"] = DK_NVCC;
        info["cuda_archs"] = DK_CUDA_ARCHS;
        info["cutlass"] = DK_CUTLASS;
        info["abi_target"] = DK_ABI_TARGET;
        info["torch"] = DK_TORCH;
        return info;
      },
      "Compiler, instruction sets, nvcc, GPU architectures, CUTLASS, the oldest PyTorch that the "
      "library's binary interface is made for, and the PyTorch whose headers it was built with.");
}
