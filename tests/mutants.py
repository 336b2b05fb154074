"""Small faults of the kind a person writes, planted one at a time in the kernels: the tests must notice at least nine in ten.

`python tests/mutants.py [words]` plants those whose file or reason holds the words, and says which the tests noticed.
"""

import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FWD, BWD, BLOCK, DEC = (
    f"csrc/cpu/attention_{name}.inl" for name in ("forward", "backward", "backward_block", "decode")
)
SEQ, SIMD, SOFTMAX = "csrc/cpu/sequence.inl", "csrc/cpu/simd.h", "csrc/cpu/softmax.inl"
T_FWD, T_TMA, T_BWD, T_DEC, T_SOFTMAX, T_CE = (
    f"kernels/{name}.py"
    for name in ("attention", "attention_tma", "attention_backward", "decode", "softmax", "cross_entropy")
)
CE, SOFTMAX_BWD = "csrc/cpu/cross_entropy.inl", "csrc/cpu/softmax_backward.inl"


class Mutant(NamedTuple):
    """A text that its file holds once, what stands there instead, and why that is wrong."""

    path: str
    text: str
    wrong: str
    why: str


SCRATCH_TOO_SMALL = Mutant(SIMD, "(n + 63) / 64 * 64)", "(n + 127) / 128 * 64)", "scratch of half the size")
SCRATCH_SHARED = Mutant(
    FWD, "static thread_local Scratch scratch;", "static Scratch scratch;", "threads share one scratch"
)
# fmt: off
MUTANTS = [Mutant(*row) for row in [
    # forward
    (FWD, "for (; n - r >= 4; r += 4) f(", "if (n - r >= 4) f(", "rows of a tile's tail are skipped"),
    (FWD, "if (r < n) f(r, std::integral_constant<int, 1>{});", "", "the last odd row is forgotten"),
    (FWD, "if (n == 3) f(v0, std::integral_constant<int, 3>{});", "", "three vectors of queries are forgotten"),
    (FWD, "store(at, d0 ? load(at) + acc[r][v] : acc[r][v]);", "store(at, acc[r][v]);", "a long head's first chunk is overwritten"),
    (FWD, "load(o + r * kPanel<C> + x * L) * load(alpha + x * L)", "load(o + r * kPanel<C> + x * L)", "o is not rescaled"),
    (FWD, "x.alpha[i] = 1;  // rescaled once", "{}", "o is rescaled once per run"),
    (FWD, "if (negative) r[i] = -r[i];", "", "the sign of scale is lost"),
    (FWD, "if (negative) r[i] ^= static_cast<int32_t>(0x80008000);", "if (negative) r[i] ^= static_cast<int32_t>(0x8000);", "one of a pair keeps its sign"),
    (FWD, "for (int64_t e = 0; e < x.D - d; e++) part[e] = q[e];", "for (int64_t e = 0; e < x.D - d - 1; e++) part[e] = q[e];", "the last head dim of a part is lost"),
    (FWD, "x.seq.b * t.stride[0] + x.h * t.stride[1] + x.i0 * si + j0 * sj", "x.seq.b * t.stride[0] + x.i0 * si + j0 * sj", "every head reads the first head's mask"),
    (FWD, "tile[j * kRows + g] = static_cast<C>(to_float(p[g * si + j * sj]));", "tile[j * kRows + g] = static_cast<C>(to_float(p[j * si + g * sj]));", "a mask's strides are swapped"),
    (FWD, "min<int64_t>(v1 * L, x.nq)", "min<int64_t>((v1 - v0) * L, x.nq)", "queries past the first of a panel read another's mask"),
    (FWD, "t1 = static_cast<int>((n + kStrip - 1) / kStrip);", "t1 = static_cast<int>(n / kStrip);", "the last keys of a block get no weights"),
    (FWD, "tanh(y * (1 / cap)) * cap", "tanh(y * (1 / cap))", "the softcap is not multiplied back"),
    (FWD, "static_cast<C>(x.i0 + x.offset + g * L - j0 - j)) * slope", "static_cast<C>(x.i0 + g * L - j0 - j)) * slope", "ALiBi forgets Nk - Nq"),
    (FWD, "slopes.dim == 2 ? x.seq.b", "slopes.dim == 1 ? x.seq.b", "slopes by batch are read by head"),
    (FWD, "clamp(j0 + j - x.a.spec.right - i, -1, L)", "clamp(j0 + j - x.a.spec.right - i - 1, -1, L)", "the mask's right edge is one key late"),
    (FWD, "clamp(j0 + j + x.a.spec.left - i, -1, L)", "clamp(j0 + j + x.a.spec.left - i - 1, -1, L)", "the window's left edge is one key late"),
    (FWD, "if (j0 + n - 1 <= i + x.a.spec.right &&", "if (j0 <= i + x.a.spec.right &&", "a strip on the diagonal counts as whole"),
    (FWD, "(j0 + j) / 4)", "j / 4)", "dropout starts anew in each strip"),
    (FWD, "wvec{} + static_cast<uint32_t>(x.h), wvec{}", "wvec{}, wvec{}", "dropout is the same in each head"),
    (FWD, "const int64_t sv = (Dv + kStep - 1) / kStep * kStep, sk", "const int64_t sv = (D + kStep - 1) / kStep * kStep, sk", "v's row length is taken from D"),
    (FWD, "if (D % 2) w.k_copy[j * sk + D] = bf16{};", "", "an odd head dim's pair holds garbage"),
    (FWD, "V m = m_new == -kInfOf<C> ? V{} : m_new;", "V m = m_new;", "a row without keys becomes NaN"),
    (FWD, "load(x.l + g * L) * alpha + (sum + odd)", "load(x.l + g * L) + (sum + odd)", "l is not rescaled"),
    (FWD, "load(x.l + g * L) * alpha + (sum + odd)", "load(x.l + g * L) * alpha + sum", "odd keys miss in l"),
    (FWD, "C inverse = l == 0 ? C(0) : keep / l;", "C inverse = keep / l;", "a row without keys divides by 0"),
    (FWD, "C inverse = l == 0 ? C(0) : keep / l;", "C inverse = l == 0 ? C(0) : 1 / l;", "what dropout keeps is not scaled up"),
    (FWD, "l = l * shrink + exp(sink - both)", "l = l + exp(sink - both)", "a large sink does not shrink l"),
    (FWD, "l == 0 ? -kInfOf<C> : m + log(l);", "l == 0 ? -kInfOf<C> : m;", "lse lacks the logarithm"),
    (FWD, "store_part(to, r[i], x.Dv - d);", "storeu(to, r[i]);", "a ragged head dim writes into the next row"),
    (FWD, "i0 + nq + offset + a.spec.right)", "i0 + nq - 1 + offset + a.spec.right)", "the last visible key is lost"),
    (FWD, "kv.k + (j - begin) * kv.sk", "kv.k", "a block that starts within the staged keys reads the first of them"),
    (FWD, "kv.v + (j - begin) / kPer<T> * kv.sv", "kv.v", "a block that starts within the staged keys takes other values"),
    (FWD, "from = min(from, x.first()), to = max(to, x.end())", "from = x.first(), to = x.end()", "only the last block's keys are staged"),
    (FWD, "hk * group + (first + t) % group", "hk * group + t % group", "a task that begins within a group takes the wrong heads"),
    (FWD, "clamp(high / L + 1, v0[t], last)", "clamp(high / L, v0[t], last)", "a window's last vector is skipped"),
    (FWD, "if (x.adjusts) adjust(x, s, w.tile, j, m, v0[t], v1[t]);", "if (x.adjusts) adjust(x, s, w.tile, j, m, 0, 1);", "only the first vector is adjusted"),
    (FWD, "v = rows<T>(a.v, a.extras, seq, hk)", "v = rows<T>(a.v, a.extras, seq, (hk * group + first % group) % a.k.size[1])", "heads are grouped the other way for v"),
    (FWD, "memset(a.o.data + (h * a.o.stride[1]", "memset(a.o.data + (0 * a.o.stride[1]", "packed rows that no sequence covers stay unwritten"),
    tuple(SCRATCH_SHARED),
    # backward
    (BLOCK, "clamp(diagonal - x.a.spec.left, 0, kBlock)", "clamp(diagonal - x.a.spec.left + 1, 0, kBlock)", "the window's left edge is one key late"),
    (BWD, "narrow<T>(k.dk + j * wide(D), D, scale,", "narrow<T>(k.dk + j * wide(D), D, 1,", "dk lacks the scale"),
    (BLOCK, "return load(w.p + at) * (y - w.delta[row + i]);", "return load(w.p + at) * y;", "dS lacks delta"),
    (BLOCK, "store(w.cap + at, 1 - t * t);", "store(w.cap + at, 1 - t);", "the softcap's derivative is wrong"),
    (BLOCK, "y -= abs(iota<C>() + static_cast<C>(x.j0 + g * L - x.i0 - r - x.offset)) * slope;", "y -= abs(iota<C>() + static_cast<C>(x.j0 + g * L - x.i0 - r)) * slope;", "ALiBi forgets Nk - Nq"),
    (BLOCK, "dp = kept == 0 ? vec_of<C>{} : dp * kept;", "", "dP is not dropped"),
    (BLOCK, "(x.j0 + j) / 4", "j / 4", "dropout starts anew in each block"),
    (BLOCK, "to[j * step] += ds[j];", "to[j * step] = ds[j];", "dbias keeps the last batch only"),
    (BLOCK, "*to += sum;", "*to = sum;", "dbias broadcast over keys keeps the last block"),
    (BWD, "for (int64_t g = 0; g < group; g++) for (int64_t i = rows.first; i < rows.end; i += kBlock)", "for (int64_t g = 0; g < 1; g++) for (int64_t i = rows.first; i < rows.end; i += kBlock)", "dk misses the group's other heads"),
    (BWD, "clamp(j1 - offset + spec.left, first, s.Nq)", "clamp(j1 - offset + spec.left - kBlock, first, s.Nq)", "a window's last queries are skipped"),
    (BWD, "if (lse != -kInfOf<C>) sum -=", "sum -=", "a row without keys spoils dsinks"),
    (BWD, "zero<T>(a.dq), zero<T>(a.dk), zero<T>(a.dv);", "zero<T>(a.dq);", "rows of dk that no sequence covers stay unwritten"),
    (BWD, "memset(k.dk, 0, k.nk * wide(D) * sizeof(C))", "memset(k.dk, 0, k.nk * D * sizeof(C))", "dk is not cleared to its padded width"),
    (BWD, "to[d] += from[d];", "to[d] = from[d];", "dq keeps the last chunk of keys only"),
    (BWD, "row[d] += more[d];", "row[d] = more[d];", "dq shared by threads keeps the last chunk only"),
    (BWD, "c0 + slots - (c0 > 0));", "c0 + slots);", "a second round of chunks takes a slot more than there is"),
    # decode and sequences
    (DEC, "w.l = at, at += rows * L;", "w.l = at, at += L;", "sums of several rows overlap"),
    (DEC, "} else if (left > 0) {", "} else if (left > kStep) {", "the head dim's tail is forgotten"),
    (DEC, "y[0][t] += y[1][t];", "{}", "half of the sums of a dot product are forgotten"),
    (DEC, "load(q + g * rows +", "load(q +", "half of the rows take the other half's queries"),
    (DEC, "whole[g][first + t] =", "whole[g][t] =", "a second pass's sums are over the first's"),
    (DEC, "for (int64_t i = 0; i < n; i++) whole[i] = p[i];", "for (int64_t i = 0; i + 1 < n; i++) whole[i] = p[i];", "the head dim's last element is forgotten"),
    (DEC, "const int64_t at = min<int64_t>(j + first + t, n - 1);", "const int64_t at = min<int64_t>(j + first + t, n - 2);", "the last key is read as its neighbour"),
    (SIMD, "near<n>(r[i], r[i + n], lanes) + far<n>(r[i], r[i + n], lanes)", "near<n>(r[i], r[i + n], lanes) + near<n>(r[i], r[i + n], lanes)", "half of the lanes are summed twice"),
    (DEC, "V l = load(w.l + row * L) * alpha;", "V l = load(w.l + row * L);", "l is not rescaled"),
    (DEC, "load(acc + r * x.wideDv + d + z * L) * splat(w.alpha[r])", "load(acc + r * x.wideDv + d + z * L)", "o is not rescaled"),
    (DEC, "i + x.offset + spec.right + 1 - j0", "i + x.offset + spec.right - j0", "the diagonal is hidden"),
    (DEC, "return Partial<C>{at + row * wideDv, reinterpret_cast<double*>(ends) + row, ends + lengths + row};", "return Partial<C>{at + row * wideDv, reinterpret_cast<double*>(ends) + row, ends + row};", "m and l of a partial result are one"),
    (DEC, "load(sum + d) + load(p.acc + d) * static_cast<C>(factor)", "load(sum + d) + load(p.acc + d)", "splits are merged without their maxima"),
    (DEC, "if (sink > -kInfOf<C>) l +=", "if (sink > m) l +=", "a small sink is forgotten"),
    (SEQ, "if (e.seqlens_k) s.Nk = clamp(length(e.seqlens_k, b), 0, s.Nk);", "if (e.seqlens_k) s.Nk = length(e.seqlens_k, b);", "a length beyond the cache is believed"),
    (SEQ, "+ j % size * stride", "+ j * stride", "a key's place in its page is not taken modulo"),
    (SEQ, "clamp(length(e.cu_seqlens_k, b + 1), s.k0, k.size[2]) - s.k0", "clamp(length(e.cu_seqlens_q, b + 1), s.k0, k.size[2]) - s.k0", "keys take the queries' lengths"),
    # cross entropy
    (CE, "l *= exp(static_cast<double>(m) - top), m = top;", "m = top;", "the running sum is not rescaled"),
    (CE, "l += q.l * exp(q.m - base), wx += q.wx;", "l += q.l, wx += q.wx;", "parts are merged without their maxima"),
    (CE, "sum += smooth * (all * lse - wx);", "sum += smooth * all * lse;", "the smoothed loss lacks the logits"),
    (CE, "if (p.z_loss != 0) sum += p.z_loss * lse * lse;", "", "the z-loss is forgotten"),
    (CE, "if (cap != 0) hit = capped(splat(hit), cap)[0];", "", "the target's logit is not capped"),
    (CE, "v = th * cap, factor = 1 - th * th;", "v = th * cap;", "the softcap's derivative is forgotten"),
    (CE, "smooth * all + 2 * p.z_loss * lse", "smooth * all + p.z_loss * lse", "the z-loss's gradient is half of it"),
    (CE, "if (b != 0) g -= weights * b;", "", "the gradient is not smoothed"),
    (CE, "if (here) from_float(dx + (y - j0), at_target);", "", "the target's gradient lacks its one"),
    (CE, "memset(dx, 0, n * sizeof(T));", "", "an ignored row's gradient stays unwritten"),
    # softmax
    (SOFTMAX, "l *= power(before - against.base), add();", "add();", "the running sum is not rescaled"),
    (SOFTMAX, "power(bases[j / kChunk] - against.base) * inverse", "inverse", "a chunk keeps the base that it was counted against"),
    (SOFTMAX, "if (!(largest[r] > -kFar<C> && largest[r] < kFar<C>)) countable = false;", "", "numbers whose logarithm to base 2 overflows become 0"),
    (SOFTMAX, "static_cast<C>(n <= L ? total(sums[0])", "static_cast<C>(n <= 2 * L ? total(sums[0])", "a short row's second vector is not summed"),
    (SOFTMAX, "kLog ? log(l[r]) : 1 / l[r]", "kLog ? C(0) : 1 / l[r]", "a short row's logarithm lacks that of the sum"),
    (SOFTMAX, "against.base * (static_cast<double>(s) / c)", "against.base", "powers of two count as natural ones"),
    (SOFTMAX, "  return min(V{}, x);", "  return x;", "a logarithm of a probability is rounded above 0"),
    (SOFTMAX, "if constexpr (kPast && std::is_same_v<T, bf16>) unmix(v[k], v[k + 1]);", "", "what goes past the caches keeps its lanes exchanged"),
    (SOFTMAX, "some = inside ? v : V{};", "some = v;", "zeros beyond the row count"),
    (SOFTMAX, "totals[k] += sums[k / L][k % L];", "totals[k] = sums[k / L][k % L];", "a column's sum is that of its last 256 rows"),
    (SOFTMAX, "if (++at[1] == M1) at[1] = 0, at[0]++;", "if (++at[1] == M1) at[1] = 0;", "the outermost index stands still"),
    (SOFTMAX_BWD, "static_cast<C>(total(sums))", "static_cast<C>(total(sums[0] + sums[1]))", "half of a long row is not summed"),
    (SOFTMAX_BWD, "totals[k] += sums[k / L][k % L];", "totals[k] = sums[k / L][k % L];", "a column's gradient knows its last rows only"),
    (SOFTMAX_BWD, "store(all, sums<L>(s));", "store(all, s[0]);", "short rows take the lanes of the first for their sums"),
    (SOFTMAX, "if (t.stride[k] != step * rows) return 0;", "", "rows that are not evenly spaced are taken for such"),
    (SOFTMAX, "v[k] = (v[k] * scale - m[k]) - l[k];", "v[k] = v[k] * scale - m[k];", "a column's logarithm lacks that of the sum"),
    (SOFTMAX, "for (int k = 0; k < 4; k++) { const __m256 high", "for (int k = 0; k < 3; k++) { const __m256 high", "every fourth vector is not summed"),
    # Triton
    (T_SOFTMAX, "(cols[None, :] - rows[:, None] <= offset)", "(cols[None, :] - rows[:, None] < offset)", "the diagonal is hidden"),
    (T_SOFTMAX, "m_end = tl.where(shape[2] == 1, M, m_first + 1)", "m_end = tl.where(shape[2] == 1, BLOCK_M, m_first + 1)", "dbias by key sums the first rows only"),
    (T_SOFTMAX, "dy_tile - tl.exp(y_tile) * total[:, None] if LOG", "dy_tile - y_tile * total[:, None] if LOG", "log_softmax's gradient takes y for its exponential"),
    (T_SOFTMAX, "_ds(y_tile, dy_tile, total, LOG) * scale)\n    else:", "_ds(y_tile, dy_tile, total, LOG))\n    else:", "dx lacks the scale"),
    (T_FWD, "l * alpha + tl.sum(p, 1)", "l + tl.sum(p, 1)", "l is not rescaled"),
    (T_FWD, "first = tl.maximum(x0 + offset - left, 0) // BLOCK", "first = tl.cdiv(tl.maximum(x0 + offset - left, 0), BLOCK)", "the window's first tile is skipped"),
    (T_FWD, "whole_end = tl.minimum(tl.maximum(x0 + offset + right + 1, 0), N) // BLOCK", "whole_end = tl.cdiv(tl.minimum(tl.maximum(x0 + offset + right + 1, 0), N), BLOCK)", "a tile on the diagonal counts as whole"),
    (T_FWD, "tl.abs(i + (nk - nq) - j)", "tl.abs(i - j)", "ALiBi forgets Nk - Nq"),
    (T_FWD, "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))", "dropout's words are out of order"),
    (T_FWD, "sign = tl.where(scale < 0, -1.0, tl.where(scale == 0, 0.0, 1.0))", "sign = tl.where(scale == 0, 0.0, 1.0)", "the sign of scale is lost"),
    (T_BWD, "d0 = chunk * BLOCK_D if D > BLOCK_D else 0", "d0 = chunk * BLOCK_D", "where only Dv has two chunks the second sees no scores"),
    (T_BWD, "ds = p * (dp - delta_row) * dcap  # (BLOCK_N, BLOCK_M)", "ds = p * (dp - delta_row)", "dk lacks the softcap's derivative"),
    (T_BWD, "for g in range(GROUP):", "for g in range(1):", "dk misses the group's other heads"),
    (T_BWD, "D - d0, BLOCK_D, acc * scale)", "D - d0, BLOCK_D, acc)", "dq lacks the scale"),
    (T_BWD, "acc += tl.where(lse_row == float(\"-inf\"), 0.0, ", "acc += tl.where(False, 0.0, ", "a row without keys spoils dsinks"),
    (T_TMA, "t -= first * m_tiles", "t -= 0", "tiles of the first heads are taken twice"),
    (T_TMA, "(k, b, h // GROUP)", "(k, b, h % GROUP)", "heads are grouped the other way"),
    (T_TMA, "programs + tl.atomic_add(taken, 1", "1 + programs + tl.atomic_add(taken, 1", "one tile is never taken"),
    (T_TMA, "mask=rows < Nq)", "mask=rows <= Nq)", "lse of the next head is overwritten"),
    (T_DEC, "tl.maximum(nk - Nq - left, 0)", "tl.maximum(nk - left, 0)", "the window ends early"),
    (T_DEC, "tl.maximum(nk + right, 0)", "tl.maximum(nk + right - 1, 0)", "the newest key is lost"),
    (T_DEC, "j // page * stp", "j // page", "the page table's strides are not used"),
    (T_DEC, "acc = acc * alpha + tl.load(parts", "acc = acc + tl.load(parts", "splits are merged without their maxima"),
    (T_CE, "l_block * tl.exp(m_block - m_safe)", "l_block", "blocks are merged without their maxima"),
    (T_CE, "d += (label_smoothing / V) * (total.to(tl.float32) * p - w)", "d += (label_smoothing / V) * (total.to(tl.float32) * p - 1)", "class weights are forgotten in smoothing"),
]]
# fmt: on


