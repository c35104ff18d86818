"""What is particular of decode_attention: a cache that is written to, rolls, and is replayed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffkernels as dk
from diffkernels import ops

B, H, D, R = 2, 3, 16, 8


def tokens(n: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, n, H, D, generator=g) for _ in range(3))


def table(n: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(n)[:, None] / 10.0 ** torch.arange(R // 2)
    return angle.cos(), angle.sin()


def caches(length: int) -> tuple[Tensor, Tensor]:
    return torch.full((B, length, H, D), torch.nan), torch.full((B, length, H, D), torch.nan)


def rotated(x: Tensor, first: int = 0) -> Tensor:
    """By complex numbers."""
    n = x.shape[1]
    unit = torch.polar(torch.ones(n, R // 2), torch.arange(first, first + n)[:, None] / 10.0 ** torch.arange(R // 2))
    turned = torch.view_as_complex(x[..., :R].unflatten(-1, (-1, 2)).contiguous()) * unit[:, None]
    return torch.cat([torch.view_as_real(turned).flatten(-2), x[..., R:]], -1)


def index(n: int) -> Tensor:
    return torch.full((B,), n, dtype=torch.int32)


@pytest.mark.parametrize("step", [1, 3, 16])
def test_a_cache_gives_what_the_whole_sequence_gives(step) -> None:
    q, k, v = tokens(48)
    memory, (cos, sin) = caches(48), table(48)
    got = [
        ops.decode_attention(*(t[:, i : i + step] for t in (q, k, v)), *memory, index(i), cos, sin) for i in range(0, 48, step)
    ]
    expected = ops.attention(rotated(q), rotated(k), v, causal=True)
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(memory[0], rotated(k), rtol=1e-5, atol=1e-5)
    assert torch.equal(memory[1], v)


def test_a_rolling_cache_keeps_the_sinks_and_the_last_tokens() -> None:
    q, k, v = tokens(40)
    memory, (cos, sin) = caches(12), table(40)
    for i in range(0, 40, 2):
        o = ops.decode_attention(*(t[:, i : i + 2] for t in (q, k, v)), *memory, index(i), cos, sin, sinks=3)
        here = [*range(min(3, i + 2)), *range(max(3, i + 2 - 9), i + 2)]
        keys, values = rotated(k)[:, here], v[:, here]
        torch.testing.assert_close(o, ops.attention(rotated(q)[:, i : i + 2], keys, values, causal=True), rtol=1e-5, atol=1e-5)


def test_the_same_positions_again_overwrite() -> None:
    """A Jacobi iteration: other tokens at the same places leave no trace of the first ones."""
    memory, again = caches(20), caches(20)
    before, first, second = tokens(7, seed=1), tokens(4, seed=2), tokens(4, seed=3)
    for m in (memory, again):
        ops.decode_attention(*before, *m, index(0))
    ops.decode_attention(*first, *memory, index(7))
    assert torch.equal(
        ops.decode_attention(*second, *memory, index(7)),
        ops.decode_attention(*second, *again, index(7)),
    )
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(memory, again, strict=True))


def test_only_the_new_tokens_slots_are_written() -> None:
    memory = caches(20)
    ops.decode_attention(*tokens(3), *memory, index(5))
    for t in memory:
        assert (~t.isnan()).all((0, 2, 3)).nonzero().flatten().tolist() == [5, 6, 7]


def test_the_index_is_read_at_every_call() -> None:
    """What a replayed CUDA graph relies on."""
    q, k, v = tokens(1)
    memory, i = caches(4), index(0)
    for n in range(4):
        ops.decode_attention(q, k, v, *memory, i)
        i += 1
        assert int((~memory[0].isnan()).all((0, 2, 3)).sum()) == n + 1


def test_autograd_sees_that_a_cache_was_written_to() -> None:
    memory = tuple(torch.zeros_like(t) for t in caches(8))
    weight = torch.ones(D, requires_grad=True)
    loss = (memory[0] * weight).sum()
    ops.decode_attention(*tokens(1), *memory, index(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("i", range(5))
def test_a_gradient_is_refused_by_name(i) -> None:
    given = [*tokens(1), *(torch.zeros_like(t) for t in caches(8))]
    given[i].requires_grad_()
    name = ("q", "k", "v", "k_cache", "v_cache")[i]
    with pytest.raises(RuntimeError, match=rf"^{name}: decode_attention has no gradient"):
        ops.decode_attention(*given, index(0))
    with torch.no_grad():
        assert ops.decode_attention(*given, index(0)).shape == (B, 1, H, D)


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        memory = caches(8)
        assert torch.equal(ops.decode_attention(*tokens(1), *memory, index(0)), tokens(1)[2])


def test_compiled_it_writes_too() -> None:
    def step(q, k, v, k_cache, v_cache, i):
        return ops.decode_attention(q, k, v, k_cache, v_cache, i) * 2

    plain, compiled = caches(8), caches(8)
    expected = step(*tokens(2), *plain, index(1))
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*tokens(2), *compiled, index(1))
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(plain, compiled, strict=True))


def test_explain_leaves_the_cache_alone() -> None:
    memory = caches(8)
    assert "->" in dk.explain(ops.decode_attention, *tokens(1), *memory, index(0))
    assert all(t.isnan().all() for t in memory)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"index": index(8)}, IndexError, "index: expected 0 to 7, got 8"),
        ({"index": index(-1)}, IndexError, "index: expected 0 to 7, got -1"),
        ({"sinks": 8}, ValueError, "sinks: expected 0 to 7"),
        ({"k_cache": torch.zeros(B, 1, H, D).expand(B, 8, H, D)}, ValueError, "k_cache: expected memory of its own"),
        ({"sin": None}, ValueError, "sin: expected a tensor beside cos"),
        ({"rope": "spiral"}, ValueError, "rope: expected one of 'interleaved', 'half'"),
        ({"scale": float("nan")}, ValueError, "scale: expected a number or None"),
    ],
)
def test_bad_input(change, error, words) -> None:
    q, k, v = tokens(1)
    memory, (cos, sin) = caches(8), table(8)
    good = {"q": q, "k": k, "v": v, "k_cache": memory[0], "v_cache": memory[1], "index": index(0), "cos": cos, "sin": sin}
    with pytest.raises(error, match=words):
        ops.decode_attention(**(good | change))
    assert all(t.isnan().all() for t in memory)


def test_too_many_tokens_are_sent_to_attention() -> None:
    with pytest.raises(ValueError, match=r"q: expected 1 to 64 new tokens \(more: ops.attention\), got 65"):
        ops.decode_attention(*tokens(65), *caches(100), index(0))
