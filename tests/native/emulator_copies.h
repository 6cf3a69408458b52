// cp.async on the host: the bytes arrive at the wait, and are NaN from the issue until then.
//
// So a missing wait reads NaN, and so does whoever still reads a stage that is filled again.

#pragma once

namespace decomp_kernels::cuda {

inline unsigned char* dynamic_shared() {
  return ::cuda_on_host::dynamic_memory->data;
}

}  // namespace decomp_kernels::cuda

namespace cuda_on_host {

inline void check_aligned(const void* place, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(place) % bytes)
    fail(std::string(what) + " at an address that is no multiple of " + std::to_string(bytes));
}

inline void check_shared(const void* place, size_t bytes, const char* what) {
  const auto [first, count] = static_memory;
  const auto* p = static_cast<const unsigned char*>(place);
  const bool is_static = p >= first && p + bytes <= first + count;
  if (!is_static && !dynamic_memory->holds(place, bytes))
    fail(std::string(what) + " at an address outside shared memory");
}

}  // namespace cuda_on_host

namespace decomp_kernels::cuda {

// bytes, 0 to 16, of the source are read and the rest of the 16 are zeros.
inline void cp_async_16(void* shared, const void* global, int bytes = 16) {
  using namespace ::cuda_on_host;
  check_aligned(shared, 16, "cp.async to");
  check_shared(shared, 16, "cp.async to");
  if (bytes < 0 || bytes > 16) fail("cp.async of a number of bytes that is not 0 to 16");
  if (bytes) {
    check_aligned(global, 16, "cp.async from");
    const auto* source = static_cast<const volatile unsigned char*>(global);
    (void)source[0], (void)source[bytes - 1];  // a fault belongs here, not to the wait
    note(global, bytes, false);
  }
  note(shared, 16, true);
  const Unwatched own;
  std::memset(shared, kFill, 16);
  block.current->copies.back().push_back({shared, global, bytes});
}

inline void cp_async_commit() { ::cuda_on_host::block.current->copies.emplace_back(); }

// Until at most ``pending`` of the newest committed groups are under way.
template <int pending>
inline void cp_async_wait() {
  auto& groups = ::cuda_on_host::block.current->copies;
  const int committed = int(groups.size()) - 1, arrived = std::max(0, committed - pending);
  for (int g = 0; g < arrived; ++g)
    for (const auto& copy : groups[g]) {
      ::cuda_on_host::note(copy.to, 16, true);
      const ::cuda_on_host::Unwatched own;
      std::memset(copy.to, 0, 16);
      if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    }
  groups.erase(groups.begin(), groups.begin() + arrived);
}

inline uint4 load_streaming_16(const void* global) {
  ::cuda_on_host::check_aligned(global, 16, "a 16-byte load");
  uint4 value;
  std::memcpy(&value, global, sizeof value);
  return value;
}

inline void store_streaming_16(void* global, uint4 value) {
  ::cuda_on_host::check_aligned(global, 16, "a 16-byte store");
  std::memcpy(global, &value, sizeof value);
}

}  // namespace decomp_kernels::cuda
