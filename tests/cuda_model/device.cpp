// The executor of the host model: fibers on one OS thread, and the exchanges between the lanes of a warp.
//
// Scheduling is warp-greedy, the most skewed legal order: a warp runs as far as it can before the next one starts. Seed
// 0 takes blocks (or clusters), warps and lanes in ascending order, 1 descending, 2 blocks and warps in random order, 3
// and above also leave a warp at random collectives. (Lock-step order hides a missing barrier.) Under ThreadSanitizer
// each CUDA thread is a fiber it knows, switches order nothing, and barriers are its acquire and release; this file
// itself is compiled without it.
#include "device.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#ifdef MODEL_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace llmfast::cuda::model {

int fault = 0;

namespace {

constexpr int kStack = 256 << 10;
constexpr size_t kEnded = 1024;  // threads that ended and keep their number under ThreadSanitizer: 8 blocks of 128

#ifdef __x86_64__
// Saves the callee-saved registers and the stack pointer, and takes those of another context: no system call, unlike
// swapcontext.
extern "C" void llmfast_model_switch(void** from, void* to);
asm(R"(
.text
.globl llmfast_model_switch
.hidden llmfast_model_switch
.type llmfast_model_switch, @function
llmfast_model_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
struct Context {
  void* sp;
  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack) - 1;  // entry sees a stack aligned as after a call
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    sp = top - 6;
  }
  static void swap(Context& from, Context& to) { llmfast_model_switch(&from.sp, to.sp); }
};
#else
struct Context {
  ucontext_t u;
  void start(char* stack, void (*entry)()) {
    getcontext(&u);
    u.uc_stack.ss_sp = stack, u.uc_stack.ss_size = kStack, u.uc_link = nullptr;
    makecontext(&u, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
};
#endif

enum Wait { kRuns, kWarp, kBlock, kCluster, kDone };

struct Copy {
  char* to;
  uint32_t bytes[4];
};

struct Block;

struct Lane {
  Block* block = nullptr;
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Wait wait = kDone;
  int index = 0;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // copies.size() when each open group was committed
  const void* mine = nullptr;  // what it brings to the collective it waits in
  const char* what = nullptr;
  void* tsan = nullptr;
  bool fenced = false;            // whether what it did before is ordered before its atomic accesses
  std::vector<int*> observed;     // by atomic accesses: ordered before what follows its next fence
  int64_t phase = 0, waited = 0;  // of the cluster's barrier: the opening it arrived for, and waited for
};

struct Warp {
  int arrived = 0;
};

struct Block {
  int64_t index;
  int rank;
  char* shared;
  int shared_bytes;
  std::vector<Warp> warps;
  int left;  // threads that have not ended
};

struct Cluster {
  std::vector<Block> blocks;
  int threads;  // of a block
  int arrived = 0;
  int64_t phase = 0;  // of its barrier: how often it has opened
  char token = 0;

  Lane& at(int block, int thread);
};

std::vector<std::unique_ptr<Lane>> lanes;  // of the cluster that runs, block by block
Context scheduler;
void* scheduler_tsan;
Lane* lane;
Cluster* cluster;
const std::function<void()>* body;
std::string error;
unsigned seed = 0;
std::mt19937 draw;
char launch_token;

Lane& Cluster::at(int block, int thread) { return *lanes[block * threads + thread]; }

void switch_to(Context& from, Context& to, [[maybe_unused]] void* tsan) {
#ifdef MODEL_TSAN
  __tsan_switch_to_fiber(tsan, __tsan_switch_to_fiber_no_sync);
#endif
  Context::swap(from, to);
}

void leave(Wait wait) {
  lane->wait = wait;
  switch_to(lane->context, scheduler, scheduler_tsan);
}

void entry() {
  (*body)();
  if (!lane->copies.empty()) fail("cp.async never waited for");
  if (lane->phase != lane->waited) fail("cluster_arrive never waited for");
#ifdef MODEL_TSAN
  __tsan_release(&launch_token);
#endif
  leave(kDone);
}

// All 32 lanes meet; the last to come runs `serve` for all of them.
void meet(const void* mine, const char* what, const std::function<void(const void* const*)>& serve) {
  const int w = lane->index / 32, rank = lane->block->rank;
  lane->mine = mine, lane->what = what;
  if (++lane->block->warps[w].arrived < 32) return leave(kWarp);
  const void* all[32];
  for (int i = 0; i < 32; i++) {
    const Lane& other = cluster->at(rank, w * 32 + i);
    if (other.what != what && std::strcmp(other.what, what))
      fail("warp %d diverges: lane %d is at %s, lane %d at %s", w, i, other.what, lane->index % 32, what);
    all[i] = other.mine;
  }
  serve(all);
  lane->block->warps[w].arrived = 0;
  for (int i = 0; i < 32; i++) cluster->at(rank, w * 32 + i).wait = kRuns;
}

void step(Lane& next) {
  lane = &next;
  switch_to(scheduler, next.context, next.tsan);
}

// Opens the barriers that all have come to; whether there was one.
bool open_barriers() {
  bool opened = false;
  for (Block& b : cluster->blocks) {
    int waiting = 0;
    for (int t = 0; t < cluster->threads; t++) waiting += cluster->at(b.rank, t).wait == kBlock;
    for (int t = 0; t < cluster->threads; t++) {
      Lane& l = cluster->at(b.rank, t);
      if (waiting == cluster->threads || (l.wait == kCluster && l.phase <= cluster->phase))
        l.wait = kRuns, opened = true;
    }
  }
  return opened;
}

// Runs the warps of one cluster to their end.
void run_cluster() {
  const int warps = cluster->threads / 32, blocks = static_cast<int>(cluster->blocks.size());
  std::vector<int> order(blocks * warps);
  for (size_t i = 0; i < order.size(); i++) order[i] = seed == 1 ? order.size() - 1 - i : i;
  for (int left = blocks * cluster->threads; left;) {
    bool progress = false;
    if (seed > 1) std::shuffle(order.begin(), order.end(), draw);
    for (int w : order)
      for (bool more = true; more;) {
        more = false;
        for (int j = 0; j < 32; j++) {
          Lane& l = cluster->at(w / warps, w % warps * 32 + (seed == 1 ? 31 - j : j));
          if (l.wait != kRuns) continue;
          step(l);
          if (!error.empty()) return;
          if (l.wait == kDone) left--, l.block->left--;
          more = progress = true;
        }
        if (seed > 2 && draw() % 8 == 0) break;
      }
    if (open_barriers() || progress || !left) continue;
    int waiting = 0;
    for (size_t i = 0; i < order.size() * 32; i++) waiting += lanes[i]->wait == kBlock || lanes[i]->wait == kCluster;
    error = "DEADLOCK: of " + std::to_string(order.size() * 32) + " threads " + std::to_string(waiting) +
            " wait at a barrier, " + std::to_string(order.size() * 32 - left) + " have ended";
    return;
  }
}

}  // namespace

int thread_index() { return lane->index; }
int64_t block_index() { return lane->block->index; }
char* shared_memory() { return lane->block->shared; }
int shared_bytes() { return lane->block->shared_bytes; }
int cluster_size() { return static_cast<int>(cluster->blocks.size()); }
int cluster_rank() { return lane->block->rank; }

void fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  error =
      std::string(text) + " (block " + std::to_string(block_index()) + ", thread " + std::to_string(lane->index) + ")";
  leave(kDone);
  abort();
}

