// Races: two threads at one byte, one of them storing, with no barrier between.
//
// Compiled with -fsanitize=thread and linked without it, every load and store of the kernels calls
// a function that is defined here.  A byte remembers its last store and its last loads; an access
// is in order with an earlier one of
//
//     the same thread            always
//     a thread of the warp       if the whole warp met in __syncwarp() since
//     a thread of the block      if the block met in __syncthreads() since
//     a thread of another block  never, in global memory
//
// so what is found does not depend on the order in which the fibers ran.  A cp.async stores twice:
// when it is issued, and when its thread waits for it.  Shuffles, ldmatrix and mma order nothing.

#pragma once

namespace cuda_on_host {

#if defined(__SANITIZE_THREAD__)

#define CUDA_ON_HOST_UNSEEN __attribute__((no_sanitize("thread")))

inline constexpr int kNobody = -1, kSeveral = -2;

struct Access {
  uint32_t block = 0, epoch = 0, warp_epoch = 0;
  int16_t warp = 0, thread = kNobody;  // kSeveral: lanes of the warp
};

struct ByteHistory {
  Access store, load, load_elsewhere;  // the latter by another warp than the former
};

// What has been done to one piece of memory.
struct History {
  const unsigned char* data = nullptr;
  size_t bytes = 0;
  bool global = false;
  std::string name;
  std::unique_ptr<ByteHistory[]> owned;
  ByteHistory* of = nullptr;
};

inline constexpr int kMostHistories = 64;
static History histories[kMostHistories];
static int history_count = 0;
static const unsigned char *lowest = nullptr, *highest = nullptr;  // of them all
static uint32_t block_serial = 0, epoch = 0;
static uint32_t warp_epochs[kMaxThreads / kLanes];
static bool watching = false;

CUDA_ON_HOST_UNSEEN inline bool in_order(const Access& before, const Access& now, bool global) {
  if (before.thread == kNobody) return true;
  if (before.block != now.block) return !global;
  if (before.epoch != now.epoch) return true;
  if (before.warp != now.warp) return false;
  return before.warp_epoch != now.warp_epoch || before.thread == now.thread;
}

CUDA_ON_HOST_UNSEEN inline void remember_load(ByteHistory& byte, const Access& now) {
  Access& last = byte.load;
  const bool current = last.thread != kNobody && last.block == now.block && last.epoch == now.epoch;
  if (current && last.warp != now.warp) byte.load_elsewhere = last;
  const bool with_others = current && last.warp == now.warp && last.warp_epoch == now.warp_epoch &&
                           last.thread != now.thread;
  last = now;
  if (with_others) last.thread = kSeveral;
}

[[noreturn]] CUDA_ON_HOST_UNSEEN inline void report(const History& history, size_t byte,
                                                    const char* now, const char* before,
                                                    const Access& other) {
  watching = false;
  fail("a race: it " + std::string(now) + " byte " + std::to_string(byte) + " of " + history.name +
       ", which " +
       (other.thread == kSeveral ? "lanes of its warp"
                                 : "thread " + describe(block.fibers[other.thread].index) +
                                       (other.block == block_serial ? "" : " of another block")) +
       " " + before + " with no barrier since");
}

CUDA_ON_HOST_UNSEEN inline void note_in(History& history, size_t first, size_t end, bool stores) {
  const Fiber* self = block.current;
  const int warp = self->warp;
  const Access now{block_serial, epoch, warp_epochs[warp], int16_t(warp),
                   int16_t(warp * kLanes + self->lane)};
  for (size_t i = first; i < end; ++i) {
    ByteHistory& byte = history.of[i];
    if (!in_order(byte.store, now, history.global))
      report(history, i, stores ? "stores to" : "loads", "stored to", byte.store);
    if (!stores) {
      remember_load(byte, now);
      continue;
    }
    if (!in_order(byte.load, now, history.global))
      report(history, i, "stores to", "loaded", byte.load);
    if (!in_order(byte.load_elsewhere, now, history.global))
      report(history, i, "stores to", "loaded", byte.load_elsewhere);
    byte.store = now;
  }
}

CUDA_ON_HOST_UNSEEN inline void note(const void* place, size_t count, bool stores) {
  if (!watching) return;
  const auto* p = static_cast<const unsigned char*>(place);
  if (p < lowest || p >= highest) return;
  watching = false;  // what this calls is watched by the same functions
  for (int h = 0; h < history_count; ++h) {
    History& history = histories[h];
    if (p < history.data || p >= history.data + history.bytes) continue;
    const size_t first = p - history.data, end = first + count;
    note_in(history, first, end < history.bytes ? end : history.bytes, stores);
    break;
  }
  watching = true;
}

// The emulator's own loads and stores of the kernels' memory are none of a thread's.
struct Unwatched {
  bool before = watching;
  CUDA_ON_HOST_UNSEEN Unwatched() { watching = false; }
  CUDA_ON_HOST_UNSEEN ~Unwatched() { watching = before; }
};

inline void watch_nothing() { history_count = 0, lowest = highest = nullptr; }

inline void watch(const unsigned char* data, size_t bytes, bool global, const std::string& name) {
  if (!bytes) return;
  if (history_count == kMostHistories) std::abort();
  auto owned = std::make_unique<ByteHistory[]>(bytes);
  ByteHistory* of = owned.get();
  histories[history_count++] = {data, bytes, global, name, std::move(owned), of};
  if (!lowest || data < lowest) lowest = data;
  if (data + bytes > highest) highest = data + bytes;
}

inline void watch_block() {
  ++block_serial;
  epoch = 0;
  std::fill(std::begin(warp_epochs), std::end(warp_epochs), 0);
}

inline void note_barrier() { ++epoch; }
inline void note_warp_barrier(int warp) { ++warp_epochs[warp]; }

#else

#define CUDA_ON_HOST_UNSEEN

static bool watching = false;
struct Unwatched {
  Unwatched() {}
};
inline void note(const void*, size_t, bool) {}
inline void watch_block() {}
inline void note_barrier() {}
inline void note_warp_barrier(int) {}

#endif

}  // namespace cuda_on_host

