"""DiMR: Alleviating Distortion in Image Generation via Multi-Resolution Diffusion Models (Liu et al., arXiv 2406.09416,
NeurIPS 2024), in the official parameterisation.

Time enters through the norms only: their weights move with it (TD-LN, TD-RMSNorm). The class enters as one token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn import (
    ConcatNormLinear,
    Fusable,
    TimeDependentLayerNorm,
    TimeDependentRMSNorm,
    TimeTable,
    attend,
    concat_linear,
    uncoded,
)
from ._inputs import check_inputs
from .checkpoint import architecture

TIMES = 1000
NORMS = {"TDRMSN": TimeDependentRMSNorm, "LN": TimeDependentLayerNorm}
TRANSFORMER, CONVNEXT = "TransformerBlock", "ConvNeXtBlock"
# What a stage's dict holds: the default, or None where there is none.
FIELDS: dict[str, Any] = {
    "block_type": None,
    "dim": None,
    "hidden_dim": None,
    "num_blocks": None,
    "max_height": None,
    "max_width": None,
    "image_input_ratio": 1,
    "input_feature_ratio": 1,
    "final_kernel_size": 3,
    "dropout_prob": 0,
}
OWN: dict[str, dict[str, Any]] = {TRANSFORMER: {"num_attention_heads": None}, CONVNEXT: {"kernel_size": 7}}
ODD = ("final_kernel_size", "kernel_size")

Norm = TimeDependentRMSNorm | TimeDependentLayerNorm


class Attention(nn.Module):
    """Self-attention of a normed h, [B, N, D] -> [B, N, D]. Parameters: norm, query_key_value (no bias), dense."""

    def __init__(self, stage: Mapping[str, Any], norm_type: str) -> None:
        super().__init__()
        dim, self.num_heads = stage["dim"], stage["num_attention_heads"]
        self.norm = NORMS[norm_type](dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.dense = nn.Linear(dim, dim)

    def forward(self, h: Tensor) -> Tensor:
        return self.dense(attend(self.query_key_value(h), self.num_heads))


class GegluMlp(Fusable):
    """w2(gelu(w0 h) · w1 h) of a normed h, [..., D] -> [..., D]. Parameters: norm, w0, w1, w2.

    Fused, h is coded once for both, the GELU and the product are in their epilogues.
    """

    def __init__(self, stage: Mapping[str, Any], norm_type: str) -> None:
        super().__init__()
        dim, hidden = stage["dim"], stage["hidden_dim"]
        self.norm = NORMS[norm_type](dim)
        self.w0, self.w1, self.w2 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def chain(self) -> str:
        return "→ codes, w0 + GELU, w1 · gate → codes, w2"

    def obstacle(self) -> str | None:
        for name in ("w0", "w1", "w2"):
            if why := uncoded(name, getattr(self, name)):
                return why
        if self.w0.smooth is None and self.w1.smooth is None:
            return None if self.w0.rotate == self.w1.rotate else "w0 and w1 are rotated otherwise"
        return "w0 and w1 are smoothed, each by its own"

    def covers(self) -> list[nn.Module]:
        return [self.w0, self.w1, self.w2]  # the norm is the block's

    def forward(self, h: Tensor) -> Tensor:
        if not self.fuses():
            return self.w2(ops.geglu(self.w0(h), self.w1(h)))
        linears: tuple[Any, ...] = (self.w0, self.w1, self.w2)
        (w0, w1, w2), coded = linears, ops.act_quantize(h, **linears[0].coding)
        gated = w1.from_codes(coded, h.dtype, w0.from_codes(coded, h.dtype, activation="gelu"))
        return w2.from_codes(ops.act_quantize(gated, **w2.coding), h.dtype)


class _Block(nn.Module):
    def __init__(self, stage: Mapping[str, Any]) -> None:
        super().__init__()
        self.dropout = stage["dropout_prob"]

    def dropped(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.dropout) if self.dropout and self.training else h


class TransformerBlock(_Block):
    """x += block1(norm(x)); x += block2(norm(x)), [B, N, D]. Parameters: block1 (attention), block2 (MLP)."""

    def __init__(self, stage: Mapping[str, Any], norm_type: str) -> None:
        super().__init__(stage)
        self.block1 = Attention(stage, norm_type)
        self.block2 = GegluMlp(stage, norm_type)

    def forward(self, x: Tensor, delta: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block on x + delta (None: on x), the sum being made in the first norm's pass. table [T, P].

        Returns:
            The block's input x + delta, and its output as a sum that is still to be made, (x, delta).
        """
        start, h = self.block1.norm.residual(x, delta, table)
        x, h = self.block2.norm.residual(start, self.dropped(self.block1(h)), table)
        return start, x, self.dropped(self.block2(h))


