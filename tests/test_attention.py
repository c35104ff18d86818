"""PyTorch's scaled_dot_product_attention, as our function and under its own name, beside torch's."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffkernels as dk
from diffkernels import _sdpa, ops

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# query, key, value (None: as key), keyword arguments; a mask is its shape and dtype
CALLS = {
    "4d": ((2, 3, 17, 24), (2, 3, 33, 24), None, {}),
    "3d": ((3, 17, 24), (3, 33, 24), None, {}),
    "2d": ((17, 24), (33, 24), None, {}),
    "5d": ((2, 2, 3, 9, 16), (2, 2, 3, 11, 16), None, {}),
    "values": ((2, 3, 17, 24), (2, 3, 33, 24), (2, 3, 33, 40), {}),
    "scale": ((2, 3, 17, 24), (2, 3, 33, 24), None, {"scale": 0.3}),
    "causal": ((2, 3, 17, 24), (2, 3, 17, 24), None, {"is_causal": True}),
    "causal-longer": ((2, 3, 17, 24), (2, 3, 33, 24), None, {"is_causal": True}),
    "causal-shorter": ((2, 3, 33, 24), (2, 3, 17, 24), None, {"is_causal": True}),
    "causal-3d": ((3, 17, 24), (3, 33, 24), None, {"is_causal": True}),
    "one-batch": ((2, 3, 17, 24), (1, 3, 33, 24), None, {}),
    "one-head": ((2, 3, 17, 24), (2, 1, 33, 24), (2, 3, 33, 24), {}),
    "one-query-batch": ((1, 3, 17, 24), (2, 3, 33, 24), None, {}),
    "fewer-dimensions": ((2, 3, 17, 24), (3, 33, 24), (33, 24), {}),
    "value-adds-a-batch": ((3, 17, 24), (3, 33, 24), (2, 3, 33, 24), {}),
    "5d-broadcast": ((2, 1, 3, 9, 16), (1, 4, 3, 11, 16), (3, 11, 8), {}),
    "grouped": ((2, 6, 17, 24), (2, 2, 33, 24), None, {"enable_gqa": True}),
    "grouped-alike": ((2, 6, 17, 24), (2, 6, 33, 24), None, {"enable_gqa": True}),
    "grouped-3d": ((6, 17, 24), (2, 33, 24), None, {"enable_gqa": True}),
    "grouped-5d": ((2, 2, 6, 9, 16), (2, 2, 11, 16), (1, 2, 11, 16), {"enable_gqa": True}),
    "grouped-unlike": ((2, 6, 9, 16), (2, 2, 11, 16), (2, 3, 11, 16), {"enable_gqa": True}),
    "bool": ((2, 3, 17, 24), (2, 3, 33, 24), None, {"attn_mask": ((2, 3, 17, 33), torch.bool)}),
    "bool-keys": ((2, 3, 17, 24), (2, 3, 33, 24), None, {"attn_mask": ((2, 1, 1, 33), torch.bool)}),
    "bool-2d": ((2, 3, 17, 24), (2, 3, 33, 24), None, {"attn_mask": ((17, 33), torch.bool)}),
    "bool-3d": ((3, 17, 24), (3, 33, 24), None, {"attn_mask": ((3, 1, 33), torch.bool)}),
    "bool-5d": ((2, 2, 3, 9, 16), (2, 2, 3, 11, 16), None, {"attn_mask": ((2, 1, 1, 9, 11), torch.bool)}),
    "bool-5d-one": ((2, 2, 3, 9, 16), (2, 2, 3, 11, 16), None, {"attn_mask": ((1, 1, 3, 9, 11), torch.bool)}),
    "bool-grouped": ((2, 6, 9, 16), (2, 2, 11, 16), None, {"attn_mask": ((2, 6, 9, 11), torch.bool), "enable_gqa": True}),
    "float": ((2, 3, 17, 24), (2, 3, 33, 24), None, {"attn_mask": ((3, 17, 33), torch.float32)}),
    "float-own": ((2, 3, 17, 24), (2, 3, 33, 24), None, {"attn_mask": ((2, 1, 17, 33), None), "scale": 0.5}),
    "no-samples": ((0, 3, 17, 24), (0, 3, 33, 24), None, {}),
    "no-heads": ((2, 0, 17, 24), (2, 0, 33, 24), None, {}),
    "no-queries": ((2, 3, 0, 24), (2, 3, 33, 24), None, {}),
    "no-keys": ((2, 3, 17, 24), (2, 3, 0, 24), None, {}),
}  # fmt: skip


def drawn(name: str, dtype: torch.dtype, grad: bool = False):
    """q, k, v and the keyword arguments of a call."""
    q, k, v, kwargs = CALLS[name]
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=draw).to(dtype).requires_grad_(grad) for shape in (q, k, v or k)]
    kwargs = dict(kwargs)
    if "attn_mask" in kwargs:
        shape, kind = kwargs["attn_mask"]
        mask = torch.randn(shape, generator=draw)
        if kind == torch.bool:
            mask = mask < 0.7
            mask[..., 0, :] = False if mask.shape[-2] > 1 else mask[..., 0, :]  # the first query sees nothing
        elif dtype == torch.float64 or kind is None:
            mask = mask.to(dtype)
        kwargs["attn_mask"] = mask
    return tensors, kwargs


def torchs(*tensors, **kwargs):
    """torch's answer; of nothing by its slow path, since the kernel of some versions (2.11) divides by the number of heads."""
    with sdpa_kernel(SDPBackend.MATH) if tensors[0].numel() == 0 else nullcontext():
        return F.scaled_dot_product_attention(*tensors, **kwargs)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", CALLS)
