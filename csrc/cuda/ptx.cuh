// Every PTX instruction the kernels use, one wrapper each (PTX ISA 8.x names in brackets), all of sm_80 but
// what clusters need.
//
// nvcc compiles this file; any other compiler takes the same names from the host model in tests/cuda_model/device.h, so
// kernels and launchers are one text that runs on a GPU and, under sanitizers, on a CPU.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#include "device.h"
#else
#define FAULT 0  // the host model plants the faults listed in tests/test_cuda_model.py; here there are none

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace llmfast::cuda {

using half = __half;
using bf16 = __nv_bfloat16;

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char dynamic_shared[];
  return dynamic_shared;
}

// Leaves a number in the kernel's PTX, where llmfast inspect finds it: the bytes that its launcher asks for.
template <int kBytes>
__device__ __forceinline__ void note_shared() {
  asm volatile("// shared memory: %0 bytes" ::"n"(kBytes));
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- barriers and exchanges within a warp

// All threads of the block; what they wrote to shared memory is seen after it.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }
// The 32 threads of the warp; what they wrote to shared memory is seen after it.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }
__device__ __forceinline__ float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
__device__ __forceinline__ int shuffle_up(int x, int lanes) { return __shfl_up_sync(0xffffffffu, x, lanes); }
__device__ __forceinline__ int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
__device__ __forceinline__ uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }

// ---- memory

__device__ __forceinline__ uint4 load_128(const void* p) { return *static_cast<const uint4*>(p); }
// [st.global.v4] One store; from a plain assignment nvcc may make four.
__device__ __forceinline__ void store_128(void* p, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// [cp.async] Copies 16 bytes to shared memory, of which those past the first `bytes` become zero; global is read for
// `bytes` only.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// This thread's copies have landed except those of its N latest groups.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- between blocks

// [atom.relaxed.gpu] Adds to a number that other blocks add to; returns what it was. Orders nothing by itself.
__device__ __forceinline__ int atomic_add(int* p, int x) { return atomicAdd(p, x); }
// [fence.acq_rel.gpu] What this thread wrote or saw through barriers before it is seen by a thread that finds, by
// atomic_add, what this one adds after it, once that thread has passed a fence too.
__device__ __forceinline__ void memory_fence() { __threadfence(); }

// ---- between the blocks of a cluster: sm_90 and later; compiled for less, a block is a cluster of its own

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// [%cluster_nctarank, %cluster_ctarank] How many blocks there are, and which of them this is.
__device__ __forceinline__ int cluster_size() {
  int x;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(x));
  return x;
}
__device__ __forceinline__ int cluster_rank() {
  int x;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}
// [barrier.cluster] All threads of the cluster: what they wrote to shared memory before they arrive is seen by all
// after they wait.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// [mapa, ld.shared::cluster] What the block of that rank has where p is in this block's shared memory.
__device__ __forceinline__ float load_remote(const float* p, int rank) {
  float x;
  asm volatile("{.reg .b32 at; mapa.shared::cluster.u32 at, %1, %2; ld.shared::cluster.f32 %0, [at];}"
               : "=f"(x)
               : "r"(shared_address(p)), "r"(rank)
               : "memory");
  return x;
}
#else
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { block_barrier(); }
__device__ __forceinline__ float load_remote(const float* p, int) { return *p; }
#endif

// ---- tensor cores

// [ldmatrix] Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8. Lane l
// receives of each matrix the elements (l / 4, 2 * (l % 4)) and (l / 4, 2 * (l % 4) + 1); _trans: of its transpose.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// [mma.m16n8k16] c (16, 8) += a (16, 16) b (16, 8). With g = lane / 4, t = lane % 4: c0 c1 are row g, columns 2t and 2t
// + 1, c2 c3 row g + 8; a0 row g, columns 2t and 2t + 1, a1 row g + 8, a2 and a3 the same at columns + 8; b0 column g,
// rows 2t and 2t + 1, b1 rows + 8.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- arithmetic

// [ex2.approx.ftz] 2^x within 2 ulp; 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// [cvt.rn.f16x2 / bf16x2] Two elements in one register, lo in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack<half>(float lo, float hi) {
  const __half2 x = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&x);
}
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float lo, float hi) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&x);
}

// ---- host

// Starts a kernel on a stream, in clusters of so many blocks; nullptr, or the error in words. A grid of 0 blocks is
// nothing to do.
template <class Problem>
const char* launch(void (*kernel)(Problem), int64_t blocks, int threads, int shared_bytes, void* stream,
                   const Problem& problem, int cluster = 1) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "the problem needs more than 2^31 - 1 blocks";
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t how = {};
  how.gridDim = dim3(static_cast<unsigned>(blocks)), how.blockDim = dim3(threads);
  how.dynamicSmemBytes = shared_bytes, how.stream = static_cast<cudaStream_t>(stream);
  how.attrs = &attribute, how.numAttrs = cluster > 1;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&how, kernel, problem);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Whether this GPU runs the kernel in clusters: it can, what it runs was compiled for one that can, and a block may
// have so much shared memory.
template <class Problem>
bool has_clusters(void (*kernel)(Problem), int shared_bytes) {
  int device = 0, found = 0, most = 0;
  cudaFuncAttributes compiled = {};
  return cudaGetDevice(&device) == cudaSuccess && cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess &&
         cudaDeviceGetAttribute(&found, cudaDevAttrClusterLaunch, device) == cudaSuccess && found &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
         compiled.ptxVersion >= 90 && shared_bytes <= most;
}

// nullptr, or why kernels can't run here: no driver, no device.
inline const char* device_problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count ? nullptr : "no CUDA-capable device is detected";
}

}  // namespace llmfast::cuda
#endif
