// Host kernels exist once for each instruction set, and the best that this machine has runs.
//
// Every file of csrc/cpu that holds a kernel is compiled several times, with DK_LEVEL naming the
// namespace and the compiler's flags the instructions.  Such a file includes no header with ordinary
// inline functions (torch's, most of the standard library's): the linker keeps one copy of those, and
// it could be the one with instructions that a machine lacks.

#pragma once

#define DK_DECLARE_AT_LEVELS(declaration) \
  namespace generic {                     \
  declaration;                            \
  }                                       \
  namespace avx2 {                        \
  declaration;                            \
  }                                       \
  namespace avx512 {                      \
  declaration;                            \
  }                                       \
  namespace avx512_bf16 {                 \
  declaration;                            \
  }

namespace decomp_kernels::cpu {

// avx2: with FMA and F16C.  avx512: F, BW, DQ and VL.
enum class Level : int { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

Level best_level();                 // of this machine
Level level();                      // what runs: the best, unless set_level took it lower
bool set_level(const char* name);   // for tests; false where the machine has no such level
const char* level_name(Level level);

// Whether PyTorch's bf16 products may use matrix tiles (AMX), which ours do not: measurements made
// without them say nothing there.
bool has_matrix_tiles();

}  // namespace decomp_kernels::cpu

// The function of that name for this machine: DK_AT_LEVEL(down_projection)(args, begin, end).
// Only x86 has other levels than the generic one.
#ifdef DK_X86
#define DK_AT_LEVEL(function)                                           \
  (::decomp_kernels::cpu::pick(::decomp_kernels::cpu::generic::function, \
                               ::decomp_kernels::cpu::avx2::function,    \
                               ::decomp_kernels::cpu::avx512::function,  \
                               ::decomp_kernels::cpu::avx512_bf16::function))

namespace decomp_kernels::cpu {

template <typename F>
F* pick(F* generic, F* avx2, F* avx512, F* avx512_bf16) {
  switch (level()) {
    case Level::kAvx512Bf16: return avx512_bf16;
    case Level::kAvx512: return avx512;
    case Level::kAvx2: return avx2;
    default: return generic;
  }
}

}  // namespace decomp_kernels::cpu
#else
#define DK_AT_LEVEL(function) (&::decomp_kernels::cpu::generic::function)
#endif
