// Runs every wrapper of csrc/cuda/ptx.cuh and prints what it gives, one line a probe: name, how to compare, words in
// hexadecimal.
//
// The same text compiled by nvcc runs on a GPU and by g++ on the host model; conformance.py compares the two. "bits"
// must agree in every bit; "close" are float32 that the hardware may round differently: within 4 units in the last
// place.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/ptx.cuh"

using namespace llmfast::cuda;

namespace {

constexpr int kThreads = 64, kSharedBytes = 4096;

struct Probe {
  const uint32_t* in;
  uint32_t* out;
};

__device__ uint32_t* words(int byte) { return reinterpret_cast<uint32_t*>(shared_memory() + byte); }
__device__ uint32_t bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
__device__ float value(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

__device__ void fill_shared(const uint32_t* in) {
  note_shared<kSharedBytes>();
  for (int i = thread_index(); i < kSharedBytes / 4; i += kThreads) *words(4 * i) = in[i];
  block_barrier();
}

template <bool kTrans>
__global__ void probe_ldmatrix(const __grid_constant__ Probe p) {
  fill_shared(p.in);
  uint32_t r[4];
  const uint32_t address = shared_address(shared_memory()) + (thread_index() * 37 + 11) % (kSharedBytes / 16) * 16;
  if (kTrans)
    ldmatrix_x4_trans(r, address);
  else
    ldmatrix_x4(r, address);
  for (int i = 0; i < 4; i++) p.out[thread_index() * 4 + i] = r[i];
}

template <class T>
__global__ void probe_mma(const __grid_constant__ Probe p) {
  uint32_t a[4], b[2];
  float c[4];
  const uint32_t* in = p.in + thread_index() * 16;
  for (int i = 0; i < 4; i++) a[i] = pack<T>(value(in[2 * i]), value(in[2 * i + 1])), c[i] = value(in[12 + i]);
  for (int i = 0; i < 2; i++) b[i] = pack<T>(value(in[8 + 2 * i]), value(in[9 + 2 * i]));
  mma_m16n8k16<T>(c, a, b[0], b[1]);
  for (int i = 0; i < 4; i++) p.out[thread_index() * 4 + i] = bits(c[i]);
}

__global__ void probe_cp_async(const __grid_constant__ Probe p) {
  fill_shared(p.in);
  const uint32_t to = shared_address(shared_memory()) + thread_index() * 32;
  cp_async_16(to, p.in + thread_index() * 4, thread_index() % 17);
  cp_async_commit();
  cp_async_16(to + 16, p.in + 400 + thread_index() * 4, 16);
  cp_async_commit();
  cp_async_wait<1>();
  for (int i = 0; i < 4; i++) p.out[thread_index() * 8 + i] = *words(thread_index() * 32 + 4 * i);
  cp_async_wait<0>();
  block_barrier();
  const int other = kThreads - 1 - thread_index();
  for (int i = 4; i < 8; i++) p.out[other * 8 + i] = *words(other * 32 + 4 * i);
}

__global__ void probe_exchange(const __grid_constant__ Probe p) {
  const uint32_t mine = p.in[thread_index()];
  uint32_t* out = p.out + thread_index() * 14;
  int n = 0;
  for (int lanes = 1; lanes < 32; lanes *= 2) out[n++] = bits(shuffle_xor(static_cast<float>(mine & 0xffffff), lanes));
  for (int lanes = 1; lanes < 32; lanes *= 2) out[n++] = shuffle_up(mine, lanes);
  out[n++] = shuffle(mine, 31);
  out[n++] = shuffle(mine, 5);
  out[n++] = llmfast::cuda::ballot(mine & 1);
  warp_barrier();
  out[n++] = thread_index() + block_index();
}

__global__ void probe_memory(const __grid_constant__ Probe p) {
  const uint4 x = load_128(p.in + 4 * thread_index());
  for (int i = 0; i < 4; i++) *words(16 * thread_index() + 4 * i) = p.in[4 * thread_index() + i];
  warp_barrier();
  const uint4 y = load_128(shared_memory() + 16 * (thread_index() ^ 1));
  store_128(p.out + 4 * thread_index(), {x.w ^ y.x, x.z ^ y.y, x.y ^ y.z, x.x ^ y.w});
}

// Each thread adds to a number of its own and to one that 8 threads share.
__global__ void probe_atomic(const __grid_constant__ Probe p) {
  const int t = thread_index();
  int *own = reinterpret_cast<int*>(p.out) + t, *shared = reinterpret_cast<int*>(p.out) + 2 * kThreads + t % 8;
  *own = p.in[t];
  if (t < 8) *shared = p.in[kThreads + t];
  block_barrier();
  p.out[kThreads + t] = atomic_add(own, p.in[2 * kThreads + t]);
  atomic_add(shared, p.in[3 * kThreads + t]);
  memory_fence();
}

// The blocks of a cluster read each other's shared memory.
__global__ void probe_cluster(const __grid_constant__ Probe p) {
  const int t = thread_index();
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[t] = static_cast<float>(p.in[cluster_rank() * kThreads + t] & 0xffff);
  cluster_arrive();
  cluster_wait();
  uint32_t* out = p.out + (block_index() * kThreads + t) * 6;
  for (int rank = 0; rank < 4; rank++) out[rank] = bits(load_remote(shared + (t + 5 * rank) % kThreads, rank));
  out[4] = cluster_size();
  out[5] = cluster_rank();
  cluster_arrive();
  cluster_wait();
}

__global__ void probe_exp2(const __grid_constant__ Probe p) {
  for (int i = thread_index(); i < 1024; i += kThreads) p.out[i] = bits(exp2_approx(value(p.in[i])));
}

template <class T>
__global__ void probe_round(const __grid_constant__ Probe p) {
  for (int i = thread_index(); i < 1024; i += kThreads) {
    const T x = from_float<T>(value(p.in[i]));
    uint16_t low;
    memcpy(&low, &x, 2);
    p.out[2 * i] = low;
    p.out[2 * i + 1] = pack<T>(value(p.in[i]), value(p.in[(i + 1) % 1024]));
  }
}

template <class T>
__global__ void probe_widen(const __grid_constant__ Probe p) {
  for (int i = thread_index(); i < 65536; i += kThreads) {
    const uint16_t low = i;
    T x;
    memcpy(&x, &low, 2);
    const float wide = to_float(x);
    p.out[i] = wide == wide ? bits(wide) : 0x7fffffff;
  }
}

#ifdef __CUDACC__
void check(cudaError_t error) {
  if (error != cudaSuccess) std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error)), std::exit(2);
}
#endif