const char* launch(int64_t blocks, int threads, int bytes, int size, const std::function<void()>& kernel) {
  if (threads % 32 || threads > 1024 || bytes > 232448)
    return "a block has at most 1024 threads and 227 KiB of shared memory";
  if (size < 1 || size > 8 || blocks % size) return "a cluster has at most 8 blocks, and a grid whole clusters";
  error.clear();
  body = &kernel;
  draw.seed(seed);
  while (static_cast<int>(lanes.size()) < threads * size) lanes.emplace_back(new Lane);
  std::vector<char*> used;
  std::vector<std::unique_ptr<Cluster>> clusters;
#ifdef MODEL_TSAN
  scheduler_tsan = __tsan_get_current_fiber();
  std::vector<void*> ended;
#endif
  std::vector<int64_t> order(blocks / size);
  for (size_t i = 0; i < order.size(); i++) order[i] = seed == 1 ? order.size() - 1 - i : i;
  if (seed > 1) std::shuffle(order.begin(), order.end(), draw);
  for (size_t i = 0; i < order.size() && error.empty(); i++) {
    clusters.emplace_back(new Cluster{{}, threads});
    cluster = clusters.back().get();
    for (int rank = 0; rank < size; rank++) {
      void* shared = nullptr;
      if (posix_memalign(&shared, 1024, std::max(bytes, 1))) return "out of memory";
      std::memset(shared, 0xff, bytes);
      used.push_back(static_cast<char*>(shared));
      const int64_t index = order[i] * size + rank;
      cluster->blocks.push_back({index, rank, used.back(), bytes, std::vector<Warp>(threads / 32), threads});
    }
    for (int t = 0; t < threads * size; t++) {
#ifdef MODEL_TSAN  // a new one, the old one's memory freed unseen: what it hands on would order the blocks
      AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
      lanes[t].reset(new Lane);
      AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
      Lane& l = *lanes[t];
      l.block = &cluster->blocks[t / threads];
      l.wait = kRuns, l.index = t % threads, l.phase = l.waited = 0;
      l.copies.clear(), l.groups.clear();
      l.fenced = false, l.observed.clear();
      l.context.start(l.stack.get(), entry);
#ifdef MODEL_TSAN
      l.tsan = __tsan_create_fiber(0);
      ended.push_back(l.tsan);
#endif
    }
    run_cluster();
#ifdef MODEL_TSAN  // not at once: a new thread with the number of an ended one passes for it
    if (ended.size() >= kEnded || i == order.size() - 1 || !error.empty()) {
      for (void* fiber : ended) __tsan_destroy_fiber(fiber);
      ended.clear();
    }
#else
    for (char* shared : used) free(shared);
    used.clear(), clusters.clear();
#endif
  }
#ifdef MODEL_TSAN  // only now: blocks are not ordered among each other
  __tsan_acquire(&launch_token);
#endif
  for (char* shared : used) free(shared);
  if (!error.empty()) lanes.clear();  // the stacks of threads that never ended
  return error.empty() ? nullptr : error.c_str();
}

