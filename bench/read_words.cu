// SPDX-License-Identifier: Apache-2.0
// Reads every byte once and keeps nothing: what a pass over memory costs on this card.
#include <cstdint>

namespace {

constexpr int kThreads = 256, kLoads = 8;  // a block has 32 KiB in flight

__global__ void __launch_bounds__(kThreads)
    read_words(const uint4* words, int64_t n, unsigned* sink) {
  unsigned sum = 0;
  const int64_t first = int64_t{blockIdx.x} * kThreads * kLoads + threadIdx.x;
  uint4 loaded[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int64_t at = first + i * kThreads;
    loaded[i] = at < n ? words[at] : uint4{0, 0, 0, 0};
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) sum += loaded[i].x + loaded[i].y + loaded[i].z + loaded[i].w;
  if (sum == 0x5EED5EEDu) *sink = sum;  // hardly ever, but the compiler can't know
}

}  // namespace

// `bytes` of 16-byte-aligned memory, rounded down to whole words; a cudaError_t.
extern "C" int read_bytes(const void* memory, int64_t bytes, void* sink, void* stream) {
  const int64_t n = bytes / 16, per_block = kThreads * kLoads;
  if (n == 0) return cudaSuccess;
  read_words<<<static_cast<unsigned>((n + per_block - 1) / per_block), kThreads, 0,
               static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(memory), n,
                                                    static_cast<unsigned*>(sink));
  return cudaGetLastError();
}
