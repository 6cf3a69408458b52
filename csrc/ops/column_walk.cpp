// One read of big [M, N] for all that a backward takes from it.
//
//     u = big @ right              [M, r] float32       right  [N, r]
//     c = drop(big)^T left         [N, r] float32       left   [M, r]    [r, N] where c_by_rank
//     p = sum_m big * other        [N] float32          other  [M, N]
//     s = sum_m big                [N] float32          where column_sum
//     scaled = big * scale         [M, N]               scale  [N] float32
//
// The mask is on big in c alone, and nothing is divided by the kept fraction: the caller divides
// left.  What is not asked for is an empty tensor.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "column_walk.h"
#include "dropout.h"
#include "scratch.h"

#ifdef DK_CUDA
#include "../cuda/column_walk.h"
#include "../cuda/down_projection.h"
#include "on_device.h"
#endif

namespace decomp_kernels {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The checks of every device, and the sizes and options that follow from them.
struct Call {
  Checks checks;
  int64_t M, N, r;
  Dtype big_dtype, small_dtype;
  Dropout dropout;

  Call(const Tensor& big, const OptionalTensor& right, const OptionalTensor& left,
       const OptionalTensor& other, const OptionalTensor& scale, const OptionalTensor& seed,
       double p)
      : checks("column_walk", big, "big") {
    checks.tensor(big, "big", {-1, -1});
    M = big.size(0);
    N = big.size(1);
    r = 0;
    big_dtype = checks.floating(big, "big", checks.on_cuda());
    small_dtype = Dtype::kFloat;
    if (const OptionalTensor& small = right ? right : left) {
      const char* name = right ? "right" : "left";
      checks.tensor(*small, name, {right ? N : M, -1});
      r = small->size(1);
      small_dtype = checks.floating(*small, name, checks.on_cuda());
    }
    if (right && left) {
      checks.tensor(*left, "left", {M, r});
      checks.dtype(left, "left", right->scalar_type());
    }
    checks.tensor(other, "other", {M, N});
    checks.dtype(other, "other", big.scalar_type());
    checks.tensor(scale, "scale", {N});
    checks.dtype(scale, "scale", ScalarType::Float);
    dropout = checked_dropout(checks, seed, p);
  }
};

// A float32 result of this shape: ``count`` partials, and their sum.
class Summed {
 public:
  Summed(const Tensor& like, bool asked, int64_t count, std::initializer_list<int64_t> shape)
      : asked_(asked), sum_{nullptr, nullptr, count, 1} {
    out_ = asked ? make(like, shape, ScalarType::Float) : make(like, {0}, ScalarType::Float);
    sum_.size = out_.numel();
    partials_ = !asked || count == 1 ? out_ : make(like, {count, sum_.size}, ScalarType::Float);
    sum_.partials = partials();
    sum_.out = static_cast<float*>(out_.mutable_data_ptr());
  }

  // Where the kernel writes; null where the result is not asked for.
  float* partials() {
    return asked_ ? static_cast<float*>(partials_.mutable_data_ptr()) : nullptr;
  }

  Tensor sum() {
    if (!asked_ || sum_.count == 1) return out_;
    if (sum_.count == 0) {
      torch::stable::zero_(out_);
      return out_;
    }
    const auto kernel = DK_AT_LEVEL(sum_partials);
    torch::stable::parallel_for(0, sum_.size, kSumGrain, [&](int64_t begin, int64_t end) {
      kernel(sum_, begin, end);
    });
    return out_;
  }

 private:
  static constexpr int64_t kSumGrain = 1 << 14;  // floats: less than that is not worth a thread