void run(const char* name, const char* compare, void (*kernel)(Probe), const std::vector<uint32_t>& in, int outputs,
         int cluster = 1) {
  std::vector<uint32_t> out(outputs);
#ifdef __CUDACC__
  uint32_t *from, *to;
  check(cudaMalloc(&from, in.size() * 4));
  check(cudaMalloc(&to, outputs * 4));
  check(cudaMemcpy(from, in.data(), in.size() * 4, cudaMemcpyHostToDevice));
  const char* error = launch(kernel, cluster, kThreads, kSharedBytes, nullptr, Probe{from, to}, cluster);
  check(cudaMemcpy(out.data(), to, outputs * 4, cudaMemcpyDeviceToHost));
  check(cudaFree(from));
  check(cudaFree(to));
#else
  void* aligned = nullptr;
  if (posix_memalign(&aligned, 16, (in.size() + outputs) * 4)) std::abort();
  uint32_t *from = static_cast<uint32_t*>(aligned), *to = from + in.size();
  std::memcpy(from, in.data(), in.size() * 4);
  const char* error = launch(kernel, cluster, kThreads, kSharedBytes, nullptr, Probe{from, to}, cluster);
  std::memcpy(out.data(), to, outputs * 4);
  std::free(aligned);
#endif
  if (error) std::fprintf(stderr, "%s: %s\n", name, error), std::exit(2);
  std::printf("%s %s", name, compare);
  for (uint32_t word : out) std::printf(" %x", word);
  std::printf("\n");
}

}  // namespace

int main() {
  if (const char* problem = device_problem()) {
    std::fprintf(stderr, "no device: %s\n", problem);
    return 2;
  }
  uint32_t state = 12345;
  const auto random = [&] { return state = state * 1664525u + 1013904223u, state >> 8; };  // 24 bits
  const auto as_bits = [](float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
  };
  std::vector<uint32_t> raw(2048), integers(1024), reals(1024), exponents(1024), edges(1024);
  for (uint32_t& x : raw) x = random() << 8 ^ random();
  for (uint32_t& x : integers) x = as_bits(static_cast<int>(random() % 17) - 8.f);  // sums of products are exact
  for (uint32_t& x : reals) x = as_bits(random() / 8388608.f - 1.f);
  for (int i = 0; i < 1024; i++) exponents[i] = as_bits(i < 300 ? i - 160.f : random() / 65536.f - 200.f);
  const float special[] = {0.f,         -0.f,        INFINITY, -INFINITY, NAN,     1.00048828125f, 1.00146484375f,
                           1.00390625f, 1.01171875f, 65504.f,  65519.9f,  65520.f, 3.3895e38f,     3.4e38f,
                           6e-8f,       2.98e-8f,    2.99e-8f, 1e-40f,    -1e-40f, 5.9e-39f};
  for (int i = 0; i < 1024; i++) edges[i] = i < 20 ? as_bits(special[i]) : random() << 8 ^ random();
  for (uint32_t& x : edges)
    if ((x & 0x7fffffff) > 0x7f800000) x = 0x7fc00000;  // one NaN

  run("ldmatrix_x4", "bits", probe_ldmatrix<false>, raw, 4 * kThreads);
  run("ldmatrix_x4_trans", "bits", probe_ldmatrix<true>, raw, 4 * kThreads);
  run("mma_half_integers", "bits", probe_mma<half>, integers, 4 * kThreads);
  run("mma_bf16_integers", "bits", probe_mma<bf16>, integers, 4 * kThreads);
  run("mma_half_reals", "close", probe_mma<half>, reals, 4 * kThreads);
  run("mma_bf16_reals", "close", probe_mma<bf16>, reals, 4 * kThreads);
  run("cp_async", "bits", probe_cp_async, raw, 8 * kThreads);
  run("exchange", "bits", probe_exchange, raw, 14 * kThreads);
  run("memory_128", "bits", probe_memory, raw, 4 * kThreads);
  run("atomic_add", "bits", probe_atomic, raw, 2 * kThreads + 8);
  if (has_clusters(probe_cluster, kSharedBytes))
    run("cluster", "bits", probe_cluster, raw, 4 * 6 * kThreads, 4);
  else
    std::printf("cluster absent\n");
  run("exp2_approx", "close", probe_exp2, exponents, 1024);
  run("round_half", "bits", probe_round<half>, edges, 2048);
  run("round_bf16", "bits", probe_round<bf16>, edges, 2048);
  run("widen_half", "bits", probe_widen<half>, raw, 65536);
  run("widen_bf16", "bits", probe_widen<bf16>, raw, 65536);
}
