// The floating types that kernels take, as one number across the border between tensors and pointers.

#pragma once

namespace decomp_kernels {

enum class Dtype : int { kFloat, kBFloat16, kHalf };

}  // namespace decomp_kernels