class ConvNeXtBlock(_Block):
    """x += conv7×7(x), depthwise and without a norm; x += block2(norm(x)), [B, H, W, D]. Parameters: block1.1, block2."""

    def __init__(self, stage: Mapping[str, Any], norm_type: str) -> None:
        super().__init__(stage)
        dim, size = stage["dim"], stage["kernel_size"]
        self.block1 = nn.ModuleDict({"1": nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim)})
        self.block2 = GegluMlp(stage, norm_type)

    def forward(self, x: Tensor, delta: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `TransformerBlock.forward`; the convolution follows, not a norm, so x + delta is a pass of its own."""
        start = x if delta is None else x + delta
        conv: nn.Conv2d = self.block1["1"]  # type: ignore[assignment]
        if self.dropout and self.training:
            x = start + self.dropped(ops.depthwise_conv2d(start, conv.weight, conv.bias))
        else:
            x = ops.depthwise_conv2d(start, conv.weight, conv.bias, residual=True)
        return start, x, self.dropped(self.block2(self.block2.norm(x, table=table)))


BLOCKS = {TRANSFORMER: TransformerBlock, CONVNEXT: ConvNeXtBlock}


class Upsample(nn.ModuleDict):
    """From all block outputs of a stage to the next one's input: TD-LN over their channels, Linear, pixel shuffle, TD-LN.

    The slices come one at a time and are not concatenated. Pixels come out in the order (row, column, channel) of the
    Linear's output, which is not torch's pixel_shuffle. Parameters: 0, 1.kernel, 2.
    """

    def __init__(self, dim_in: int, dim: int, ratio: int) -> None:
        kernel = nn.ModuleDict({"kernel": nn.Linear(dim_in, dim * ratio * ratio)})
        super().__init__({"0": TimeDependentLayerNorm(dim_in), "1": kernel, "2": TimeDependentLayerNorm(dim)})
        self.ratio = ratio

    def begin(self, table: Tensor) -> ConcatNormLinear:
        """Takes the slices, [B, H·W, D_i] each."""
        norm: TimeDependentLayerNorm = self["0"]  # type: ignore[assignment]
        linear: nn.Linear = self["1"]["kernel"]  # type: ignore
        gamma, beta = norm.affine(table=table)
        assert beta is not None
        return ConcatNormLinear(gamma, beta, linear.weight, linear.bias, norm.eps)

    def finish(self, slices: ConcatNormLinear, height: int, width: int, table: Tensor) -> Tensor:
        """[B, ratio·H, ratio·W, D], once all slices are in."""
        out, r = slices.result(), self.ratio
        b, _, c = out.shape
        pixels = out.view(b, height, width, r, r, c // (r * r)).transpose(2, 3)  # the norm reads strides: no copy
        return self["2"](pixels, table=table).view(b, r * height, r * width, -1)


class Stage(nn.Module):
    """One resolution: [B, C, H, W] -> features, from which comes its noise prediction. See `DiMR` for its dict.

    Parameters: input_layer.1, input_layer.3.position_embeddings, class_embeds (transformer), upsample (not the first), blocks,
    skip_denses, output_layer.0, output_layer.2.
    """

    reads_weights_of = ("upsample", "skip_denses")  # of Linears that it does not call: nothing beside them would be seen

    def __init__(self, stage: Mapping[str, Any], channels: int, num_classes: int, norm_type: str, lower: Stage | None) -> None:
        super().__init__()
        dim, ratio, size = stage["dim"], stage["input_feature_ratio"], stage["final_kernel_size"]
        self.height, self.width, self.shrink = stage["max_height"], stage["max_width"], stage["image_input_ratio"]
        embed = nn.ModuleDict({"position_embeddings": nn.Embedding(self.height * self.width, dim)})
        self.input_layer = nn.ModuleDict({"1": nn.Conv2d(channels, dim, ratio, ratio), "3": embed})
        self.class_embeds = nn.Embedding(num_classes, dim) if stage["block_type"] == TRANSFORMER else None
        if lower is not None:
            self.upsample = Upsample(lower.cascade_dim, dim, self.height // lower.height)
        half = stage["num_blocks"] // 2
        self.cascade_dim: int = (2 * half + 2) * dim
        self.blocks = nn.ModuleList(BLOCKS[stage["block_type"]](stage, norm_type) for _ in range(2 * half + 1))
        self.skip_denses = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(half))
        head = nn.Conv2d(dim, channels, size, padding=size // 2)
        self.output_layer = nn.ModuleDict({"0": TimeDependentLayerNorm(dim), "2": head})

    def forward(
        self, images: Tensor, y: Tensor, table: Tensor, lower: Tensor | None, seen: Callable[[Tensor], None], head: bool
    ) -> Tensor | None:
        """Runs the stage.

        Args:
            images: [B, C, H, W]; y: [B] labels; table: [T, P], of all time-dependent parameters.
            lower: [B, height, width, D], what the stage below hands up, or None.
            seen: is called with the stage's input and each block's output, [B, height · width, D], as they come.
            head: whether the noise prediction is wanted.

        Returns:
            The noise prediction [B, C, height', width'], or None.
        """
        x, delta = self._embed(images, y, lower), None  # the stream is x + delta
        first = 0 if self.class_embeds is None else 1  # the class token is the stage's own
        half = len(self.skip_denses)
        skips: list[Tensor] = []

        def show(x: Tensor) -> None:
            seen(x.flatten(1, 2) if first == 0 else x[:, 1:])

        for i, block in enumerate(self.blocks):
            if delta is not None and i > half:
                x = x + delta
                show(x)
                dense: nn.Linear = self.skip_denses[i - half - 1]  # type: ignore[assignment]
                x, delta = concat_linear((x, skips.pop()), dense.weight, dense.bias), None
            start, x, delta = block(x, delta, table)
            if i <= half:
                show(start)
                if i:
                    skips.append(start)
        assert delta is not None
        if not head:
            show(x + delta)
            return None
        norm: Norm = self.output_layer["0"]  # type: ignore[assignment]
        x, h = norm.residual(x, delta, table)
        show(x)
        h = h if first == 0 else h[:, 1:].unflatten(1, (self.height, self.width))
        return self.output_layer["2"](h.permute(0, 3, 1, 2))

    def _embed(self, images: Tensor, y: Tensor, lower: Tensor | None) -> Tensor:
        """The blocks' input: [B, height, width, D], or [B, 1 + height · width, D] with the class token first."""
        if self.shrink > 1:
            images = F.interpolate(images, size=[n // self.shrink for n in images.shape[2:]], mode="area")
        place: nn.Embedding = self.input_layer["3"]["position_embeddings"]  # type: ignore
        base = place.weight.view(self.height, self.width, -1)
        if lower is not None:
            base = lower + base
        x = (base + self.input_layer["1"](images).permute(0, 2, 3, 1)).contiguous()
        if self.class_embeds is None:
            return x
        return torch.cat([self.class_embeds(y)[:, None], x.flatten(1, 2)], dim=1)


@architecture
class DiMR(nn.Module):
    """A class-conditional multi-resolution diffusion model. State dicts of qihao067/DiMR load with `strict=True`.

    Args:
        stages: a dict for each resolution, the lowest first. All take the whole sample, [channels, H, W].
            block_type: "TransformerBlock" (global attention, class token) or "ConvNeXtBlock".
            dim, hidden_dim: width, and of the MLP inside.
            num_blocks: made odd, 2 (n // 2) + 1: the first half's outputs are skips of the second's.
            max_height, max_width: of its features, H / (image_input_ratio · input_feature_ratio).
            image_input_ratio: area downsampling of the sample (1). input_feature_ratio: stride of the patches (1).
            final_kernel_size: of the output convolution (3). dropout_prob: in training (0).
            num_attention_heads: of a transformer, a divisor of dim, of at most 256 each. kernel_size: of a ConvNeXt, odd (7).
        channels: C of x.
        num_classes: rows of the class table, the last of which is the null class: 1001 for ImageNet.
        norm_type: the blocks' norm, "TDRMSN" (TD-RMSNorm, the released models) or "LN" (TD-LN).
        block_grad_to_lowres: no gradient from a stage's loss to the stages below.

    Raises:
        ValueError: a stage or size outside of the above, named, with what was expected and what came.
    """

    def __init__(
        self,
        stages: list[dict],
        channels: int = 4,
        num_classes: int = 1001,
        norm_type: str = "TDRMSN",
        block_grad_to_lowres: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels: expected 1 or more, got {channels}")
        if num_classes < 2:
            raise ValueError(f"num_classes: expected 2 or more, a label and the null class, got {num_classes}")
        if norm_type not in NORMS:
            raise ValueError(f"norm_type: expected one of {', '.join(NORMS)}; got {norm_type!r}")
        stages = _stages(stages)
        self.config: dict[str, Any] = {
            "stages": copy.deepcopy(stages),
            "channels": channels,
            "num_classes": num_classes,
            "norm_type": norm_type,
            "block_grad_to_lowres": block_grad_to_lowres,
        }
        self.stages = nn.ModuleList()
        for stage in stages:
            lower: Stage | None = self.stages[-1] if len(self.stages) else None  # type: ignore[assignment]
            self.stages.append(Stage(stage, channels, num_classes, norm_type, lower))
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if getattr(m, "bias", None) is not None:
                    nn.init.zeros_(m.bias)  # type: ignore[arg-type]
        self._times = TimeTable(self)

    @property
    def null_class(self) -> int:
        """The label that stands for no label: the last row of the class table."""
        return self.config["num_classes"] - 1

    @property
    def labels(self) -> int:
        """How many labels there are: 0 to labels - 1; the null class is not one."""
        return self.config["num_classes"] - 1

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        height, width = _sample(self.config["stages"][-1])
        return self.config["channels"], height, width

    def time_table(self, t: Tensor) -> Tensor:
        """All time-dependent parameters at timesteps t [T], integer or float, 0 to 999 -> [T, P], P = 165 k for XL.

        tau = (t - 499) / 500, which is the official 2 n / 1000 - 1 of n = t + 1, 1 to 1000. See `nn.ScheduledTimes`.
        """
        weight: Tensor = self.stages[0].output_layer["0"].weight.param0  # type: ignore
        return self._times((t.to(torch.promote_types(weight.dtype, torch.float32)) - (TIMES / 2 - 1)) / (TIMES / 2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, time: Tensor | None = None) -> Tensor:
        """The noise in `x` at timesteps `t` with labels `y`: the last stage's answer. The other stages' heads don't run.

        Args:
            x: [B, C, H, W] in the dtype of the weights, with `sample_shape`.
            t: [B], or [1] or [] for all: one time costs less than B equal ones. Integer or float, 0 to 999, as DiT counts.
            y: [B] int64, 0 to num_classes - 1, of which the last is `null_class`.
            time: [1 or B, P], `time_table` of t where that was computed before; t is not looked at then.

        Returns:
            [B, C, H / r, W / r], r the last stage's input ratios: 1 in the released models.

        Raises:
            ValueError: x, t, y or time of another shape.
        """
        out = self._run(x, t, y, time, every=False)[-1]
        assert out is not None
        return out

    def forward_stages(self, x: Tensor, t: Tensor, y: Tensor, time: Tensor | None = None) -> list[Tensor]:
        """As `forward`, the noise at every stage's resolution, the lowest first: what `multiscale_loss` takes."""
        return [out for out in self._run(x, t, y, time, every=True) if out is not None]

    def _run(self, x: Tensor, t: Tensor, y: Tensor, time: Tensor | None, every: bool) -> list[Tensor | None]:
        check_inputs(x, t, y, self.sample_shape)
        if time is None:
            time = self.time_table(t.reshape(-1))
        elif time.ndim != 2 or time.shape[0] not in (1, x.shape[0]) or time.shape[1] != self._times.width:
            raise ValueError(f"time: expected [1 or {x.shape[0]}, {self._times.width}], got {list(time.shape)}")
        outs: list[Tensor | None] = []
        lower = None
        for i, stage in enumerate(self.stages):
            above = self.stages[i + 1].upsample if i + 1 < len(self.stages) else None
            slices = None if above is None else above.begin(time)  # type: ignore[operator,union-attr]

            def seen(x: Tensor, slices: ConcatNormLinear | None = slices) -> None:
                if slices is not None:
                    slices.add(x.detach() if self.config["block_grad_to_lowres"] else x)

            outs.append(stage(x, y, time, lower, seen, every or above is None))
            if above is not None:
                lower = above.finish(slices, stage.height, stage.width, time)  # type: ignore[operator,union-attr]
        return outs


def multiscale_loss(outputs: Sequence[Tensor], noise: Tensor, coefficients: Sequence[float] = (1 / 4, 1)) -> Tensor:
    """DiMR's training loss of each sample: sum of coefficient · mean squared error over the stages.

    A stage's target is the noise summed over boxes of r × r and divided by r, so that its variance stays 1.

    Args:
        outputs: [B, C, H / r, W / r] for each stage, from `DiMR.forward_stages`. noise: [B, C, H, W].
        coefficients: one a stage.

    Returns:
        [B].

    Raises:
        ValueError: a shape that is no whole fraction of noise's, or another number of coefficients.

    Source: DiMR (arXiv 2406.09416) §3.3.
    """
    if len(outputs) != len(coefficients):
        raise ValueError(f"coefficients: expected one a stage, {len(outputs)}, got {len(coefficients)}")
    total = torch.zeros((), device=noise.device)
    for i, (out, coefficient) in enumerate(zip(outputs, coefficients, strict=True)):
        r = noise.shape[-1] // max(1, out.shape[-1])
        if tuple(out.shape) != (*noise.shape[:2], noise.shape[2] // max(1, r), noise.shape[3] // max(1, r)) or not r:
            raise ValueError(f"outputs[{i}]: expected a whole fraction of noise's {list(noise.shape)}, got {list(out.shape)}")
        target = noise if r == 1 else F.avg_pool2d(noise, r) * r
        total = total + coefficient * (out - target).square().flatten(1).mean(1)
    return total


def _sample(stage: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the sample that a stage takes."""
    ratio = stage["image_input_ratio"] * stage["input_feature_ratio"]
    return stage["max_height"] * ratio, stage["max_width"] * ratio


def _stages(stages: Any) -> list[dict[str, Any]]:
    """The stages with their defaults filled in; ValueError where they can't be built."""
    if not isinstance(stages, list | tuple) or not stages:
        raise ValueError(f"stages: expected a list of one dict or more, got {stages!r}")
    whole: list[dict[str, Any]] = []
    for i, given in enumerate(stages):
        name = f"stages[{i}]"
        if not isinstance(given, dict):
            raise ValueError(f"{name}: expected a dict, got {given!r}")
        kind = given.get("block_type")
        if kind not in BLOCKS:
            raise ValueError(f"{name}.block_type: expected one of {', '.join(BLOCKS)}; got {kind!r}")
        known = FIELDS | OWN[kind]
        for key in given:
            if key not in known:
                raise ValueError(f"{name}: expected keys among {', '.join(known)}; got {key!r}")
        stage = known | given
        for key, value in stage.items():
            if key in ("block_type", "dropout_prob"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (key in ODD and value % 2 == 0):
                raise ValueError(f"{name}.{key}: expected {'an odd' if key in ODD else 'an'} int of 1 or more, got {value!r}")
        p = stage["dropout_prob"]
        if not isinstance(p, int | float) or not 0 <= p < 1:
            raise ValueError(f"{name}.dropout_prob: expected a number, 0 <= p < 1, got {p!r}")
        if kind == TRANSFORMER and stage["dim"] % stage["num_attention_heads"]:
            raise ValueError(
                f"{name}.dim: expected a multiple of num_attention_heads {stage['num_attention_heads']}, got {stage['dim']}"
            )
        if whole:
            low, ratio = whole[-1], stage["max_height"] // whole[-1]["max_height"]
            if (stage["max_height"], stage["max_width"]) != (ratio * low["max_height"], ratio * low["max_width"]):
                raise ValueError(
                    f"{name}.max_height, max_width: expected a multiple of the stage below's {low['max_height']} × "
                    f"{low['max_width']}, got {stage['max_height']} × {stage['max_width']}"
                )
            if _sample(stage) != _sample(low):
                raise ValueError(f"{name}: expected samples of {_sample(low)} as the stage below takes, got {_sample(stage)}")
        whole.append(stage)
    return whole


def _two(dim: int, blocks: int, blocks_above: int) -> list[dict[str, Any]]:
    """Two resolutions for latents [4, 32, 32]: a transformer at 16 × 16, ConvNeXt of half its width at 32 × 32."""
    low = {"block_type": TRANSFORMER, "dim": dim, "hidden_dim": 2 * dim, "num_attention_heads": 16, "num_blocks": blocks}
    low |= {"max_height": 16, "max_width": 16, "input_feature_ratio": 2}
    high = {"block_type": CONVNEXT, "dim": dim // 2, "hidden_dim": dim, "num_blocks": blocks_above}
    return [low, high | {"max_height": 32, "max_width": 32}]


PRESETS = {"XL/2R": _two(960, 39, 20), "G/2R": _two(1152, 57, 29)}


def dimr(name: str, **config: Any) -> DiMR:
    """A DiMR by its name in the paper, "XL/2R" or "G/2R"; `config` overrides what the name stands for.

    Raises:
        ValueError: an unknown name; the text lists the names.
    """
    preset = PRESETS.get(name.removeprefix("DiMR-"))
    if preset is None:
        raise ValueError(f"name: expected one of {', '.join(PRESETS)}; got {name!r}")
    return DiMR(**{"stages": preset, **config})
