"""What a user would call instead of our op: each adapter makes a call of it, or says why it can't be had here.

An adapter takes the op, the case and its keyword arguments, prepares what is prepared once, and returns what makes a call of
(other) keyword arguments. A library that answers something else than the definition (another approximation, other rounding
points) is still what people would pick: its error stands beside its time.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._case import Case
from .._op import Op
from ..ops._linear import ACTIVATIONS, DTYPES
from ..ops.linear_w4a8_lowrank import unpack_w4, whole_w4
from ..ops.linear_w8a8 import unpack_w8

Call = Callable[[], Any]
Bind = Callable[[dict[str, Any]], Call]


class Skip(Exception):
    """Why a peer can't be had: its text is the row's."""


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken peer must not end the run, whatever it raises
        raise Skip(f"{name} can't be imported: {type(error).__name__}: {error}") from None


def _formula(case: Case) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """The case's eager formula and the names of what it takes."""
    if case.eager is None:
        raise Skip("the case has no eager formula")
    return case.eager, tuple(inspect.signature(case.eager).parameters)


def _on_gpu(kwargs: dict[str, Any]) -> None:
    if not any(isinstance(a, Tensor) and a.is_cuda for a in kwargs.values()):
        raise Skip("runs on a GPU only")


def eager(op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    formula, names = _formula(case)
    return lambda given: functools.partial(formula, **{name: given[name] for name in names})


def compiled(op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    formula, names = _formula(case)
    torch._dynamo.reset()  # a graph of its own for every shape, as `dynamic=False` alone would not give
    fast = torch.compile(formula, dynamic=False)
    return lambda given: functools.partial(fast, **{name: given[name] for name in names})


def liger(op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    """Liger-Kernel: its norms and GEGLU (by tanh), with what it has not fused around them in PyTorch."""
    if op.name not in ("norm_modulate", "geglu"):
        raise Skip(f"has nothing for {op.name}")
    _on_gpu(kwargs)
    functional = library("liger_kernel.transformers.functional")
    if op.name == "geglu":
        return lambda given: lambda: functional.liger_geglu(given["a"], given["b"])
    if kwargs.get("norm") == "rms":
        return lambda given: lambda: functional.liger_rms_norm(given["x"], given["weight"], given["eps"])
    one, zero = torch.ones_like(kwargs["x"][0, 0]), torch.zeros_like(kwargs["x"][0, 0])

    def bind(given: dict[str, Any]) -> Call:
        x, scale, shift = given["x"], given["scale"].unsqueeze(1), given["shift"].unsqueeze(1)
        return lambda: functional.liger_layer_norm(x, one, zero, 1e-6) * (1 + scale) + shift

    return bind


class _Formula(nn.Module):
    def __init__(self, formula: Callable[..., Any], names: tuple[str, ...]) -> None:
        super().__init__()
        self.formula, self.names = formula, names

    def forward(self, *tensors: Tensor) -> Any:
        return self.formula(**dict(zip(self.names, tensors, strict=True)))


def _tensors(names: tuple[str, ...], kwargs: dict[str, Any], library: str) -> tuple[Tensor, ...]:
    tensors = [kwargs[name] for name in names]
    if not all(isinstance(t, Tensor) and t.dtype is torch.float32 and not t.is_cuda for t in tensors):
        raise Skip(f"{library}'s adapter takes float32 tensors on a CPU")
    return tuple(t.contiguous() for t in tensors)


def openvino_library() -> Any:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # it would report to its makers
    return library("openvino")


def openvino_request(model: Any, **hints: str) -> Any:
    """A model of OpenVINO's, ready to `infer` on as many threads as PyTorch has."""
    common = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_CPU_PINNING": False,  # it would pin the process's own threads too, and so everybody's
    }
    return openvino_library().compile_model(model, "CPU", common | hints).create_infer_request()


def openvino(op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    """OpenVINO, the formula converted, in float32 (its CPU plugin would choose bfloat16 where there is one)."""
    formula, names = _formula(case)
    tensors = _tensors(names, kwargs, "OpenVINO")
    found = openvino_library().convert_model(_Formula(formula, names).eval(), example_input=tensors)

    def bind(given: dict[str, Any]) -> Call:
        request = openvino_request(found, INFERENCE_PRECISION_HINT="f32")
        arrays = [t.numpy() for t in _tensors(names, given, "OpenVINO")]

        def call() -> list[Tensor]:
            answer = request.infer(arrays, share_inputs=True, share_outputs=True)
            return [torch.from_numpy(answer[i]) for i in range(len(answer))]

        return call

    return bind


def onnxruntime(op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    """ONNX Runtime on its CPU provider, all optimisations, inputs bound once.

    Its threads do not spin after their work: they would take the cores from whoever is next.
    """
    formula, names = _formula(case)
    tensors, ort, _ = _tensors(names, kwargs, "ONNX Runtime"), library("onnxruntime"), library("onnx")
    file = io.BytesIO()
    torch.onnx.export(_Formula(formula, names).eval(), tensors, file, input_names=list(names), dynamo=False, opset_version=18)  # type: ignore[arg-type]
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])

    def bind(given: dict[str, Any]) -> Call:
        binding = session.io_binding()
        for name, t in zip(names, _tensors(names, given, "ONNX Runtime"), strict=True):
            binding.bind_cpu_input(name, t.numpy())
        for output in session.get_outputs():
            binding.bind_output(output.name)

        def call() -> list[Tensor]:
            session.run_with_iobinding(binding)
            return [torch.from_numpy(a) for a in binding.copy_outputs_to_cpu()]

        return call

    return bind


def _attention(op: Op, kwargs: dict[str, Any], *can: str) -> None:
    """Raises Skip unless this is attention of [B, S, H, D] with nothing more than what the peer `can` do."""
    if op.name != "attention_forward":
        raise Skip("stands in for attention's forward only")
    q, k = kwargs["q"], kwargs["k"]
    asked = [name for name in ("bias", "mask", "key_lengths", "cu_q", "kv_index") if kwargs[name] is not None]
    asked += ["grouped heads"] if q.shape[2] != k.shape[2] else []
    if kwargs["causal"] != "none":
        asked.append("causal" if q.shape[1] == k.shape[1] else f"causal {kwargs['causal']}")
    if missing := [name for name in asked if name not in can]:
        raise Skip(f"has no {', '.join(missing)}")


def sdpa(backend: str, op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    """One backend of torch's attention, pinned. It returns o, as the peers below do."""
    _attention(op, kwargs, "mask" if kwargs.get("bias") is None else "bias", "causal", "causal top-left", "grouped heads")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    pinned, causal = getattr(SDPBackend, backend), kwargs["causal"] != "none"
    more = {"is_causal": causal, "scale": kwargs["scale"], "enable_gqa": kwargs["q"].shape[2] != kwargs["k"].shape[2]}

    def bind(given: dict[str, Any]) -> Call:
        q, k, v = (given[name].transpose(1, 2) for name in "qkv")
        mask = given["mask"] if given["bias"] is None else given["bias"]
        mask = None if mask is None else mask[(None,) * (4 - mask.ndim)]  # flash attention takes no mask of 3 dimensions

        def call() -> Tensor:
            with sdpa_kernel(pinned):
                return F.scaled_dot_product_attention(q, k, v, mask, **more).transpose(1, 2)

        return call

    return bind


def flash_attn(op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    _attention(op, kwargs, "causal", "causal bottom-right", "grouped heads")
    _on_gpu(kwargs)
    attend, more = (
        library("flash_attn").flash_attn_func,
        {"softmax_scale": kwargs["scale"], "causal": kwargs["causal"] != "none"},
    )
    return lambda given: lambda: attend(given["q"], given["k"], given["v"], **more)


def sageattention(op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    _attention(op, kwargs, "causal")
    _on_gpu(kwargs)
    attend, more = library("sageattention").sageattn, {"sm_scale": kwargs["scale"], "is_causal": kwargs["causal"] != "none"}
    return lambda given: lambda: attend(given["q"], given["k"], given["v"], tensor_layout="NHD", **more)


def xformers(op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    _attention(op, kwargs)
    _on_gpu(kwargs)
    attend, scale = library("xformers.ops").memory_efficient_attention, kwargs["scale"]
    return lambda given: lambda: attend(given["q"], given["k"], given["v"], scale=scale)


def _float_conv(op: Op, given: dict[str, Any]) -> Call:
    """What a quantized convolution's codes stand for, in the result's dtype: one call, and a pass for the residual."""
    kwargs = op.optional | given
    x, scale, size, dtype = kwargs["x"], kwargs["weight_scale"], kwargs["kernel"], DTYPES[kwargs["dtype"]]
    bias, residual = kwargs["bias"], kwargs["residual"]
    if kwargs["gate"] is not None or kwargs["activation"] != "none":
        raise Skip("has neither gate nor activation")
    c, n, how = x.shape[-1], scale.shape[0], (kwargs["stride"], kwargs["padding"], kwargs["dilation"])
    layer = nn.Conv2d(c, n, size, *how, bias=bias is not None, device=x.device, dtype=dtype).requires_grad_(False)
    codes = unpack_w8(kwargs["weight"], n, size * size * c).unflatten(1, (size, size, c)).permute(0, 3, 1, 2)
    layer.weight.copy_(codes * scale[:, None, None, None])
    if layer.bias is not None:
        layer.bias.copy_(bias)
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    wide = (x * kwargs["x_scale"][:, None, None, None]).to(dtype).permute(0, 3, 1, 2)
    if residual is None:
        return lambda: layer(wide).permute(0, 2, 3, 1)
    return lambda: layer(wide).permute(0, 2, 3, 1) + residual


def _bare(kwargs: dict[str, Any]) -> None:
    if any(kwargs.get(name) is not None for name in ("gate", "residual", "low")):
        raise Skip("has neither gate nor residual nor a branch")


def _float_linear(op: Op, kwargs: dict[str, Any]) -> tuple[nn.Linear, Callable[[Tensor], Tensor], Tensor]:
    """What a quantized Linear's codes stand for, in the result's dtype: the layer, what follows it, and its input."""
    if op.name not in ("linear_w8a8", "linear_w4a16"):
        raise Skip("stands in for quantized linear layers only")
    _bare(kwargs)
    x, scale = kwargs["x"], kwargs["weight_scale"]
    if op.name == "linear_w4a16":
        dtype, codes = x.dtype, whole_w4(kwargs["weight"], kwargs["group_scale"], scale.shape[0], x.shape[-1])
    else:
        dtype, codes = DTYPES[kwargs["dtype"]], unpack_w8(kwargs["weight"], scale.shape[0], x.shape[-1])
    bias = kwargs.get("bias")
    layer = nn.Linear(x.shape[-1], scale.shape[0], bias=bias is not None, device=x.device, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(codes * scale.unsqueeze(-1))
    if bias is not None:
        layer.bias.copy_(bias)
    x = (x * kwargs["x_scale"].unsqueeze(-1)).to(dtype) if "x_scale" in kwargs else x
    return layer, ACTIVATIONS[kwargs.get("activation", "none")], x


def linear(op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    """PyTorch's Linear, or its Conv2d, of the case's dtype, not quantized at all."""
    if op.name == "conv2d_w8a8":
        call = _float_conv(op, kwargs)
        return lambda given: call
    layer, activation, x = _float_linear(op, kwargs)
    return lambda given: lambda: activation(layer(x))


def int4pack(op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    """PyTorch's own product of bfloat16 with 4-bit weights on CPUs, then bias and activation."""
    if op.name != "linear_w4a16" or kwargs["x"].device.type != "cpu" or kwargs["x"].dtype != torch.bfloat16:
        raise Skip("stands in for bfloat16 on CPUs with weights of 4 bits only")
    _bare(kwargs)
    x, scale, bias = kwargs["x"], kwargs["weight_scale"], kwargs.get("bias")
    codes, groups = unpack_w4(kwargs["weight"], kwargs["group_scale"], scale.shape[0], x.shape[-1])
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    scales = (groups * scale.unsqueeze(-1)).t()
    both = torch.stack((scales, torch.zeros_like(scales)), -1).to(x.dtype).contiguous()
    activation, group = ACTIVATIONS[kwargs.get("activation", "none")], 64 if groups.shape[1] == -(-x.shape[-1] // 64) else 128

    def call() -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, both)
        return activation(y if bias is None else y + bias)

    return lambda given: call


def torchao(op: Op, case: Case, kwargs: dict[str, Any]) -> Bind:
    """torchao's dynamic W8A8 linear layer, which finds its input's codes itself."""
    if op.name != "linear_w8a8":
        raise Skip("stands in for layers of 8 bits only")
    layer, activation, x = _float_linear(op, kwargs)
    quantization = library("torchao.quantization")
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig())
    return lambda given: lambda: activation(layer(x))


PEERS: dict[str, Callable[[Op, Case, dict[str, Any]], Bind]] = {
    "eager": eager,
    "compile": compiled,
    "liger": liger,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
    "linear": linear,
    "int4pack": int4pack,
    "torchao": torchao,
    "sdpa-flash": functools.partial(sdpa, "FLASH_ATTENTION"),
    "sdpa-efficient": functools.partial(sdpa, "EFFICIENT_ATTENTION"),
    "sdpa-cudnn": functools.partial(sdpa, "CUDNN_ATTENTION"),
    "sdpa-math": functools.partial(sdpa, "MATH"),
    "flash-attn": flash_attn,
    "sageattention": sageattention,
    "xformers": xformers,
}
ALWAYS = ("eager", "compile")


def chosen(names: str | None) -> tuple[str, ...]:
    """The peers that `--vs` names, `sdpa` all of its backends. Raises ValueError, with what there is, for an unknown one."""
    if names is None:
        return ALWAYS
    wanted: list[str] = []
    for name in names.split(","):
        found = [peer for peer in PEERS if name in ("all", peer) or peer.startswith(f"{name}-")]
        if not found:
            raise ValueError(f"--vs: expected all, or one of {', '.join(PEERS)}; got {name!r}")
        wanted += found
    return tuple(dict.fromkeys(wanted))
