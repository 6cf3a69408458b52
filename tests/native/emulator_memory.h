// Arrays that end where a page that cannot be touched begins, and the launch of a grid.
//
//     | guard page | slack of 0xFF | array, 16-byte aligned | < 16 bytes of slack | guard page |
//
// A fault inside a launch ends it with a message.  The slack is NaN to whoever reads it and is
// looked at after the launch; an input is read-only while kernels run.

#pragma once

#include <csignal>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

namespace cuda_on_host {

inline constexpr size_t kPage = 4096, kMaxShared = 232448;  // 227 KiB a block, sm_90 and sm_100
inline constexpr unsigned char kFill = 0xFF;                 // a NaN in bf16, fp16 and fp32; -1

// bytes of memory between two guard pages, as close to the later one as alignment permits.
struct Guarded {
  unsigned char *mapped = nullptr, *data = nullptr;
  size_t bytes = 0, room = 0;  // room: the pages between the guards

  Guarded(size_t bytes, size_t alignment) : bytes(bytes) {
    const size_t whole = (bytes + alignment - 1) / alignment * alignment;
    room = std::max(kPage, (whole + kPage - 1) / kPage * kPage);
    void* place = mmap(nullptr, room + 2 * kPage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED) std::abort();
    mapped = static_cast<unsigned char*>(place);
    mprotect(mapped, kPage, PROT_NONE);
    mprotect(mapped + kPage + room, kPage, PROT_NONE);
    data = mapped + kPage + room - whole;
    fill();
  }
  Guarded(const Guarded&) = delete;
  Guarded(Guarded&& other) noexcept { *this = std::move(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    std::swap(mapped, other.mapped), std::swap(data, other.data);
    std::swap(bytes, other.bytes), std::swap(room, other.room);
    return *this;
  }
  ~Guarded() {
    if (mapped) munmap(mapped, room + 2 * kPage);
  }

  void fill() { std::memset(mapped + kPage, kFill, room); }
  void protect(bool read_only) {
    mprotect(mapped + kPage, room, read_only ? PROT_READ : PROT_READ | PROT_WRITE);
  }
  bool holds(const void* place, size_t count) const {
    const auto* p = static_cast<const unsigned char*>(place);
    return p >= data && p + count <= data + bytes;
  }
  bool near(const void* place) const {
    const auto* p = static_cast<const unsigned char*>(place);
    return p >= mapped && p < mapped + room + 2 * kPage;
  }
  bool slack_is_whole() const {
    auto untouched = [](const unsigned char* first, const unsigned char* end) {
      return std::all_of(first, end, [](unsigned char b) { return b == kFill; });
    };
    return untouched(mapped + kPage, data) && untouched(data + bytes, mapped + kPage + room);
  }
};

static Guarded* dynamic_memory = nullptr;                // of the block that runs
static std::pair<unsigned char*, size_t> static_memory;  // the same, and its bytes
static std::vector<const Guarded*> global_arrays;        // to name the one that a fault is near
static std::string failure;                              // the first of this Memory's launches
static int64_t bank_conflicts = 0;                       // of ldmatrix, in the last launch

// An array begins ``shift`` elements after an address that is 16-byte aligned.
class Memory {
 public:
  Memory() {
    failure.clear();
    global_arrays.clear();
  }
  ~Memory() { global_arrays.clear(); }

  template <typename T>
  const T* input(const T* host, int64_t count, int shift = 0) {
    return host ? add<T>(host, nullptr, count, shift) : nullptr;
  }
  template <typename T>
  T* output(T* host, int64_t count, int shift = 0) {  // NaN until it is stored to
    return host ? add<T>(nullptr, host, count, shift) : nullptr;
  }
  template <typename T>
  T* in_and_output(T* host, int64_t count, int shift = 0) {
    return host ? add<T>(host, host, count, shift) : nullptr;
  }
  template <typename T>
  T* scratch(int64_t count) {
    return add<T>(nullptr, nullptr, count, 0);
  }

  // Copies the outputs back.  nullptr, or what went wrong, which is valid until the next Memory.
  const char* finish() {
    for (Array& array : arrays_) {
      array.guarded->protect(false);
      if (failure.empty() && !array.guarded->slack_is_whole())
        failure = "a store beside an array of " + std::to_string(array.guarded->bytes) + " bytes";
      if (array.out)
        std::memcpy(array.out, array.guarded->data + array.before,
                    array.guarded->bytes - array.before);
    }
    return failure.empty() ? nullptr : failure.c_str();
  }

 private:
  struct Array {
    std::unique_ptr<Guarded> guarded;
    void* out;
    size_t before;  // bytes of slack that the shift leaves
  };

  template <typename T>
  T* add(const T* in, T* out, int64_t count, int shift) {
    const size_t before = shift * sizeof(T), bytes = count * sizeof(T);
    Array& array =
        arrays_.emplace_back(Array{std::make_unique<Guarded>(before + bytes, 16), out, before});
    unsigned char* place = array.guarded->data + before;
    if (in) std::memcpy(place, in, bytes);
    if (in && !out) array.guarded->protect(true);
    global_arrays.push_back(array.guarded.get());
    return reinterpret_cast<T*>(place);
  }

