// Threads of a block as fibers: they run until they wait, and a wait that cannot end is an error.
//
// A fiber that waits hands over to the next ready lane of its warp, then to the next warp in this
// phase's order.  __syncthreads() begins a new phase, with another order of warps.

#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#if defined(__x86_64__) && !defined(CUDA_ON_HOST_UCONTEXT)
#define CUDA_ON_HOST_X86 1  // ucontext asks the kernel about signals at every switch
#endif

namespace cuda_on_host {

inline constexpr int kLanes = 32, kMaxThreads = 1024;
inline constexpr size_t kStackBytes = 256 * 1024, kSlotBytes = 64;

// One half of a context switch: where a stack of its own stopped.
struct Context {
#if defined(CUDA_ON_HOST_X86)
  void* stack_pointer = nullptr;
#else
  ucontext_t machine;
#endif
};

#if defined(CUDA_ON_HOST_X86)
// The registers that a call preserves go on the old stack and come from the new one.
__attribute__((naked, noinline, unused, no_sanitize("thread"))) static void switch_stacks(
    void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
inline void switch_context(Context& from, Context& to) {
  switch_stacks(&from.stack_pointer, to.stack_pointer);
}
inline void start_context(Context& context, char* stack, void (*entry)()) {
  // After six registers and the return address the stack is as on entry to a function.
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  context.stack_pointer = top;
}
#else
inline void switch_context(Context& from, Context& to) { swapcontext(&from.machine, &to.machine); }
inline void start_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.machine);
  context.machine.uc_stack.ss_sp = stack;
  context.machine.uc_stack.ss_size = kStackBytes;
  context.machine.uc_link = nullptr;
  makecontext(&context.machine, entry, 0);
}
#endif

// Where a thread waits: the kind of wait and the line that called for it.
struct Site {
  const char* what = "";
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const {
    return line == other.line && what == other.what && file == other.file;  // literals, merged
  }
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

enum class State { kReady, kInWarp, kAtBarrier, kDone };

struct Fiber {
  Context context;
  uint3 index{};
  int warp = 0, lane = 0;
  State state = State::kReady;
  Site site;
  std::vector<std::vector<Copy>> copies;  // cp.async: committed groups, then the open one
};

// A collective that some lanes of a warp have reached.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  Site site;
};

struct Warp {
  uint32_t exists = 0, ready = 0, done = 0;
  std::vector<Meeting> meetings;
  alignas(16) unsigned char given[kLanes][kSlotBytes], taken[kLanes][kSlotBytes];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> order;  // of the warps, in this phase
  int waiting = 0, done = 0;  // threads at the barrier, threads that returned
  Site barrier;
  Fiber* current = nullptr;
  Context host;
  const std::function<void()>* body = nullptr;
  uint64_t random = 0;
  std::string error;
};

static Block block;
static uint3 block_index{}, block_extent{}, grid_extent{};

inline std::string describe(const uint3& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

inline std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(site.what) + " at " + (slash ? slash + 1 : site.file) + ":" +
         std::to_string(site.line);
}

// Ends the launch: nothing of the block runs any more.
[[noreturn]] inline void fail(const std::string& what) {
  block.error = "block " + describe(block_index) + ", thread " + describe(block.current->index) +
                ": " + what;
  Context nobody;
  switch_context(nobody, block.host);
  __builtin_unreachable();
}

}  // namespace cuda_on_host

#include "emulator_races.h"

namespace cuda_on_host {

inline uint64_t draw(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

template <typename T>
void shuffle(std::vector<T>& items, uint64_t& random) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[draw(random) % i]);
}

[[noreturn]] inline void stuck() {
  for (const Fiber& fiber : block.fibers)
    if (fiber.state == State::kInWarp)
      fail("thread " + describe(fiber.index) + " waits for ever in " + describe(fiber.site) +
           ": lanes that its mask names are elsewhere");
  fail("threads wait for ever");
}

// The next ready thread: of this warp, from this lane on, or of another.
inline Fiber* next_ready() {
  const Fiber& now = *block.current;
  auto lane_from = [](uint32_t ready, int first) {
    const uint32_t later = first < kLanes ? ready & (~0u << first) : 0;
    return __builtin_ctz(later ? later : ready);
  };
  if (const uint32_t ready = block.warps[now.warp].ready)
    return &block.fibers[now.warp * kLanes + lane_from(ready, now.lane + 1)];
  for (int warp : block.order)
    if (const uint32_t ready = block.warps[warp].ready)
      return &block.fibers[warp * kLanes + lane_from(ready, 0)];
  return nullptr;
}

inline void hand_over() {
  Fiber* self = block.current;
  Fiber* next = next_ready();
  if (!next) stuck();
  if (next == self) return;
  block.current = next;
  switch_context(self->context, next->context);
}

inline void wait_as(State state, const Site& site) {
  Fiber& self = *block.current;
  self.state = state;
  self.site = site;
  block.warps[self.warp].ready &= ~(1u << self.lane);
}

inline void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  block.warps[fiber.warp].ready |= 1u << fiber.lane;
}

