// The GPU that an operator's tensors are on: made current, with its stream, architecture and errors.
//
// Only compiled with device kernels (DK_CUDA).  The CUDA runtime is linked statically, and PyTorch's
// stream is looked up when it is first asked for: a library with device kernels also loads where
// PyTorch has no CUDA.  Both runtimes share the device's primary context and so its streams.

#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

namespace decomp_kernels {
namespace {  // PyTorch's guard is of one file as well

class Device {
 public:
  // Makes the device of ``t`` current for the time of the operator.
  Device(const char* op, const Tensor& t) : op_(op), index_(t.get_device_index()), guard_(index_) {
    check(cudaSetDevice(index_));  // the static runtime's own idea of the current device
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index_));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index_));
    check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, index_));
    arch_ = 10 * major + minor;
  }

  // Raises RuntimeError with the operator's name.
  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // a launch that failed must not be reported again by the next operator
    fail(op_, ": CUDA error ", cudaGetErrorName(error), " on device ", index_, ": ",
                    cudaGetErrorString(error));
  }

  // Refuses with the reason that a kernel gave, if it gave one.
  void supported(const char* why_not) const {
    if (why_not != nullptr) fail(op_, " cannot run: ", why_not);
  }

  cudaStream_t stream() const {
    using Ask = int32_t (*)(int32_t, void**);
    static const Ask ask = [] {
      void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      void* found = dlsym(torch_cuda ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
      return reinterpret_cast<Ask>(found);
    }();
    if (ask == nullptr) fail(op_, ": this PyTorch has no CUDA streams");
    void* stream = nullptr;
    if (ask(index_, &stream) != 0) fail(op_, ": PyTorch gave no CUDA stream");
    return static_cast<cudaStream_t>(stream);
  }

  int arch() const { return arch_; }              // 90 of an H200
  int processors() const { return processors_; }  // streaming multiprocessors

 private:
  const char* op_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  int arch_ = 0, processors_ = 0;
};

// Memory for the time of one operator, from PyTorch's allocator; bytes may be 0.
[[maybe_unused]] Tensor workspace(const Tensor& like, size_t bytes) {
  return make(like, {int64_t(bytes)}, ScalarType::Byte);
}

}  // namespace
}  // namespace decomp_kernels
