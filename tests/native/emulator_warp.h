// Shuffles and votes of a warp: every lane that the mask names gives a value and takes another's.

#pragma once

namespace cuda_on_host {

using Slots = unsigned char (*)[kSlotBytes];

// Lane l of mask takes the value of lane source(l), or its own where source(l) < 0.
template <typename T, typename Source>
T exchange(const Site& site, uint32_t mask, T value, Source source) {
  return collective<T>(site, mask, value, [&](Slots given, Slots taken) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const int from = source(lane);
      if (from >= 0 && !(mask >> from & 1)) fail(describe(site) + ": a lane outside the mask read");
      std::memcpy(taken[lane], given[from < 0 ? lane : from], sizeof(T));
    }
  });
}

// The lanes of mask for which value is true.
inline unsigned votes(const Site& site, uint32_t mask, int value) {
  return collective<unsigned>(site, mask, value, [&](Slots given, Slots taken) {
    unsigned result = 0;
    int vote;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      std::memcpy(&vote, given[lane], sizeof vote);
      result |= unsigned(vote != 0) << lane;
    }
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(taken[lane], &result, sizeof result);
  });
}

}  // namespace cuda_on_host

#define CUDA_ON_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, CUDA_ON_HOST_SITE) {
  // ``from`` may differ from lane to lane, so it travels with the value.
  struct Pair {
    T value;
    int from;
  };
  return cuda_on_host::collective<T>(
      {"__shfl_sync", file, line}, mask, Pair{value, from},
      [&](cuda_on_host::Slots given, cuda_on_host::Slots taken) {
        for (int lane = 0; lane < cuda_on_host::kLanes; ++lane) {
          if (!(mask >> lane & 1)) continue;
          Pair mine, other;
          std::memcpy(&mine, given[lane], sizeof mine);
          const int source = (lane & ~(width - 1)) | (mine.from & (width - 1));
          if (!(mask >> source & 1))
            cuda_on_host::fail("__shfl_sync: a lane outside the mask read");
          std::memcpy(&other, given[source], sizeof other);
          std::memcpy(taken[lane], &other.value, sizeof(T));
        }
      });
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_ON_HOST_SITE) {
  return cuda_on_host::exchange(
      {"__shfl_xor_sync", file, line}, mask, value, [=](int lane) {
        const int from = lane ^ lanes;
        return from < (lane & ~(width - 1)) + width ? from : -1;
      });
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, CUDA_ON_HOST_SITE) {
  return cuda_on_host::exchange(
      {"__shfl_down_sync", file, line}, mask, value, [=](int lane) {
        const int from = lane + int(lanes);
        return from < (lane & ~(width - 1)) + width ? from : -1;
      });
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32, CUDA_ON_HOST_SITE) {
  return cuda_on_host::exchange(
      {"__shfl_up_sync", file, line}, mask, value, [=](int lane) {
        const int from = lane - int(lanes);
        return from >= (lane & ~(width - 1)) ? from : -1;
      });
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, CUDA_ON_HOST_SITE) {
  const int warp = cuda_on_host::block.current->warp;
  cuda_on_host::collective<int>({"__syncwarp", file, line}, mask, 0, [=](auto, auto) {
    if (mask == cuda_on_host::block.warps[warp].exists) cuda_on_host::note_warp_barrier(warp);
  });
}
inline unsigned __ballot_sync(unsigned mask, int value, CUDA_ON_HOST_SITE) {
  return cuda_on_host::votes({"__ballot_sync", file, line}, mask, value);
}
inline int __any_sync(unsigned mask, int value, CUDA_ON_HOST_SITE) {
  return cuda_on_host::votes({"__any_sync", file, line}, mask, value) != 0;
}
inline int __all_sync(unsigned mask, int value, CUDA_ON_HOST_SITE) {
  return cuda_on_host::votes({"__all_sync", file, line}, mask, value) == mask;
}
