// Launches of the row norms and their gradients (interface and formulas: row_norm.h).

#include "row_norm.cuh"

#include "column_walk.h"
#include "down_projection.h"

namespace decomp_kernels::cuda {

namespace {

template <typename Args>
const char* why_not_factors(const Args& args, int arch) {
  const bool old_device = arch < 80;
  const bool other_types =
      !paired(args.weight.dtype, args.down.dtype) || args.up.dtype != args.down.dtype;
  const bool too_large = args.K >= int64_t(1) << 26 || args.R > 16384;
  if (old_device) return "it needs compute capability 8.0 or newer";
  if (other_types) return "down and up must be of the weight's dtype or float32, and of one";
  if (too_large) return "K must be below 2^26 and r at most 16384";
  return nullptr;
}

// t = big [M, K] small^T, float32.
DownProjection projection(const Matrix& big, int64_t M, const Matrix& small, int64_t K, int64_t R,
                          float* t) {
  return {.x = big, .down = small, .M = M, .K = K, .R = R, .t = {t, Dtype::kFloat}};
}

struct NormRoom {
  float *U, *G;
  DownProjection for_U, for_G;
  void *U_room, *G_room;
  size_t bytes;

  NormRoom(const RowNorm& args, int device_sms, void* workspace) {
    Room room(workspace);
    U = room.take<float>(args.N * args.R);
    G = room.take<float>(args.R * args.R);
    for_U = projection(args.weight, args.N, args.down, args.K, args.R, U);
    for_G = projection(args.down, args.R, args.down, args.K, args.R, G);
    U_room = room.take<unsigned char>(int64_t(workspace_bytes(for_U, device_sms)));
    G_room = room.take<unsigned char>(int64_t(workspace_bytes(for_G, device_sms)));
    bytes = room.bytes();
  }
};

// The passes that the gradients are made of: over W for L^T W and U, over B for L^T B.
struct GradientsRoom {
  float *U, *G, *left, *left_up, *right;
  ColumnWalk over_weight, over_up;
  DownProjection for_U, for_G;
  bool walk_gives_U;  // else another read of W does, which is cheaper where the rank is large
  void *weight_room, *up_room, *U_room, *G_room;
  size_t bytes;