def faulty(mutant):
    """The file with the fault in it."""
    text = (ROOT / mutant.path).read_text()
    found = list(re.finditer(r"\s+".join(map(re.escape, mutant.text.split())), text))  # however the lines are broken
    if len(found) != 1:
        raise ValueError(f"{mutant.path} holds this {len(found)} times, not once: {mutant.text}")
    return text[: found[0].start()] + mutant.wrong + text[found[0].end() :]


def copy(folder):
    """A copy of the tree to plant faults in."""
    for name in ("csrc", "kernels", "llmfast", "tests"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"), dirs_exist_ok=True
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)


def plant(mutant, folder):
    copy(folder)
    (folder / mutant.path).write_text(faulty(mutant))


NOTICE = {  # by what the fault's file is called: the tests that may notice it
    "csrc/cpu/": ("attention", "softmax", "cross_entropy", "cpu_forward", "cpu_backward", "properties", "large"),
    "kernels/attention": ("attention", "triton_tma", "triton_shapes"),
    "kernels/decode": ("triton_decode",),
    "kernels/softmax": ("softmax",),
    "kernels/cross_entropy": ("cross_entropy", "triton_cross_entropy"),
}


def kind(mutant):
    return next(start for start in NOTICE if mutant.path.startswith(start))


def failing(folder, kind, isa, *options):
    """The tests for a kind of file that fail on this tree."""
    env = os.environ | {"LLMFAST_CUDA": "0", "LLMFAST_ISAS": isa, "LLMFAST_ISA": isa}
    backend = "triton" if kind.startswith("kernels/") else "not triton and not reference and not cuda"
    if backend != "triton":
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, env=env, check=True)
    tests = [f"tests/test_{name}.py" for name in NOTICE[kind]]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-k",
        backend,
        *tests,
        *options,
    ]
    try:
        child = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return ["hangs"]
    lines = [line for line in child.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    found = [line.split(" - ")[0].split(" ", 1)[1] for line in lines]
    return found or ([] if child.returncode == 0 else [f"ends with {child.returncode}"])


def survivors(mutants, isa, workers=2):
    """The mutants that no test notices, each built and tested in one of a few copies of the tree.

    What fails without any fault proves nothing and is left out.
    """
    with tempfile.TemporaryDirectory() as name:
        folders = queue.SimpleQueue()
        for i in range(workers):
            copy(Path(name, str(i)))
            setup = Path(name, str(i), "setup.py")
            setup.write_text(setup.read_text().replace('"-O3"', '"-O0"'))  # builds in a third of the time of -O1
            folders.put(Path(name, str(i)))
        options = ["-x"]
        for one in dict.fromkeys(map(kind, mutants)):
            options += [f"--deselect={test}" for test in failing(Path(name, "0"), one, isa)]
        print("left out:", options[1:], flush=True)

        def noticed(mutant):
            folder = folders.get()
            path = folder / mutant.path
            right = path.read_text()
            path.write_text(faulty(mutant))
            seen = failing(folder, kind(mutant), isa, *options)
            path.write_text(right)
            folders.put(folder)
            print("noticed " if seen else "SURVIVED", mutant.path, "|", mutant.why, "|", *seen, flush=True)
            return bool(seen)

        with ThreadPoolExecutor(workers) as pool:
            return [mutant for mutant, seen in zip(mutants, pool.map(noticed, mutants), strict=True) if not seen]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from llmfast import _cpu

    words = " ".join(sys.argv[1:])
    chosen = [m for m in MUTANTS if words in f"{m.path} {m.why}"]
    left = survivors(chosen, _cpu.isa())
    print(f"{len(chosen) - len(left)} of {len(chosen)} noticed")
