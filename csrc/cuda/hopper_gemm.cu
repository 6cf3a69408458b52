// Launches of the Hopper product: tensor maps from plain boxes, the instance from a list, and the
// sum of partial column sums (interface and formulas: hopper_gemm.h).

#include "hopper_gemm.h"

#include "hopper_maps.h"
#include "hopper_problem.h"

namespace decomp_kernels::cuda {

HopperLaunch hopper_launches[kHopperInstances];  // zero before any instance enters itself

namespace {

constexpr int kSumCols = 32, kSumSlices = 8;

// out[col] = sum of partial[row, col]: slice s takes rows s, s + 8, ..., then the slices in order.
__global__ void __launch_bounds__(kSumCols * kSumSlices) sum_partial_kernel(
    const float* __restrict__ partial,  // [rows, cols]
    float* __restrict__ out,            // [cols]
    int64_t rows, int64_t cols) {
  __shared__ float slices[kSumSlices][kSumCols];
  const int64_t col = int64_t(blockIdx.x) * kSumCols + threadIdx.x;
  float sum = 0.0f;
  if (col < cols)
    for (int64_t row = threadIdx.y; row < rows; row += kSumSlices) sum += partial[row * cols + col];
  slices[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || col >= cols) return;
  for (int s = 1; s < kSumSlices; ++s) sum += slices[s][threadIdx.x];
  out[col] = sum;
}

// One operation's shape, as far as both have it.
struct Operands {
  TensorBox left, right, small_left, small_right, out, z;
};

cudaError_t make_maps(const Operands& t, Dtype dtype, HopperMaps& maps) {
  const std::pair<const TensorBox*, CUtensorMap*> every[] = {
      {&t.left, &maps.left},
      {&t.right, &maps.right},
      {&t.small_left, &maps.small_left},
      {&t.small_right, &maps.small_right},
      {&t.out, &maps.out},
      {&t.z, &maps.z},
  };
  for (const auto& [box, map] : every) {
    if (box->base == nullptr) continue;  // the kernel does not look at it
    if (const cudaError_t error = make_map(*box, dtype, *map); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// The shape asked for or chosen, if its instance is linked; kChooseShape if not.
int shape_of(
    HopperOp op, Dtype dtype, int asked, int64_t rows, int64_t cols, int64_t inner, int sms) {
  const unsigned linked = hopper_linked(op, dtype);
  if (asked == kChooseShape) return choose_shape(op, rows, cols, inner, sms, linked);
  return linked >> asked & 1 ? asked : kChooseShape;
}

}  // namespace

unsigned hopper_linked(HopperOp op, Dtype dtype) {
  unsigned shapes = 0;
  for (int shape = 0; shape < kHopperShapes; ++shape)
    shapes |= unsigned(hopper_launches[hopper_instance(op, dtype, shape)] != nullptr) << shape;
  return shapes;
}

size_t workspace_bytes(const HopperInputGradientArgs& a) {
  return a.d_in_scale == nullptr ? 0 : size_t(partial_rows(a.M)) * size_t(a.K) * sizeof(float);
}

cudaError_t launch(
    const HopperForwardArgs& a, void* /*workspace*/, int device_sms, cudaStream_t stream) {
  if (a.M == 0 || a.N == 0) return cudaSuccess;
  const int shape = shape_of(HopperOp::kForward, a.dtype, a.shape, a.M, a.N, a.K, device_sms);
  if (shape == kChooseShape) return cudaErrorNotSupported;
  const HopperTile tile = hopper_tile(HopperOp::kForward, shape);
  const HopperLaunch instance = hopper_launches[hopper_instance(tile.op, a.dtype, shape)];

  HopperMaps maps{};
  const Operands operands{
      left_tensor(tile, a.x, a.M, a.K, a.x_stride),
      right_tensor(tile, a.weight, a.N, a.K, a.weight_stride),
      left_tensor(tile, a.v, a.M, a.r, a.v_stride),
      right_tensor(tile, a.up, a.N, a.r, a.up_stride),
      out_tensor(a.y, a.M, a.N, a.y_stride),
      out_tensor(a.z, a.M, a.N, a.z_stride),
  };
  if (const cudaError_t error = make_maps(operands, a.dtype, maps); error != cudaSuccess)
    return error;

  HopperProblem<HopperOp::kForward> problem{
      int(a.M), int(a.N), int(a.K), int(a.r), tile_grid(tile, a.M, a.N), nullptr, 0,
      {a.addend, a.addend_stride, a.out_scale, a.bias, int(a.M), int(a.N), a.z != nullptr}};
  return instance(maps, &problem, device_sms, stream);
}

cudaError_t launch(
    const HopperInputGradientArgs& a, void* workspace, int device_sms, cudaStream_t stream) {
  const bool summed = a.d_in_scale != nullptr;
  if (a.M == 0 || a.K == 0)
    return summed ? cudaMemsetAsync(a.d_in_scale, 0, size_t(a.K) * sizeof(float), stream)
                  : cudaSuccess;
  if (a.d_x == nullptr && !summed) return cudaSuccess;
  const int shape =
      shape_of(HopperOp::kInputGradient, a.dtype, a.shape, a.M, a.K, a.N, device_sms);
  if (shape == kChooseShape) return cudaErrorNotSupported;
  const HopperTile tile = hopper_tile(HopperOp::kInputGradient, shape);
  const HopperLaunch instance = hopper_launches[hopper_instance(tile.op, a.dtype, shape)];

  HopperMaps maps{};
  const Operands operands{
      left_tensor(tile, a.g, a.M, a.N, a.g_stride),
      right_tensor(tile, a.weight, a.K, a.N, a.weight_stride),
      left_tensor(tile, a.dt, a.M, a.r, a.dt_stride),
      right_tensor(tile, a.down, a.K, a.r, a.down_stride),
      out_tensor(a.d_x, a.M, a.K, a.d_x_stride),
      {},
  };
  if (const cudaError_t error = make_maps(operands, a.dtype, maps); error != cudaSuccess)
    return error;

  float* partial = summed ? static_cast<float*>(workspace) : nullptr;
  HopperProblem<HopperOp::kInputGradient> problem{
      int(a.M), int(a.K), int(a.N), int(a.r), tile_grid(tile, a.M, a.K), a.seed, a.threshold,
      {a.x, a.x_stride, a.in_scale, partial, int(a.M), int(a.K), a.d_x != nullptr}};
  const cudaError_t error = instance(maps, &problem, device_sms, stream);
  if (error != cudaSuccess || !summed) return error;
  const dim3 blocks((unsigned(a.K) + kSumCols - 1) / kSumCols), threads(kSumCols, kSumSlices);
  sum_partial_kernel<<<blocks, threads, 0, stream>>>(
      partial, a.d_in_scale, partial_rows(a.M), a.K);
  return cudaGetLastError();
}

}  // namespace decomp_kernels::cuda