  GradientsRoom(const RowNormGradients& args, int device_sms, void* workspace) {
    const int64_t N = args.N, K = args.K, R = args.R;
    Room room(workspace);
    const auto more = [&](size_t needed) { return room.take<unsigned char>(int64_t(needed)); };
    U = room.take<float>(N * R);
    G = room.take<float>(R * R);
    left = room.take<float>(N * R);
    left_up = room.take<float>(R * R);
    right = room.take<float>(K * R);
    const Matrix L{left, Dtype::kFloat, R}, down_transposed{right, Dtype::kFloat, R};
    over_up = {.big = args.up, .M = N, .N = R, .left = L, .L = R, .c = left_up};
    over_weight = {.big = args.weight, .M = N, .N = K, .right = down_transposed, .left = L,
                   .R = R, .L = R, .u = U, .c = args.d_down};
    walk_gives_U = u_is_cheap(over_weight);
    if (!walk_gives_U) over_weight.u = nullptr;
    for_U = projection(args.weight, N, args.down, K, R, U);
    for_G = projection(args.down, R, args.down, K, R, G);
    weight_room = more(workspace_bytes(over_weight, device_sms));
    up_room = more(workspace_bytes(over_up, device_sms));
    U_room = more(workspace_bytes(for_U, device_sms));
    G_room = more(workspace_bytes(for_G, device_sms));
    bytes = room.bytes();
  }
};

}  // namespace

const char* why_not(const SquaredRows& args, int arch) {
  const bool old_device = arch < 80, too_large = args.K > INT32_MAX;
  if (old_device) return "it needs compute capability 8.0 or newer";
  if (too_large) return "K must be below 2^31";
  return nullptr;
}

const char* why_not(const RowNorm& args, int arch) { return why_not_factors(args, arch); }
const char* why_not(const RowNormGradients& args, int arch) { return why_not_factors(args, arch); }

size_t workspace_bytes(const RowNorm& args, int device_sms) {
  return NormRoom(args, device_sms, nullptr).bytes;
}

size_t workspace_bytes(const RowNormGradients& args, int device_sms) {
  return GradientsRoom(args, device_sms, nullptr).bytes;
}

cudaError_t launch(const SquaredRows& args, void*, int, cudaStream_t stream) {
  if (args.N == 0) return cudaSuccess;
  return with_type(args.weight.dtype, [&]<typename T>() {
    const SquaredRowsCall<T> call{view<T>(args.weight, args.N, args.K), args.squares};
    return enqueue(&squared_rows<T>, ceil_div(args.N, kRowsABlock), kRowThreads, 0, stream, call);
  });
}

cudaError_t launch(const RowNorm& args, void* workspace, int device_sms, cudaStream_t stream) {
  if (args.N == 0) return cudaSuccess;
  const NormRoom room(args, device_sms, workspace);
  cudaError_t status = launch(room.for_U, room.U_room, device_sms, stream);
  if (status == cudaSuccess) status = launch(room.for_G, room.G_room, device_sms, stream);
  if (status != cudaSuccess) return status;
  return with_type(args.up.dtype, [&]<typename S>() {
    const RowNormCall<S> call{
        .up = view<S>(args.up, args.N, args.R),
        .N = args.N,
        .R = int(args.R),
        .scale = args.scale,
        .U = room.U,
        .G = room.G,
        .squares = args.squares,
        .norm = args.norm,
    };
    return enqueue(&row_norm<S>, ceil_div(args.N, kRowsABlock), kRowThreads, 0, stream, call);
  });
}

cudaError_t launch(const RowNormGradients& args, void* workspace, int device_sms,
                   cudaStream_t stream) {
  if (args.N == 0 || args.K == 0 || args.R == 0) {  // sums over nothing
    const size_t down_bytes = size_t(args.R * args.K) * sizeof(float);
    const size_t up_bytes = size_t(args.N * args.R) * sizeof(float);
    if (down_bytes) return cudaMemsetAsync(args.d_down, 0, down_bytes, stream);
    if (up_bytes) return cudaMemsetAsync(args.d_up, 0, up_bytes, stream);
    return cudaSuccess;
  }
  const GradientsRoom room(args, device_sms, workspace);
  return with_type(args.up.dtype, [&]<typename S>() {
    const RowNormGradientsCall<S> call{
        .up = view<S>(args.up, args.N, args.R),
        .down = view<S>(args.down, args.R, args.K),
        .N = args.N,
        .K = args.K,
        .R = int(args.R),
        .scale = args.scale,
        .d_norm = args.d_norm,
        .norm = args.norm,
        .U = room.U,
        .G = room.G,
        .left_up = room.left_up,
        .left = room.left,
        .right = room.right,
        .d_down = args.d_down,
        .d_up = args.d_up,
    };
    const int64_t row_blocks = ceil_div(args.N, kRowsABlock);
    const int64_t left_blocks = ceil_div(args.N * args.R, kRowThreads);
    const int64_t down_blocks = ceil_div(args.K * args.R, kRowThreads);
    cudaError_t status = cudaSuccess;
    const auto then = [&](auto step) {
      if (status == cudaSuccess) status = step();
    };
    const auto rows = [&](auto kernel, int64_t blocks) {
      then([&] { return enqueue(kernel, blocks, kRowThreads, 0, stream, call); });
    };
    const auto pass = [&](const auto& args, void* place) {
      then([&] { return launch(args, place, device_sms, stream); });
    };
    rows(&row_norm_left<S>, left_blocks);
    if (room.walk_gives_U)
      rows(&row_norm_right<S>, down_blocks);
    else
      pass(room.for_U, room.U_room);
    pass(room.over_weight, room.weight_room);
    pass(room.over_up, room.up_room);
    pass(room.for_G, room.G_room);
    rows(&row_norm_d_up<S>, row_blocks);
    rows(&row_norm_d_down<S>, down_blocks);
    return status;
  });
}

}  // namespace decomp_kernels::cuda
