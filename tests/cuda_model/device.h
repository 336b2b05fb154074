// Host model of csrc/cuda/ptx.cuh: the same names for a C++ compiler. One block runs at a time, or one cluster of them,
// one fiber for each thread.
//
// It is stricter than the hardware: cp.async poisons its destination and delivers only at wait_group; shared memory
// starts as NaN and has its exact size; misaligned or out-of-range addresses, divergent collectives and barriers that
// never open end the launch with an error. Memory that kernels share is touched here, so that sanitizers see it; warp
// exchanges are in device.cpp, which ThreadSanitizer does not see, because they order no memory on the device either.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define FAULT llmfast::cuda::model::fault

struct uint4 {
  uint32_t x, y, z, w;
};

namespace llmfast::cuda {

using std::max;
using std::min;

struct half {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

namespace model {

extern int fault;  // which of the faults planted in the kernels is active; 0: none

int thread_index();
int64_t block_index();
char* shared_memory();
int shared_bytes();
// Ends the launch with an error in words; called in a kernel.
[[noreturn]] void fail(const char* format, ...);
const char* launch(int64_t blocks, int threads, int shared_bytes, int cluster, const std::function<void()>& body);

void block_barrier();
void warp_barrier();
int cluster_size();
int cluster_rank();
void cluster_arrive();
void cluster_wait();
const char* remote(const void* p, int rank);  // the same place in the shared memory of another block of the cluster
uint32_t exchange(uint32_t mine, const char* what,
                  const std::function<uint32_t(const uint32_t (&)[32], int lane)>& result);
void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_half);
void gather(uint32_t mine, uint32_t (&all)[32]);
void fence();
void observe(int* p, bool before);  // an atomic access: what earlier fences order, and what later ones will
void cp_async_issue(char* to, const uint32_t (&bytes)[4]);
void cp_async_commit();
void cp_async_deliver(int pending, void (*store)(char* to, const uint32_t (&bytes)[4]));

typedef uint32_t __attribute__((may_alias)) word;
typedef uint16_t __attribute__((may_alias)) element;

inline void check(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("%s: address not a multiple of %d", what, bytes);
}
inline char* at(uint32_t shared, const char* what) {
  if (shared % 16 || shared + 16 > static_cast<uint32_t>(shared_bytes())) fail("%s: shared address %u", what, shared);
  return shared_memory() + shared;
}
static inline void store(char* to, const uint32_t (&bytes)[4]) {
  for (int i = 0; i < 4; i++) reinterpret_cast<word*>(to)[i] = bytes[i];
}
inline float half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return x;
}
inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
inline void ldmatrix(uint32_t (&r)[4], uint32_t address, bool trans) {
  uint32_t rows[32];
  gather(address, rows);
  const int l = thread_index() % 32;
  for (int m = 0; m < 4; m++) {
    uint32_t e[2];
    for (int j = 0; j < 2; j++) {
      const int row = trans ? l % 4 * 2 + j : l / 4, column = trans ? l / 4 : l % 4 * 2 + j;
      e[j] = reinterpret_cast<const element*>(at(rows[m * 8 + row], "ldmatrix"))[column];
    }
    r[m] = e[0] | e[1] << 16;
  }
}

}  // namespace model

inline int thread_index() { return model::thread_index(); }
inline int64_t block_index() { return model::block_index(); }
inline char* shared_memory() { return model::shared_memory(); }
template <int kBytes>
void note_shared() {
  if (model::shared_bytes() != kBytes) model::fail("the launcher gave %d bytes of %d", model::shared_bytes(), kBytes);
}
inline uint32_t shared_address(const void* p) {
  const int64_t offset = static_cast<const char*>(p) - model::shared_memory();
  if (offset < 0 || offset >= model::shared_bytes())
    model::fail("shared_address: %ld of %d bytes", offset, model::shared_bytes());
  return static_cast<uint32_t>(offset);
}

inline void block_barrier() { model::block_barrier(); }
inline void warp_barrier() { model::warp_barrier(); }
inline float shuffle_xor(float x, int lanes) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = model::exchange(bits, "shuffle_xor", [=](auto& all, int lane) { return all[lane ^ lanes]; });
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int shuffle_up(int x, int lanes) {
  return model::exchange(x, "shuffle_up", [=](auto& all, int lane) { return all[lane < lanes ? lane : lane - lanes]; });
}
inline int shuffle(int x, int from) {
  return model::exchange(x, "shuffle", [=](auto& all, int) { return all[from & 31]; });
}
inline uint32_t ballot(bool x) {
  return model::exchange(x, "ballot", [](auto& all, int) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; i++) bits |= all[i] << i;
    return bits;
  });
}

inline uint4 load_128(const void* p) {
  model::check(p, 16, "load_128");
  const model::word* w = static_cast<const model::word*>(p);
  return {w[0], w[1], w[2], w[3]};
}
inline void store_128(void* p, uint4 x) {
  model::check(p, 16, "store_128");
  model::store(static_cast<char*>(p), {x.x, x.y, x.z, x.w});
}

inline void cp_async_16(uint32_t shared, const void* global, int bytes) {
  char* to = model::at(shared, "cp.async");
  model::check(global, 16, "cp.async");
  if (bytes < 0 || bytes > 16) model::fail("cp.async: %d bytes", bytes);
  uint32_t words[4] = {};
  for (int i = 0; i < bytes; i++)
    words[i / 4] |= static_cast<uint32_t>(static_cast<const unsigned char*>(global)[i]) << i % 4 * 8;
  model::store(to, {~0u, ~0u, ~0u, ~0u});
  model::cp_async_issue(to, words);
}
inline void cp_async_commit() { model::cp_async_commit(); }
template <int N>
void cp_async_wait() {
  model::cp_async_deliver(N, model::store);
}

inline int atomic_add(int* p, int x) {
  model::check(p, 4, "atomic_add");
  model::observe(p, true);
  const int before = __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
  model::observe(p, false);
  return before;
}
inline void memory_fence() { model::fence(); }

inline int cluster_size() { return model::cluster_size(); }
inline int cluster_rank() { return model::cluster_rank(); }
inline void cluster_arrive() { model::cluster_arrive(); }
inline void cluster_wait() { model::cluster_wait(); }
inline float load_remote(const float* p, int rank) {
  shared_address(p);
  return *reinterpret_cast<const float*>(model::remote(p, rank));
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { model::ldmatrix(r, address, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) { model::ldmatrix(r, address, true); }
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  model::mma(c, a, b0, b1, std::is_same_v<T, half>);
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float to_float(float x) { return x; }
inline float to_float(half x) { return model::half_to_float(x.bits); }
inline float to_float(bf16 x) { return model::bf16_to_float(x.bits); }
template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if (x != x) {
    return {0x7fff};
  } else if constexpr (std::is_same_v<T, half>) {
    const _Float16 y = static_cast<_Float16>(x);
    T r;
    std::memcpy(&r.bits, &y, 2);
    return r;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
}
template <class T>
uint32_t pack(float lo, float hi) {
  return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
}

template <class Problem>
const char* launch(void (*kernel)(Problem), int64_t blocks, int threads, int shared_bytes, void*,
                   const Problem& problem, int cluster = 1) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "the problem needs more than 2^31 - 1 blocks";
  return model::launch(blocks, threads, shared_bytes, cluster, [&] { kernel(problem); });
}
template <class Problem>
bool has_clusters(void (*)(Problem), int) {
  return true;
}
inline const char* device_problem() { return nullptr; }

}  // namespace llmfast::cuda
