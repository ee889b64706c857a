// SPDX-License-Identifier: Apache-2.0
// CHECK for tests that need no framework: counts, prints what failed, and main() returns the
// verdict.
#pragma once

#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <vector>

namespace r2dllm::test {

struct Case {
  const char* name;
  std::function<void()> body;
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, std::function<void()> body) { cases().push_back({name, body}); }
};

inline int run_all() {
  int failed = 0;
  for (const Case& test : cases()) {
    const int before = failures();
    const auto began = std::chrono::steady_clock::now();
    test.body();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    const bool ok = failures() == before;
    failed += ok ? 0 : 1;
    std::printf("%s %6.2f s  %s\n", ok ? "ok  " : "FAIL", took.count(), test.name);
  }
  std::printf("%zu passed, %d failed\n", cases().size() - failed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace r2dllm::test

#define TEST(name)                                                  \
  static void name();                                               \
  static const r2dllm::test::Register register_##name(#name, name); \
  static void name()

#define CHECK(...)                                                            \
  do {                                                                        \
    if (!(__VA_ARGS__)) {                                                     \
      ++r2dllm::test::failures();                                             \
      std::printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #__VA_ARGS__); \
    }                                                                         \
  } while (false)
