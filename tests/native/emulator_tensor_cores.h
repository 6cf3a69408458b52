// ldmatrix and mma.sync on the host, by the fragment layouts of the PTX ISA (9.7.14, warp-level
// matrix instructions).  With g = lane / 4 and t = lane % 4, registers of two 16-bit elements:
//
//     A [16, 16]   a0 (g, 2t)   a1 (g + 8, 2t)   a2 (g, 2t + 8)   a3 (g + 8, 2t + 8)   and col + 1
//     B [16, 8]    b0 (2t, g)   b1 (2t + 8, g)                                         and row + 1
//     C [16, 8]    c0 (g, 2t)   c1 (g, 2t + 1)   c2 (g + 8, 2t)   c3 (g + 8, 2t + 1)   float32
//
// ldmatrix: lane 8 i + j gives the address of row j of the 8 x 8 matrix i; r_i is (g, 2t) and the
// next column of matrix i, or with .trans (2t, g) and the next row.

#pragma once

#include "narrow.h"

namespace cuda_on_host {

struct FourRegisters {
  uint32_t r[4];
};

struct MmaOperands {
  float c[4];
  uint32_t a[4], b[2];
};

// Rows that lanes 8 i to 8 i + 7 read at once are free of conflicts if they meet all 32 banks once.
inline int conflicts_of(const unsigned char* const (&rows)[8]) {
  int extra = 0;
  for (int j = 0; j < 8; ++j)
    for (int before = 0; before < j; ++before)
      if (rows[j] != rows[before] && reinterpret_cast<uintptr_t>(rows[j]) / 16 % 8 ==
                                         reinterpret_cast<uintptr_t>(rows[before]) / 16 % 8)
        ++extra;
  return extra;
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, const Site& site) {
  check_aligned(row, 16, "ldmatrix");
  check_shared(row, 16, "ldmatrix");
  note(row, 16, false);
  const auto result = collective<FourRegisters>(site, ~0u, row, [&](auto given, auto taken) {
    const unsigned char* rows[4][8];
    for (int lane = 0; lane < kLanes; ++lane)
      std::memcpy(&rows[lane / 8][lane % 8], given[lane], sizeof(void*));
    for (const auto& matrix : rows) bank_conflicts += conflicts_of(matrix);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      FourRegisters out;
      for (int i = 0; i < 4; ++i) {
        uint16_t low, high;
        std::memcpy(&low, transposed ? rows[i][2 * t] + 2 * g : rows[i][g] + 4 * t, 2);
        std::memcpy(&high, transposed ? rows[i][2 * t + 1] + 2 * g : rows[i][g] + 4 * t + 2, 2);
        out.r[i] = uint32_t(high) << 16 | low;
      }
      std::memcpy(taken[lane], &out, sizeof out);
    }
  });
  for (int i = 0; i < 4; ++i) r[i] = result.r[i];
}

template <typename T>
void multiply_tiles(unsigned char (*given)[kSlotBytes], unsigned char (*taken)[kSlotBytes]) {
  using decomp_kernels::to_float;
  auto half = [](uint32_t pair, int i) { return to_float(T{uint16_t(pair >> (16 * i))}); };
  float A[16][16], B[16][8], C[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    MmaOperands in;
    std::memcpy(&in, given[lane], sizeof in);
    for (int i = 0; i < 2; ++i) {
      A[g][2 * t + i] = half(in.a[0], i), A[g + 8][2 * t + i] = half(in.a[1], i);
      A[g][2 * t + 8 + i] = half(in.a[2], i), A[g + 8][2 * t + 8 + i] = half(in.a[3], i);
      B[2 * t + i][g] = half(in.b[0], i), B[2 * t + 8 + i][g] = half(in.b[1], i);
      C[g][2 * t + i] = in.c[i], C[g + 8][2 * t + i] = in.c[2 + i];
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int col = 0; col < 8; ++col) C[row][col] += A[row][k] * B[k][col];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const float out[4] = {C[g][2 * t], C[g][2 * t + 1], C[g + 8][2 * t], C[g + 8][2 * t + 1]};
    std::memcpy(taken[lane], out, sizeof out);
  }
}

}  // namespace cuda_on_host

namespace decomp_kernels::cuda {

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, CUDA_ON_HOST_SITE) {
  ::cuda_on_host::load_matrices(r, row, false, {"ldmatrix", file, line});
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, CUDA_ON_HOST_SITE) {
  ::cuda_on_host::load_matrices(r, row, true, {"ldmatrix.trans", file, line});
}

// d += a b
template <typename T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         CUDA_ON_HOST_SITE) {
  using namespace ::cuda_on_host;
  const MmaOperands in{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  struct Result {
    float c[4];
  };
  const auto out = collective<Result>({"mma", file, line}, ~0u, in, [](auto given, auto taken) {
    multiply_tiles<T>(given, taken);
  });
  for (int i = 0; i < 4; ++i) d[i] = out.c[i];
}

// low and high rounded to T, low in the lower 16 bits.
template <typename T>
inline uint32_t narrow_two(float low, float high) {
  return uint32_t(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

}  // namespace decomp_kernels::cuda