def test_means_what_torchs_means(name, dtype) -> None:
    tensors, kwargs = drawn(name, dtype)
    close(dk.scaled_dot_product_attention(*tensors, **kwargs), torchs(*tensors, **kwargs))


@pytest.mark.parametrize("name", [n for n in CALLS if n != "no-heads"])
def test_gradients_are_torchs(name) -> None:
    found = []
    for attend in (dk.scaled_dot_product_attention, torchs):
        tensors, kwargs = drawn(name, torch.float64, grad=True)
        if "attn_mask" in kwargs and kwargs["attn_mask"].is_floating_point():
            tensors.append(kwargs["attn_mask"].requires_grad_())
        out = attend(*tensors[:3], **kwargs)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        found.append(torch.autograd.grad(out, tensors, grad))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_broadcasts_and_transposed_views_are_not_copied(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(ops, "attention", lambda q, k, v, *rest: seen.extend((q, k, v, rest[0])) or q)
    q, k, v = torch.randn(2, 9, 3, 4, 8).unbind(2)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    q, k = q.transpose(1, 2), k[:1].transpose(1, 2)
    dk.scaled_dot_product_attention(q, k, v[..., :1, :].transpose(1, 2), mask)
    assert [t.data_ptr() for t in seen] == [t.data_ptr() for t in (q, k, v, mask)]
    assert seen[1].stride()[0] == 0 and seen[2].stride()[2] == 0


def test_a_query_that_sees_no_key_gives_zero_as_torchs_does() -> None:
    """torch's math path and its CPU kernel agree: a softmax over nothing is 0, not NaN."""
    q = torch.randn(1, 2, 4, 8)
    for mask in (torch.zeros(4, 4, dtype=torch.bool), torch.full((4, 4), -torch.inf)):
        ours = dk.scaled_dot_product_attention(q, q, q, mask)
        with sdpa_kernel(SDPBackend.MATH):
            slow = F.scaled_dot_product_attention(q, q, q, mask)
        assert not ours.any() and not slow.any() and not F.scaled_dot_product_attention(q, q, q, mask).any()


def test_autocast_casts_as_it_does_for_torchs() -> None:
    q = torch.randn(2, 3, 9, 16)
    with torch.autocast("cpu"):
        for v in (q, q.bfloat16()):
            close(dk.scaled_dot_product_attention(q, q, v), F.scaled_dot_product_attention(q, q, v))
        assert dk.scaled_dot_product_attention(q.double(), q.double(), q.double()).dtype == torch.float64


X = torch.zeros(2, 3, 4, 8)
WRONG = {
    "dropout_p: expected 0": ((X, X, X), {"dropout_p": 0.1}),
    "attn_mask: expected None beside is_causal": ((X, X, X, torch.zeros(4, 4)), {"is_causal": True}),
    r"attn_mask: expected a shape that broadcasts to \[2, 3, 4, 4\]": ((X, X, X, torch.zeros(3, 1, 1, 4)), {}),
    r"attn_mask: expected .* \[3, 4, 4\], got \[2, 3, 4, 4\]": ((X[0], X[0], X[0], torch.zeros(2, 3, 4, 4)), {}),
    "leading dimensions that broadcast": ((X, X[:, :2], X[:, :2]), {}),
    "value: expected a number of heads that divides query's 3": ((X, X, X[:, :2]), {"enable_gqa": True}),
    "key: expected a number of heads that divides query's 3, got 0": ((X, X[:, :0], X), {"enable_gqa": True}),
    r"query: expected \[..., S, D\]": ((X[0, 0, 0], X, X), {}),
    r"key: expected \[..., H, S, D\]": ((X, X[0, 0], X), {"enable_gqa": True}),
    "head dimension": ((X, X[..., :7], X), {}),
    "v: expected k's batch, length and heads": ((X, X, X[:, :, :3]), {}),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_errors_name_the_argument(words) -> None:
    args, kwargs = WRONG[words]
    with pytest.raises(ValueError, match=words):
        dk.scaled_dot_product_attention(*args, **kwargs)


def test_errors_of_dtype() -> None:
    with pytest.raises(TypeError, match="k: expected q's dtype"):
        dk.scaled_dot_product_attention(X, X.half(), X)


def test_compiles_whole() -> None:
    tensors, kwargs = drawn("bool-keys", torch.float32, grad=True)
    fast = torch.compile(
        lambda q, k, v: dk.scaled_dot_product_attention(q, k, v, **kwargs), fullgraph=True, backend="aot_eager"
    )
    got, expected = fast(*tensors), dk.scaled_dot_product_attention(*tensors, **kwargs)
    close(got, expected)
    for a, b in zip(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        close(a, b)


def test_what_the_docs_show_runs() -> None:
    text = (Path(__file__).parents[1] / "docs/attention.md").read_text()
    try:
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(code, "docs/attention.md", "exec"), {})
    finally:
        dk.disable_sdpa()


# Under torch's own name


@pytest.fixture
def calls(monkeypatch):
    """Our kernels under torch's name; the calls that reach them. Undone after the test."""
    seen = []
    for name in ("attention", "attention_backward"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, op=op, **k: seen.append(name) or op(*a, **k))
    dk.enable_sdpa("cpu")
    yield seen
    dk.disable_sdpa()


BACKEND = ("4d", "scale", "causal", "causal-longer", "causal-shorter", "grouped", "bool", "bool-keys", "bool-2d", "float-own")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", BACKEND)
def test_torchs_name_runs_ours(name, dtype, calls) -> None:
    tensors, kwargs = drawn(name, dtype)
    got = F.scaled_dot_product_attention(*tensors, **kwargs)
    assert calls == ["attention"]
    dk.disable_sdpa()
    expected = F.scaled_dot_product_attention(*tensors, **kwargs)
    assert calls == ["attention"]
    close(got, expected)
    assert got.stride() == expected.stride()


@pytest.mark.parametrize("name", BACKEND)
def test_its_gradient_is_ours_too(name, calls) -> None:
    tensors, kwargs = drawn(name, torch.float32, grad=True)
    got = torch.autograd.grad(F.scaled_dot_product_attention(*tensors, **kwargs).square().sum(), tensors)
    assert calls == ["attention", "attention_backward"]
    dk.disable_sdpa()
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*tensors, **kwargs).square().sum(), tensors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CALLS if n not in (*BACKEND, "no-heads")])
def test_what_torch_gives_to_another_backend_stays_right(name, calls) -> None:
    tensors, kwargs = drawn(name, torch.float32)
    got = F.scaled_dot_product_attention(*tensors, **kwargs)
    dk.disable_sdpa()
    close(got, torchs(*tensors, **kwargs))


