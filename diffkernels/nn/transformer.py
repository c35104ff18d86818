"""The two halves of a transformer block, under the names that timm and most released weights use."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .fusable import Fusable, other_than, uncoded
from .quantized import QuantizedLinear, WeightOnlyLinear


def attend(qkv: Tensor, num_heads: int, precision: str | None = None) -> Tensor:
    """Self-attention of packed projections: [B, N, 3 D], packed as [3, heads, d], d ≤ 256, -> [B, N, D]. Scale d^-1/2.
    `precision` is `ops.attention`'s."""
    b, n, d = qkv.shape
    q, k, v = qkv.view(b, n, 3, num_heads, d // (3 * num_heads)).unbind(2)  # views: the op reads strides
    o = ops.attention(q, k, v, precision=precision)
    return o.view(b, n, d // 3)


class Attention(nn.Module):
    """Self-attention, [B, N, D] -> [B, N, D]: see `attend`. Parameters: qkv, proj. `precision` may be set to "int8"."""

    precision: str | None = None

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(self.qkv(x), self.num_heads, self.precision))


class Mlp(Fusable):
    """Linear, GELU (tanh form), Linear: [..., D] -> [..., D]. Parameters: fc1, fc2.

    Fused, the GELU writes codes; or where fc1 is a `WeightOnlyLinear`, it is that layer's epilogue.
    """

    def __init__(self, hidden_size: int, mlp_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def chain(self) -> str:
        return "fc1 + GELU, fc2" if type(self.fc1) is WeightOnlyLinear else "fc1, GELU → codes, fc2"

    def obstacle(self) -> str | None:
        if type(self.fc1) is WeightOnlyLinear:
            return other_than(WeightOnlyLinear, "fc1", self.fc1)
        return uncoded("fc2", self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.fc1) is WeightOnlyLinear and self.fuses():
            return self.fc2(self.fc1(x, activation="gelu_tanh"))
        h = self.fc1(x)
        return self.activated(h) if self.fuses() else self.fc2(F.gelu(h, approximate="tanh"))

    def activated(self, h: Tensor, gate: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """fc2(gelu(h)) · gate + residual, of a quantized fc2: the GELU writes its codes. As wide as h."""
        fc2: QuantizedLinear = self.fc2  # type: ignore[assignment]
        return fc2.from_codes(ops.act_quantize(h, "gelu_tanh", **fc2.coding), h.dtype, gate, residual)
