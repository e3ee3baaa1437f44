// Runs a CUDA kernel on the CPU, one CTA at a time, one fiber a thread: for testing kernels where
// there is no GPU.  Included before the kernel's headers, whose ptx/ directory is replaced by the
// one here.
//
// What is faithful: the order of collectives (a warp collective waits for its 32 lanes and checks
// that all of them called the same one), barriers, mbarrier phases, asynchronous copies that land
// late and in any order, fragment layouts, rounding of inputs.  What is not: memory ordering,
// timing, caches.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // CTAs run one after the other

using std::max;
using std::min;

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

struct Index {
  int x, y, z;
};

[[noreturn]] inline void fail(const char* what) {
  std::printf("emulation: %s\n", what);
  std::fflush(stdout);
  std::abort();
}

constexpr int kSharedBytes = 227 * 1024;
constexpr uint32_t kSharedBase = 1024;  // addresses of shared memory start here, as on sm_90

// The context starts a fiber; from then on it is left and entered by jumps, which unlike
// swapcontext() save no signal masks, that is, make no system calls.  Compiled without
// _FORTIFY_SOURCE, whose longjmp() refuses other stacks.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started = false;
  std::vector<uint8_t> stack;
  Index thread;
  bool done = true;
};

// Collectives of a warp: operands are exchanged in one of two buffers, used in turn, so that a fast
// lane can enter the next collective while a slow one still reads the last.
struct Warp {
  int arrived = 0;
  uint64_t generation = 0;
  int kind = 0;
  uint64_t operand[2][32][4];
};

struct NamedBarrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Mbarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
};

class Machine {
 public:
  alignas(1024) uint8_t shared[kSharedBytes];
  Index block{}, grid{};
  int threads = 0;
  int columns = 0;  // threads with the same threadIdx.y
  std::vector<Warp> warps;
  NamedBarrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;
  // Copies in flight: run later, in random order among threads.  Those of one queue keep their
  // order.
  std::map<int, std::deque<std::function<void()>>> flying;
  uint64_t random = 1;
  uint64_t progress = 0;  // counts what may unblock somebody

  Fiber& self() { return *fibers_[current_]; }
  int thread_index() const { return current_; }

  uint32_t next_random() {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(random >> 33);
  }

  void yield() {
    if (_setjmp(self().place) == 0) _longjmp(scheduler_, 1);
  }

  // Yields until `ready` holds.
  template <typename Ready>
  void wait(Ready&& ready) {
    while (!ready()) yield();
  }

  void land_one() {
    if (flying.empty()) return;
    auto it = flying.begin();
    std::advance(it, next_random() % flying.size());
    const auto action = std::move(it->second.front());
    it->second.pop_front();
    if (it->second.empty()) flying.erase(it);
    action();
    ++progress;
  }

  void finish_phase(Mbarrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
      barrier.pending = barrier.expected;
      ++barrier.phase;
      ++progress;
    }
  }

  Mbarrier& mbarrier(uint32_t address) {
    const auto it = mbarriers.find(address);
    if (it == mbarriers.end()) fail("use of an mbarrier that was not initialised");
    return it->second;
  }

  void arrive(uint32_t address) {
    Mbarrier& barrier = mbarrier(address);
    if (barrier.pending == 0) fail("more arrivals at an mbarrier than expected");
    --barrier.pending;
    finish_phase(barrier);
  }

  void run_block(const std::function<void()>& kernel) {
    std::memset(shared, 0xff, sizeof shared);
    mbarriers.clear();
    for (NamedBarrier& barrier : barriers) barrier = {};
    warps.assign((threads + 31) / 32, Warp{});
    body_ = &kernel;
    while (static_cast<int>(fibers_.size()) < threads) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->stack.resize(kStackBytes);
    }
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.thread = {i % columns, i / columns, 0};
      fiber.done = fiber.started = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Machine::enter), 0);
    }
    int alive = threads, idle_rounds = 0;
    while (alive > 0) {
      const uint64_t before = progress;
      const int alive_before = alive;
      // Warps in a random order, their lanes in turn.
      const int first = static_cast<int>(next_random() % warps.size());
      for (size_t w = 0; w < warps.size(); ++w) {
        const int warp = static_cast<int>((first + w) % warps.size());
        for (int i = 32 * warp; i < std::min(threads, 32 * warp + 32); ++i) {
          if (fibers_[i]->done) continue;
          current_ = i;
          resume(*fibers_[i]);
          if (fibers_[i]->done) --alive;
        }
      }
      if (next_random() % 4 == 0) land_one();
      const bool moved = progress != before || alive != alive_before;
      idle_rounds = moved ? 0 : idle_rounds + 1;
      if (!moved) land_one();
      if (idle_rounds > 1000) fail("deadlock");
    }
    if (!flying.empty()) fail("a CTA ended with copies in flight");
  }

 private:
  static constexpr size_t kStackBytes = 96 * 1024;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  jmp_buf scheduler_;
  int current_ = 0;
  const std::function<void()>* body_ = nullptr;

  static void enter();

  __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void Machine::enter() {
  (*machine().body_)();
  machine().self().done = true;
  _longjmp(machine().scheduler_, 1);
}

// kernel<<<grid, dim3(columns, rows)>>>(args...)
template <typename Kernel, typename... Args>
void launch_rows(Kernel kernel, int grid, int columns, int rows, const Args&... args) {
  Machine& m = machine();
  m.grid = {grid, 1, 1};
  m.threads = columns * rows;
  m.columns = columns;
  for (int block = 0; block < grid; ++block) {
    m.block = {block, 0, 0};
    m.run_block([&] { kernel(args...); });
  }
}