void block_barrier() {
#ifdef MODEL_TSAN
  __tsan_release(lane->block->shared);
#endif
  leave(kBlock);
#ifdef MODEL_TSAN
  __tsan_acquire(lane->block->shared);
#endif
}

void cluster_arrive() {
  if (lane->phase != lane->waited) fail("cluster_arrive twice without cluster_wait");
#ifdef MODEL_TSAN
  __tsan_release(&cluster->token);
#endif
  lane->phase = cluster->phase + 1;
  if (++cluster->arrived == static_cast<int>(cluster->blocks.size()) * cluster->threads)
    cluster->arrived = 0, cluster->phase++;
}

void cluster_wait() {
  if (lane->phase == lane->waited) fail("cluster_wait without cluster_arrive");
  lane->waited = lane->phase;
  leave(kCluster);
#ifdef MODEL_TSAN
  __tsan_acquire(&cluster->token);
#endif
}

const char* remote(const void* p, int rank) {
  if (rank < 0 || rank >= cluster_size()) fail("load_remote: block %d of %d", rank, cluster_size());
  const Block& other = cluster->blocks[rank];
  if (other.left == 0) fail("load_remote: block %d of the cluster has ended", rank);
  return other.shared + (static_cast<const char*>(p) - lane->block->shared);
}

