"""Attention in 8 bits: how far from float64 it is, exact sums, what is never read, and what `attention` makes of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import diffkernels as dk
from diffkernels import ops
from diffkernels._ladder import LADDER, missing
from diffkernels.models import DiT
from diffkernels.ops import _quantize

pytestmark = pytest.mark.usefixtures("one_thread")

NONE = (None,) * 6


def rungs_of(op: str) -> list[str]:
    return [rung for rung in LADDER["cpu"] if missing(rung, op, "cpu") is None]


CODERS = rungs_of("qkv_quantize")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def data(kind: str, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, 512, 3, d]; logits of standard deviation 1, or 1.5 where they are wide: at 3 codes of 8 bits
    end at 0.9998 and 0.018."""
    q, k, v = (normal(i, 1, 512, 3, d) for i in range(3))
    if kind == "wide-logits":
        q = 1.5 * q
    if kind == "k-biased":
        k = k + 6 * normal(3, 1, 1, 3, d)
    if kind == "v-biased":
        v = v + 6 * normal(4, 1, 1, 3, d)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("rung", rungs_of("attention_int8"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("d", [40, 64, 72, 128])
@pytest.mark.parametrize("kind", ["gaussian", "wide-logits", "k-biased", "v-biased"])
def test_close_to_float64(kind, d, dtype, rung) -> None:
    """The gates for int8 scores beside values in 16 bits: cosine >= 0.9999, relative L1 <= 0.015."""
    q, k, v = data(kind, d, dtype)
    exact = ops.attention(q.double(), k.double(), v.double())
    with dk.rung(rung):
        o = ops.attention(q, k, v, precision="int8").double() if rung in CODERS else by_hand(q, k, v)
    assert F.cosine_similarity(o.flatten(), exact.flatten(), 0) >= 0.9999
    assert (o - exact).abs().sum() <= 0.015 * exact.abs().sum()


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of a rung that multiplies codes, but makes none."""
    center = k.float().mean(1, keepdim=True)
    coded = [t for x in (q.float(), k.float() - center) for t in _quantize.rows(x, None, 0)]
    return ops.attention_int8(*coded, v, *NONE, "none", q.shape[-1] ** -0.5)[0].double()


@pytest.mark.parametrize("rung", rungs_of("attention_int8"))
@pytest.mark.parametrize("d", [1, 3, 60, 64, 72, 251, 256])
def test_sums_are_exact(d, rung) -> None:
    """Of one key the log-sum-exp is the score itself: an integer, up to 256 · 127², times powers of two."""
    generator = torch.Generator().manual_seed(d)
    q, k = (torch.randint(-127, 128, (2, s, 2, d), dtype=torch.int8, generator=generator) for s in (9, 1))
    q[:, 0], k[:, 0, 0] = 127, -127
    q[:, 1] = -127
    scales = [torch.full(t.shape[:3], 2.0**-9) for t in (q, k)]
    with dk.rung(rung):
        _, lse = ops.attention_int8(q, scales[0], k, scales[1], normal(0, 2, 1, 2, 8), *NONE, "none", 1.0)
    scores = torch.einsum("bshd,bthd->bhs", q.double(), k.double()) * 2.0**-18
    torch.testing.assert_close(lse.double(), scores, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("rung", CODERS)
@pytest.mark.parametrize("how", [{}, {"norm": "rms"}, {"norm": "layer", "rope": "half"}], ids=["plain", "rms", "layer-half"])
def test_codes_are_those_of_what_qkv_prep_leaves(how, rung) -> None:
    q, k, v = normal(0, 2, 7, 3, 4, 72).unbind(2)
    table = {"cos": normal(1, 7, 36), "sin": normal(2, 7, 36)} if how else {}
    with dk.rung(rung):
        prepared = ops.qkv_prep(q, k, v, **table, **how)
        found = ops.qkv_quantize(q, k, v, **table, **how)
    for codes, scale, t in ((*found[:2], prepared[0]), (*found[2:4], prepared[1])):
        expected, expected_scale = _quantize.rows(t, None, 0)
        torch.testing.assert_close(scale, expected_scale, rtol=3e-7, atol=0)  # sums may be contracted otherwise
        assert (codes.int() - expected.int()).abs().max() <= 1 and (codes != expected).float().mean() < 0.01
    assert torch.equal(found[4], prepared[2])


def test_padding_is_never_read_and_a_center_is_made_without_it() -> None:
    q, k, v = (normal(i, 3, s, 2, 24) for i, s in enumerate((20, 300, 300)))
    lengths = torch.tensor([300, 0, 130], dtype=torch.int32)
    expected = ops.attention(q, k, v, key_lengths=lengths, precision="int8", lse=True)
    k[1:, 130:] = v[1:, 130:] = torch.nan
    k[1], v[1] = torch.nan, torch.inf
    found = ops.attention(q, k, v, key_lengths=lengths, precision="int8", lse=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0][1].eq(0).all() and found[1][1].eq(-torch.inf).all()


@pytest.mark.parametrize("more", ["none", "lengths", "grouped", "packed", "indexed", "indexed-lengths", "causal", "empty"])
def test_log_sum_exp_is_that_of_the_keys_as_they_were(more) -> None:
    """The center that was taken off is in it again."""
    q, k, v = (normal(i, b, s, h, 64) for i, (b, s, h) in enumerate(((2, 30, 4), (2, 200, 4), (2, 200, 4))))
    k = k + 3 * normal(3, 1, 1, 4, 64)
    given: dict = {}
    if more == "lengths":
        given["key_lengths"] = torch.tensor([200, 37], dtype=torch.int32)
    if more == "grouped":
        k, v = k[:, :, :2], v[:, :, :2]
    if more == "packed":
        q, k, v = q[0], k[0], v[0]
        given = {"cu_q": torch.tensor([0, 11, 30], dtype=torch.int32), "cu_k": torch.tensor([0, 150, 200], dtype=torch.int32)}
    if more.startswith("indexed"):
        q, given["kv_index"] = normal(4, 3, 30, 4, 64), torch.tensor([1, 0, 1], dtype=torch.int32)
    if more == "indexed-lengths":
        given["key_lengths"] = torch.tensor([200, 50, 9], dtype=torch.int32)
    if more == "causal":
        given["causal"] = True
    if more == "empty":
        k, v = k[:, :0], v[:, :0]
    o, lse = ops.attention(q, k, v, **given, precision="int8", lse=True)
    exact, exact_lse = ops.attention(q.double(), k.double(), v.double(), **given, lse=True)
    # without a center the keys' bias sets the scale of their codes
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0.01, atol=0.3 if more == "indexed-lengths" else 0.1)
    torch.testing.assert_close(o.double(), exact, rtol=0, atol=0.3 if more == "indexed-lengths" else 0.1)


@pytest.mark.parametrize("rung", rungs_of("attention_int8"))
def test_what_is_not_finite_reaches_who_sees_it(rung) -> None:
    q, k, v = (normal(i, 1, 40, 2, 24) for i in range(3))
    q[0, 3, 0, 5], k[0, 7, 1, 2] = torch.nan, torch.inf
    coded = [*_quantize.rows(q, None, 0), *_quantize.rows(k, None, 0)]
    with dk.rung(rung):
        o, _ = ops.attention_int8(*coded, v, *NONE, "none", 0.2)
    lost = o.isnan().any(-1)
    assert lost[0, 3, 0] and lost[0, :, 1].all() and lost.sum() == 41


def test_refused_with_words() -> None:
    q, k, v = (normal(i, 1, 4, 2, 8) for i in range(3))
    with pytest.raises(ValueError, match="precision: expected None or 'int8', got 'fp8'"):
        ops.attention(q, k, v, precision="fp8")
    with pytest.raises(TypeError, match="k: expected q's dtype"):
        ops.attention(q, k.half(), v, precision="int8")
    with pytest.raises(RuntimeError, match="gradient"):
        ops.attention(q.requires_grad_(), k, v, precision="int8")
    codes, scale = _quantize.rows(k, None, 0)
    with pytest.raises(ValueError, match=r"k_scale: expected a scale a row, \[1, 4, 2\]; got \[1, 4\]"):
        ops.attention_int8(codes, scale, codes, scale[..., 0], v, *NONE, "none", 1.0)
    with pytest.raises(TypeError, match=r"q: expected int8, got torch\.float32"):
        ops.attention_int8(k, scale, codes, scale, v, *NONE, "none", 1.0)
    with pytest.raises(ValueError, match=r"center: expected \[2, 8\] or \[1, 2, 8\], got \[8\]"):
        ops.qkv_quantize(k, k, center=torch.zeros(8))
    with pytest.raises(ValueError, match="q: expected a head dimension of 1 to 256, got 257"):
        ops.qkv_quantize(*(torch.zeros(1, 2, 1, 257) for _ in range(2)))


def test_a_model_that_is_told_to() -> None:
    """A DiT of random weights: its answer is within 1 % of the one without."""
    torch.manual_seed(0)
    model = DiT(input_size=16, hidden_size=128, depth=4, num_heads=2, num_classes=3).eval()
    for p in model.parameters():  # the official one starts as the identity
        torch.nn.init.normal_(p, std=0.05) if p.ndim > 1 else None
    x, t, y = normal(0, 2, 4, 16, 16), torch.tensor([10.0, 900.0]), torch.tensor([0, 2])
    with torch.no_grad():
        plain = model(x, t, y)
        for block in model.blocks:
            block.attn.precision = "int8"
        coded = model(x, t, y)
    assert not torch.equal(coded, plain)
    assert (coded - plain).norm() <= 0.01 * plain.norm()