LAYOUTS = {
    "BHSD": lambda: torch.randn(2, 3, 9, 16),
    "BSHD": lambda: torch.randn(2, 9, 3, 16).transpose(1, 2),
    "packed": lambda: torch.randn(2, 9, 3, 3, 16)[:, :, 1].transpose(1, 2),
    "expanded": lambda: torch.randn(1, 3, 9, 16).expand(2, -1, -1, -1),
    "one-head": lambda: torch.randn(2, 1, 9, 16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_lie_as_torch_lays_them(layout, calls) -> None:
    """Compiled graphs count on it."""
    q = LAYOUTS[layout]()
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = []
    for _ in range(2):
        o, lse = run(q, q, q, 0.0, True)
        found.append((o, lse, *back(torch.ones_like(o), q, q, q, o, lse, 0.0, True)))
        dk.disable_sdpa()
    for got, expected in zip(*found, strict=True):
        assert all(n == 1 or a == b for n, a, b in zip(got.shape, got.stride(), expected.stride(), strict=True))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q", [torch.randn(1, 2, 9, 272), torch.randn(1, 2, 9, 16).double()], ids=["wide", "float64"])
def test_what_ours_does_not_do_goes_to_torchs_kernel(q, calls) -> None:
    q = q.requires_grad_()
    out = F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.2)
    (got,) = torch.autograd.grad(out.square().sum(), q)
    assert calls == []
    dk.disable_sdpa()
    expected = F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.2)
    assert torch.equal(out, expected) and torch.equal(got, torch.autograd.grad(expected.square().sum(), q)[0])


