// The executor of the host model: fibers on one OS thread, and the exchanges between the lanes of a warp.
//
// Scheduling is warp-greedy, the most skewed legal order: a warp runs as far as it can before the next one starts. Seed
// 0 takes blocks, warps and lanes in ascending order, 1 descending, 2 blocks and warps in random order, 3 and above
// also leave a warp at random collectives. (Lock-step order hides a missing barrier.) Under ThreadSanitizer each CUDA
// thread is a fiber it knows, switches order nothing, and barriers are its acquire and release; this file itself is
// compiled without it.
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

enum Wait { kRuns, kWarp, kBlock, kDone };

struct Copy {
  char* to;
  uint32_t bytes[4];
};

struct Lane {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Wait wait = kDone;
  int index = 0;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // copies.size() when each open group was committed
  const void* mine = nullptr;  // what it brings to the collective it waits in
  const char* what = nullptr;
  void* tsan = nullptr;
  bool fenced = false;         // whether what it did before is ordered before its atomic accesses
  std::vector<int*> observed;  // by atomic accesses: ordered before what follows its next fence
};

struct Warp {
  int arrived = 0;
};

struct Block {
  int64_t index;
  char* shared;
  int shared_bytes;
  std::vector<Warp> warps;
};

std::vector<std::unique_ptr<Lane>> lanes;
Context scheduler;
void* scheduler_tsan;
Lane* lane;
Block* block;
const std::function<void()>* body;
std::string error;
unsigned seed = 0;
std::mt19937 draw;
char launch_token;

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
#ifdef MODEL_TSAN
  __tsan_release(&launch_token);
#endif
  leave(kDone);
}

// All 32 lanes meet; the last to come runs `serve` for all of them.
void meet(const void* mine, const char* what, const std::function<void(const void* const*)>& serve) {
  const int w = lane->index / 32;
  lane->mine = mine, lane->what = what;
  if (++block->warps[w].arrived < 32) return leave(kWarp);
  const void* all[32];
  for (int i = 0; i < 32; i++) {
    const Lane& other = *lanes[w * 32 + i];
    if (other.what != what && std::strcmp(other.what, what))
      fail("warp %d diverges: lane %d is at %s, lane %d at %s", w, i, other.what, lane->index % 32, what);
    all[i] = other.mine;
  }
  serve(all);
  block->warps[w].arrived = 0;
  for (int i = 0; i < 32; i++) lanes[w * 32 + i]->wait = kRuns;
}

void step(Lane& next) {
  lane = &next;
  switch_to(scheduler, next.context, next.tsan);
}

// Runs the warps of one block to their end.
void run_block(int threads) {
  std::vector<int> order(threads / 32);
  for (size_t i = 0; i < order.size(); i++) order[i] = seed == 1 ? order.size() - 1 - i : i;
  for (int left = threads; left;) {
    bool progress = false;
    if (seed > 1) std::shuffle(order.begin(), order.end(), draw);
    for (int w : order)
      for (bool more = true; more;) {
        more = false;
        for (int j = 0; j < 32; j++) {
          Lane& l = *lanes[w * 32 + (seed == 1 ? 31 - j : j)];
          if (l.wait != kRuns) continue;
          step(l);
          if (!error.empty()) return;
          left -= l.wait == kDone;
          more = progress = true;
        }
        if (seed > 2 && draw() % 8 == 0) break;
      }
    int waiting = 0;
    for (int i = 0; i < threads; i++) waiting += lanes[i]->wait == kBlock;
    if (left && waiting == threads) {
      for (int i = 0; i < threads; i++) lanes[i]->wait = kRuns;
    } else if (left && !progress) {
      error = "DEADLOCK: of " + std::to_string(threads) + " threads " + std::to_string(waiting) +
              " wait at a block barrier, " + std::to_string(threads - left) + " have ended";
      return;
    }
  }
}

}  // namespace

int thread_index() { return lane->index; }
int64_t block_index() { return block->index; }
char* shared_memory() { return block->shared; }
int shared_bytes() { return block->shared_bytes; }

void fail(const char* format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  error =
      std::string(text) + " (block " + std::to_string(block->index) + ", thread " + std::to_string(lane->index) + ")";
  leave(kDone);
  abort();
}

const char* launch(int64_t blocks, int threads, int bytes, const std::function<void()>& kernel) {
  if (threads % 32 || threads > 1024 || bytes > 232448)
    return "a block has at most 1024 threads and 227 KiB of shared memory";
  error.clear();
  body = &kernel;
  draw.seed(seed);
  while (static_cast<int>(lanes.size()) < threads) lanes.emplace_back(new Lane);
  std::vector<char*> used;
#ifdef MODEL_TSAN
  scheduler_tsan = __tsan_get_current_fiber();
  std::vector<void*> ended;
#endif
  std::vector<int64_t> order(blocks);
  for (int64_t i = 0; i < blocks; i++) order[i] = seed == 1 ? blocks - 1 - i : i;
  if (seed > 1) std::shuffle(order.begin(), order.end(), draw);
  for (int64_t i = 0; i < blocks && error.empty(); i++) {
    void* shared = nullptr;
    if (posix_memalign(&shared, 1024, std::max(bytes, 1))) return "out of memory";
    std::memset(shared, 0xff, bytes);
    used.push_back(static_cast<char*>(shared));
    Block b{order[i], used.back(), bytes, std::vector<Warp>(threads / 32)};
    block = &b;
    for (int t = 0; t < threads; t++) {
#ifdef MODEL_TSAN  // a new one, the old one's memory freed unseen: what it hands on would order the blocks
      AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
      lanes[t].reset(new Lane);
      AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#endif
      Lane& l = *lanes[t];
      l.wait = kRuns, l.index = t;
      l.copies.clear(), l.groups.clear();
      l.fenced = false, l.observed.clear();
      l.context.start(l.stack.get(), entry);
#ifdef MODEL_TSAN
      l.tsan = __tsan_create_fiber(0);
      ended.push_back(l.tsan);
#endif
    }
    run_block(threads);
#ifdef MODEL_TSAN  // not at once: a new thread with the number of an ended one passes for it
    if (ended.size() >= kEnded || i == blocks - 1 || !error.empty()) {
      for (void* fiber : ended) __tsan_destroy_fiber(fiber);
      ended.clear();
    }
#else
    free(used.back());
    used.pop_back();
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
  __tsan_release(block->shared);
#endif
  leave(kBlock);
#ifdef MODEL_TSAN
  __tsan_acquire(block->shared);
#endif
}

void warp_barrier() {
  [[maybe_unused]] Warp* token = &block->warps[lane->index / 32];
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