// kernel<<<dim3(grid.x, grid.y), threads>>>(args...)
template <typename Kernel, typename... Args>
void launch_grid(Kernel kernel, Index grid, int threads, const Args&... args) {
  Machine& m = machine();
  m.grid = grid;
  m.threads = m.columns = threads;
  for (int y = 0; y < grid.y; ++y) {
    for (int x = 0; x < grid.x; ++x) {
      m.block = {x, y, 0};
      m.run_block([&] { kernel(args...); });
    }
  }
}

// kernel<<<grid, threads>>>(args...)
template <typename Kernel, typename... Args>
void launch(Kernel kernel, int grid, int threads, const Args&... args) {
  launch_rows(kernel, grid, threads, 1, args...);
}

inline int lane() { return machine().thread_index() % 32; }

// All 32 lanes call this with the same `kind`; returns the buffer of the lanes' operands.
inline uint64_t (*exchange(int kind, uint64_t a, uint64_t b = 0, uint64_t c = 0,
                           uint64_t d = 0))[4] {
  Machine& m = machine();
  Warp& warp = m.warps[m.thread_index() / 32];
  const uint64_t generation = warp.generation;
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) fail("lanes of a warp are in different collectives");
  uint64_t (*buffer)[4] = warp.operand[generation % 2];
  uint64_t* mine = buffer[lane()];
  mine[0] = a, mine[1] = b, mine[2] = c, mine[3] = d;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
    ++m.progress;
  } else {
    m.wait([&] { return warp.generation != generation; });
  }
  return buffer;
}

enum Kind {
  kSync = 1,
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kVote,
  kBallot,
  kReduceAdd,
  kMmaInt8,
  kMmaHalf,
  kMmaTf32,
  kMmaTf32B,
  kMmaInt8B,
  kMmaHalfB,
  kLdmatrixTrans,
  kRegisters
};

inline void arrive_at_barrier(int id, int threads) {
  Machine& m = machine();
  NamedBarrier& b = m.barriers[id];
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.generation;
    ++m.progress;
  }
}

inline void barrier(int id, int threads) {
  Machine& m = machine();
  NamedBarrier& b = m.barriers[id];
  const uint64_t generation = b.generation;
  arrive_at_barrier(id, threads);
  m.wait([&] { return b.generation != generation; });
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// fp16 <-> fp32, round to nearest even.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return from_bits<float>(sign | 0x7f800000u | mantissa << 13);
  return from_bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = static_cast<uint32_t>(to_bits(x));
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (x != x) return sign | 0x7fffu;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.f) return sign | 0x7c00u;
  if (magnitude < 0x1p-14f) {
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  }
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);  // [0.5, 1)
  const uint32_t scaled = static_cast<uint32_t>(std::nearbyint(std::ldexp(fraction, 11)));
  return sign | static_cast<uint16_t>((exponent + 13) * 1024 + scaled);
}

inline uint16_t float_to_bfloat(float x) {
  uint32_t bits = static_cast<uint32_t>(to_bits(x));
  if (x != x) return 0x7fff;
  bits += 0x7fffu + (bits >> 16 & 1);
  return static_cast<uint16_t>(bits >> 16);
}

}  // namespace emulation

#define threadIdx (::emulation::machine().self().thread)
#define blockIdx (::emulation::machine().block)
#define gridDim (::emulation::machine().grid)

template <typename T>
T __shfl_sync(uint32_t, T value, int source) {
  return emulation::from_bits<T>(
      emulation::exchange(emulation::kShuffle, emulation::to_bits(value))[source & 31][0]);
}
template <typename T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return emulation::from_bits<T>(emulation::exchange(
      emulation::kShuffleXor, emulation::to_bits(value))[(emulation::lane() ^ mask) & 31][0]);
}
template <typename T>
T __shfl_up_sync(uint32_t, T value, int delta) {
  const auto all = emulation::exchange(emulation::kShuffleUp, emulation::to_bits(value));
  return emulation::from_bits<T>(all[max(0, emulation::lane() - delta)][0]);
}
inline bool __all_sync(uint32_t, bool value) {
  const auto all = emulation::exchange(emulation::kVote, value);
  bool result = true;
  for (int i = 0; i < 32; ++i) result = result && all[i][0] != 0;
  return result;
}
inline uint32_t __ballot_sync(uint32_t, bool value) {
  const auto all = emulation::exchange(emulation::kBallot, value);
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<uint32_t>(all[i][0] != 0) << i;
  return result;
}
inline int __reduce_add_sync(uint32_t, int value) {
  const auto all = emulation::exchange(emulation::kReduceAdd, static_cast<uint32_t>(value));
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result += static_cast<uint32_t>(all[i][0]);
  return static_cast<int>(result);
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline bool __any_sync(uint32_t, bool value) { return !__all_sync(0, !value); }
inline void __syncwarp() { emulation::exchange(emulation::kSync, 0); }
inline void __syncthreads() { emulation::barrier(0, emulation::machine().threads); }

inline uint32_t __float_as_uint(float x) { return static_cast<uint32_t>(emulation::to_bits(x)); }
inline float __uint_as_float(uint32_t x) { return emulation::from_bits<float>(x); }
inline float __int_as_float(int32_t x) {
  return emulation::from_bits<float>(static_cast<uint32_t>(x));
}
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  return static_cast<int>(std::nearbyint(std::max(-2147483648.f, std::min(2147483520.f, x))));
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __log2f(float x) { return std::log2(x); }
