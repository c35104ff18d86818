"""Plants bugs, one at a time, in a copy of the tree, and demands that the tests catch each: `python tests/mutation.py`.

A mutation is caught when a test of its selection fails: a build that breaks, a module that does not import or a process that
dies is none of that. The copy is built with the portable CPU rung alone, at -O1; the tree itself is never written to.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffkernels._op import OPS

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("csrc", "diffkernels", "tests", "CMakeLists.txt", "pyproject.toml")
LIMIT = 300  # seconds that one selection of tests may take


@dataclass(frozen=True)
class Mutation:
    """`old`, found exactly once in `file`, becomes `new`; `tests` is what pytest runs: a file and an expression for -k."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]
    device: str = "cpu"
    devices: int = 1  # GPUs without which it cannot be seen


def kernel(op: str) -> tuple[str, str]:
    return "tests/test_ops.py", f"test_kernel and {op}- and f32"


def border(words: str) -> tuple[str, str]:
    return "tests/test_border.py", words


def cuda(words: str) -> tuple[str, str]:
    return "tests/test_cuda.py", words


MUTATIONS = [
    # kernels
    Mutation(
        "the mask of a row's tail dropped",
        "csrc/cpu/geglu.cpp",
        "store_some(to + i, value(a.some(i, n), b.some(i, n)), n)",
        "store_pair(to + i, value(a.some(i, n), b.some(i, n)))",
        kernel("geglu"),
    ),
    Mutation(
        "a row's tail left out",
        "csrc/cpu/geglu.cpp",
        "if (const int n = static_cast<int>(c.columns - i))",
        "if (const int n = 0)",
        kernel("geglu"),
    ),
    Mutation(
        "an output not written",
        "csrc/cpu/slice_moments.cpp",
        "        moments_of[2 * r + 1] = m.ms * static_cast<float>(c.columns);\n",
        "",
        kernel("slice_moments"),
    ),
    Mutation(
        "the last row skipped",
        "csrc/cpu/norm_modulate.cpp",
        "r < end; ++r",
        "r + 1 < end; ++r",
        kernel("norm_modulate"),
    ),
    Mutation(
        "an offset of 32 bits",
        "csrc/cpu/depthwise_conv2d.cpp",
        "b * x.step(0) + c",
        "static_cast<int32_t>(b * x.step(0)) + c",
        ("tests/test_ops.py", "test_offsets and depthwise_conv2d-"),
    ),
    Mutation(
        "scale and shift swapped",
        "csrc/cpu/gate_residual_norm.cpp",
        "describe(c.norm, out[0], scale, shift, weight",
        "describe(c.norm, out[0], shift, scale, weight",
        kernel("gate_residual_norm"),
    ),
    Mutation(
        "eps inside where it is outside",
        "csrc/cpu/norm_modulate.cpp",
        "    const int64_t total = x.numel();",
        "    c.inside = true;\n    const int64_t total = x.numel();",
        kernel("norm_modulate"),
    ),
    Mutation(
        "norm_quantize: codes not rounded but cut",
        "csrc/cpu/quantize.h",
        "bit_cast<U>(product(h, inverse) + splat(0x1.8p23f))",
        "bit_cast<U>(__builtin_convertvector(product(h, inverse), I))",
        ("tests/test_quantize_ops.py", "ties"),
    ),
    Mutation(
        "norm_quantize: a NaN lost beside larger numbers",
        "csrc/cpu/quantize.h",
        "{ return bit_cast<I>(v) & 0x7fffffff; }",
        "{ return bit_cast<I>(v == v ? v : F{}) & 0x7fffffff; }",
        ("tests/test_quantize_ops.py", "nan_wins"),
    ),
    Mutation(
        "norm_quantize: the largest magnitude without its sign forgotten",
        "csrc/cpu/quantize.h",
        "{ return bit_cast<I>(v) & 0x7fffffff; }",
        "{ return bit_cast<I>(v); }",
        kernel("norm_quantize"),
    ),
    Mutation(
        "norm_quantize: what lies past a row in the largest magnitude",
        "csrc/cpu/quantize.h",
        "v = {first(v.lo, before), first(v.hi, n - before)};",
        "static_cast<void>(before);",
        kernel("norm_quantize"),
    ),
    Mutation(
        "norm_quantize: even and odd codes swapped",
        "csrc/cpu/quantize.h",
        "(even & 0xffu) | (odd << 8 & 0xff00u)",
        "(odd & 0xffu) | (even << 8 & 0xff00u)",
        ("tests/test_ops.py", "test_kernel and norm_quantize- and bf16"),
    ),
    Mutation(
        "norm_quantize: a row of zeros divided by",
        "csrc/cpu/quantize.h",
        "amax <= kLeast ? 1 : amax / 127 * c.norm;",
        "amax / 127 * c.norm;",
        ("tests/test_quantize_ops.py", "zeros"),
    ),
    Mutation(
        "a rotation without its first step",
        "csrc/cpu/quantize.h",
        "across_from<kPaired ? 2 : 1>(v);",
        "across_from<2>(v);",
        ("tests/test_quantize_ops.py", "rotation_is"),
    ),
    Mutation(
        "a rotation's root forgotten",
        "csrc/cpu/quantize.h",
        "amax / 127 * c.norm;",
        "amax / 127;",
        ("tests/test_quantize_ops.py", "rotation_is"),
    ),
    Mutation(
        "norm_quantize: smooth left out",
        "csrc/cpu/quantize.h",
        "    c.smooth = to;\n",
        "",
        kernel("norm_quantize"),
    ),
    Mutation(
        "group_norm_quantize: silu's minimum between the extremes forgotten",
        "csrc/cpu/group_norm_quantize.cpp",
        "if (c.silu) reach = larger(crossed",
        "if (false) reach = larger(crossed",
        ("tests/test_quantize_ops.py", "amax_is_a_bound"),
    ),
    Mutation(
        "group_norm_quantize: a group's channels about means of their own",
        "csrc/cpu/group_norm_quantize.cpp",
        "squares += p[kSquares * w] + count * (v - mean) * (v - mean);",
        "squares += p[kSquares * w] + 0 * count * v;",
        kernel("group_norm_quantize"),
    ),
    Mutation(
        "act_quantize: a gated row's halves swapped",
        "csrc/cpu/act_quantize.cpp",
        "h.put(i, value(a.at(i), kGated ? b.at(i) : Pair{}), kPair);",
        "h.put(i, value(kGated ? b.at(i) : a.at(i), a.at(i)), kPair);",
        kernel("act_quantize"),
    ),
    Mutation(
        "a rotated pair swapped",
        "csrc/cpu/qkv_prep.cpp",
        "put(i, n, fma(v, load(table.cos + i), product(swapped<1>(v), load(table.sin + i))));",
        "put(i, n, fma(swapped<1>(v), load(table.cos + i), product(v, load(table.sin + i))));",
        kernel("qkv_prep"),
    ),
    Mutation(
        "the sign of a rotation's second half",
        "csrc/cpu/qkv_prep.cpp",
        "fma(b, cos, product(a, sin))",
        "fma(b, cos, -product(a, sin))",
        kernel("qkv_prep"),
    ),
    Mutation(
        "a head's statistics from the first head",
        "csrc/cpu/qkv_prep.cpp",
        "of[k] = moments(h + k, 1);",
        "of[k] = moments(0, 1);",
        kernel("qkv_prep"),
    ),
    Mutation(
        "the bias after the norm's statistics",
        "csrc/cpu/qkv_prep.cpp",
        "const Head<T, kUnit> from = head(h);",
        "Head<T, kUnit> from = head(h);\n            from.with.bias = nullptr;",
        kernel("qkv_prep"),
    ),
    Mutation(
        "a new token that sees later ones",
        "csrc/cpu/decode_attention.cpp",
        "(row + r) % c.tokens + 1; c.causal",
        "(row + r) % c.tokens + 2; c.causal",
        kernel("decode_attention"),
    ),
    Mutation(
        "a sink that rolls out",
        "csrc/cpu/decode_attention.cpp",
        "sinks + (p - sinks) % (length - sinks)",
        "p % length",
        kernel("decode_attention"),
    ),
    Mutation(
        "parts of a cache merged without their largest scores",
        "csrc/cpu/decode_attention.cpp",
        "kept = exp2(splat(part[wide] - base))[0]",
        "kept = 1",
        kernel("decode_attention"),
    ),
    Mutation(
        "keys cached as they came",
        "csrc/cpu/decode_attention.cpp",
        "store(lanes, quiet(load(row + i)));",
        "store(lanes, some(token_of<T>(c.k, sample, t, kv_head) + i * c.k.at[3], c.k.at[3], static_cast<int>(c.d - i)));",
        kernel("decode_attention"),
    ),
    Mutation(
        "keys behind a row's last one let in",
        "csrc/cpu/attention_forward.h",
        "                hide(scores, seen[r], width);\n",
        "",
        kernel("attention_forward"),
    ),
    Mutation(
        "what earlier keys gave not rescaled",
        "csrc/cpu/attention_forward.h",
        "    if (any(moved))\n",
        "    if (false)\n",
        kernel("attention_forward"),
    ),
    Mutation(
        "causal from the other corner",
        "csrc/attention.h",
        "(causal == Causal::bottom_right ?",
        "(causal == Causal::top_left ?",
        kernel("attention_forward"),
    ),
    Mutation(
        "a row of keys past the last let through",
        "csrc/attention.h",
        "s.k_sample >= k_samples",
        "s.k_sample > k_samples",
        ("tests/test_attention.py", "one_past_the_last and kv_index"),
    ),
    Mutation(
        "queries with another group's keys",
        "csrc/cpu/attention_forward.h",
        "(range.kv_head * a.group() + row / s.queries) * a.q.at[2]",
        "(range.kv_head + row / s.queries * a.kv_heads) * a.q.at[2]",
        kernel("attention_forward"),
    ),
    Mutation(
        "keys' scales read side by side, however they lie",
        "csrc/cpu/attention_forward.h",
        "scale[j * c.k_scale.at[1]] : 0",
        "scale[j] : 0",
        kernel("attention_int8"),
    ),
    Mutation(
        "queries' scales left out",
        "csrc/cpu/attention_forward.h",
        " * splat(row[r]);",
        ";",
        kernel("attention_int8"),
    ),
    Mutation(
        "every sample's keys less the first one's center",
        "csrc/cpu/qkv_prep.cpp",
        "part.less.ndim == 3 ? sample * part.heads() : 0",
        "0",
        kernel("qkv_quantize"),
    ),
    Mutation(
        "what lies behind a half's last columns overwritten",
        "csrc/cpu/qkv_prep.cpp",
        "if (half && n < kLanes)",
        "if (false)",
        kernel("qkv_quantize"),
    ),
    Mutation(
        "the sum over a row left out of the scores' gradient",
        "csrc/cpu/attention_backward.cpp",
        "e * (load(ds + j) - delta)",
        "e * load(ds + j)",
        kernel("attention_backward"),
    ),
    Mutation(
        "the gradient of keys from one of their samples only",
        "csrc/cpu/attention_backward.cpp",
        "if (s.k_sample != k_row ||",
        "if (b != k_row ||",
        kernel("attention_backward"),
    ),
    Mutation(
        "the codes' offset left in the sums",
        "csrc/cpu/linear_int8.h",
        "bit_cast<I>(sum - static_cast<uint32_t>(row.offset))",
        "bit_cast<I>(sum)",
        kernel("linear_w8a8"),
    ),
    Mutation(
        "the last inputs of a row left out of the sums",
        "csrc/cpu/linear_int8.h",
        "x ? c.depth % kDepth : 0",
        "0",
        kernel("linear_w8a8"),
    ),
    Mutation(
        "a row's scale taken from its block's first",
        "csrc/cpu/linear_int8.h",
        "know(c, from + r, sum, known[r]);",
        "know(c, from, sum, known[r]);",
        kernel("linear_w8a8"),
    ),
    Mutation(
        "the last rank left out",
        "csrc/cpu/linear.h",
        "k < c.rank; ++k",
        "k < c.rank - 1; ++k",
        kernel("linear_w8a8"),
    ),
    Mutation(
        "a window's right edge from the next line",
        "csrc/cpu/conv2d_w8a8.cpp",
        "last = clamp(width - h, end)",
        "last = end",
        kernel("conv2d_w8a8"),
    ),
    Mutation(
        "every window at the first sample's scale",
        "csrc/cpu/conv2d_w8a8.cpp",
        "c.scale_rows.push(x_scale.shape[0], x_scale.stride[0])",
        "c.scale_rows.push(x_scale.shape[0], 0)",
        kernel("conv2d_w8a8"),
    ),
    Mutation(
        "every group at the first one's scale",
        "csrc/cpu/pack_w4.h",
        "scales + (panel * groups + g) * kPanel",
        "scales + panel * groups * kPanel",
        kernel("linear_w4a8_lowrank"),
    ),
    Mutation(
        "a chunk's sums instead of those before",
        "csrc/cpu/linear_w4a16.cpp",
        "store(p, add ? load(all + i) + load(p) : load(all + i))",
        "store(p, load(all + i))",
        kernel("linear_w4a16"),
    ),
    Mutation(
        "the second half of a chunk from the first",
        "csrc/cpu/linear_w4a16.cpp",
        "x + kHalf * kRows, n - kHalf",
        "x, n - kHalf",
        kernel("linear_w4a16"),
    ),
    Mutation(
        "a LoRA beside a weight-only layer at its own alpha",
        "diffkernels/nn/quantized.py",
        "return self.alpha * F.linear",
        "return self.scale * F.linear",
        ("tests/test_lora.py", "weight_only"),
    ),
    Mutation(
        "an operand of another dtype let through",
        "csrc/cpu/geglu.cpp",
        "!b.same_shape(a) || b.dtype != a.dtype",
        "!b.same_shape(a)",
        border("another_dtype and geglu"),
    ),
    Mutation(
        "an input written to",
        "csrc/cpu/geglu.cpp",
        "value(a.some(i, n), b.some(i, n)), n);",
        "value(a.some(i, n), b.some(i, n)), n);\n        const_cast<T*>(a.p)[0] = T{};",
        kernel("geglu"),
    ),
    Mutation(
        "the step's index not checked",
        "csrc/cpu/solver_step.cpp",
        "at < 0 || at >= coef.shape[0]",
        "at < 0",
        border("refuses_rather"),
    ),
    Mutation(
        "every sample drawn from the first one's seed",
        "csrc/cpu/solver_step.cpp",
        "c.seed[b * c.seed_sample]",
        "c.seed[0]",
        kernel("solver_step"),
    ),
    Mutation(
        "the history's coefficients in the wrong slots",
        "csrc/cpu/solver_step.cpp",
        "splat(k.term[j][t])",
        "splat(k.term[j][c.terms - 1 - t])",
        kernel("solver_step"),
    ),
    Mutation(
        "the guided channels counted from each block's start",
        "csrc/cpu/solver_step.cpp",
        "int64_t split = c.guided - begin;",
        "int64_t split = c.guided;",
        kernel("solver_step"),
    ),
    Mutation(
        "a round of Philox left out",
        "csrc/philox.h",
        "kPhiloxRounds = 10",
        "kPhiloxRounds = 9",
        ("tests/test_noise.py", "4_ulp"),
    ),
    Mutation(
        "the same noise in every block",
        "csrc/cpu/noise.h",
        "(begin + at) / 4",
        "at / 4",
        ("tests/test_noise.py", "4_ulp"),
    ),
    Mutation(
        "a rank off by one",
        "csrc/cpu/row_abs_quantile.cpp",
        "s.rank >= count[bin]",
        "s.rank > count[bin]",
        kernel("row_abs_quantile"),
    ),
    Mutation(
        "a sample's last part left out",
        "csrc/cpu/row_covariance.cpp",
        "for (int64_t i = 1; i < parts; ++i) merge",
        "for (int64_t i = 1; i < parts - 1; ++i) merge",
        ("tests/test_rows.py", "covariance"),
    ),
    # gradients
    Mutation(
        "weight and bias take each other's sum",
        "csrc/cpu/norm_backward.cpp",
        "which == 2 ? sq : sp",
        "which == 3 ? sq : sp",
        kernel("norm_backward"),
    ),
    Mutation(
        "partial sums added in another order each time",
        "csrc/cpu/norm_backward.cpp",
        "for (int64_t k = k0; k <= k1; ++k) {\n",
        "static int turn = 0;\n"
        "                ++turn;\n"
        "                for (int64_t j = k0; j <= k1; ++j) {\n"
        "                    const int64_t k = k0 + (j - k0 + turn) % (k1 - k0 + 1);\n",
        ("tests/test_gradients.py", "number_of_threads"),
    ),
    Mutation(
        "partial sums cut by the number of threads",
        "csrc/cpu/td_params.cpp",
        "        float* const d_tau = to.tau ? to.tau + block * c.times * kLanes : nullptr;\n"
        "        for (int64_t t = 0; d_tau && t < c.times; ++t) store(d_tau + t * kLanes, F{});\n",
        "        for (int64_t t = 0; to.tau && t < c.times; ++t) store(to.tau + (block * c.times + t) * kLanes, F{});\n"
        "        float* const d_tau = to.tau ? to.tau + begin * c.times * kLanes : nullptr;\n",
        ("tests/test_ops.py", "number_of_threads and td_params_backward-"),
    ),
    Mutation(
        "the gradient of what is frozen, not of what is wanted",
        "diffkernels/_grad.py",
        "is_leaf=lambda g: g is None), ctx.needs_input_grad)",
        "is_leaf=lambda g: g is None), tuple(not n for n in ctx.needs_input_grad))",
        ("tests/test_gradients.py", "wanted"),
    ),
    # threads
    Mutation(
        "a thread's last item lost",
        "csrc/cpu/parallel.cpp",
        "begin = w.n * i / threads, end = w.n * (i + 1) / threads",
        "begin = w.n / threads * i, end = w.n / threads * (i + 1)",
        ("tests/test_ops.py", "number_of_threads and row_abs_quantile-"),
    ),
    # the border
    Mutation(
        "a negative bit let through",
        "csrc/bindings.cpp",
        "return owned(PyObject_CallOneArg(torch->is_neg.ptr(), a)).ptr() == Py_False;",
        "return true;",
        border("negative_bit or not_plain"),
    ),
    Mutation(
        "requires_grad ignored on the short way",
        "csrc/bindings.cpp",
        "|| (grad && owned(get(torch->requires_grad.ptr(), a, nullptr)).ptr() == Py_True)",
        "",
        border("not_plain"),
    ),
    Mutation(
        "modes ignored on the short way",
        "csrc/bindings.cpp",
        "PyObject_IsTrue(set.ptr()) != 0) return false;",
        "PyObject_IsTrue(set.ptr()) < 0) return false;",
        border("modes_and_fake"),
    ),
    Mutation(
        "the GIL held while a kernel works",
        "csrc/bindings.cpp",
        "        py::gil_scoped_release nogil;\n",
        "",
        border("gil_is_released"),
    ),
    Mutation(
        "a null pointer let through",
        "csrc/bindings.cpp",
        "if (!d.data && v.numel() != 0) return false;",
        "",
        border("not_plain"),
    ),
    # the ladder and the op
    Mutation(
        "a forced rung ignored",
        "csrc/bindings.cpp",
        "if (!owned(forced).is_none()) return device;",
        "",
        border("forced"),
    ),
    Mutation(
        "a forced rung's refusal swallowed",
        "diffkernels/_ladder.py",
        """raise RungError(f"{op.name}: rung {refused[0]!r} was forced, but it refuses: {refused[1]}")""",
        "pass",
        border("forced"),
    ),
    Mutation(
        "a LoRA's first outputs where others are wanted",
        "diffkernels/nn/quantized.py",
        "up[:, first:last]",
        "up[:, : len(scale)]",
        ("tests/test_lora.py", "joins"),
    ),
    Mutation(
        "a GroupNorm's eps forgotten where it writes codes",
        "diffkernels/fuse.py",
        "eps=norm.eps, **how",
        "**how",
        ("tests/test_conv.py", "sequence"),
    ),
    Mutation(
        "a silent fall to the reference",
        "diffkernels/_ladder.py",
        "    if forced is None:\n        _fell(",
        "    if not refused:\n        _fell(",
        border("fall_to_the_reference"),
    ),
    Mutation(
        "a transform let through that would be silently wrong",
        "diffkernels/_op.py",
        "if kind in kinds:",
        "if kind in ():",
        border("silently_wrong"),
    ),
    Mutation(
        "outputs laid out as the input is",
        "diffkernels/_op.py",
        "torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)",
        "torch.empty_like(x)",
        kernel("norm_modulate"),
    ),
    # Triton, interpreted
    Mutation(
        "Triton: the mask of a row's tail dropped",
        "diffkernels/triton/geglu.py",
        "(h * phi * u).to(y.dtype.element_ty), mask=mask)",
        "(h * phi * u).to(y.dtype.element_ty))",
        ("tests/test_ops.py", "test_kernel and geglu- and triton"),
    ),
    Mutation(
        "Triton: every sample drawn from the first one's seed",
        "diffkernels/triton/solver_step.py",
        "tl.load(seed + b)",
        "tl.load(seed)",
        ("tests/test_ops.py", "test_kernel and solver_step-seeded and triton"),
    ),
    Mutation(
        "Triton: norm_quantize's NaN lost to a float's maximum",
        "diffkernels/triton/_quantize.py",
        "h.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)",
        "tl.where(h == h, h, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)",
        ("tests/test_quantize_ops.py", "nan_wins and triton"),
    ),
    Mutation(
        "Triton: eps inside and outside confused",
        "diffkernels/triton/_norm.py",
        "tl.sqrt(ms + eps) if INSIDE else tl.sqrt(ms) + eps",
        "tl.sqrt(ms) + eps if INSIDE else tl.sqrt(ms + eps)",
        ("tests/test_ops.py", "test_kernel and norm_modulate- and outside and triton"),
    ),
    # CUDA
    Mutation(
        "CUDA: not on the current stream",
        "csrc/cuda/norm_modulate.cu",
        "const auto queue = static_cast<cudaStream_t>(stream.handle);",
        "const cudaStream_t queue = stream.handle ? nullptr : nullptr;",
        cuda("current_stream and norm_modulate"),
        "cuda",
    ),
    Mutation(
        "CUDA: the tensors' device not made current",
        "csrc/cuda/guard.cuh",
        "error = cudaSetDevice(now);",
        "error = cudaSuccess;",
        cuda("second_device"),
        "cuda",
        devices=2,
    ),
    Mutation(
        "CUDA: coefficients read before they are there",
        "csrc/cuda/solver_step.cu",
        "    __syncthreads();\n\n    const float* c = k + rows;",
        "\n    const float* c = k + rows;",
        cuda("crowded and solver_step"),
        "cuda",
    ),
    Mutation(
        "CUDA: warps' sums read before they are there",
        "csrc/cuda/row_covariance.cu",
        "    __syncthreads();\n    if (tid < kSums)\n",
        "    if (tid < kSums)\n",
        cuda("crowded and row_covariance"),
        "cuda",
    ),
    Mutation(
        "CUDA: blocks' counts read before all are there",
        "csrc/cuda/row_abs_quantile.cu",
        "if (turn != d.chunks - 1) return;",
        "if (turn != 0) return;",
        cuda("crowded and row_abs_quantile"),
        "cuda",
    ),
    Mutation(
        "CUDA: threads beyond the end write",
        "csrc/cuda/geglu.cu",
        "if (e >= static_cast<Index>(c.total)) return;",
        "",
        ("tests/test_ops.py", "test_kernel and geglu- and cuda-cuda"),
        "cuda",
    ),
    Mutation(
        "CUDA: the last block not launched",
        "csrc/cuda/geglu.cu",
        "(c.total / kVec + kThreads - 1) / kThreads)",
        "(c.total / kVec - 1) / kThreads)",
        ("tests/test_ops.py", "test_kernel and geglu- and cuda-cuda"),
        "cuda",
    ),
    Mutation(
        "CUDA: an offset of 32 bits",
        "csrc/cuda/geglu.cu",
        "c.a.rows.offset(row)",
        "static_cast<int32_t>(c.a.rows.offset(row))",
        ("tests/test_ops.py", "test_offsets and geglu- and cuda-cuda"),
        "cuda",
    ),
]


