// Random problems through the launchers on the host model, against a float64 loop: fuzz
// attention|backward|decode|softmax|cross_entropy FIRST COUNT [SEED [FAULT [SMALL]]]
//
// Problem i depends on i and SMALL alone, so one can be run again by its number. Tensors have their exact size on the
// heap, so that AddressSanitizer sees a step outside. Prints a line for each wrong result, up to the first where a
// fault is planted, and "N wrong of COUNT"; exit status 1 if there are any.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda/launch.h"
#include "cuda/views.cuh"

using namespace llmfast;
extern "C" void llmfast_model(unsigned seed, int fault);

namespace {

std::mt19937 rng;
int draw(int from, int to) { return from + static_cast<int>(rng() % (to - from + 1)); }
bool maybe(int one_in) { return draw(1, one_in) == 1; }
double normal() {
  double x = -6;
  for (int i = 0; i < 12; i++) x += rng() / 4294967296.0;
  return x;
}

double get(const Tensor& t, int64_t i) {
  switch (t.dtype) {
    case Dtype::kFloat32:
      return reinterpret_cast<float*>(t.data)[i];
    case Dtype::kBFloat16:
      return cuda::to_float(reinterpret_cast<cuda::bf16*>(t.data)[i]);
    case Dtype::kFloat16:
      return cuda::to_float(reinterpret_cast<cuda::half*>(t.data)[i]);
    case Dtype::kBool:
      return reinterpret_cast<bool*>(t.data)[i];
    case Dtype::kInt64:
      return reinterpret_cast<int64_t*>(t.data)[i];
    default:
      return reinterpret_cast<int*>(t.data)[i];
  }
}
void set(const Tensor& t, int64_t i, double x) {
  switch (t.dtype) {
    case Dtype::kFloat32:
      reinterpret_cast<float*>(t.data)[i] = x;
      break;
    case Dtype::kBFloat16:
      reinterpret_cast<cuda::bf16*>(t.data)[i] = cuda::from_float<cuda::bf16>(x);
      break;
    case Dtype::kFloat16:
      reinterpret_cast<cuda::half*>(t.data)[i] = cuda::from_float<cuda::half>(x);
      break;
    case Dtype::kBool:
      reinterpret_cast<bool*>(t.data)[i] = x > 0;
      break;
    case Dtype::kInt64:
      reinterpret_cast<int64_t*>(t.data)[i] = x;
      break;
    default:
      reinterpret_cast<int*>(t.data)[i] = x;
  }
}
int bytes(Dtype d) {
  return d == Dtype::kBool ? 1 : d == Dtype::kInt64 ? 8 : d == Dtype::kFloat32 || d == Dtype::kInt32 ? 4 : 2;
}
double at(const Tensor& t, int64_t a, int64_t b, int64_t c, int64_t d) {
  return get(t, a * t.stride[0] + b * t.stride[1] + c * t.stride[2] + d * t.stride[3]);
}

struct Heap {
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks;