def test_compiled_graphs_run_ours_and_go_back(calls) -> None:
    """One graph, made while ours are there, without them and with them again: it calls aten's op, which is looked up."""
    tensors, kwargs = drawn("causal", torch.float32, grad=True)

    def step(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **kwargs)

    fast, expected = torch.compile(step, fullgraph=True), step(*tensors)
    calls.clear()
    got = fast(*tensors)
    close(got, expected)
    assert calls == ["attention"]
    grads = torch.autograd.grad(got.sum(), tensors)
    assert calls == ["attention", "attention_backward"]
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), tensors), strict=True):
        close(a, b)
    calls.clear()
    dk.disable_sdpa()
    close(fast(*tensors), expected)
    assert calls == []
    dk.enable_sdpa("cpu")
    close(fast(*tensors), expected)
    assert calls == ["attention"]


def test_on_and_off_as_often_as_one_likes(calls) -> None:
    q = torch.randn(1, 2, 9, 16)
    dk.enable_sdpa("cpu")
    dk.disable_sdpa()
    dk.disable_sdpa()
    F.scaled_dot_product_attention(q, q, q)
    assert calls == []
    for _ in range(3):
        dk.enable_sdpa("cpu")
        dk.disable_sdpa()
    F.scaled_dot_product_attention(q, q, q)
    assert calls == []
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'mps'"):
        dk.enable_sdpa("mps")


