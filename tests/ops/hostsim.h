// Runs CUDA kernels on the CPU: one fiber per thread of a block, blocks one after the other. It stands in for
// cuda_runtime.h when a .cu file is compiled as C++ with VTC_HOSTSIM.
//
// What it finds, with the sanitizers: reads and writes out of bounds, of shared memory too (exact size, own allocation
// per block), misaligned vectors, use of shared memory that was not written (filled with NaN), missing barriers where
// another order of threads gives another result (VTC_SIM_REVERSE=1 runs threads backwards), barriers and warp votes
// that some threads do not reach. What it cannot find: races that neither order shows, the memory model, launch limits,
// anything about speed or about the code that nvcc makes.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline int cudaGetLastError() { return 0; }

namespace hostsim {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "hostsim: %s\n", what);
  std::abort();
}

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 * 1024;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;
  State state = State::kReady;
  uint32_t value = 0;     // what this lane brings to a warp operation
  uint32_t received[kWarp];  // what all lanes brought
};

inline dim3 thread_idx, block_idx, block_dim, grid_dim;
inline unsigned char* shared_memory;
inline std::vector<Fiber>* fibers;
inline std::vector<std::unique_ptr<char[]>> stacks;  // of all blocks, one after the other
inline unsigned current;
inline ucontext_t scheduler;
inline const std::function<void()>* body;

inline void wait(State state) {
  Fiber& own = (*fibers)[current];
  own.state = state;
  swapcontext(&own.context, &scheduler);
}

inline void run_fiber() {
  (*body)();
  wait(State::kDone);
}

// Lanes meet in `exchange`; every one of them must, since every mask is full.
inline void release_warps() {
  for (size_t first = 0; first < fibers->size(); first += kWarp) {
    unsigned waiting = 0, done = 0;
    for (size_t lane = 0; lane < kWarp; ++lane) {
      waiting += (*fibers)[first + lane].state == State::kAtWarp;
      done += (*fibers)[first + lane].state == State::kDone;
    }
    if (waiting > 0 && done > 0) fail("a lane left before an operation of its whole warp");
    if (waiting < kWarp) continue;
    for (size_t lane = 0; lane < kWarp; ++lane) {
      Fiber& fiber = (*fibers)[first + lane];
      for (size_t other = 0; other < kWarp; ++other) fiber.received[other] = (*fibers)[first + other].value;
      fiber.state = State::kReady;
    }
  }
}

inline bool run_all(bool reverse) {
  bool ran = false;
  const unsigned count = static_cast<unsigned>(fibers->size());
  for (unsigned step = 0; step < count; ++step) {
    current = reverse ? count - 1 - step : step;
    Fiber& fiber = (*fibers)[current];
    if (fiber.state != State::kReady) continue;
    ran = true;
    thread_idx = dim3(current);
    swapcontext(&scheduler, &fiber.context);
  }
  return ran;
}

inline void run_block(unsigned threads, size_t shared_bytes, bool reverse) {
  std::vector<Fiber> own(threads);
  // no byte more than was asked for, so that the address sanitizer sees what lies beyond
  std::unique_ptr<unsigned char[]> shared(shared_bytes ? new unsigned char[shared_bytes] : nullptr);
  if (shared_bytes) std::memset(shared.get(), 0xff, shared_bytes);
  shared_memory = shared.get();
  fibers = &own;
  while (stacks.size() < threads) stacks.emplace_back(new char[kStack]);
  for (unsigned thread = 0; thread < threads; ++thread) {
    getcontext(&own[thread].context);
    own[thread].context.uc_stack.ss_sp = stacks[thread].get();
    own[thread].context.uc_stack.ss_size = kStack;
    own[thread].context.uc_link = nullptr;
    makecontext(&own[thread].context, run_fiber, 0);
  }
  for (;;) {
    if (run_all(reverse)) {
      release_warps();
      continue;
    }
    unsigned waiting = 0, done = 0;
    for (const Fiber& fiber : own) {
      waiting += fiber.state == State::kAtBarrier;
      done += fiber.state == State::kDone;
    }
    if (done == threads) return;
    if (waiting != threads) fail("threads wait for others that left, or wait elsewhere");
    for (Fiber& fiber : own) fiber.state = State::kReady;
  }
}

inline void launch(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads == 0 || threads % kWarp != 0 || threads > 1024) fail("blocks must be whole warps of at most 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535) fail("the grid is empty or too large");
  const char* reversed = std::getenv("VTC_SIM_REVERSE");
  const bool reverse = reversed && reversed[0] == '1';
  block_dim = dim3(threads), grid_dim = grid, body = &kernel;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      block_idx = dim3(x, y);
      run_block(threads, shared_bytes, reverse);
    }
  }
  body = nullptr;
}

inline void exchange(uint32_t value) {
  (*fibers)[current].value = value;
  wait(State::kAtWarp);
}

}  // namespace hostsim

#define threadIdx hostsim::thread_idx
#define blockIdx hostsim::block_idx
#define blockDim hostsim::block_dim

#define VTC_SHARED(type, name) type* name = reinterpret_cast<type*>(hostsim::shared_memory)
#define VTC_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  ((void)(stream), hostsim::launch(grid, threads, shared_bytes, [&] { (kernel)(__VA_ARGS__); }))
#define VTC_TRAP() hostsim::fail("trap")

inline void __syncthreads() { hostsim::wait(hostsim::State::kAtBarrier); }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  hostsim::exchange(bits);
  const uint32_t* received = (*hostsim::fibers)[hostsim::current].received;
  std::memcpy(&value, &received[(hostsim::current % hostsim::kWarp) ^ offset], sizeof value);
  return value;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  hostsim::exchange(vote);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < hostsim::kWarp; ++lane) {
    votes |= (*hostsim::fibers)[hostsim::current].received[lane] << lane;
  }
  return votes;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
