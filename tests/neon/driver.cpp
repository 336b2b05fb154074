// Runs kernels of this build's instruction set as they are asked for: a call's tensors and numbers come on stdin, its
// tensors go back on stdout. Each tensor ends where a page begins that can't be touched: a step beyond it ends all.
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/kernels.h"

using namespace llmfast;

namespace {

void receive(void* to, size_t n) {
  for (ssize_t got; n; to = static_cast<char*>(to) + got, n -= got)
    if ((got = read(STDIN_FILENO, to, n)) <= 0) exit(0);
}

void send(const void* from, size_t n) {
  for (ssize_t put; n; from = static_cast<const char*>(from) + put, n -= put)
    if ((put = write(STDOUT_FILENO, from, n)) <= 0) exit(1);
}

struct Header {  // of a call; its name, its numbers and its tensors follow
  int32_t name, numbers, tensors, threads;
};
struct Shape {  // of a tensor; its bytes follow
  int32_t present, dtype, dim, unused;
  int64_t size[4], stride[4], bytes;
};

struct Guarded {
  Tensor tensor;
  char* pages = nullptr;
  size_t length = 0, bytes = 0;
};

Guarded receive_tensor() {
  Shape s;
  receive(&s, sizeof s);
  Guarded g;
  if (!s.present) return g;
  const size_t page = sysconf(_SC_PAGESIZE);
  g.bytes = s.bytes, g.length = (g.bytes + page - 1) / page * page + page;
  void* pages = mmap(nullptr, g.length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) abort();
  g.pages = static_cast<char*>(pages);
  mprotect(g.pages + g.length - page, page, PROT_NONE);
  g.tensor.data = g.pages + g.length - page - g.bytes;
  g.tensor.dtype = static_cast<Dtype>(s.dtype), g.tensor.dim = s.dim;
  for (int i = 0; i < s.dim; i++) g.tensor.size[i] = s.size[i], g.tensor.stride[i] = s.stride[i];
  receive(g.tensor.data, g.bytes);
  return g;
}

void call(const cpu::Kernels& k, const std::string& name, const std::vector<Tensor>& t, const std::vector<double>& n) {
  auto whole = [&](int i) { return static_cast<int64_t>(n[i]); };
  auto spec = [&] { return AttentionSpec{n[0], whole(1), whole(2), n[3], n[4]}; };
  auto extras = [&](int i) {
    return Extras{t[i], t[i + 1], t[i + 2], t[i + 3], t[i + 4], t[i + 5], t[i + 6], t[i + 7], t[i + 8]};
  };
  if (name == "attention_forward") {
    k.attention_forward({t[0], t[1], t[2], t[3], t[4], spec(), extras(5)});
  } else if (name == "attention_decode") {
    k.attention_decode({t[0], t[1], t[2], t[3], t[4], spec(), extras(5)});
  } else if (name == "attention_backward") {
    k.attention_backward(
        {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11], spec(), extras(12)});
  } else if (name == "rowdot") {
    k.rowdot(t[0], t[1], t[2]);
  } else if (name == "softmax_forward") {
    k.softmax_forward({t[0], t[1], t[2], t[3], n[0], whole(1), n[2] != 0});
  } else if (name == "softmax_backward") {
    k.softmax_backward({t[0], t[1], t[2], t[3], n[0], n[1] != 0});
  } else if (name == "cross_entropy_forward") {
    k.cross_entropy_forward({t[0], t[1], t[2], t[3], t[4], whole(0), n[1], n[2], n[3]});
  } else if (name == "cross_entropy_backward") {
    k.cross_entropy_backward({t[0], t[1], t[2], t[3], t[4], t[5], whole(0), n[1], n[2], n[3]});
  } else if (name == "linear") {
    k.linear(t[0], t[1], t[2], t[3]);
  } else {
    abort();
  }
}

}  // namespace

int main() {
  const cpu::Kernels& kernels = *cpu::select("");
  const std::string names = std::string(cpu::supported()) + "\n";
  send(names.data(), names.size());
  for (Header h;;) {
    receive(&h, sizeof h);
    std::string name(h.name, ' ');
    std::vector<double> numbers(h.numbers);
    receive(name.data(), name.size());
    receive(numbers.data(), numbers.size() * sizeof(double));
    std::vector<Guarded> given;
    std::vector<Tensor> tensors;
    for (int i = 0; i < h.tensors; i++) given.push_back(receive_tensor()), tensors.push_back(given[i].tensor);
    omp_set_num_threads(h.threads);
    call(kernels, name, tensors, numbers);
    for (const Guarded& g : given) {
      send(g.tensor.data, g.bytes);
      if (g.pages) munmap(g.pages, g.length);
    }
  }
}
