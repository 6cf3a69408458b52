// phi and phi' of the low-rank branch (definition: decomp_kernels/reference/decomposed_linear.py).

#pragma once

#include <cmath>

#include "host_device.h"

namespace decomp_kernels {

// The order is that of decomp_kernels.factors.ACTIVATIONS; the number crosses the operators' border.
enum class Activation : int { kIdentity, kRelu, kSilu, kGelu, kTanh };

DK_HOST_DEVICE float activate(float t, Activation phi) {
  switch (phi) {
    case Activation::kRelu: return t < 0.0f ? 0.0f : t;  // a NaN stays one
    case Activation::kSilu: return t / (1.0f + expf(-t));
    case Activation::kGelu: return 0.5f * t * (1.0f + erff(t * 0.70710678118654752f));
    case Activation::kTanh: return tanhf(t);
    default: return t;
  }
}

// phi'(t).  relu has 0 at 0, as in PyTorch.
DK_HOST_DEVICE float activation_derivative(float t, Activation phi) {
  switch (phi) {
    case Activation::kRelu: return t > 0.0f ? 1.0f : 0.0f;
    case Activation::kSilu: {
      const float s = 1.0f / (1.0f + expf(-t));
      return s * (1.0f + t * (1.0f - s));
    }
    case Activation::kGelu: {
      const float density = expf(-0.5f * t * t) * 0.39894228040143268f;
      return 0.5f * (1.0f + erff(t * 0.70710678118654752f)) + t * density;
    }
    case Activation::kTanh: {
      const float h = tanhf(t);
      return 1.0f - h * h;
    }
    default: return 1.0f;
  }
}

}  // namespace decomp_kernels