class Broken(Exception):
    """A mutation that does not apply, build or import: the table is at fault, not the tests."""


@dataclass
class Tree:
    """A copy of the tree that is built, mutated and mended again."""

    root: Path
    device: str

    def __post_init__(self) -> None:
        self.build, self.clean = self.root / "build", self.root / "clean"
        self.package = self.root / "diffkernels"
        self.root.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, self.root / part, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
            else:
                shutil.copy2(ROOT / part, self.root / part)
        dirs = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
        ).stdout.strip()
        configure = ["cmake", "-S", self.root, "-B", self.build, "-G", "Ninja", "-DDK_RUNGS=", "-DDK_LAST_FLAGS=-O1"]
        configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={self.package}", f"-DPython_EXECUTABLE={sys.executable}"]
        self.command(*configure, f"-Dpybind11_DIR={dirs}")
        self.make()
        shutil.copytree(self.build, self.clean, symlinks=True)
        for module in self.package.glob("_C*.so"):
            shutil.copy2(module, self.clean)

    def environment(self, tests: str) -> dict[str, str]:
        env = os.environ | {"PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        env["FORCE_CUDA"] = "1" if self.device == "cuda" else "0"
        if self.device == "cpu":  # as many threads on every machine, and Triton's interpreter where it is asked for
            env |= {"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": str(int("triton" in tests))}
        return env

    def command(self, *words: str | Path, tests: str = "") -> subprocess.CompletedProcess[str]:
        try:
            run = subprocess.run(
                [str(w) for w in words],
                cwd=self.root,
                env=self.environment(tests),
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=LIMIT if tests else None,
            )
        except subprocess.TimeoutExpired as e:
            raise Broken(f"the tests took more than {LIMIT} s: {tests}") from e
        if run.returncode and not tests:
            raise Broken(f"{' '.join(map(str, words))}\n{run.stdout[-4000:]}{run.stderr[-4000:]}")
        return run

    def make(self) -> None:
        self.command("cmake", "--build", self.build, "-j", "1" if self.device == "cpu" else str(os.cpu_count()))

    def test(self, files: tuple[str, ...], words: str, *options: str) -> tuple[int, str]:
        """pytest's exit status and output."""
        named = sorted(op for op in OPS if re.search(rf"\b{op}-", words))  # what -k leaves out is not collected either
        options += tuple(f"--op={op}" for op in named)
        pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-rf", "--color=no", *options)
        run = self.command(*pytest, *files, "-k", words, tests=words)
        return run.returncode, run.stdout + run.stderr

    def caught_by(self, m: Mutation) -> str | None:
        """The first test that fails under the mutation, or None."""
        path = self.root / m.file
        before, times = path.read_text(encoding="utf-8"), path.stat()
        if before.count(m.old) != 1:
            raise Broken(f"{m.file}: expected once, found {before.count(m.old)} times: {m.old!r}")
        path.write_text(before.replace(m.old, m.new), encoding="utf-8")
        try:
            if m.file.startswith("csrc/"):
                self.make()
            status, output = self.test((m.tests[0],), m.tests[1], "-x")
        finally:
            path.write_text(before, encoding="utf-8")
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if m.file.startswith("csrc/"):  # the clean objects and their times, instead of a second build
                shutil.copytree(self.clean, self.build, symlinks=True, dirs_exist_ok=True)
                for module in self.clean.glob("_C*.so"):
                    shutil.copy2(module, self.package)
        failed = re.search(r"(?m)^FAILED \S*?::(\S+)", output)
        if status == 0:
            return None
        if status != 1 or failed is None or re.search(r": (ImportError|ModuleNotFoundError)\b", output):
            raise Broken(f"no test failed, but pytest ended with {status}:\n{output[-4000:]}")
        return failed[1]


def here(device: str, only: str | None) -> list[Mutation]:
    return [m for m in MUTATIONS if m.device == device and (only is None or only in m.name)]


def control(tree: Tree, chosen: list[Mutation]) -> None:
    """Without a mutation every selection passes, and selects something."""
    for triton in (False, True):
        some = [m.tests for m in chosen if ("triton" in m.tests[1]) == triton]
        if not some:
            continue
        files = tuple(sorted({file for file, _ in some}))
        status, output = tree.test(files, " or ".join(sorted({f"({words})" for _, words in some})))
        if status:
            raise Broken(f"the tests do not pass without a mutation:\n{output[-6000:]}")


def results(chosen: list[Mutation], device: str, jobs: int, work: Path) -> Iterator[tuple[Mutation, str | None, float, bool]]:
    """(mutation, the test that caught it or what went wrong, seconds, whether it was caught), by `jobs` trees at a time."""
    jobs = max(1, min(jobs, len(chosen)))
    first = Tree(work / "0", device)
    control(first, chosen)

    def share(k: int) -> list[tuple[Mutation, str | None, float, bool]]:
        tree, done = first if k == 0 else Tree(work / str(k), device), []
        for m in chosen[k::jobs]:
            start = time.monotonic()
            try:
                by = tree.caught_by(m)
                caught = by is not None
            except Broken as e:
                by, caught = f"BROKEN: {str(e).splitlines()[0]}", False
                print(e, file=sys.stderr)
            done.append((m, by, time.monotonic() - start, caught))
            print(f"{m.name}: {by or 'NOT CAUGHT'} ({done[-1][2]:.0f} s)", flush=True)
        return done

    with ThreadPoolExecutor(jobs) as pool:
        for done in pool.map(share, range(jobs)):
            yield from done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORDS", help="the mutations whose names have these words in them")
    parser.add_argument("--list", action="store_true", help="names and files, and nothing else")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trees that are built and tested at a time (%(default)s)")
    given = parser.parse_args()
    chosen = here(given.device, given.only)
    if given.list or not chosen:
        print("\n".join(f"{m.name}: {m.file}" for m in chosen) or "no such mutation")
        return not chosen
    unseen: list[Mutation] = []
    if given.device == "cuda":
        import torch

        unseen = [m for m in chosen if m.devices > torch.cuda.device_count()]
        chosen = [m for m in chosen if m not in unseen]
        major, minor = torch.cuda.get_device_capability()
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")

    table, start = Table(title=f"{len(chosen)} mutations, {given.device}"), time.monotonic()
    for column in ("mutation", "file", "caught by", "s"):
        table.add_column(column)
    every = True
    with tempfile.TemporaryDirectory(prefix="mutation") as work:
        try:
            for m, by, seconds, caught in results(chosen, given.device, given.jobs, Path(work)):
                every = every and caught
                table.add_row(m.name, m.file, by or "NOT CAUGHT", f"{seconds:.0f}")
        except Broken as e:
            print(e, file=sys.stderr)
            return 1
    for m in unseen:
        table.add_row(m.name, m.file, f"not run: needs {m.devices} GPUs", "")
    Console(width=160, markup=False).print(table)
    print(f"{'all caught' if every else 'NOT ALL CAUGHT'}, in {time.monotonic() - start:.0f} s")
    return not every


if __name__ == "__main__":
    sys.exit(main())