  bool asked_;
  cpu::PartialSum sum_;
  Tensor out_, partials_;
};

Results column_walk(Tensor big, OptionalTensor right, OptionalTensor left, OptionalTensor other,
                    OptionalTensor scale, OptionalTensor seed, double dropout, bool column_sum,
                    bool c_by_rank) {
  const Call call(big, right, left, other, scale, seed, dropout);
  const int64_t M = call.M, N = call.N, r = call.r;
  cpu::ColumnWalk walk{};
  walk.big = big.const_data_ptr();
  walk.right = pointer(right);
  walk.left = pointer(left);
  walk.other = pointer(other);
  walk.scale = float_pointer(scale);
  walk.M = M;
  walk.N = N;
  walk.r = r;
  walk.seed = host_seed(seed);
  walk.threshold = call.dropout.threshold;
  walk.c_by_rank = c_by_rank;
  walk.big_dtype = call.big_dtype;
  walk.small_dtype = call.small_dtype;

  Summed u(big, bool(right), walk.strips(), {M, r});
  Summed c(big, bool(left), walk.chunks(), {c_by_rank ? r : N, c_by_rank ? N : r});
  Summed p(big, bool(other), walk.chunks(), {N}), s(big, column_sum, walk.chunks(), {N});
  Tensor scaled = scale ? make(big, {M, N}, big.scalar_type()) : make(big, {0}, big.scalar_type());
  walk.u = u.partials();
  walk.c = c.partials();
  walk.p = p.partials();
  walk.s = s.partials();
  walk.scaled = scale ? scaled.mutable_data_ptr() : nullptr;

  const auto kernel = DK_AT_LEVEL(column_walk);
  torch::stable::parallel_for(0, walk.units(), 1, [&](int64_t begin, int64_t end) {
    const auto scratch = scratch_floats(walk.scratch_floats());
    kernel(walk, begin, end, scratch.get());
  });
  return {u.sum(), c.sum(), p.sum(), s.sum(), scaled};
}

#ifdef DK_CUDA

// The partial results of u may be more bytes than another read of big: then u is a projection of big
// on right^T, which is small, and the walk does the rest.
void project(const Tensor& big, const Tensor& right, Tensor& u, const Device& device) {
  Tensor down = make(right, {right.size(1), right.size(0)}, right.scalar_type());
  Tensor transposed = torch::stable::transpose(right, 0, 1);
  torch::stable::copy_(down, transposed);
  cuda::DownProjection args;
  args.x = matrix(big);
  args.down = matrix(down);
  args.M = big.size(0), args.K = big.size(1), args.R = right.size(1);
  args.t = output(u);
  launch(args, big, device);
}

Results column_walk_cuda(Tensor big, OptionalTensor right, OptionalTensor left,
                         OptionalTensor other, OptionalTensor scale, OptionalTensor seed,
                         double dropout, bool column_sum, bool c_by_rank) {
  const Call call(big, right, left, other, scale, seed, dropout);
  const Device device("column_walk", big);
  const int64_t M = call.M, N = call.N, r = call.r;
  const auto floats = [&](bool asked, std::initializer_list<int64_t> shape) {
    return asked ? make(big, shape, ScalarType::Float) : make(big, {0}, ScalarType::Float);
  };
  Tensor u = floats(bool(right), {M, r}), c = floats(bool(left), {r, N});
  Tensor p = floats(bool(other), {N}), s = floats(column_sum, {N});
  Tensor scaled = scale ? make(big, {M, N}, big.scalar_type()) : make(big, {0}, big.scalar_type());
  const auto data = [](Tensor& t) {
    return t.numel() ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
  };
  cuda::ColumnWalk args;
  args.big = matrix(big);
  args.M = M, args.N = N;
  if (right) args.right = matrix(right), args.R = r, args.u = data(u);
  if (left) args.left = matrix(left), args.L = r, args.c = data(c);
  args.mask = mask(seed, call.dropout);
  args.other = matrix(other);
  args.scale = vector(scale);
  args.p = data(p);
  args.s = data(s);
  args.scaled_big = output(scaled);
  if (M == 0 || N == 0) {
    for (Tensor* sum : {&u, &c, &p, &s}) torch::stable::zero_(*sum);
  } else {
    if (args.u && !cuda::u_is_cheap(args)) {
      project(big, *right, u, device);
      args.right = {}, args.R = 0, args.u = nullptr;
    }
    if (args.u || args.c || args.p || args.s || args.scaled_big.data) launch(args, big, device);
  }
  if (left && !c_by_rank) {
    Tensor by_column = make(c, {N, r}, ScalarType::Float);
    Tensor transposed = torch::stable::transpose(c, 0, 1);
    torch::stable::copy_(by_column, transposed);
    c = by_column;
  }
  return {u, c, p, s, scaled};
}

#endif

}  // namespace
}  // namespace decomp_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(decomp_kernels_native, m) {
  m.def("column_walk(Tensor big, Tensor? right, Tensor? left, Tensor? other, Tensor? scale, "
        "Tensor? seed, float dropout, bool column_sum, bool c_by_rank=False) "
        "-> (Tensor u, Tensor c, Tensor p, Tensor s, Tensor scaled)");
}

STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CPU, m) {
  m.impl("column_walk", TORCH_BOX(&decomp_kernels::column_walk));
}

#ifdef DK_CUDA
STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CUDA, m) {
  m.impl("column_walk", TORCH_BOX(&decomp_kernels::column_walk_cuda));
}
#endif
