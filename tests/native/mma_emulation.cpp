// csrc/cuda/mma_gemm.cuh on the host: the kernels' own source, instances chosen as for a launch.
//
// The tests pass the arguments' own structs, with pointers to host memory.  ``choice`` is the tile,
// ``order`` the seed of the order of blocks and warps, ``shift`` how many elements after a multiple
// of 16 bytes every array begins.  A message or null comes back.

#include "mma_gemm.cuh"

namespace on_host = cuda_on_host;
using namespace decomp_kernels;
using namespace decomp_kernels::cuda;

namespace {

// Stands where mma_gemm.cu's launcher does.
struct Launcher {
  uint64_t order;

  template <typename... Arguments>
  int operator()(void (*kernel)(Arguments...), int64_t blocks, int threads, int shared_bytes,
                 const std::type_identity_t<Arguments>&... arguments) const {
    const bool ran = on_host::launch({.grid = {unsigned(blocks)}, .block = {unsigned(threads)},
                                      .shared = size_t(shared_bytes), .seed = order},
                                     [&] { kernel(arguments...); });
    return ran ? 0 : 1;
  }
};

// Guarded copies of the arrays that arguments point to.
struct Arrays {
  on_host::Memory& memory;
  int shift;

  static int64_t count(int64_t rows, int64_t cols, int64_t stride) {
    return rows && cols ? (rows - 1) * stride + cols : 0;
  }
  MmaMatrix in(const MmaMatrix& m, int64_t rows, int64_t cols) {
    return {memory.input(static_cast<const uint16_t*>(m.data), count(rows, cols, m.stride), shift),
            m.stride};
  }
  MmaOutput out(const MmaOutput& m, int64_t rows, int64_t cols) {  // what is between rows stays
    auto* data = static_cast<uint16_t*>(m.data);
    return {memory.in_and_output(data, count(rows, cols, m.stride), shift), m.stride};
  }
  MmaVector in(const MmaVector& v, int64_t size) {
    if (v.dtype == Dtype::kFloat)
      return {memory.input(static_cast<const float*>(v.data), size, shift), v.dtype};
    return {memory.input(static_cast<const uint16_t*>(v.data), size, shift), v.dtype};
  }
};

}  // namespace

extern "C" const char* mma_forward(const MmaForward* given, int choice, uint64_t order, int shift) {
  on_host::Memory memory;
  Arrays arrays{memory, shift};
  MmaForward a = *given;
  a.x = arrays.in(a.x, a.M, a.K);
  a.weight = arrays.in(a.weight, a.N, a.K);
  a.v = arrays.in(a.v, a.M, a.r);
  a.up = arrays.in(a.up, a.N, a.r);
  a.addend = arrays.in(a.addend, a.M, a.N);
  a.out_scale = arrays.in(a.out_scale, a.N);
  a.bias = arrays.in(a.bias, a.N);
  a.y = arrays.out(a.y, a.M, a.N);
  a.z = arrays.out(a.z, a.M, a.N);
  if (const char* why = why_not(a, 80)) return why;
  with_launches(a, TileChoice(choice), nullptr, Launcher{order});
  return memory.finish();
}

extern "C" const char* mma_input_gradient(const MmaInputGradient* given, int choice, uint64_t order,
                                          int shift) {
  on_host::Memory memory;
  Arrays arrays{memory, shift};
  MmaInputGradient a = *given;
  a.g = arrays.in(a.g, a.M, a.N);
  a.weight = arrays.in(a.weight, a.N, a.K);
  a.dt = arrays.in(a.dt, a.M, a.r);
  a.down = arrays.in(a.down, a.r, a.K);
  a.x = arrays.in(a.x, a.M, a.K);
  a.in_scale = arrays.in(a.in_scale, a.K);
  a.seed = memory.input(a.seed, 1);
  a.d_x = arrays.out(a.d_x, a.M, a.K);
  a.d_in_scale = memory.output(a.d_in_scale, a.K);
  if (const char* why = why_not(a, 80)) return why;
  // Exactly what the interface asks for: a part outside is found.
  const int64_t parts_count = int64_t(workspace_bytes(a) / sizeof(float));
  float* parts = parts_count ? memory.scratch<float>(parts_count) : nullptr;
  with_launches(a, TileChoice(choice), parts, Launcher{order});
  return memory.finish();
}

extern "C" const char* mma_forward_refusal(const MmaForward* a, int arch) {
  return why_not(*a, arch);
}

extern "C" const char* mma_input_gradient_refusal(const MmaInputGradient* a, int arch) {
  return why_not(*a, arch);
}

extern "C" int mma_tile(int64_t rows, int64_t cols, int processors) {
  return int(choose_tile(rows, cols, processors));
}

extern "C" void mma_place(int64_t tile, int64_t row_tiles, int64_t col_tiles, int* row_and_col) {
  const Place place = tile_place(tile, row_tiles, col_tiles);
  row_and_col[0] = place.row;
  row_and_col[1] = place.col;
}

// Of ldmatrix, in the launch before.
extern "C" int64_t mma_bank_conflicts() { return on_host::bank_conflicts; }
