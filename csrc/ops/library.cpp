// The operators that are about the library itself.  Each other operator's file adds its own.

#include <torch/csrc/stable/library.h>

#include <string>

#include "checks.h"
#include "levels.h"

namespace decomp_kernels {
namespace {

std::string cpu_level() { return cpu::level_name(cpu::level()); }

bool cpu_has_matrix_tiles() { return cpu::has_matrix_tiles(); }

void set_cpu_level(std::string name) {
  if (!cpu::set_level(name.c_str()))
    fail("set_cpu_level: the level must be generic, avx2, avx512 or avx512_bf16 and one that this ",
         "processor has (its best is ", cpu::level_name(cpu::best_level()), "), got ", name);
}

}  // namespace
}  // namespace decomp_kernels

STABLE_TORCH_LIBRARY(decomp_kernels_native, m) {
  m.def("cpu_level() -> str");
  m.def("cpu_has_matrix_tiles() -> bool");
  m.def("set_cpu_level(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&decomp_kernels::cpu_level));
  m.impl("cpu_has_matrix_tiles", TORCH_BOX(&decomp_kernels::cpu_has_matrix_tiles));
  m.impl("set_cpu_level", TORCH_BOX(&decomp_kernels::set_cpu_level));
}
