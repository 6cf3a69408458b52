// E = M M^T - I and its like, and their gradients, for one group: matrices of one shape and dtype
// (maths: decomp_kernels/reference/gram.py).

#include "../cpu/gram.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "checks.h"

namespace decomp_kernels {
namespace {

constexpr int64_t kProductsPerThread = 1 << 18;  // fewer are not worth another thread

struct Group {
  std::vector<const void*> pointers;
  cpu::GramArgs args;
};

Group check_group(const Checks& check, const std::vector<Tensor>& matrices, bool of_rows) {
  Group group{};
  check.tensor(matrices[0], "matrices[0]", {-1, -1});
  const int64_t rows = matrices[0].size(0), cols = matrices[0].size(1);
  for (size_t g = 0; g < matrices.size(); ++g) {
    const std::string name = "matrices[" + std::to_string(g) + "]";
    check.tensor(matrices[g], name.c_str(), {rows, cols});
    check.dtype(matrices[g], name.c_str(), matrices[0].scalar_type());
    group.pointers.push_back(matrices[g].const_data_ptr());
  }
  group.args.dtype = check.floating(matrices[0], "matrices[0]", false);
  group.args.matrices = group.pointers.data();
  group.args.of_rows = of_rows;
  group.args.r = of_rows ? rows : cols;
  group.args.length = of_rows ? cols : rows;
  return group;
}

// Where the kernels put float32 copies of a few rows at a time; empty where they make none.
Tensor block_of(const Tensor& like, int64_t G, const cpu::GramArgs& a) {
  const bool copies = a.dtype != Dtype::kFloat && !a.of_rows;
  return make(like, {copies ? G : 0, cpu::kGramBlock, a.r}, ScalarType::Float);
}

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

template <typename F>
void over_matrices(int64_t G, const cpu::GramArgs& a, F* run) {
  const int64_t grain = kProductsPerThread / (a.r * a.r * a.length + 1) + 1;
  torch::stable::parallel_for(0, G, grain,
                              [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

std::tuple<Tensor, Tensor> gram_fwd(std::vector<Tensor> matrices, bool of_rows, bool identity) {
  STD_TORCH_CHECK(!matrices.empty(), "gram_fwd: matrices must not be empty");
  const Checks check("gram_fwd", matrices[0], "matrices[0]");
  const Group group = check_group(check, matrices, of_rows);
  cpu::GramArgs a = group.args;
  const int64_t G = int64_t(matrices.size());
  Tensor residual = make(matrices[0], {G, a.r, a.r}, ScalarType::Float);
  Tensor squared = make(matrices[0], {G}, ScalarType::Float);
  Tensor block = block_of(matrices[0], G, a);
  a.identity = identity;
  a.residual = floats(residual);
  a.squared = floats(squared);
  a.block = floats(block);
  over_matrices(G, a, DK_AT_LEVEL(gram_forward));
  return {residual, squared};
}

Tensor gram_bwd(std::vector<Tensor> matrices, Tensor residual, Tensor factor, bool of_rows) {
  STD_TORCH_CHECK(!matrices.empty(), "gram_bwd: matrices must not be empty");
  const Checks check("gram_bwd", matrices[0], "matrices[0]");
  const Group group = check_group(check, matrices, of_rows);
  cpu::GramArgs a = group.args;
  const int64_t G = int64_t(matrices.size());
  check.tensor(residual, "residual", {G, a.r, a.r});
  check.tensor(factor, "factor", {G});
  check.dtype(residual, "residual", ScalarType::Float);
  check.dtype(factor, "factor", ScalarType::Float);
  Tensor slope = make(matrices[0], {G, a.r, a.r}, ScalarType::Float);
  Tensor block = block_of(matrices[0], G, a);
  Tensor out = make(matrices[0], {G, matrices[0].size(0), matrices[0].size(1)},
                    matrices[0].scalar_type());
  a.residual = static_cast<float*>(const_cast<void*>(residual.const_data_ptr()));
  a.factor = static_cast<const float*>(factor.const_data_ptr());
  a.slope = floats(slope);
  a.block = floats(block);
  a.out = out.mutable_data_ptr();
  over_matrices(G, a, DK_AT_LEVEL(gram_backward));
  return out;
}

}  // namespace
}  // namespace decomp_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(decomp_kernels_native, m) {
  m.def(
      "gram_fwd(Tensor[] matrices, bool of_rows, bool identity) "
      "-> (Tensor residual, Tensor squared)");
  m.def("gram_bwd(Tensor[] matrices, Tensor residual, Tensor factor, bool of_rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CPU, m) {
  m.impl("gram_fwd", TORCH_BOX(&decomp_kernels::gram_fwd));
  m.impl("gram_bwd", TORCH_BOX(&decomp_kernels::gram_bwd));
}