inline void barrier(const Site& site) {
  if (block.done) fail(describe(site) + " after a thread of the block returned");
  if (block.waiting && !(block.barrier == site))
    fail(describe(site) + " while other threads wait in " + describe(block.barrier));
  block.barrier = site;
  wait_as(State::kAtBarrier, site);
  if (++block.waiting < int(block.fibers.size())) return hand_over();
  block.waiting = 0;
  note_barrier();
  for (Fiber& fiber : block.fibers) make_ready(fiber);
  if (block.random) shuffle(block.order, block.random);
  // Not on with this warp: a warp that had just left would always be the one that arrived last.
  Fiber* self = block.current;
  const int warp = block.order[0];
  Fiber* first = &block.fibers[warp * kLanes];
  if (first == self) return;
  block.current = first;
  switch_context(self->context, first->context);
}

// Lanes of mask meet; the last to come computes taken from given, each [32] slots, for all of them.
template <typename Taken, typename Given, typename Compute>
Taken collective(const Site& site, uint32_t mask, const Given& given, Compute compute) {
  static_assert(sizeof(Given) <= kSlotBytes && sizeof(Taken) <= kSlotBytes);
  Fiber& self = *block.current;
  Warp& warp = block.warps[self.warp];
  const uint32_t me = 1u << self.lane;
  if (!(mask & me)) fail(describe(site) + ": the mask leaves out the lane that calls");
  if (mask & ~warp.exists) fail(describe(site) + ": the mask names lanes that the block lacks");
  if (mask & warp.done) fail(describe(site) + ": the mask names lanes that have returned");
  Meeting* meeting = nullptr;
  for (Meeting& other : warp.meetings) {
    if (!(other.mask & mask)) continue;
    if (other.mask != mask || !(other.site == site))
      fail(describe(site) + " while lanes of the same warp wait in " + describe(other.site));
    meeting = &other;
  }
  if (!meeting) meeting = &warp.meetings.emplace_back(Meeting{mask, 0, site});
  std::memcpy(warp.given[self.lane], &given, sizeof given);
  meeting->arrived |= me;
  if (meeting->arrived == mask) {
    warp.meetings.erase(warp.meetings.begin() + (meeting - warp.meetings.data()));
    {
      const Unwatched own;
      compute(warp.given, warp.taken);
    }
    for (int lane = 0; lane < kLanes; ++lane)
      if ((mask & ~me) >> lane & 1) make_ready(block.fibers[self.warp * kLanes + lane]);
  } else {
    wait_as(State::kInWarp, site);
    hand_over();
  }
  Taken taken;
  std::memcpy(&taken, warp.taken[self.lane], sizeof taken);
  return taken;
}

inline void thread_main() {
  (*block.body)();
  Fiber& self = *block.current;
  if (self.copies.size() > 1 || !self.copies.back().empty())
    fail("returned while copies by cp.async are under way");
  if (block.waiting) fail("returned while other threads wait in " + describe(block.barrier));
  self.state = State::kDone;
  Warp& warp = block.warps[self.warp];
  warp.done |= 1u << self.lane;
  warp.ready &= ~(1u << self.lane);
  for (const Meeting& meeting : warp.meetings)
    if (meeting.mask >> self.lane & 1)
      fail("returned while lanes of its warp wait for it in " + describe(meeting.site));
  ++block.done;
  if (block.done == int(block.fibers.size())) {
    Context nobody;
    switch_context(nobody, block.host);
  }
  Fiber* next = next_ready();
  if (!next) stuck();
  block.current = next;
  switch_context(self.context, next->context);
}

// A launch's stacks, with a page that faults at the end of each.  They go with the launch, since a
// process may load many libraries of kernels, and the system limits how many such pages it has.
class Stacks {
 public:
  explicit Stacks(int threads) : bytes_(kStackBytes * threads) {
    void* place = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED) std::abort();
    first_ = static_cast<char*>(place);
    for (int i = 0; i < threads; ++i) mprotect(of(i), 4096, PROT_NONE);
  }
  Stacks(const Stacks&) = delete;
  ~Stacks() { munmap(first_, bytes_); }
  char* of(int thread) const { return first_ + size_t(thread) * kStackBytes; }

 private:
  char* first_;
  size_t bytes_;
};

// Runs one block to its end, or to its first error.
inline void run_block(const std::function<void()>& body, const Stacks& stacks, uint64_t random) {
  const int threads = int(block_extent.x * block_extent.y * block_extent.z);
  const int warps = (threads + kLanes - 1) / kLanes;
  block.fibers.resize(threads);
  block.warps.resize(warps);
  block.order.resize(warps);
  for (int w = 0; w < warps; ++w) {
    const int lanes = std::min(kLanes, threads - w * kLanes);
    const uint32_t all = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    block.warps[w].exists = block.warps[w].ready = all;
    block.warps[w].done = 0;
    block.warps[w].meetings.clear();
    block.order[w] = w;
  }
  block.random = random;
  if (random) shuffle(block.order, block.random);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.index = {i % block_extent.x, i / block_extent.x % block_extent.y,
                   i / (block_extent.x * block_extent.y)};
    fiber.warp = i / kLanes;
    fiber.lane = i % kLanes;
    fiber.state = State::kReady;
    fiber.copies.assign(1, {});
    start_context(fiber.context, stacks.of(i), thread_main);
  }
  block.body = &body;
  block.waiting = block.done = 0;
  watch_block();
  block.current = &block.fibers[block.order[0] * kLanes];
  switch_context(block.host, block.current->context);
}

}  // namespace cuda_on_host

#define threadIdx (::cuda_on_host::block.current->index)
#define blockIdx (::cuda_on_host::block_index)
#define blockDim (::cuda_on_host::block_extent)
#define gridDim (::cuda_on_host::grid_extent)

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_host::barrier({"__syncthreads", file, line});
}
