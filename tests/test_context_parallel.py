"""Attention over a sequence that two processes share: what `lse` is for.

torch's own engine, `torch.distributed.tensor.experimental.context_parallel`, handles aten's flash, efficient and cuDNN
attention, the ops of GPUs. On CPU tensors `F.scaled_dot_product_attention` runs another op,
`_scaled_dot_product_flash_attention_for_cpu`, for which torch 2.13 has no sharding strategy: NotImplementedError, with or
without `diffkernels.enable_sdpa`. So flash attention is called by aten's name here, with our kernels for CUDA registered for
CPU tensors: what the engine meets on a GPU after `enable_sdpa("cuda")`, in its ring, its merging and its load balancing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from diffkernels import _sdpa, ops

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")

B, S, H, D = 2, 96, 4, 24
RANKS = 2


def whole() -> list[Tensor]:
    """q, k, v, alike in every process: [B, S, H, D]."""
    return list(torch.randn(3, B, S, H, D, generator=torch.Generator().manual_seed(0)).unbind(0))


def merged(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys, from that to each: docs/attention.md."""
    lse1, lse2 = (t.clamp_min(torch.finfo(t.dtype).min) for t in (lse1, lse2))  # -inf - -inf would be NaN
    lse = torch.logaddexp(lse1, lse2)
    w1, w2 = ((t - lse).exp().transpose(1, 2).unsqueeze(-1) for t in (lse1, lse2))
    return w1 * o1 + w2 * o2, lse


def gathered(t: Tensor, dim: int = 1) -> Tensor:
    parts = [torch.empty_like(t.contiguous()) for _ in range(RANKS)]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts, dim)


def ring(rank: int) -> None:
    """Keys and values go round; causal and not."""
    q, k, v = whole()
    for causal in (False, True):
        mine, *held = (t.chunk(RANKS, 1)[rank] for t in (q, k, v))
        o, lse = ops.attention(mine, *held, causal=causal, lse=True)
        for step in range(1, RANKS):
            sent, received = torch.stack(held), torch.empty(2, *held[0].shape)
            ends = [dist.P2POp(dist.isend, sent, (rank + 1) % RANKS), dist.P2POp(dist.irecv, received, (rank - 1) % RANKS)]
            for work in dist.batch_isend_irecv(ends):
                work.wait()
            held = list(received.unbind(0))
            if not causal or step <= rank:  # these keys are before my queries
                o, lse = merged(o, lse, *ops.attention(mine, *held, lse=True))
        expected, sums = ops.attention(q, k, v, causal=causal, lse=True)
        torch.testing.assert_close(gathered(o), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(gathered(lse, 2), sums, rtol=0, atol=2e-6)


def ulysses(rank: int) -> None:
    """An all-to-all gives each process all of the sequence for some of the heads, another one gives them back."""
    q, k, v = whole()

    def exchanged(t: Tensor) -> Tensor:
        """[RANKS, ...], part i for process i -> [RANKS, ...], part i from process i."""
        out = torch.empty_like(t.contiguous())
        dist.all_to_all_single(out, t.contiguous())
        return out

    def to_heads(t: Tensor) -> Tensor:
        """[B, S / RANKS, H, D] -> [B, S, H / RANKS, D]."""
        return exchanged(torch.stack(t.chunk(RANKS, 2))).transpose(0, 1).flatten(1, 2)

    mine = (t.chunk(RANKS, 1)[rank] for t in (q, k, v))
    o = ops.attention(*(to_heads(t) for t in mine), causal=True)
    back = exchanged(torch.stack(o.chunk(RANKS, 1)))  # [RANKS, B, S / RANKS, H / RANKS, D]
    o = back.permute(1, 2, 0, 3, 4).flatten(2, 3)
    torch.testing.assert_close(gathered(o), ops.attention(q, k, v, causal=True), rtol=0, atol=1e-6)


def engine(rank: int) -> None:
    """torch's, forward and backward, with and without its load balancing."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options

    seen, library = [], torch.library.Library("aten", "IMPL")

    def own(*args, **kwargs):
        raise AssertionError("not ours")

    for name, kernel in _sdpa.ON_CUDA.items():
        library.impl(name, lambda *a, kernel=kernel, **k: seen.append(kernel) or kernel(own, *a, **k), "CPU")
    mesh = init_device_mesh("cpu", (RANKS,))
    for balance, causal in ((True, True), (False, True), (False, False)):
        _cp_options.enable_load_balance = balance
        q, k, v = (t.transpose(1, 2).contiguous() for t in whole())
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        expected = F.scaled_dot_product_attention(*leaves, is_causal=causal)
        right = [expected.detach(), *torch.autograd.grad(expected.square().sum(), leaves)]
        seen.clear()
        with context_parallel(mesh, buffers=[q, k, v, *right], buffer_seq_dims=[2] * 7):  # in here each is a shard
            parts = [DTensor.from_local(t, mesh, [Shard(2)]).requires_grad_() for t in (q, k, v)]
            out = torch.ops.aten._scaled_dot_product_flash_attention(*parts, 0.0, causal)[0]
            local = out.to_local()
            found = [local.detach(), *(g.to_local() for g in torch.autograd.grad(local.square().sum(), parts))]
            assert set(seen) == {_sdpa._forward_cuda, _sdpa._backward_cuda}
            for got, e, atol in zip(found, right, (1e-6, 1e-5, 1e-5, 1e-5), strict=True):
                assert got.shape == (B, H, S // RANKS, D)
                torch.testing.assert_close(got, e, rtol=0, atol=atol)
    library._destroy()


def run(rank: int, check, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    check(rank)
    dist.destroy_process_group()


@pytest.mark.parametrize("check", [ring, ulysses, engine], ids=lambda f: f.__name__)
def test_two_processes_compute_what_one_does(check, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(run, (check, str(tmp_path)), nprocs=RANKS)


def test_merging_is_differentiable() -> None:
    """lse has a gradient of its own; a query that sees none of the keys of one part, or of both, has no NaN."""
    q, k, v = (t.double().requires_grad_() for t in whole())
    half = S // 2
    lengths = torch.tensor([half + 5, 0], dtype=torch.int32)
    parts = [
        ops.attention(q, k[:, i : i + half], v[:, i : i + half], key_lengths=(lengths - i).clamp(0, half), lse=True)
        for i in (0, half)
    ]
    o, lse = merged(*parts[0], *parts[1])
    expected, sums = ops.attention(q, k, v, key_lengths=lengths, lse=True)
    torch.testing.assert_close((o, lse), (expected, sums.clamp_min(lse.min())), rtol=1e-12, atol=1e-12)
    assert not o[1].any() and lse.min() == torch.finfo(lse.dtype).min
    for got, e in zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (o, expected)), strict=True):
        torch.testing.assert_close(got, e, rtol=1e-10, atol=1e-10)
