// SPDX-License-Identifier: Apache-2.0
// Thread blocks on the CPU: every lane of cuda/lane.h is a fibre. Between two barriers the lanes
// run in an order drawn at random, one at a time, as do the blocks of a launch; a barrier that not
// all of its threads reach ends the program. A kernel that lacks a barrier gives results that
// change with the seed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../cuda/lane.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace r2dllm::test {

using cuda::kWarp;

// What runs on a stack of its own. Between two that have begun the built-in jumps do: swapcontext
// asks the system for the signal mask, and longjmp of a hardened glibc refuses another stack.
struct Context {
  ucontext_t begin;
  void* here[5];
  bool began = false;
};

inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)  // it knows swapcontext
  swapcontext(&from.begin, &to.begin);
#else
  if (__builtin_setjmp(from.here) != 0) return;
  from.began = true;
  if (to.began) __builtin_longjmp(to.here, 1);
  setcontext(&to.begin);
#endif
}

class Block;

class FibreLane {
 public:
  FibreLane(Block& block, int thread) : block_(block), thread_(thread) {}

  int thread() const { return thread_; }
  int threads() const;
  int64_t block() const;
  void sync(int n);

  template <class T>
  T shuffle(T x, int from) {
    const T all = x;
    return exchange(all, [&](const auto& slot) { return slot(from); });
  }
  template <class T>
  T shuffle_xor(T x, int mask) {
    return shuffle(x, (thread_ % kWarp) ^ mask);
  }
  uint32_t ballot(bool b) {
    return exchange(static_cast<uint32_t>(b), [](const auto& slot) {
      uint32_t bits = 0;
      for (int i = 0; i < kWarp; ++i) bits |= slot(i) << i;
      return bits;
    });
  }
  int32_t max(int32_t x) {
    return exchange(x, [](const auto& slot) {
      int32_t max = slot(0);
      for (int i = 1; i < kWarp; ++i) max = slot(i) > max ? slot(i) : max;
      return max;
    });
  }
  // Off by up to 2^-22.5, as a card may be, and always alike for the same x; 0 for denormals.
  float exp2(float x) const {
    const double power = std::exp2(static_cast<double>(x));
    if (x == 0.0f || !(power < INFINITY)) return static_cast<float>(power);
    if (power < static_cast<double>(FLT_MIN)) return 0.0f;
    uint32_t hash;
    std::memcpy(&hash, &x, sizeof hash);
    hash = (hash ^ hash >> 16) * 0x7FEB352Du;
    hash = (hash ^ hash >> 15) * 0x846CA68Bu;
    const double error = static_cast<double>(hash) / 0x1p31 - 1.0;  // in [-1, 1)
    return static_cast<float>(power * (1.0 + error * 0x1.6p-23));
  }
  cuda::Words load(const void* p) const {
    check_aligned(p);
    cuda::Words words;
    std::memcpy(&words, p, sizeof words);
    return words;
  }
  cuda::Words load_own(const void* p) const { return load(p); }
  void store(void* p, const cuda::Words& words) const {
    check_aligned(p);
    std::memcpy(p, &words, sizeof words);
  }
  void release_next() const {}
  void await_previous() const {}

 private:
  static void check_aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16 == 0) return;
    std::puts("16 bytes are not aligned");
    std::abort();
  }
  // All lanes of the warp put x down; then each reads what it needs.
  template <class T, class Read>
  T exchange(T x, Read read);

  Block& block_;
  int thread_;
  bool second_ = false;
};

class Block {
 public:
  Block(int64_t number, int threads, std::mt19937& random)
      : number_(number),
        random_(random),
        fibres_(static_cast<size_t>(threads)),
        slots_(2 * static_cast<size_t>(threads)),
        warps_(static_cast<size_t>(threads / kWarp)) {}

  // body(lane) on every lane.
  template <class Body>
  void run(Body body) {
    body_ = [body](FibreLane& lane) { body(lane); };
    for (int i = 0; i < threads(); ++i) start(i);
    std::vector<int> runnable(fibres_.size());
    while (true) {
      runnable.clear();
      size_t done = 0;
      for (int i = 0; i < threads(); ++i) {
        done += fibres_[i].state == State::kDone;
        if (fibres_[i].state == State::kRunnable) runnable.push_back(i);
      }
      if (done == fibres_.size()) return;
      if (runnable.empty()) fail("not all threads of a barrier reach it");
      std::shuffle(runnable.begin(), runnable.end(), random_);
      for (int i : runnable) resume(i);
    }
  }

  int threads() const { return static_cast<int>(fibres_.size()); }
  int64_t number() const { return number_; }
  uint64_t* slots(bool second) { return slots_.data() + (second ? fibres_.size() : 0); }

  void wait_for_block(int n) {
    if (n % kWarp != 0 || n > threads() || running_ >= n) fail("a barrier of the wrong threads");
    wait(all_, n);
  }
  void wait_for_warp() { wait(warps_[static_cast<size_t>(running_ / kWarp)], kWarp); }

