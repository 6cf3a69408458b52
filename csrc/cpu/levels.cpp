// Which instruction set this machine has: asked once, of the processor.

#include "levels.h"

#include <atomic>
#include <cstring>

#ifdef DK_X86
#include <cpuid.h>
#endif

namespace decomp_kernels::cpu {
namespace {

Level detect() {
#ifdef DK_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2 && has_avx512 && __builtin_cpu_supports("avx512bf16")) return Level::kAvx512Bf16;
  if (has_avx2 && has_avx512) return Level::kAvx512;
  if (has_avx2) return Level::kAvx2;
#endif
  return Level::kGeneric;
}

constexpr Level kLevels[] = {Level::kGeneric, Level::kAvx2, Level::kAvx512, Level::kAvx512Bf16};

std::atomic<int> chosen{-1};

}  // namespace

Level best_level() {
  static const Level best = detect();
  return best;
}

Level level() {
  const int set = chosen.load(std::memory_order_relaxed);
  return set < 0 ? best_level() : Level(set);
}

bool set_level(const char* name) {
  for (const Level one : kLevels) {
    if (std::strcmp(name, level_name(one)) == 0 && one <= best_level()) {
      chosen.store(int(one), std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

const char* level_name(Level level) {
  switch (level) {
    case Level::kAvx512Bf16: return "avx512_bf16";
    case Level::kAvx512: return "avx512";
    case Level::kAvx2: return "avx2";
    default: return "generic";
  }
}

bool has_matrix_tiles() {
#ifdef DK_X86
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1);
#else
  return false;
#endif
}

}  // namespace decomp_kernels::cpu
