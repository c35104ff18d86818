"""What is particular to the real gradients: that they run, that no thread count shows in them, and their edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffkernels import ops
from diffkernels._op import OPS
from diffkernels.bench import oracle
from diffkernels.bench.passes import count


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.fixture
def called(monkeypatch) -> dict[str, int]:
    """How often each op that has a gradient's kernels allocated its outputs."""
    counts: dict[str, int] = {}
    for name in ("norm_backward", "td_params_backward"):

        def allocate(*args, name=name, own=OPS[name].allocate):
            counts[name] = counts.get(name, 0) + 1
            return own(*args)

        monkeypatch.setattr(OPS[name], "allocate", allocate)
    return counts


def test_the_gradients_are_ops_of_their_own(called) -> None:
    x, delta, gate, scale, shift = leaf(2, 5, 16), leaf(2, 5, 16, seed=1), leaf(2, 16), leaf(2, 16), leaf(2, 16)
    ops.norm_modulate(x, scale, shift).sum().backward()
    x_new, y = ops.gate_residual_norm(x, delta, gate, scale, shift)
    (x_new * y).sum().backward()
    ops.td_params(leaf(9), leaf(9), leaf(9), leaf(9), leaf(2)).sum().backward()
    assert called == {"norm_backward": 2, "td_params_backward": 1}


def test_only_what_is_wanted_is_computed(monkeypatch) -> None:
    asked = []
    own = OPS["norm_backward"].allocate
    monkeypatch.setattr(OPS["norm_backward"], "allocate", lambda *args: asked.append(args[-1]) or own(*args))
    frozen = torch.randn(16)
    ops.norm_modulate(leaf(2, 5, 16), weight=frozen, bias=leaf(16)).sum().backward()
    ops.gate_residual_norm(torch.randn(2, 5, 16), leaf(2, 5, 16), torch.randn(2, 16))[0].sum().backward()
    assert asked == [0b10001, 0b0100000]


def test_either_result_of_gate_residual_norm_alone_has_a_gradient() -> None:
    for which in (0, 1):
        x, delta, gate = leaf(2, 5, 16), leaf(2, 5, 16, seed=1), leaf(2, 16, seed=2)
        got = torch.autograd.grad(ops.gate_residual_norm(x, delta, gate)[which].square().sum(), (x, delta, gate))
        body = OPS["gate_residual_norm"].body
        want = torch.autograd.grad(body(x, delta, gate)[which].square().sum(), (x, delta, gate))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", [48, 1152, 8200])
def test_any_number_of_threads_gives_the_same_bits(d) -> None:
    rows = 131
    x, g, delta = (torch.randn(rows, d) for _ in range(3))
    scale, weight, gate = torch.randn(rows, d), torch.randn(d), torch.randn(d)
    args = (g, x, scale, None, weight, None, "layer", 1e-6, "inside", g, delta, gate, 0b1101011)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(ops.norm_backward(*args))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("tokens", [41, 64])
def test_sums_over_several_chunks_are_right(tokens) -> None:
    """Groups of rows that begin and end within chunks, at their edges and across several of them."""
    op = OPS["norm_backward"]
    x, g, residual, delta = (torch.randn(3, tokens, 1152) for _ in range(4))
    scale, shift, weight, gate = torch.randn(3, 1152), torch.randn(3, 1152), torch.randn(1152), torch.randn(3, 1152)
    args = (g, x, scale, shift, weight, None, "layer", 1e-6, "inside", residual, delta, gate, 0b1101111)
    exact, reference = oracle.exact(op, args), list(op.reference(*args))
    for got, e, r in zip(ops.norm_backward(*args), exact, reference, strict=True):
        oracle.compare(got, e, r, c=3.0, own=oracle.own_error(exact, reference))


def test_a_padded_token_of_zeros_has_no_gradient_but_no_nan() -> None:
    """sqrt has no slope at 0: autograd's answer to DiMR's RMSNorm of a zero row is NaN."""
    x = torch.zeros(2, 8).requires_grad_()
    y = ops.norm_modulate(x, norm="rms", eps=1e-8, eps_mode="outside")
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 1e-3))
    assert grad.isfinite().all()
    assert torch.equal(y, torch.zeros_like(y))


def test_wrong_requests_are_named() -> None:
    x = torch.randn(2, 4)
    how = ("layer", 1e-6, "inside")
    with pytest.raises(ValueError, match="wanted: 0b10 asks"):
        ops.norm_backward(x, x, None, None, None, None, *how, None, None, None, 2)
    with pytest.raises(ValueError, match="wanted: expected 0 to 127"):
        ops.norm_backward(x, x, None, None, None, None, *how, None, None, None, 128)
    with pytest.raises(ValueError, match="gate: expected None without delta"):
        ops.norm_backward(x, x, None, None, None, None, *how, None, None, torch.randn(4), 1)
    with pytest.raises(ValueError, match="grad: expected x's shape"):
        ops.norm_backward(x[:1], x, None, None, None, None, *how, None, None, None, 1)
    with pytest.raises(ValueError, match="w: expected \\[3\\]"):
        ops.td_params(torch.randn(3), torch.randn(3), torch.randn(2), torch.randn(3), torch.randn(1))


def test_the_residual_with_the_next_norm_is_four_passes() -> None:
    """What the tracer counts, and the documentation says: 2 reads and 2 writes instead of 6 and 5."""
    x, delta = torch.randn(2, 64, 256), torch.randn(2, 64, 256)
    gate, scale, shift = torch.randn(3, 2, 256)

    def eager():
        h = x + gate[:, None] * delta
        return F.layer_norm(h, (256,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    before = count(eager, x.numel())
    after = count(lambda: ops.gate_residual_norm(x, delta, gate, scale, shift), x.numel())
    assert (round(before.reads), round(before.writes)) == (6, 5)
    assert (round(after.reads), round(after.writes), after.calls) == (2, 2, 1)