#if defined(__SANITIZE_THREAD__)

// What the compiler calls.
#define CUDA_ON_HOST_HOOK extern "C" CUDA_ON_HOST_UNSEEN __attribute__((visibility("default"))) void
#define CUDA_ON_HOST_SIZE(bytes)                                                                   \
  CUDA_ON_HOST_HOOK __tsan_read##bytes(void* p) { cuda_on_host::note(p, bytes, false); }           \
  CUDA_ON_HOST_HOOK __tsan_write##bytes(void* p) { cuda_on_host::note(p, bytes, true); }           \
  CUDA_ON_HOST_HOOK __tsan_volatile_read##bytes(void* p) { cuda_on_host::note(p, bytes, false); }  \
  CUDA_ON_HOST_HOOK __tsan_volatile_write##bytes(void* p) { cuda_on_host::note(p, bytes, true); }  \
  CUDA_ON_HOST_HOOK __tsan_unaligned_read##bytes(void* p) { cuda_on_host::note(p, bytes, false); } \
  CUDA_ON_HOST_HOOK __tsan_unaligned_write##bytes(void* p) { cuda_on_host::note(p, bytes, true); }
CUDA_ON_HOST_SIZE(1)
CUDA_ON_HOST_SIZE(2)
CUDA_ON_HOST_SIZE(4)
CUDA_ON_HOST_SIZE(8)
CUDA_ON_HOST_SIZE(16)
CUDA_ON_HOST_HOOK __tsan_read_range(void* p, size_t n) { cuda_on_host::note(p, n, false); }
CUDA_ON_HOST_HOOK __tsan_write_range(void* p, size_t n) { cuda_on_host::note(p, n, true); }
CUDA_ON_HOST_HOOK __tsan_init() {}
CUDA_ON_HOST_HOOK __tsan_func_entry(void*) {}
CUDA_ON_HOST_HOOK __tsan_func_exit() {}
CUDA_ON_HOST_HOOK __tsan_vptr_update(void**, void*) {}
CUDA_ON_HOST_HOOK __tsan_vptr_read(void**) {}

#endif