  std::vector<Array> arrays_;
};

struct Launch {
  dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory
  uint64_t seed = 0;  // of the order of blocks and warps; 0 is ascending
};

// This library's thread-local storage: all static __shared__ arrays of all kernels.
static thread_local unsigned char shared_marker;

inline std::pair<unsigned char*, size_t> static_shared_memory() {
  shared_marker = 0;  // a first use allocates it
  std::pair<unsigned char*, size_t> found{nullptr, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        auto* data = static_cast<unsigned char*>(info->dlpi_tls_data);
        for (int i = 0; data && i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_TLS || &shared_marker < data ||
              &shared_marker >= data + header.p_memsz)
            continue;
          *static_cast<std::pair<unsigned char*, size_t>*>(result) = {data, header.p_memsz};
        }
        return 0;
      },
      &found);
  return found;
}

// What a faulting thread did, told by the address, and a way out of it.
inline void on_fault(int signal, siginfo_t* info, void*) {
  if (signal == SIGFPE) fail("an integer division by zero, or one that overflows");
  if (signal == SIGILL || signal == SIGTRAP)
    fail("a trap: an index outside a static array, or undefined behaviour");
  const auto* place = static_cast<const unsigned char*>(info->si_addr);
  auto where = [&](const Guarded& array, const std::string& kind) {
    const int64_t offset = place - array.data;
    if (array.holds(place, 1)) fail("a store to an input, at byte " + std::to_string(offset));
    fail("byte " + std::to_string(offset) + " of " + kind + " of " + std::to_string(array.bytes) +
         " bytes");
  };
  if (dynamic_memory && dynamic_memory->near(place))
    where(*dynamic_memory, "dynamic shared memory");
  for (const Guarded* array : global_arrays)
    if (array->near(place)) where(*array, "an array");
  fail("an access to memory that no array is near");
}

struct FaultHandlers {
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  struct sigaction before[std::size(kSignals)];
  FaultHandlers() {
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler never returns
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &before[i]);
  }
  ~FaultHandlers() {
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &before[i], nullptr);
  }
};

inline std::string why_not_launch(const Launch& how) {
  const uint64_t threads = uint64_t(how.block.x) * how.block.y * how.block.z;
  const bool empty = !threads || !how.grid.x || !how.grid.y || !how.grid.z;
  const bool grid_fits = how.grid.x <= INT_MAX && how.grid.y <= 65535 && how.grid.z <= 65535;
  if (empty) return "a launch of no threads";
  if (!grid_fits) return "a grid over 2147483647 x 65535 x 65535";
  if (threads > kMaxThreads || how.block.z > 64) return "a block over 1024 threads";
  if (how.shared > kMaxShared) return "more than 232448 bytes of shared memory";
  return "";
}

// Runs body as each thread of each block.  False, and a message in ``failure``, at the first error.
inline bool launch(const Launch& how, const std::function<void()>& body) {
  if (!failure.empty()) return false;  // an earlier launch failed
  if (failure = why_not_launch(how); !failure.empty()) return false;
  block_extent = {how.block.x, how.block.y, how.block.z};
  grid_extent = {how.grid.x, how.grid.y, how.grid.z};
  Guarded shared(how.shared, 128);
  static_memory = static_shared_memory();
  uint64_t random = how.seed;
  std::vector<uint32_t> order(size_t(how.grid.x) * how.grid.y * how.grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = uint32_t(i);
  if (random) shuffle(order, random);
  dynamic_memory = &shared;
#if defined(__SANITIZE_THREAD__)
  watch_nothing();
  watch(shared.data, shared.bytes, false, "dynamic shared memory");
  watch(static_memory.first, static_memory.second, false, "static shared memory");
  for (const Guarded* array : global_arrays)
    watch(array->data, array->bytes, true,
          "an array of " + std::to_string(array->bytes) + " bytes");
#endif
  bank_conflicts = 0;
  block.error.clear();
  {
    const FaultHandlers handlers;
    const Stacks stacks(int(how.block.x * how.block.y * how.block.z));
    for (uint32_t i : order) {
      block_index = {i % how.grid.x, i / how.grid.x % how.grid.y, i / (how.grid.x * how.grid.y)};
      shared.fill();
      std::memset(static_memory.first, kFill, static_memory.second);
      watching = true;
      run_block(body, stacks, random ? draw(random) | 1 : 0);
      watching = false;
      if (block.error.empty() && !shared.slack_is_whole())
        block.error = "block " + describe(block_index) + ": a store beside dynamic shared memory";
      if (!block.error.empty()) break;
    }
  }
  dynamic_memory = nullptr;
  failure = block.error;
  return failure.empty();
}

}  // namespace cuda_on_host