  // A tensor of these sizes, heads and rows swapped in memory where asked, rows padded to `pad` elements; every element
  // from fill().
  template <class F>
  Tensor make(Dtype dtype, std::vector<int64_t> size, F fill, bool swap = false, int pad = 1) {
    Tensor t;
    t.dtype = dtype, t.dim = static_cast<int>(size.size());
    std::vector<int> order(t.dim);
    for (int i = 0; i < t.dim; i++) order[i] = i;
    if (swap) std::swap(order[1], order[2]);
    int64_t elements = 1, row = 0;
    for (int n = t.dim - 1; n >= 0; n--) {
      const int i = order[n];
      t.size[i] = size[i], t.stride[i] = size[i] == 1 ? 0 : elements;
      elements *= n == t.dim - 1 ? (size[i] + pad - 1) / pad * pad : size[i];
      if (n == t.dim - 1) row = elements;
    }
    // the last row ends at its last element, not at its padding
    const int64_t used = elements ? elements - row + t.size[t.dim - 1] : 0;
    void* p = nullptr;
    if (posix_memalign(&p, 16, used * bytes(dtype) + (used == 0))) abort();
    blocks.emplace_back(p, free);
    t.data = static_cast<char*>(p);
    for (int64_t i = 0; i < used; i++) set(t, i, fill());
    return t;
  }
};

const double kNan = NAN, kInfinity = INFINITY;

bool wrong(double got, double want, double allowed) {
  if (std::isnan(got) || std::isinf(want)) return !(got == want);
  return std::fabs(got - want) > allowed;
}

// One row of attention in float64: scores, the derivative of the softcap, o and lse.
struct Row {
  std::vector<double> x, derivative, o;
  double lse;
};

// Whether query i of nq of sequence b and head h, which lies at (batch, h, n), has the o and lse of float64 over nk
// keys; key(j, d) and value(j, d) are theirs.
template <class Key, class Value>
bool agrees(const char* what, int number, const AttentionForward& p, int b, int h, int i, int nq, int nk, int batch,
            int n, Key key, Value value, Row& row) {
  const int D = p.q.size[3], Dv = p.v.size[3];
  const Tensor &slopes = p.extras.alibi_slopes, &sinks = p.extras.sinks;
  row = {std::vector<double>(nk), std::vector<double>(nk, 1.0), std::vector<double>(Dv), 0};
  std::vector<double> q;
  for (int d = 0; d < D; d++) q.push_back(at(p.q, batch, h, n, d));
  const double sink = sinks ? get(sinks, h * sinks.stride[0]) : -kInfinity;
  double m = sink, l = 0, largest = 0;
  for (int j = 0; j < nk; j++) {
    double y = 0;
    for (int d = 0; d < D; d++) y += q[d] * key(j, d);
    y *= p.spec.scale;
    if (p.spec.softcap) {
      const double t = std::tanh(y / p.spec.softcap);
      y = p.spec.softcap * t, row.derivative[j] = 1 - t * t;
    }
    const int distance = j - i - (nk - nq);
    if (slopes) y -= (slopes.dim == 2 ? at(slopes, b, h, 0, 0) : at(slopes, h, 0, 0, 0)) * std::abs(distance);
    if (p.extras.bias) y += at(cuda::four_dimensional(p.extras.bias), b, h, i, j);
    if (p.extras.mask && !at(p.extras.mask, b, h, i, j)) y = -kInfinity;
    if (distance < -p.spec.left || distance > p.spec.right) y = -kInfinity;
    row.x[j] = y, m = std::fmax(m, y);
  }
  for (int j = 0; j < nk; j++) {
    const double e = m == -kInfinity ? 0 : std::exp(row.x[j] - m);
    l += e;
    for (int d = 0; d < Dv; d++) row.o[d] += e * value(j, d);
  }
  if (m != -kInfinity) l += std::exp(sink - m);
  for (double& o : row.o) largest = std::fmax(largest, std::fabs(o = l == 0 ? 0 : o / l));
  const double eps = p.q.dtype == Dtype::kBFloat16 ? 0x1p-8 : 0x1p-11;
  for (int d = 0; d < Dv; d++)  // p and o are each rounded once to the dtype
    if (const double got = at(p.o, batch, h, n, d); wrong(got, row.o[d], 4 * eps * (largest + 1))) {
      std::printf("%s %d: o[%d][%d][%d][%d] is %g, not %g\n", what, number, b, h, i, d, got, row.o[d]);
      return false;
    }
  row.lse = l == 0 ? -kInfinity : m + std::log(l);
  const double got = p.lse ? at(p.lse, batch, h, n, 0) : row.lse;
  if (!wrong(got, row.lse, 1e-5 * (1 + std::fabs(row.lse)))) return true;
  std::printf("%s %d: lse[%d][%d][%d] is %g, not %g\n", what, number, b, h, i, got, row.lse);
  return false;
}

int attention(int number, bool small, bool backward) {
  Heap heap;
  const Dtype dtype = maybe(2) ? Dtype::kBFloat16 : Dtype::kFloat16;
  const int dims[] = {64, 64, 128, 32, 16, 40, 59, 80, 96, 111, 160, 256};
  const int packed = !small && maybe(4), H = draw(1, 4), Hk = H % 2 == 0 && maybe(2) ? H / 2 : maybe(4) ? 1 : H;
  const int D = dims[draw(0, small ? 1 : 11)], Dv = maybe(5) ? dims[draw(0, small ? 1 : 11)] : D, B = draw(1, 2);
  const int Nq = maybe(6) ? 1 : draw(1, small ? 140 : 180), Nk = maybe(12) ? 0 : draw(1, small ? 140 : 200);
  AttentionForward p{};
  const auto tensor = [&](int heads, int n, int d) {
    return heap.make(dtype, {packed ? 1 : B, heads, n, d}, [] { return 1.4 * normal(); }, maybe(2), 8);
  };
  p.q = tensor(H, Nq, D), p.k = tensor(Hk, Nk, D), p.v = tensor(Hk, Nk, Dv);
  p.o = heap.make(dtype, {packed ? 1 : B, H, Nq, Dv}, [] { return kNan; }, maybe(2));
  if (!maybe(4) || backward) p.lse = heap.make(Dtype::kFloat32, {packed ? 1 : B, H, Nq}, [] { return kNan; });
  const int open = 1 << 30, kind = draw(0, 4);
  p.spec = {1 / std::sqrt(static_cast<double>(D)), open, open, 0, 0};
  if (kind == 1) p.spec.right = 0;
  if (kind == 2) p.spec.right = Nq - Nk;
  if (kind == 3) p.spec.left = draw(0, 90), p.spec.right = draw(0, 40);
  if (kind == 4) p.spec.left = draw(-20, 70), p.spec.right = draw(-20, 30);
  if (maybe(8)) p.spec.scale *= draw(-1, 1);
  if (maybe(6)) p.spec.softcap = 3;
  if (maybe(6)) p.extras.alibi_slopes = heap.make(Dtype::kFloat32, {H}, [] { return 0.3 * std::fabs(normal()); });
  if (maybe(4)) p.extras.sinks = heap.make(Dtype::kFloat32, {H}, normal);
  if (!packed && maybe(6))
    p.extras.mask = heap.make(Dtype::kBool, {maybe(2) ? B : 1, 1, Nq, Nk}, [] { return draw(-1, 2); });
  if (!packed && maybe(6)) p.extras.bias = heap.make(maybe(2) ? dtype : Dtype::kFloat32, {H, Nq, Nk}, normal);
  std::vector<int> starts[2] = {{0, Nq}, {0, Nk}};
  if (packed)
    for (int side = 0; side < 2; side++) {
      const int n = side ? Nk : Nq;
      std::vector<int>& cu = starts[side] = {0, draw(0, n), draw(0, n), n};
      if (cu[1] > cu[2]) std::swap(cu[1], cu[2]);
      int next = 0;
      (side ? p.extras.cu_seqlens_k : p.extras.cu_seqlens_q) =
          heap.make(Dtype::kInt32, {4}, [&] { return cu[next++]; });
    }
  if (const char* error = cuda::attention_forward(p, nullptr)) {
    std::printf("attention %d: %s\n", number, error);
    return 1;
  }
  const double eps = dtype == Dtype::kBFloat16 ? 0x1p-8 : 0x1p-11;
  const Tensor dout = tensor(H, Nq, Dv);
  const Tensor delta = heap.make(Dtype::kFloat32, {packed ? 1 : B, H, Nq}, [] { return kNan; });
  // Gradients, and what their terms add up to in absolute value.
  std::vector<double> dq((packed ? 1 : B) * H * Nq * D), dk((packed ? 1 : B) * Hk * Nk * D),
      dv((packed ? 1 : B) * Hk * Nk * Dv), dq_size(dq), dk_size(dk), dv_size(dv);
  for (int b = 0; b < (packed ? 3 : B); b++)
    for (int h = 0; h < H; h++) {
      const int s = packed ? b : 0, q0 = starts[0][s], k0 = starts[1][s], nq = starts[0][s + 1] - q0,
                nk = starts[1][s + 1] - k0;
      const int row = packed ? 0 : b, hk = h / (H / Hk);
      for (int i = 0; i < nq; i++) {
        const auto key = [&](int j, int d) { return at(p.k, row, hk, k0 + j, d); };
        const auto value = [&](int j, int d) { return at(p.v, row, hk, k0 + j, d); };
        Row r;
        if (!agrees("attention", number, p, b, h, i, nq, nk, row, q0 + i, key, value, r)) return 1;
        if (!backward) continue;
        double sum = 0;
        for (int d = 0; d < Dv; d++) sum += r.o[d] * at(dout, row, h, q0 + i, d);
        set(delta, row * delta.stride[0] + h * delta.stride[1] + (q0 + i) * delta.stride[2], sum);
        for (int j = 0; j < nk && r.lse != -kInfinity; j++) {
          const double weight = std::exp(r.x[j] - r.lse);
          double dp = 0;
          for (int d = 0; d < Dv; d++) dp += at(dout, row, h, q0 + i, d) * value(j, d);
          const double ds = weight * (dp - sum) * r.derivative[j] * p.spec.scale,
                       size = weight * (std::fabs(dp) + std::fabs(sum)) * std::fabs(p.spec.scale);
          const int64_t qi = (static_cast<int64_t>(row) * H + h) * Nq + q0 + i,
                        kj = (static_cast<int64_t>(row) * Hk + hk) * Nk + k0 + j;
          for (int d = 0; d < D; d++) {
            const double kd = key(j, d), qd = at(p.q, row, h, q0 + i, d);
            dq[qi * D + d] += ds * kd, dq_size[qi * D + d] += size * std::fabs(kd);
            dk[kj * D + d] += ds * qd, dk_size[kj * D + d] += size * std::fabs(qd);
          }
          for (int d = 0; d < Dv; d++) {
            const double g = weight * at(dout, row, h, q0 + i, d);
            dv[kj * Dv + d] += g, dv_size[kj * Dv + d] += std::fabs(g);
          }
        }
      }
    }
  if (!backward) return 0;
  const Tensor dots = heap.make(Dtype::kFloat32, {packed ? 1 : B, H, Nq}, [] { return kNan; });
  if (const char* error = cuda::attention_rowdot({p.o, dout, dots}, nullptr)) {
    std::printf("rowdot %d: %s\n", number, error);
    return 1;
  }
  for (int b = 0; b < (packed ? 1 : B); b++)
    for (int h = 0; h < H; h++)
      for (int i = 0; i < Nq; i++) {
        double sum = 0, size = 0;
        for (int d = 0; d < Dv; d++) {
          const double term = at(p.o, b, h, i, d) * at(dout, b, h, i, d);
          sum += term, size += std::fabs(term);
        }
        const double got = get(dots, b * dots.stride[0] + h * dots.stride[1] + i * dots.stride[2]);
        if (wrong(got, sum, 1e-5 * size)) {
          std::printf("rowdot %d: delta[%d][%d][%d] is %g, not %g\n", number, b, h, i, got, sum);
          return 1;
        }
      }
  const bool apart = maybe(2);
  const auto gradient = [&](int heads, int n, int d) {
    return heap.make(dtype, {packed ? 1 : B, heads, n, d}, [=] { return packed ? 0 : kNan; }, apart);
  };
  AttentionBackward g{dout, p.q, p.k, p.v, Tensor{}, p.lse, delta, {}, {}, {}, {}, {}, p.spec, p.extras};
  g.dq = gradient(H, Nq, D), g.dk = gradient(Hk, Nk, D), g.dv = gradient(Hk, Nk, Dv);
  if (const char* error = cuda::attention_backward(g, nullptr)) {
    std::printf("backward %d: %s\n", number, error);
    return 1;
  }
  const auto compare = [&](const char* name, const Tensor& got, const std::vector<double>& want,
                           const std::vector<double>& size) {
    int64_t n = 0;
    for (int b = 0; b < got.size[0]; b++)
      for (int h = 0; h < got.size[1]; h++)
        for (int i = 0; i < got.size[2]; i++)
          for (int d = 0; d < got.size[3]; d++, n++)  // p and ds are rounded, and the sum; float16 ends at 6e-8
            if (wrong(at(got, b, h, i, d), want[n], 3 * eps * size[n] + 1e-5)) {
              std::printf("backward %d: %s[%d][%d][%d][%d] is %g, not %g\n", number, name, b, h, i, d,
                          at(got, b, h, i, d), want[n]);
              return 1;
            }
    return 0;
  };
  return compare("dq", g.dq, dq, dq_size) || compare("dk", g.dk, dk, dk_size) || compare("dv", g.dv, dv, dv_size);
}

// Twice on the same counters, the second time in another order of blocks and warps: the same bits.
int decode(int number, bool small, unsigned seed, int fault) {
  Heap heap;
  const Dtype dtype = maybe(2) ? Dtype::kBFloat16 : Dtype::kFloat16;
  const int dims[] = {64, 128, 64, 32, 16, 40, 59, 80, 96, 111, 160, 256};
  const int D = dims[draw(0, small ? 1 : 11)], Dv = maybe(5) ? dims[draw(0, small ? 1 : 11)] : D, B = draw(1, 2);
  const int Hk = draw(1, 2), H = Hk * draw(1, 6), Nq = maybe(2) ? 1 : draw(1, H > 4 ? 4 : 16);
  const bool paged = maybe(2);
  const int page = paged ? draw(1, 40) : maybe(12) ? 0 : draw(1, small ? 600 : 900);
  const int pages = paged ? draw(1, (small ? 600 : 900) / page) : 1, M = page * pages;
  const int P = paged ? draw(1, 2 * pages) : B;
  AttentionForward p{};
  p.q = heap.make(dtype, {B, H, Nq, D}, [] { return 1.4 * normal(); }, maybe(2), 8);
  p.k = heap.make(dtype, {P, Hk, page, D}, [] { return 1.4 * normal(); }, maybe(2), 8);
  p.v = heap.make(dtype, {P, Hk, page, Dv}, [] { return 1.4 * normal(); }, maybe(2), 8);
  p.o = heap.make(dtype, {B, H, Nq, Dv}, [] { return kNan; }, maybe(2));
  if (!maybe(4)) p.lse = heap.make(Dtype::kFloat32, {B, H, Nq}, [] { return kNan; });
  const int open = 1 << 30, kind = draw(0, 3);
  p.spec = {1 / std::sqrt(static_cast<double>(D)), open, kind == 1 ? open : 0, 0, 0};
  if (kind == 2) p.spec.left = draw(0, 400);
  if (kind == 3) p.spec.left = draw(-20, 70), p.spec.right = draw(-20, 30);
  if (maybe(8)) p.spec.scale *= draw(-1, 1);
  if (maybe(6)) p.spec.softcap = 3;
  if (maybe(6)) p.extras.alibi_slopes = heap.make(Dtype::kFloat32, {B, H}, [] { return 0.3 * std::fabs(normal()); });
  if (maybe(4)) p.extras.sinks = heap.make(Dtype::kFloat32, {H}, normal);
  if (maybe(6)) p.extras.mask = heap.make(Dtype::kBool, {maybe(2) ? B : 1, 1, Nq, M}, [] { return draw(-1, 2); });
  if (maybe(6)) p.extras.bias = heap.make(maybe(2) ? dtype : Dtype::kFloat32, {H, Nq, M}, normal);
  if (!maybe(6)) p.extras.seqlens_k = heap.make(Dtype::kInt32, {B}, [=] { return maybe(4) ? M + 30 : draw(-3, M); });
  if (paged)  // here and there a page that is not there: the nearest one is taken
    p.extras.page_table =
        heap.make(Dtype::kInt32, {B, pages}, [=] { return maybe(9) ? draw(-2, P + 2) : draw(0, P - 1); });
  const auto length = [&](int b) {
    const int n = p.extras.seqlens_k ? get(p.extras.seqlens_k, b * p.extras.seqlens_k.stride[0]) : M;
    return std::min(std::max(n, 0), M);
  };
  const auto block = [&](int b, int j) {
    const int n = paged ? at(p.extras.page_table, b, j / page, 0, 0) : b;
    return std::min(std::max(n, 0), P - 1);
  };
  std::vector<bool> counts(P * page);
  for (int b = 0; b < B; b++)
    for (int j = 0; j < length(b); j++) counts[block(b, j) * page + (paged ? j % page : j)] = true;
  for (int i = 0; i < P * page; i++)
    for (int hk = 0; hk < Hk && !counts[i]; hk++)
      for (const Tensor* t : {&p.k, &p.v})
        for (int d = 0; d < t->size[3]; d++)
          set(*t, i / page * t->stride[0] + hk * t->stride[1] + i % page * t->stride[2] + d, kNan);
  const int splits = maybe(3) ? draw(1, 6) : (M + 255) / 256, tiles = (H / Hk * Nq + 15) / 16;
  cuda::AttentionDecode a{p, {}, {}, {}};
  if (splits > 1) {
    a.parts = heap.make(Dtype::kFloat32, {splits, B * H * Nq, (Dv + 7) / 8 * 8}, [] { return kNan; });
    a.sums = heap.make(Dtype::kFloat32, {splits, B * H * Nq, 2}, [] { return kNan; });
    a.counters = heap.make(Dtype::kInt32, {B * Hk * tiles}, [] { return 0; });
  }
  std::vector<double> first;
  for (int turn = 0; turn < 2; turn++) {
    llmfast_model(seed ^ turn, fault);
    const char* error = cuda::attention_decode(a, nullptr);
    llmfast_model(seed, fault);
    if (error) {
      std::printf("decode %d: %s\n", number, error);
      return 1;
    }
    for (int i = 0; splits > 1 && i < B * Hk * tiles; i++)
      if (get(a.counters, i * a.counters.stride[0]) != 0) {
        std::printf("decode %d: a counter is left at %g\n", number, get(a.counters, i * a.counters.stride[0]));
        return 1;
      }
    std::vector<double> got;
    for (int row = 0; row < B * H * Nq; row++) {
      const int b = row / Nq / H, h = row / Nq % H, i = row % Nq;
      for (int d = 0; d < Dv; d++) got.push_back(at(p.o, b, h, i, d));
      if (p.lse) got.push_back(at(p.lse, b, h, i, 0));
    }
    if (turn == 0) first = got;
    for (size_t n = 0; n < got.size(); n++)
      if (got[n] != first[n]) {  // NaN too
        std::printf("decode %d: number %zu is %g and then %g\n", number, n, first[n], got[n]);
        return 1;
      }
  }
  Row r;
  for (int b = 0; b < B; b++)
    for (int h = 0; h < H; h++)
      for (int i = 0; i < Nq; i++) {
        const auto of = [&](const Tensor& t) {
          return [&](int j, int d) { return at(t, block(b, j), h / (H / Hk), paged ? j % page : j, d); };
        };
        if (!agrees("decode", number, p, b, h, i, Nq, length(b), b, i, of(p.k), of(p.v), r)) return 1;
      }
  return 0;
}

int softmax(int number, bool small) {
  Heap heap;
  const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}, dtype = dtypes[draw(0, 2)];
  const int lengths[] = {draw(1, 40),      draw(200, 300),   draw(1000, 1100),  draw(1025, 3000),
                         8 * draw(1, 140), draw(8190, 9000), draw(32760, 40000)};
  const int of_clusters = maybe(2) ? draw(32769, 131072) : 8 * draw(4097, 32768);  // of 2, 4 or 8 blocks
  const int longer = maybe(2) ? draw(131073, 140000) : 8 * draw(32769, 34000);
  const bool wide = number % 8 == 7;
  const int N = wide ? (small ? 40000 : number % 16 == 7 ? of_clusters : longer) : lengths[draw(0, small ? 4 : 6)];
  const int M = wide ? 1 : N > 4000 ? draw(1, 2) : draw(1, 9), pad = maybe(2) ? 8 : 1;
  Softmax p{};
  p.x = heap.make(dtype, {draw(1, 2), 2, M, N}, [] { return 2 * normal(); }, maybe(2), pad);
  p.y = maybe(3) ? p.x : heap.make(dtype, {p.x.size[0], 2, M, N}, [] { return kNan; }, maybe(2), pad);
  p.scale = maybe(2) ? 1 : 1.5 * normal(), p.offset = maybe(2) ? 1 << 30 : draw(-M, N), p.log = maybe(2);
  if (maybe(3)) p.mask = heap.make(Dtype::kBool, {M, N}, [] { return draw(-1, 3); });
  if (maybe(3)) p.bias = heap.make(Dtype::kFloat32, {N}, normal);
  const Tensor dy = heap.make(dtype, {p.x.size[0], 2, M, N}, normal, maybe(2), pad);
  const Tensor dx = heap.make(dtype, {p.x.size[0], 2, M, N}, [] { return kNan; }, maybe(2), pad);
  std::vector<double> x;
  for (int r = 0; r < p.x.size[0] * 2 * M; r++)
    for (int j = 0; j < N; j++) x.push_back(at(p.x, r / M / 2, r / M % 2, r % M, j));
  const char* error = cuda::softmax_forward(p, nullptr);
  if (!error) error = cuda::softmax_backward({dy, p.y, dx, Tensor{}, p.scale, p.log}, nullptr);
  if (error) {
    std::printf("softmax %d: %s\n", number, error);
    return 1;
  }
  const double eps = dtype == Dtype::kFloat32 ? 0x1p-20 : dtype == Dtype::kBFloat16 ? 0x1p-7 : 0x1p-10;
  for (int64_t r = 0; r < p.x.size[0] * 2 * M; r++) {
    double m = -kInfinity, l = 0, *s = &x[r * N];
    for (int j = 0; j < N; j++) {
      s[j] = s[j] * static_cast<float>(p.scale) + (p.bias ? get(p.bias, j * p.bias.stride[0]) : 0);
      if (j > r % M + p.offset || (p.mask && !at(cuda::four_dimensional(p.mask), 0, 0, r % M, j))) s[j] = -kInfinity;
      m = std::fmax(m, s[j]);
    }
    for (int j = 0; j < N; j++) l += m == -kInfinity ? 0 : std::exp(s[j] - m);
    for (int j = 0; j < N; j++) {
      const double y = l == 0 ? (p.log ? -kInfinity : 0) : p.log ? s[j] - m - std::log(l) : std::exp(s[j] - m) / l;
      const double got = at(p.y, r / M / 2, r / M % 2, r % M, j);
      if (wrong(got, y,
                eps * (1 + std::fabs(m)) * (std::fabs(y) + (p.log ? 1 : 1.0 / N)))) {  // s is rounded at the size of m
        std::printf("softmax %d: row %d of %d, column %d of %d is %g, not %g\n", number, static_cast<int>(r), M, j, N,
                    got, y);
        return 1;
      }
    }
    double sum = 0, size = 0;  // of the rounded y that the backward reads
    const auto y = [&](int j) { return at(p.y, r / M / 2, r / M % 2, r % M, j); };
    const auto g = [&](int j) { return at(dy, r / M / 2, r / M % 2, r % M, j) * !(p.log && y(j) == -kInfinity); };
    for (int j = 0; j < N; j++) sum += p.log ? g(j) : y(j) * g(j), size += std::fabs(p.log ? g(j) : y(j) * g(j));
    for (int j = 0; j < N; j++) {
      const double weight = p.log ? std::exp(y(j)) : y(j),
                   want = p.scale * (p.log ? g(j) - weight * sum : weight * (g(j) - sum));
      const double got = at(dx, r / M / 2, r / M % 2, r % M, j);
      const double allowed =
          eps * (std::fabs(want) + std::fabs(p.scale) * weight * (size + std::fabs(g(j))) * (1 + p.log * 20));
      if (wrong(got, want, allowed + 1e-7)) {
        std::printf("softmax %d: dx of row %d, column %d of %d is %g, not %g\n", number, static_cast<int>(r), j, N, got,
                    want);
        return 1;
      }
    }
  }
  return 0;
}

