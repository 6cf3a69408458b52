// out = x R;  dx = gx R^T and d_R_i = x_i^T gx_i, in one walk over x and gx
//
// A unit is some blocks that are neighbours, and their columns of x become float32 in the cache, a
// few rows at a time.  A block's gradient is a sum over those in order, whoever takes the unit.

#include "block_rotate.h"

#include "panel.h"
#include "products.h"

namespace decomp_kernels::cpu::DK_LEVEL {
namespace {

// The blocks of a unit, and where they are in memory.
struct Unit {
  int64_t first, count, column, width;  // blocks and columns
  Unit(const BlockRotateArgs& a, int64_t unit)
      : first(unit * a.group()),
        count(smaller(a.group(), a.q - first)),
        column(first * a.b),
        width(count * a.b) {}
};

template <typename T>
void widen(const T* from, int64_t from_row, int64_t rows, int64_t cols, float* to, int64_t line) {
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += line)
    for (int64_t j = 0; j < cols; j += kLanes) store(to + j, floats_at(from, j, cols));
}

// out [rows, width] = panel times the blocks, which are [b, b] each.
template <typename T>
void turn(const float* panel, int64_t line, int64_t rows, const float* blocks, int64_t count,
          int64_t b, T* out, int64_t out_row) {
  for (int64_t j = 0; j < count; ++j, panel += b, blocks += b * b, out += b)
    outer_products(Left{panel, 1, line}, rows, blocks, b, b, 0, b,
                   [&](int64_t i, int64_t c, Floats sum, auto lanes) {
                     put(out + i * out_row + c, sum, lanes);
                   });
}

void transpose_blocks(const float* from, int64_t count, int64_t b, float* to) {
  for (int64_t j = 0; j < count; ++j, from += b * b, to += b * b)
    for (int64_t i = 0; i < b; ++i)
      for (int64_t k = 0; k < b; ++k) to[k * b + i] = from[i * b + k];
}

template <typename T>
void forward_of(const BlockRotateArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t K = a.K(), line = a.line(), tall = parts(a.M, kRotateRows);
  float* panel = aligned(scratch);
  for (int64_t part = begin; part < end; ++part) {
    const Unit unit(a, part / tall);
    const int64_t row = part % tall * kRotateRows, rows = smaller(kRotateRows, a.M - row);
    const int64_t at = row * K + unit.column;
    widen(static_cast<const T*>(a.x) + at, K, rows, unit.width, panel, line);
    turn(panel, line, rows, a.blocks + unit.first * a.b * a.b, unit.count, a.b,
         static_cast<T*>(a.out) + at, K);
  }
}

template <typename T>
void backward_of(const BlockRotateArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t K = a.K(), b = a.b, line = a.line();
  float* x = aligned(scratch);
  float* g = aligned(x + kRotateRows * line);
  float* back = aligned(g + kRotateRows * line);  // the transposed blocks
  for (int64_t number = begin; number < end; ++number) {
    const Unit unit(a, number);
    float* d_blocks = a.d_blocks + unit.first * b * b;
    transpose_blocks(a.blocks + unit.first * b * b, unit.count, b, back);
    clear(d_blocks, unit.count * b * b);
    for (int64_t row = 0; row < a.M; row += kRotateRows) {
      const int64_t rows = smaller(kRotateRows, a.M - row), at = row * K + unit.column;
      widen(static_cast<const T*>(a.x) + at, K, rows, unit.width, x, line);
      widen(static_cast<const T*>(a.gx) + at, K, rows, unit.width, g, line);
      turn(g, line, rows, back, unit.count, b, static_cast<T*>(a.out) + at, K);
      for (int64_t j = 0; j < unit.count; ++j) {
        float* d = d_blocks + j * b * b;
        outer_products(Left{x + j * b, line, 1}, b, g + j * b, line, rows, 0, b,
                       [&](int64_t k, int64_t c, Floats sum, auto lanes) {
                         float* to = d + k * b + c;
                         put(to, take(to, lanes) + sum, lanes);
                       });
      }
    }
  }
}

}  // namespace

void block_rotate_forward(const BlockRotateArgs& a, int64_t begin, int64_t end, float* scratch) {
  a.dtype == Dtype::kFloat ? forward_of<float>(a, begin, end, scratch)
                           : forward_of<bf16>(a, begin, end, scratch);
}

void block_rotate_backward(const BlockRotateArgs& a, int64_t begin, int64_t end, float* scratch) {
  a.dtype == Dtype::kFloat ? backward_of<float>(a, begin, end, scratch)
                           : backward_of<bf16>(a, begin, end, scratch);
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
