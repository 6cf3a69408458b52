// n^2 = ||W||^2 + scale * sum_j B * (2 U + scale * B G)        U = W A^T [N, r]   G = A A^T [r, r]
//
//     L = scale * (dn / n)[:, None] * B        dB = scale * (dn / n)[:, None] * U + scale * L G
//     dA = L^T W + scale * (L^T B) A
//
// The backward reads W once: a block of rows that stays in the level-2 cache gives its rows of U
// and then its share of L^T W.  Each unit of rows has its own partial sums of dA, which are added
// in a fixed order.

#include "row_norm.h"

#include "products.h"

namespace decomp_kernels::cpu::DK_LEVEL {
namespace {

// Of W, as much as one block of the backward reads twice: a quarter of a 1 MiB level-2 cache.
constexpr int64_t kBlockBytes = 256 << 10;

template <typename TX, typename TA>
struct Operands {
  explicit Operands(const RowNormArgs& a)
      : weight(static_cast<const TX*>(a.weight)),
        down(static_cast<const TA*>(a.down)),
        up(static_cast<const TA*>(a.up)) {}
  const TX* weight;
  const TA* down;
  const TA* up;
};

// Squares all have one sign, so that the errors of a long sum do not cancel: short sums are added.
template <typename TX>
float squared_sum(const TX* x, int64_t K) {
  constexpr int64_t kShort = 64 * kLanes;
  Floats total = zero();
  for (int64_t first = 0; first < K; first += kShort) {
    const int64_t last = smaller(first + kShort, K);
    Floats sums[4] = {zero(), zero(), zero(), zero()};
    int64_t k = first;
    for (; k + 4 * kLanes <= last; k += 4 * kLanes)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Floats a = load(x + k + v * kLanes);
        sums[v] = fma(a, a, sums[v]);
      }
    for (; k < last; k += kLanes) {
      const Floats a = load(x + k, smaller(last - k, kLanes));
      sums[0] = fma(a, a, sums[0]);
    }
    total = total + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return reduce_add(total);
}

// sum_j b[j] * u[j]
float dot(const float* b, const float* u, int64_t r) {
  Floats sum = zero();
  for (int64_t j = 0; j < r; j += kLanes) {
    const int64_t n = smaller(r - j, kLanes);
    sum = fma(load(b + j, n), load(u + j, n), sum);
  }
  return reduce_add(sum);
}

// out = factor * b
template <typename TA>
void scaled(const TA* b, float factor, float* out, int64_t r) {
  for (int64_t j = 0; j < r; j += kLanes) {
    const int64_t n = smaller(r - j, kLanes);
    store(out + j, set1(factor) * load(b + j, n), n);
  }
}

template <typename TA>
void gram_rows(const RowNormArgs& a, int64_t begin, int64_t end) {
  const int64_t r = a.r;
  for (int64_t i = begin * kGramRows; i < smaller(end * kGramRows, r); i += kGramRows) {
    const int64_t stop = smaller(i + kGramRows, r);
    self_products(static_cast<const TA*>(a.down), a.K, r, i, stop, a.gram);
    for (int64_t m = i; m < stop; ++m)  // below the diagonal, its mirror image
      for (int64_t j = m + 1; j < r; ++j) a.gram[j * r + m] = a.gram[m * r + j];
  }
}

template <typename TX, typename TA>
void forward_rows(const RowNormArgs& a, int64_t begin, int64_t end) {
  const int64_t r = a.r, K = a.K, last = smaller(end * kForwardRows, a.N);
  const Operands<TX, TA> op(a);
  const Floats scale = set1(a.scale), two = set1(2.0f);
  for (int64_t n = begin * kForwardRows; n < last; n += kForwardRows) {
    const int64_t rows = smaller(kForwardRows, last - n);
    float* U = a.products + n * r;
    float* B = a.wide + n * r;
    row_products(op.weight + n * K, K, rows, op.down, K, r, K, U, r);
    for (int64_t m = 0; m < rows; ++m) scaled(op.up + (n + m) * r, 1.0f, B + m * r, r);
    outer_products(Left{B, 1, r}, rows, a.gram, r, r, 0, r,
                   [&](int64_t m, int64_t j, Floats sum, auto lanes) {
                     float* u = U + m * r + j;
                     put(u, fma(scale, sum, two * take(u, lanes)), lanes);
                   });
    for (int64_t m = 0; m < rows; ++m) {
      const float sq = a.weight_sq[n + m] + a.scale * dot(B + m * r, U + m * r, r);
      a.out[n + m] = __builtin_sqrtf(sq < 0.0f ? 0.0f : sq);  // a NaN stays one
    }
  }
}

template <typename TX, typename TA>
void backward_rows(const RowNormArgs& a, int64_t unit) {
  const int64_t r = a.r, K = a.K;
  const Operands<TX, TA> op(a);
  const Floats scale = set1(a.scale);
  float* d_down = a.partial + unit * r * K;
  float* gram = a.partial_gram + unit * r * r;
  const int64_t row_bytes = K * int64_t(sizeof(TX));
  const int64_t fitting = kBlockBytes / (row_bytes + 1) / kDotRows * kDotRows;
  const int64_t step = fitting < kDotRows ? kDotRows : smaller(fitting, kBackwardRows);
  const int64_t first = unit * kBackwardRows, last = smaller(first + kBackwardRows, a.N);
  for (int64_t n = first; n < last; n += step) {
    const int64_t rows = smaller(step, last - n);
    const TX* W = op.weight + n * K;
    const TA* B = op.up + n * r;
    float* U = a.d_up + n * r;
    float* L = a.wide + n * r;
    row_products(W, K, rows, op.down, K, r, K, U, r);
    const auto share = [&](int64_t m) { return a.scale * (a.d_norm[n + m] / a.norm[n + m]); };
    for (int64_t m = 0; m < rows; ++m) scaled(B + m * r, share(m), L + m * r, r);
    const auto add_to = [&](float* out, int64_t width) {
      return [=](int64_t j, int64_t k, Floats sum, auto lanes) {
        float* d = out + j * width + k;
        put(d, n == first ? sum : take(d, lanes) + sum, lanes);
      };
    };
    outer_products(Left{L, r, 1}, r, W, K, rows, 0, K, add_to(d_down, K));
    outer_products(Left{L, r, 1}, r, B, r, rows, 0, r, add_to(gram, r));
    outer_products(Left{L, 1, r}, rows, a.gram, r, r, 0, r,
                   [&](int64_t m, int64_t j, Floats sum, auto lanes) {
                     float* u = U + m * r + j;
                     put(u, fma(scale, sum, set1(share(m)) * take(u, lanes)), lanes);
                   });
  }
}

template <typename TX, typename TA>
void finish_columns(const RowNormArgs& a, int64_t begin, int64_t end) {
  const int64_t r = a.r, K = a.K, parts = (a.N + kBackwardRows - 1) / kBackwardRows;
  const Floats scale = set1(a.scale);
  const int64_t last = smaller(end * kFinishColumns, K);
  outer_products(Left{a.partial_gram, r, 1}, r, Operands<TX, TA>(a).down, K, parts ? r : 0,
                 begin * kFinishColumns, last,
                 [&](int64_t j, int64_t k, Floats sum, auto lanes) {
                   Floats total = zero();
                   for (int64_t part = 0; part < parts; ++part)
                     total = total + take(a.partial + (part * r + j) * K + k, lanes);
                   put(a.d_down + j * K + k, fma(scale, sum, total), lanes);
                 });
}

// Calls f<TX, TA>() with the types of W and of A and B.
#define DK_FOR_TYPES(f, ...)                                          \
  do {                                                                \
    const bool wide_weight = a.weight_dtype == Dtype::kFloat;         \
    const bool wide_small = a.small_dtype == Dtype::kFloat;           \
    if (wide_weight && wide_small) f<float, float>(__VA_ARGS__);      \
    if (wide_weight && !wide_small) f<float, bf16>(__VA_ARGS__);      \
    if (!wide_weight && wide_small) f<bf16, float>(__VA_ARGS__);      \
    if (!wide_weight && !wide_small) f<bf16, bf16>(__VA_ARGS__);      \
  } while (false)

}  // namespace

void squared_rows(const RowNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n)
    a.out[n] = a.weight_dtype == Dtype::kFloat
                   ? squared_sum(static_cast<const float*>(a.weight) + n * a.K, a.K)
                   : squared_sum(static_cast<const bf16*>(a.weight) + n * a.K, a.K);
}

void down_gram(const RowNormArgs& a, int64_t begin, int64_t end) {
  if (a.small_dtype == Dtype::kFloat)
    gram_rows<float>(a, begin, end);
  else
    gram_rows<bf16>(a, begin, end);
}

void row_norm_forward(const RowNormArgs& a, int64_t begin, int64_t end) {
  DK_FOR_TYPES(forward_rows, a, begin, end);
}

void row_norm_backward(const RowNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) DK_FOR_TYPES(backward_rows, a, unit);
}

void row_norm_gram_sum(const RowNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t part = 1; part < (a.N + kBackwardRows - 1) / kBackwardRows; ++part)
    for (int64_t i = begin; i < end; ++i) a.partial_gram[i] += a.partial_gram[part * a.r * a.r + i];
}

void row_norm_finish(const RowNormArgs& a, int64_t begin, int64_t end) {
  DK_FOR_TYPES(finish_columns, a, begin, end);
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
