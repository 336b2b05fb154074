// The part of libgomp that g++ calls for csrc/cpu, on plain pthreads, so that ThreadSanitizer sees every
// synchronisation: the real library waits on futexes, which it can't follow. Iterations are handed out by relaxed
// atomics, because an ordering that OpenMP doesn't promise would hide races.
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kShares = 4096;  // loops and single blocks in one parallel region

struct Team {
  int size;
  pthread_barrier_t barrier;
  std::atomic<long> next[kShares];
};

struct Share {
  long start, count, step, chunk;
};

thread_local Team* team = nullptr;
thread_local int thread = 0, shares = 0;
thread_local Share share;

std::atomic<long>& next_of(int i) {
  if (i >= kShares) abort();
  return team->next[i];
}

struct Start {
  Team* team;
  int thread;
  void (*fn)(void*);
  void* data;
  Share first;  // the loop of a combined parallel for
};

void* run(void* p) {
  const Start& s = *static_cast<Start*>(p);
  team = s.team, thread = s.thread, share = s.first, shares = s.first.chunk ? 1 : 0;
  s.fn(s.data);
  return nullptr;
}

int threads_wanted() {
  const char* n = getenv("OMP_NUM_THREADS");
  return n ? atoi(n) : 4;
}

void parallel(void (*fn)(void*), void* data, unsigned threads, Share first) {
  Team* const outer = team;
  const int outer_thread = thread, outer_shares = shares;
  const Share outer_share = share;
  Team* const inner = new Team();
  inner->size = outer ? 1 : threads ? static_cast<int>(threads) : threads_wanted();
  pthread_barrier_init(&inner->barrier, nullptr, inner->size);
  std::vector<Start> starts;
  for (int i = 0; i < inner->size; i++) starts.push_back({inner, i, fn, data, first});
  std::vector<pthread_t> others(inner->size - 1);
  for (int i = 1; i < inner->size; i++)
    if (pthread_create(&others[i - 1], nullptr, run, &starts[i])) abort();
  run(&starts[0]);
  for (pthread_t t : others) pthread_join(t, nullptr);
  pthread_barrier_destroy(&inner->barrier);
  delete inner;
  team = outer, thread = outer_thread, shares = outer_shares, share = outer_share;
}

Share make_share(long start, long end, long step, long chunk) {
  const long count = step > 0 ? (end - start + step - 1) / step : (start - end - step - 1) / -step;
  return {start, count > 0 ? count : 0, step, chunk};
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned) { parallel(fn, data, threads, Share{}); }

void GOMP_parallel_loop_nonmonotonic_dynamic(void (*fn)(void*), void* data, unsigned threads, long start, long end,
                                             long step, long chunk, unsigned) {
  parallel(fn, data, threads, make_share(start, end, step, chunk));
}

void GOMP_barrier() {
  if (team) pthread_barrier_wait(&team->barrier);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* start, long* end) {
  const long at = next_of(shares - 1).fetch_add(share.chunk, std::memory_order_relaxed);
  if (at >= share.count) return false;
  const long to = at + share.chunk < share.count ? at + share.chunk : share.count;
  *start = share.start + at * share.step, *end = share.start + to * share.step;
  return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* from, long* to) {
  share = make_share(start, end, step, chunk);
  shares++;
  return GOMP_loop_nonmonotonic_dynamic_next(from, to);
}

void GOMP_loop_end_nowait() {}
void GOMP_loop_end() { GOMP_barrier(); }

bool GOMP_single_start() { return !team || next_of(shares++).fetch_add(1, std::memory_order_relaxed) == 0; }

int omp_get_thread_num() { return thread; }
int omp_get_num_threads() { return team ? team->size : 1; }
int omp_get_max_threads() { return team ? 1 : threads_wanted(); }
int omp_in_parallel() { return team && team->size > 1; }

}  // extern "C"