def test_torchs_kernels_are_back_to_the_bit_and_nothing_warns() -> None:
    """In a process of its own: torch warns of an overridden kernel once."""
    code = """
import torch, torch.nn.functional as F
dump = lambda: [torch._C._dispatch_dump(f"aten::_scaled_dot_product_flash_attention_for_cpu{s}") for s in ("", "_backward")]
before, q = dump(), torch.randn(2, 3, 65, 40)
expected = F.scaled_dot_product_attention(q, q, q)
import diffkernels
assert dump() == before, "at import"
diffkernels.enable_sdpa("cpu")
assert dump() != before
F.scaled_dot_product_attention(q, q, q)
diffkernels.disable_sdpa()
assert dump() == before
assert torch.equal(F.scaled_dot_product_attention(q, q, q), expected)
"""
    argv = [sys.executable, "-P", "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr


# CUDA's registration. Without a GPU its kernels run on CPU tensors, as plain functions, and torch's registry is asked alone


def own(*args, **kwargs):
    raise AssertionError("torch's own kernel")


@pytest.mark.parametrize("causal", [False, True])
def test_cudas_kernels_return_what_its_op_returns(causal) -> None:
    q, k, v = (torch.randn(2, n, 3, 16).transpose(1, 2).bfloat16() for n in (9, 11, 11))
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, debug = _sdpa._forward_cuda(own, q, k, v, 0.0, causal)
    mask = torch.ones(9, 11, dtype=torch.bool).tril(2) if causal else None  # bottom-right: what CausalBias counts on
    close(out, F.scaled_dot_product_attention(q, k, v, mask))
    assert out.stride() == q.stride() and (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 3, 9), torch.float32, True)
    assert (cum_q, cum_k, max_q, max_k) == (None, None, 9, 11)
    meta = torch.ops.aten._scaled_dot_product_flash_attention(*(t.to("meta") for t in (q, k, v)), 0.0, causal)
    assert [t.dtype for t in (seed, offset, debug)] == [t.dtype for t in (meta[6], meta[7], meta[8])]
    assert [t.shape for t in (seed, offset, debug)] == [t.shape for t in (meta[6], meta[7], meta[8])]
    grads = _sdpa._backward_cuda(own, torch.ones_like(out), q, k, v, out, lse, None, None, 9, 11, 0.0, causal, seed, offset)
    leaves = [t.float().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, mask).sum(), leaves)
    for got, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(got.float(), e, rtol=2e-2, atol=2e-2)
    with pytest.raises(AssertionError, match="torch's own"):
        _sdpa._forward_cuda(own, q, k, v, 0.1)


def test_cudas_implementation_is_one_of_torchs(monkeypatch) -> None:
    attention = pytest.importorskip("torch.nn.attention")
    if not hasattr(attention, "activate_flash_attention_impl"):
        pytest.skip("this torch has no registry of flash attention")
    name = "aten::_scaled_dot_product_flash_attention"
    before = torch._C._dispatch_dump(name)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.library, "get_kernel", lambda name, key: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.enable_sdpa("cuda")
    assert attention.current_flash_attention_impl() == "diffkernels" and torch._C._dispatch_dump(name) != before
    dk.disable_sdpa()
    assert attention.current_flash_attention_impl() is None and torch._C._dispatch_dump(name) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA: no GPU here, where torch's name would run our kernels")
def test_torchs_name_runs_ours_on_a_gpu() -> None:
    q, k, v = (t.cuda().bfloat16() for t in torch.randn(3, 2, 4, 129, 72))
    expected = F.scaled_dot_product_attention(q, k, v)
    dk.enable_sdpa("cuda")
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            close(F.scaled_dot_product_attention(q, k, v), expected)
    finally:
        dk.disable_sdpa()


@pytest.mark.parametrize("name", ["kv_index", "key_lengths", "cu_q", "cu_k"])
def test_an_index_one_past_the_last_is_refused_by_name(name) -> None:
    """The last that there is is taken: a comparison that is off by one shows."""
    q, k, v = torch.randn(2, 5, 1, 8), torch.randn(3, 7, 1, 8), torch.randn(3, 7, 1, 8)
    good = {"kv_index": torch.tensor([0, 2], dtype=torch.int32), "key_lengths": torch.tensor([1, 7], dtype=torch.int32)}
    if name not in good:
        q, k, v = q[0], k[0], v[0]
        good = {"cu_q": torch.tensor([0, 5], dtype=torch.int32), "cu_k": torch.tensor([0, 7], dtype=torch.int32)}
    assert ops.attention(q, k, v, **good).isfinite().all()
    bad = good[name].clone()
    bad[-1] += 1
    with pytest.raises(IndexError, match=name):
        ops.attention(q, k, v, **(good | {name: bad}))