 private:
  enum class State { kRunnable, kWaiting, kDone };
  static constexpr size_t kStack = 64 * 1024;

  struct Fibre {
    Context context;
    char* stack = nullptr;
    State state = State::kRunnable;
  };
  struct Barrier {
    int expected = 0;
    std::vector<int> waiting;
  };

  static void fail(const char* message) {
    std::printf("fibre_lane: %s\n", message);
    std::abort();
  }

  void start(int thread) {
    Fibre& fibre = fibres_[static_cast<size_t>(thread)];
    static std::vector<std::unique_ptr<char[]>> stacks;  // of one block at a time
    while (static_cast<int>(stacks.size()) <= thread) stacks.emplace_back(new char[kStack]);
    fibre.stack = stacks[static_cast<size_t>(thread)].get();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fibre.stack, kStack);  // a fibre never returns from its frames
#endif
    ucontext_t& begin = fibre.context.begin;
    getcontext(&begin);
    begin.uc_stack.ss_sp = fibre.stack;
    begin.uc_stack.ss_size = kStack;
    begin.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&begin, reinterpret_cast<void (*)()>(&Block::enter), 2,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
  }

  static void enter(unsigned high, unsigned low) {
    auto* block = reinterpret_cast<Block*>(static_cast<uintptr_t>(high) << 32 | low);
    block->arrive(nullptr);
    FibreLane lane(*block, block->running_);
    block->body_(lane);
    block->fibres_[static_cast<size_t>(block->running_)].state = State::kDone;
    block->leave(true);
  }

  void resume(int thread) {
    running_ = thread;
    Fibre& fibre = fibres_[static_cast<size_t>(thread)];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fibre.stack, kStack);
#endif
    switch_context(scheduler_, fibre.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // Back to the scheduler.
  void leave(bool for_good) {
    Fibre& fibre = fibres_[static_cast<size_t>(running_)];
    [[maybe_unused]] void* fake = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_stack_, scheduler_size_);
#else
    static_cast<void>(for_good);
#endif
    switch_context(fibre.context, scheduler_);
    arrive(fake);
  }

  // On a fibre, just switched to.
  void arrive([[maybe_unused]] void* fake) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_size_);
#endif
  }

  void wait(Barrier& barrier, int expected) {
    if (barrier.waiting.empty()) barrier.expected = expected;
    if (barrier.expected != expected) fail("threads disagree about a barrier");
    if (static_cast<int>(barrier.waiting.size()) + 1 == expected) {
      for (int thread : barrier.waiting) {
        fibres_[static_cast<size_t>(thread)].state = State::kRunnable;
      }
      barrier.waiting.clear();
      return;
    }
    barrier.waiting.push_back(running_);
    fibres_[static_cast<size_t>(running_)].state = State::kWaiting;
    leave(false);
  }

  int64_t number_;
  std::mt19937& random_;
  std::vector<Fibre> fibres_;
  std::vector<uint64_t> slots_;
  std::vector<Barrier> warps_;
  Barrier all_;
  std::function<void(FibreLane&)> body_;
  Context scheduler_;
  int running_ = 0;
  [[maybe_unused]] const void* scheduler_stack_ = nullptr;
  [[maybe_unused]] size_t scheduler_size_ = 0;
};

inline int FibreLane::threads() const { return block_.threads(); }
inline int64_t FibreLane::block() const { return block_.number(); }
inline void FibreLane::sync(int n) {
  if (n == kWarp && thread_ < kWarp) {
    block_.wait_for_warp();  // as CudaLane
  } else {
    block_.wait_for_block(n);
  }
}

template <class T, class Read>
T FibreLane::exchange(T x, Read read) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  // The next exchange uses the other slots; the one after it begins when all have read these.
  uint64_t* slots = block_.slots(second_ = !second_);
  std::memcpy(&slots[thread_], &x, sizeof x);
  block_.wait_for_warp();
  const int first = thread_ / kWarp * kWarp;
  return read([&](int lane) {
    T other;
    std::memcpy(&other, &slots[first + lane], sizeof other);
    return other;
  });
}

// A launch: body(lane, shared) on all blocks, in random order. Shared memory begins as garbage.
template <class Shared, class Body>
void launch(int64_t blocks, int threads, unsigned seed, size_t shared_bytes, Body body) {
  std::mt19937 random(seed);
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (int64_t number : order) {
    // Exactly as long: an index beyond it is an error under AddressSanitizer.
    const std::unique_ptr<Shared[]> shared(new Shared[shared_bytes / sizeof(Shared)]);
    std::memset(static_cast<void*>(shared.get()), 0xA5, shared_bytes);
    Block block(number, threads, random);
    block.run([&](FibreLane& lane) { body(lane, shared.get()); });
  }
}

}  // namespace r2dllm::test