void warp_barrier() {
  [[maybe_unused]] Warp* token = &lane->block->warps[lane->index / 32];
#ifdef MODEL_TSAN
  __tsan_release(token);
#endif
  meet(nullptr, "warp_barrier", [](const void* const*) {});
#ifdef MODEL_TSAN
  __tsan_acquire(token);
#endif
}

uint32_t exchange(uint32_t mine, const char* what, const std::function<uint32_t(const uint32_t (&)[32], int)>& result) {
  uint32_t all[32];
  uint32_t* const brought[2] = {&mine, all};
  meet(brought, what, [](const void* const* lanes) {
    for (int to = 0; to < 32; to++)
      for (int from = 0; from < 32; from++)
        static_cast<uint32_t* const*>(lanes[to])[1][from] = *static_cast<uint32_t* const*>(lanes[from])[0];
  });
  return result(all, lane->index % 32);
}

void gather(uint32_t mine, uint32_t (&all)[32]) {
  uint32_t* const brought[2] = {&mine, all};
  meet(brought, "ldmatrix", [](const void* const* lanes) {
    for (int to = 0; to < 32; to++)
      for (int from = 0; from < 32; from++)
        static_cast<uint32_t* const*>(lanes[to])[1][from] = *static_cast<uint32_t* const*>(lanes[from])[0];
  });
}

void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_half) {
  struct Mine {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
    bool is_half;
  } mine{c, a, {b0, b1}, is_half};
  meet(&mine, "mma", [](const void* const* lanes) {
    double A[16][16], B[16][8], C[16][8];  // the products of one mma are exact and are added before one rounding
    for (int l = 0; l < 32; l++) {
      const Mine& m = *static_cast<const Mine*>(lanes[l]);
      const auto wide = m.is_half ? half_to_float : bf16_to_float;
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; r++)
        for (int j = 0; j < 2; j++) {
          A[g + r % 2 * 8][2 * t + j + r / 2 * 8] = wide(m.a[r] >> 16 * j);
          if (r < 2) B[2 * t + j + r * 8][g] = wide(m.b[r] >> 16 * j);
          if (r % 2 == 0) C[g + r / 2 * 8][2 * t + j] = m.c[r + j];
        }
    }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++)
        for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < 32; l++)
      for (int r = 0; r < 4; r++) static_cast<const Mine*>(lanes[l])->c[r] = C[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
  });
}

void fence() {
  lane->fenced = true;
#ifdef MODEL_TSAN
  for (int* p : lane->observed) __tsan_acquire(p);
#endif
}

void observe([[maybe_unused]] int* p, [[maybe_unused]] bool before) {
#ifdef MODEL_TSAN
  if (before && lane->fenced) __tsan_release(p);
  if (!before) lane->observed.push_back(p);
#endif
}

void cp_async_issue(char* to, const uint32_t (&bytes)[4]) {
  lane->copies.push_back({to, {bytes[0], bytes[1], bytes[2], bytes[3]}});
}

void cp_async_commit() { lane->groups.push_back(lane->copies.size()); }

void cp_async_deliver(int pending, void (*store)(char* to, const uint32_t (&bytes)[4])) {
  Lane& l = *lane;
  const int done = static_cast<int>(l.groups.size()) - pending;
  if (done <= 0) return;
  const size_t landed = l.groups[done - 1];
  for (size_t i = 0; i < landed; i++) store(l.copies[i].to, l.copies[i].bytes);
  l.copies.erase(l.copies.begin(), l.copies.begin() + landed);
  l.groups.erase(l.groups.begin(), l.groups.begin() + done);
  for (size_t& g : l.groups) g -= landed;
}

}  // namespace llmfast::cuda::model

extern "C" __attribute__((visibility("default"))) void llmfast_model(unsigned seed, int fault) {
  llmfast::cuda::model::seed = seed, llmfast::cuda::model::fault = fault;
}