int cross_entropy(int number, bool small) {
  Heap heap;
  const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}, dtype = dtypes[draw(0, 2)];
  const int lengths[] = {draw(1, 40), 8 * draw(1, 140), draw(200, 300), draw(1025, 3000), draw(4090, 9000)};
  const int V = lengths[draw(0, small ? 3 : 4)], T = draw(1, V > 1000 ? 3 : 9), pad = maybe(2) ? 8 : 1;
  cuda::CrossEntropy p{};
  p.x = heap.make(dtype, {T, V}, [] { return 3 * normal(); }, false, pad);
  p.ignore_index = maybe(2) ? -100 : draw(0, V - 1);
  p.target = heap.make(Dtype::kInt64, {T}, [&] { return maybe(4) ? p.ignore_index : maybe(8) ? V : draw(0, V - 1); });
  p.loss = heap.make(Dtype::kFloat32, {T}, [] { return kNan; });
  p.lse = heap.make(Dtype::kFloat32, {T}, [] { return kNan; });
  p.smoothing = maybe(2) ? 0.2 : 0, p.z_loss = maybe(3) ? 0.01 : 0, p.softcap = maybe(3) ? 5 : 0;
  std::vector<double> w(V, 1.0);
  double total = V;
  if (maybe(2)) {
    p.weight = heap.make(Dtype::kFloat32, {V}, [] { return 0.5 + std::fabs(normal()); });
    total = 0;
    for (int j = 0; j < V; j++) total += w[j] = get(p.weight, j);
    p.weight_sum = heap.make(Dtype::kFloat32, {1}, [=] { return total; });
  }
  const Tensor dloss = heap.make(Dtype::kFloat32, {T}, normal);
  std::vector<double> x;
  for (int i = 0; i < T; i++)
    for (int j = 0; j < V; j++) x.push_back(get(p.x, i * p.x.stride[0] + j * p.x.stride[1]));
  const char* error = cuda::cross_entropy(p, nullptr);
  cuda::CrossEntropy b = p;
  b.loss = dloss, b.dx = maybe(3) ? p.x : heap.make(dtype, {T, V}, [] { return kNan; }, false, pad);
  if (!error) error = cuda::cross_entropy(b, nullptr);
  if (error) {
    std::printf("cross entropy %d: %s\n", number, error);
    return 1;
  }
  const double eps = dtype == Dtype::kFloat32 ? 0x1p-20 : dtype == Dtype::kBFloat16 ? 0x1p-7 : 0x1p-10;
  for (int i = 0; i < T; i++) {
    const int64_t y = get(p.target, i);
    double *c = &x[i * V], m = -kInfinity, l = 0, smooth = 0;
    std::vector<double> derivative(V, 1.0);
    for (int j = 0; j < V; j++) {
      if (p.softcap) {
        const double t = std::tanh(c[j] / p.softcap);
        c[j] = p.softcap * t, derivative[j] = 1 - t * t;
      }
      m = std::fmax(m, c[j]), smooth += w[j] * c[j];
    }
    for (int j = 0; j < V; j++) l += std::exp(c[j] - m);
    const double lse = m + std::log(l), hit = y == V ? kNan : (1 - p.smoothing) * w[y < 0 ? 0 : y];
    double loss =
        hit * (lse - (y < 0 || y == V ? 0 : c[y])) + p.smoothing / V * (total * lse - smooth) + p.z_loss * lse * lse;
    if (y == p.ignore_index) loss = 0;
    const double got = get(p.loss, i);  // of sums of about 10
    if (y == V ? !std::isnan(got) : wrong(got, loss, 4e-6 * (10 + std::fabs(loss)))) {
      std::printf("cross entropy %d: loss of row %d of %d, %d columns, is %g, not %g\n", number, i, T, V, got, loss);
      return 1;
    }
    for (int j = 0; j < V; j++) {
      const double weight = std::exp(c[j] - lse), one = j == y,
                   d = hit * (weight - one) + p.smoothing / V * (total * weight - w[j]) + 2 * p.z_loss * lse * weight;
      const double want = y == p.ignore_index ? 0 : d * derivative[j] * get(dloss, i);
      const double dx = get(b.dx, i * b.dx.stride[0] + j * b.dx.stride[1]);
      const double allowed = eps * std::fabs(get(dloss, i)) * (std::fabs(d) * derivative[j] + weight + one) + 1e-7;
      if (y == V ? !std::isnan(dx) : wrong(dx, want, allowed)) {
        std::printf("cross entropy %d: dx of row %d, column %d of %d is %g, not %g\n", number, i, j, V, dx, want);
        return 1;
      }
    }
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const auto argument = [&](int i, int otherwise) { return count > i ? std::atoi(arguments[i]) : otherwise; };
  const char what = count > 1 ? arguments[1][0] : 'a';
  const bool small = argument(6, 0);
  const int fault = argument(5, 0);
  const unsigned seed = argument(4, 0);
  llmfast_model(seed, fault);
  int bad = 0;
  for (int i = argument(2, 0); i < argument(2, 0) + argument(3, 1) && !(fault && bad); i++) {
    rng.seed(i + 1);
    bad += what == 'd'   ? decode(i, small, seed, fault)
           : what == 's' ? softmax(i, small)
           : what == 'c' ? cross_entropy(i, small)
                         : attention(i, small, what == 'b');
  }
  std::printf("%d wrong of %d\n", bad, argument(3, 1));
  return bad > 0;
}
