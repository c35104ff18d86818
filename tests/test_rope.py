"""Rotary tables and `ops.qkv_prep`: against complex numbers, against what diffusers computes, and what a rotation must keep."""

import pytest
import torch
import torch.nn.functional as F

import diffkernels as dk
from diffkernels import ops
from diffkernels._ladder import missing
from diffkernels.nn import axial_rope, rope_table

RUNGS = [rung for rung in ("reference", "cpu", "avx2", "avx512") if missing(rung, "qkv_prep", "cpu") is None]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=RUNGS)
def rung(request):
    with dk.rung(request.param):
        yield request.param


def heads(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(x: torch.Tensor, positions: torch.Tensor, rope: str = "interleaved", theta: float = 10_000.0) -> torch.Tensor:
    """By complex numbers, in float64: x [B, S, H, D]."""
    d = x.shape[-1]
    order = torch.arange(d).view(2, -1).T.flatten() if rope == "half" else torch.arange(d)
    pairs = torch.view_as_complex(x.double()[..., order].unflatten(-1, (-1, 2)).contiguous())
    turns = torch.exp(1j * positions.double()[:, None] * theta ** (-2 * torch.arange(d // 2).double() / d))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)[..., order.argsort()]


@pytest.mark.parametrize("rope", ["interleaved", "half"])
def test_a_rotation_is_a_complex_product(rung, rope) -> None:
    q, k, positions = heads(2, 50, 3, 40), heads(2, 50, 2, 40, seed=1), torch.arange(50) + 0.5
    cos, sin = rope_table(positions, 40)
    for got, x in zip(ops.qkv_prep(q, k, cos=cos, sin=sin, rope=rope), (q, k), strict=True):
        torch.testing.assert_close(got.double(), turned(x, positions, rope), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rope", ["interleaved", "half"])
def test_scores_know_distances_alone_and_norms_stay(rung, rope) -> None:
    q, k = heads(1, 1, 1, 64).expand(1, 30, 1, 64), heads(1, 1, 1, 64, seed=1).expand(1, 30, 1, 64)
    rotated = []
    for start in (0, 1000):
        cos, sin = rope_table(start + torch.arange(30), 64)
        rotated.append(ops.qkv_prep(q, k, cos=cos, sin=sin, rope=rope))
    (q0, k0), (q1, k1) = rotated
    torch.testing.assert_close(q0[0, :, 0] @ k0[0, :, 0].T, q1[0, :, 0] @ k1[0, :, 0].T, rtol=0, atol=2e-5)
    torch.testing.assert_close(q0.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(q0[:, 0], q[:, 0], rtol=0, atol=0)  # position 0


def test_tables_are_of_float64s_digits() -> None:
    position = 123_456
    cos, sin = rope_table(torch.tensor([position]), 8)
    angles = position * torch.tensor([1.0, 10.0**-1, 10.0**-2, 10.0**-3], dtype=torch.float64)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, 4)
    torch.testing.assert_close(cos[0].double(), angles.cos(), rtol=0, atol=6e-8)
    torch.testing.assert_close(sin[0].double(), angles.sin(), rtol=0, atol=6e-8)


def test_axes_of_a_grid() -> None:
    cos, sin = axial_rope((2, 3, 5), (16, 24, 8))
    assert cos.shape == sin.shape == (30, 24)
    token = (1 * 3 + 2) * 5 + 4  # frame 1, row 2, column 4
    parts = [rope_table(torch.tensor(p), d) for p, d in ((1, 16), (2, 24), (4, 8))]
    assert torch.equal(cos[token], torch.cat([c for c, _ in parts])) and torch.equal(
        sin[token], torch.cat([s for _, s in parts])
    )
    assert all(map(torch.equal, axial_rope((7,), (6,)), rope_table(torch.arange(7), 6)))


def test_what_tables_refuse() -> None:
    with pytest.raises(ValueError, match="dim: expected an even number of columns, got 7"):
        rope_table(torch.arange(3), 7)
    with pytest.raises(ValueError, match="dims: expected one for each of 1 to 3 sizes, got 1 for 2"):
        axial_rope((2, 3), (8,))
    with pytest.raises(ValueError, match="dims: expected one"):
        axial_rope((2, 3, 4, 5), (8, 8, 8, 8))


@pytest.mark.parametrize(("rope", "unbind"), [("interleaved", -1), ("half", -2)])
def test_flux_of_diffusers(rung, rope, unbind) -> None:
    """Its tables, and its rotation after its norm of each head."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    positions = torch.arange(40)
    theirs = embeddings.get_1d_rotary_pos_embed(
        64, positions, use_real=True, repeat_interleave_real=rope == "interleaved", freqs_dtype=torch.float64
    )
    cos, sin = rope_table(positions, 64)
    for ours, full in zip((cos, sin), theirs, strict=True):
        part = full[:, ::2] if rope == "interleaved" else full[:, :32]
        torch.testing.assert_close(ours, part.float(), rtol=0, atol=1e-7)
    q, k = heads(2, 40, 2, 4, 64).unbind(2)
    weights = heads(64, seed=1), heads(64, seed=2)
    got = ops.qkv_prep(q, k, q_weight=weights[0], k_weight=weights[1], cos=cos, sin=sin, rope=rope, norm="rms")
    for mine, x, w in zip(got, (q, k), weights, strict=True):
        normed = F.rms_norm(x, (64,), w, 1e-6)
        expected = embeddings.apply_rotary_emb(normed, theirs, use_real_unbind_dim=unbind, sequence_dim=1)
        torch.testing.assert_close(mine, expected.float(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("kind", ["rms_norm", "rms_norm_across_heads", "layer_norm"])
def test_norms_of_diffusers_attention(rung, kind) -> None:
    """SD 3's per head, Wan's across heads, and LayerNorm, as its Attention makes them, with the projections' bias."""
    processor = pytest.importorskip("diffusers.models.attention_processor")
    theirs = processor.Attention(query_dim=48, heads=4, kv_heads=4, dim_head=12, qk_norm=kind, bias=True, eps=1e-6)
    for i, p in enumerate(theirs.parameters()):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    x, across = heads(2, 9, 48, seed=3), kind.endswith("across_heads")
    with torch.no_grad():
        expected = []
        for linear, norm in ((theirs.to_q, theirs.norm_q), (theirs.to_k, theirs.norm_k)):
            h = linear(x)
            expected.append(norm(h).unflatten(2, (4, 12)) if across else norm(h.unflatten(2, (4, 12))))
        expected.append(theirs.to_v(x).unflatten(2, (4, 12)))
        plain = [F.linear(x, f.weight).unflatten(2, (4, 12)) for f in (theirs.to_q, theirs.to_k, theirs.to_v)]
        got = ops.qkv_prep(
            *plain,
            *(f.bias for f in (theirs.to_q, theirs.to_k, theirs.to_v)),
            theirs.norm_q.weight,
            theirs.norm_k.weight,
            getattr(theirs.norm_q, "bias", None),
            getattr(theirs.norm_k, "bias", None),
            norm="layer" if kind == "layer_norm" else "rms",
            across=across,
        )
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_values_are_left_alone_or_copied(rung) -> None:
    q, k, v = heads(2, 5, 3, 2, 8).unbind(2)
    assert len(ops.qkv_prep(q, k)) == 2
    copied = ops.qkv_prep(q, k, v)[2]
    assert torch.equal(copied, v) and copied.is_contiguous() and copied.data_ptr() != v.data_ptr()


def test_nothing_comes_from_beyond_the_rotated_columns(rung) -> None:
    """An infinity beside the last pair stays where it is."""
    q = heads(1, 3, 2, 33)
    q[..., 20:] = torch.inf
    cos, sin = rope_table(torch.arange(3), 20)
    for rope in ("interleaved", "half"):
        got, _ = ops.qkv_prep(q, q, cos=cos, sin=sin, rope=rope)
        assert got[..., :20].isfinite().all() and (got[..., 20:] == torch.inf).all()
