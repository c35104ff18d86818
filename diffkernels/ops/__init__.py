"""The ops. Each is a Python function whose body is its definition; kernels on faster rungs do the same, in one pass."""

from .act_quantize import act_quantize
from .attention import attention
from .attention_backward import attention_backward
from .attention_forward import attention_forward
from .attention_int8 import attention_int8
from .conv2d_w8a8 import conv2d_w8a8
from .decode_attention import decode_attention
from .depthwise_conv2d import depthwise_conv2d
from .gate_residual_norm import gate_residual_norm
from .geglu import geglu
from .group_norm_quantize import group_norm_quantize
from .linear_w4a8_lowrank import code_w4, linear_w4a8_lowrank, pack_w4, unpack_w4
from .linear_w4a16 import linear_w4a16
from .linear_w8a8 import linear_w8a8, pack_w8, unpack_w8
from .norm_backward import norm_backward
from .norm_modulate import norm_modulate
from .norm_quantize import norm_quantize
from .qkv_prep import qkv_prep
from .qkv_quantize import qkv_quantize
from .row_abs_quantile import row_abs_quantile
from .row_covariance import row_covariance
from .slice_moments import slice_moments
from .solver_step import solver_step
from .td_params import td_params, td_params_backward

__all__ = [
    "act_quantize",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_int8",
    "code_w4",
    "conv2d_w8a8",
    "decode_attention",
    "depthwise_conv2d",
    "gate_residual_norm",
    "geglu",
    "group_norm_quantize",
    "linear_w4a8_lowrank",
    "linear_w4a16",
    "linear_w8a8",
    "norm_backward",
    "norm_modulate",
    "norm_quantize",
    "pack_w4",
    "pack_w8",
    "qkv_prep",
    "qkv_quantize",
    "row_abs_quantile",
    "row_covariance",
    "slice_moments",
    "solver_step",
    "td_params",
    "td_params_backward",
    "unpack_w4",
    "unpack_w8",
]
