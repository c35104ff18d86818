"""Between Python and the kernels: what a plain call is, what is refused, threads, forks, imports."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from typing import ClassVar

import pytest
import torch
from torch.utils import _pytree as pytree

import diffkernels as dk
from diffkernels import _C, _ladder, ops
from diffkernels._case import Draw
from diffkernels._op import OPS


def python(code: str, **env: str) -> str:
    """Runs `code` in a fresh interpreter and returns what it printed."""
    run = subprocess.run([sys.executable, "-P", "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def norm_args(*shape: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(*shape), torch.randn(shape[0], shape[-1]), torch.randn(shape[0], shape[-1])


# What is plain


def device_if_plain(*args) -> int:
    return _C.attempt({1: None, 2: None}, None, *args)


def test_plain_calls_take_the_short_way() -> None:
    x, scale, shift = norm_args(2, 3, 8)
    assert device_if_plain(x, scale, None, "layer", 1e-6, True, 3) == 1
    assert device_if_plain(torch.nn.Parameter(x, requires_grad=False), [scale, shift]) == 1


def test_the_output_of_a_plain_call_is_its_own() -> None:
    """Whoever allocates it: norm_modulate's is made in C++ where x is contiguous."""
    x = torch.randn(2, 3, 8)
    for given in (x, x.bfloat16(), torch.nn.Parameter(x, requires_grad=False), x.transpose(0, 1), x[:0], x.requires_grad_()):
        with torch.no_grad():
            before = sys.getrefcount(given)
            y = ops.norm_modulate(given)
        assert sys.getrefcount(given) == before and sys.getrefcount(y) == 2
        assert type(y) is torch.Tensor and not y.requires_grad and y._base is None and y.is_contiguous()
        assert (y.shape, y.dtype, y.device) == (given.shape, given.dtype, given.device)
        y.resize_(99)  # of torch's own allocator
    with torch.inference_mode():
        assert ops.norm_modulate(x).is_inference()


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_a_function_is_its_bodys_own(op) -> None:
    assert inspect.signature(op.call, follow_wrapped=False).parameters.keys() == op.signature.parameters.keys()
    assert inspect.signature(op.call) == op.signature
    assert (op.call.__name__, op.call.__doc__, op.call.__defaults__) == (op.name, op.body.__doc__, op.body.__defaults__)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.writes], ids=lambda op: op.name)
@pytest.mark.parametrize("rung", [None, "cpu", "reference"])
def test_what_is_written_to_has_a_new_version(op, rung) -> None:
    args = op.bind((), op.cases[0].args(Draw(torch.float32)))
    with contextlib.nullcontext() if rung is None else dk.rung(rung):
        versions = [args[i]._version for i in op.writes]
        op.call(*args)
        assert all(args[i]._version > version for i, version in zip(op.writes, versions, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch._neg_view(x),
        lambda x: x.requires_grad_(),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.as_subclass(type("Sub", (torch.Tensor,), {})),
        lambda x: x.numpy(),
        lambda x: [x, torch._neg_view(x)],
        lambda x: torch._efficientzerotensor(x.shape),
    ],
    ids=["neg-bit", "requires-grad", "meta", "sparse", "subclass", "numpy", "neg-bit-in-a-list", "without-memory"],
)
def test_what_is_not_plain(make) -> None:
    assert device_if_plain(make(torch.randn(3, 4))) == 0


def test_negative_bit_keeps_its_sign() -> None:
    x, scale, shift = norm_args(2, 3, 8)
    torch.testing.assert_close(ops.norm_modulate(torch._neg_view(x), scale, shift), ops.norm_modulate(-x, scale, shift))


def test_modes_and_fake_tensors_see_the_op() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Spy(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Spy():
        ops.norm_modulate(torch.randn(2, 4))
    assert any("diffkernels.norm_modulate" in name for name in Spy.seen)
    with FakeTensorMode():
        y = ops.norm_modulate(torch.empty(2, 3, 4, dtype=torch.bfloat16).transpose(0, 1))
    assert y.shape == (3, 2, 4) and y.dtype == torch.bfloat16 and y.is_contiguous()
    assert ops.norm_modulate(torch.empty(5, 4, device="meta")).device.type == "meta"


def test_jit_trace_records_the_op() -> None:
    traced = torch.jit.trace(lambda x: ops.norm_modulate(x) + 0, torch.randn(2, 4), check_trace=False)
    x = torch.randn(2, 4)
    torch.testing.assert_close(traced(x), ops.norm_modulate(x))


def test_subclass_and_wrapper_tensors_reach_the_op() -> None:
    x = torch.randn(3, 4)
    sub = x.as_subclass(type("Sub", (torch.Tensor,), {}))
    torch.testing.assert_close(torch.Tensor(ops.norm_modulate(sub)), ops.norm_modulate(x))


@pytest.mark.parametrize("transform", ["vmap", "jvp", "forward_ad"])
def test_transforms_that_would_be_silently_wrong_raise(transform) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match=r"norm_modulate does not support"):
        if transform == "vmap":
            torch.func.vmap(ops.norm_modulate)(x)
        elif transform == "jvp":
            torch.func.jvp(ops.norm_modulate, (x,), (x,))
        else:
            with torch.autograd.forward_ad.dual_level():
                ops.norm_modulate(torch.autograd.forward_ad.make_dual(x, x))


def test_functional_grad_works() -> None:
    x = torch.randn(3, 4)
    got = torch.func.grad(lambda v: ops.norm_modulate(v).square().sum() + ops.norm_modulate(v).sin().sum())(x)
    v = x.clone().requires_grad_()
    (ops.norm_modulate(v).square().sum() + ops.norm_modulate(v).sin().sum()).backward()
    torch.testing.assert_close(got, v.grad)


def test_modes_are_read_from_live_objects() -> None:
    """With an allocator that overwrites what is freed: a reference dropped too early shows."""
    out = python(
        "import torch; from diffkernels import ops\n"
        "print(torch.func.grad(lambda x: ops.norm_modulate(x).pow(3).sum())(torch.randn(2, 8)).shape)",
        PYTHONMALLOC="debug",
    )
    assert "2, 8" in out


def test_make_fx_traces_in_every_mode() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for mode in ("real", "fake", "symbolic"):
        call = lambda x, coef, step: ops.solver_step([x], x, [], coef, step)[0]  # noqa: E731
        graph = make_fx(call, tracing_mode=mode)(X, STEP["coef"], STEP["step"])
        assert any("solver_step" in str(node.target) for node in graph.graph.nodes), mode


def test_autocast_never_casts_inside() -> None:
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.norm_modulate(x)
    assert torch.equal(y, ops.norm_modulate(x))


def test_without_the_exchange_api_the_attributes_are_read() -> None:
    out = python(
        "import torch\n"
        "t = torch.randn(2, 6, 9)[:, ::2]; expected = torch.nn.functional.layer_norm(t, (9,), eps=1e-6)\n"
        "del torch.Tensor.__dlpack_c_exchange_api__\n"
        "import diffkernels as dk\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    with dk.rung('cpu'): y = dk.ops.norm_modulate(t.to(dtype))\n"
        "    assert y.dtype == dtype and (y.float() - expected).abs().max() < 0.05, dtype\n"
        "print('ok')"
    )
    assert out.strip() == "ok"


# Kernels defend themselves


def test_a_kernel_refuses_rather_than_reads_outside() -> None:
    kernels = {(rung, op): run for rung, op, _, run in _C.kernels}
    run = kernels["cpu", "norm_modulate"]
    x = torch.randn(2, 3, 8)
    y = torch.full_like(x, 7)
    for bad in (torch.randn(9), torch.randn(3, 8), torch.randn(2, 2, 8), torch.randn(2, 8, dtype=torch.float64)):
        assert isinstance(run(y, x, bad, None, None, None, "layer", 1e-6, "inside"), str)
    assert isinstance(run(y[:1], x, None, None, None, None, "layer", 1e-6, "inside"), str)
    assert isinstance(run(y, x, None, None, None, None, "group", 1e-6, "inside"), str)
    assert (y == 7).all()
    with pytest.raises(TypeError, match="9 arguments"):
        run(y, x)
    with pytest.raises(TypeError, match="expected tensors with memory of their own"):
        run(y, x.to("meta"), None, None, None, None, "layer", 1e-6, "inside")
    assert "another type" in run(y, x, None, None, None, None, "layer", "eps", "inside")
    step = kernels["cpu", "solver_step"]
    coef = torch.zeros(2, 1, 6)
    for bad in (-1, 2, 2**31 - 1):
        at, none = torch.tensor(bad, dtype=torch.int32), [None] * 5
        assert "step" in step([y], [x], x, [], coef, at, *none, 1, -1, 0, "float32", False)


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_a_tensor_of_another_dtype_is_refused_or_understood(op) -> None:
    """And never read as what it is not."""
    for case in op.cases:
        flat, spec = pytree.tree_flatten(op.bind((), case.args(Draw(torch.float32))) if case.model is None else ())
        where = [i for i, t in enumerate(flat) if isinstance(t, torch.Tensor)]
        if sum(flat[i].numel() for i in where) > 20_000:
            continue
        for i, dtype in itertools.product(where, (torch.float16, torch.float64, torch.int32)):
            args = pytree.tree_unflatten([*flat[:i], flat[i].to(dtype), *flat[i + 1 :]], spec)
            for rung in _ladder.LADDER["cpu"][:-1]:
                if _ladder.missing(rung, op.name, "cpu") is None:
                    outs = op.allocate(*args)  # the kernel itself: a plain call meets it before any check
                    if _ladder.kernel(rung, op.name)(outs, *args) is None:
                        torch.testing.assert_close(outs, op.reference(*args), rtol=0.02, atol=0.02, equal_nan=True)


def test_equal_columns_have_no_negative_variance() -> None:
    """Rounding may take the variance of a constant row below zero; its root must not be NaN."""
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 1e5
    for rung in _ladder.RUNGS:
        if _ladder.missing(rung, "norm_modulate", "cpu") is not None:
            continue
        for width in (200, 400, 620, 20000, 66816):
            x = values[: 2 if width > 1000 else 64, None].expand(-1, width)
            for mode in ("inside", "outside"):
                with dk.rung(rung):
                    y = ops.norm_modulate(x, eps=1e-6, eps_mode=mode)
                assert y.isfinite().all(), (rung, width, mode)


@pytest.mark.parametrize("width", [33, 64, 1152, 4100])
def test_first_columns_unlike_the_row(width) -> None:
    """A kernel may look at the first columns for a value near the mean; they need not be near it."""
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    x[:, :32] += torch.tensor([1e1, 1e3, 1e5, -1e7, 0.0])[:, None]
    x[4, 0] = 1e7
    exact = torch.nn.functional.layer_norm(x.double(), (width,), eps=1e-6)
    for rung in _ladder.RUNGS:
        if _ladder.missing(rung, "norm_modulate", "cpu") is None:
            with dk.rung(rung):
                error = (ops.norm_modulate(x) - exact).abs().amax(-1) / exact.abs().amax(-1)
            assert (error < 1e-6).all(), (rung, error)


def test_a_bfloat16_nan_stays_one() -> None:
    """Whatever its payload: rounding must not carry it into an infinity or a number."""
    x = torch.randn(3, 80).bfloat16()
    scale = torch.full([80], -1, dtype=torch.int32).view(torch.float32)
    x[1] = torch.tensor([0x7FFF], dtype=torch.int16).view(torch.bfloat16)
    for rung in _ladder.RUNGS:
        if _ladder.missing(rung, "norm_modulate", "cpu") is None:
            with dk.rung(rung):
                assert ops.norm_modulate(x, scale).isnan().all(), rung
                assert ops.norm_modulate(x)[1].isnan().all() and ops.norm_modulate(x)[::2].isfinite().all(), rung


def test_built_for(monkeypatch) -> None:
    monkeypatch.setitem(_C.build, "cuda", "13.0 for 80-real 90")
    runs = {cc for cc in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)) if _ladder._built_for(cc)}
    assert runs == {(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}
    monkeypatch.setitem(_C.build, "cuda", "13.0 for 90a-real")
    assert _ladder._built_for((9, 0)) and not _ladder._built_for((8, 0)) and not _ladder._built_for((10, 0))


# The ladder


def test_forced_rungs() -> None:
    x = torch.randn(2, 8)
    for name in _ladder.RUNGS:
        if _ladder.missing(name, "norm_modulate", "cpu") is None:
            with dk.rung(name):
                torch.testing.assert_close(ops.norm_modulate(x), torch.nn.functional.layer_norm(x, (8,), eps=1e-6))
        else:
            with dk.rung(name), pytest.raises(dk.RungError, match=name):
                ops.norm_modulate(x)
    with pytest.raises(ValueError, match=r"rung: expected one of .*reference.*; got 'fast'"), dk.rung("fast"):
        pass


def test_a_forced_rung_that_refuses_raises_with_its_reason() -> None:
    with dk.rung("cpu"), pytest.raises(dk.RungError, match="float32, float16 or bfloat16"):
        ops.norm_modulate(torch.randn(2, 8, dtype=torch.float64))


def test_the_environment_forces_too() -> None:
    code = "import torch, diffkernels as dk; dk.ops.norm_modulate(torch.randn(2, 8, dtype=torch.float64))"
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=os.environ | {"DIFFKERNELS_RUNG": "cpu"}, capture_output=True, text=True
    )
    assert run.returncode and "'cpu' was forced" in run.stderr
    run = subprocess.run(
        [sys.executable, "-P", "-c", "import diffkernels"],
        env=os.environ | {"DIFFKERNELS_RUNG": "fast"},
        capture_output=True,
        text=True,
    )
    assert run.returncode and "rung: expected one of" in run.stderr


def test_a_fall_to_the_reference_is_said_once(caplog) -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    _ladder._said.clear()
    with caplog.at_level(logging.INFO, logger="diffkernels"):
        ops.norm_modulate(x)
        ops.norm_modulate(x)
    assert len(caplog.records) == 1 and "float32, float16 or bfloat16" in caplog.text


def test_explain_names_every_rung(capsys) -> None:
    text = dk.explain(ops.norm_modulate, torch.randn(2, 8))
    assert [line[3:].split()[0] for line in text.splitlines()] == list(_ladder.LADDER["cpu"])
    assert sum(line.startswith("->") for line in text.splitlines()) == 1


# Bad input: a typed error that names the argument, whatever way the call takes


X = torch.randn(2, 6, 8)
STEP = {
    "outputs": [X],
    "x": X,
    "history": [],
    "coef": torch.zeros(3, 1, 6),
    "step": torch.tensor(1, dtype=torch.int32),
}
WIDE = {"coef": torch.zeros(3, 1, 9)}
BAD = [
    ("norm_modulate", {"x": X.numpy()}, TypeError, "x: expected a torch.Tensor, got ndarray"),
    ("norm_modulate", {"x": X.int()}, TypeError, r"x: expected float32.*got torch.int32"),
    ("norm_modulate", {"x": X.to_sparse()}, TypeError, "x: expected a dense tensor"),
    ("norm_modulate", {"x": X[0, 0, 0]}, ValueError, "x: expected at least one dimension"),
    ("norm_modulate", {"x": X, "scale": torch.randn(6, 8)}, ValueError, r"scale: expected shape .*got \[6, 8\]"),
    ("norm_modulate", {"x": X, "shift": torch.randn(2, 4, 1, 8)}, ValueError, "shift: expected shape"),
    ("norm_modulate", {"x": X, "weight": torch.randn(7)}, ValueError, r"weight: expected shape \[8\]"),
    ("norm_modulate", {"x": X, "bias": torch.randn(8).to(torch.complex64)}, TypeError, "bias: expected float32"),
    ("norm_modulate", {"x": X, "scale": torch.empty(8, device="meta")}, ValueError, "scale: expected a tensor on cpu"),
    ("norm_modulate", {"x": X, "norm": "group"}, ValueError, "norm: expected 'layer' or 'rms', got 'group'"),
    ("norm_modulate", {"x": X, "eps_mode": 3}, TypeError, "eps_mode: expected str, got int"),
    ("norm_modulate", {"x": X, "eps": torch.tensor([1e-3])}, TypeError, "eps: expected float, got Tensor"),
    ("norm_modulate", {"x": [X]}, TypeError, "x: expected a torch.Tensor, got list"),
    ("norm_modulate", {"x": None, "scale": X}, TypeError, "x: expected a torch.Tensor, got NoneType"),
    ("solver_step", STEP | {"results": "2"}, TypeError, "results: expected int, got str"),
    ("norm_modulate", {"x": X, "eps": -1.0}, ValueError, "eps: expected a number >= 0, got -1.0"),
    ("norm_modulate", {"x": X, "eps": float("nan")}, ValueError, "eps: expected a number >= 0, got nan"),
    ("norm_modulate", {"x": X, "gamma": X}, TypeError, "unexpected keyword argument 'gamma'"),
    ("norm_modulate", {}, TypeError, "missing 1 required positional argument: 'x'"),
    ("solver_step", STEP | {"outputs": X}, TypeError, "outputs: expected a list of tensors, got Tensor"),
    ("solver_step", STEP | {"outputs": []}, ValueError, "outputs: expected 1 to 4 model outputs, got 0"),
    ("solver_step", STEP | {"outputs": [X[:1]]}, ValueError, r"outputs\[0\]: expected x's shape"),
    ("solver_step", STEP | {"outputs": [X, X.half()]}, TypeError, r"outputs\[1\]: expected the dtype of outputs\[0\]"),
    ("solver_step", STEP | {"x": X.half()}, TypeError, "x: the sampler's state is float32"),
    ("solver_step", STEP | {"history": [X.half()], **WIDE}, TypeError, r"history\[0\]: expected x's dtype"),
    ("solver_step", STEP | {"mask": X[:1], "known": X, **WIDE}, ValueError, "mask: expected x's shape"),
    ("solver_step", STEP | {"mask": X, **WIDE}, ValueError, "known: expected both of mask and known"),
    ("solver_step", STEP | {"gain": X[:, 0, 0].double()}, TypeError, "gain: expected x's dtype"),
    ("solver_step", STEP | {"bound": X}, ValueError, r"bound: expected \[2\], one a sample"),
    ("solver_step", STEP | {"copies": 5, **WIDE}, ValueError, "copies: expected 0 to 4, got 5"),
    ("solver_step", STEP | {"copies": 1, "copy_dtype": "int8", **WIDE}, ValueError, "copy_dtype: expected one of float32"),
    (
        "solver_step",
        STEP | {"coef": torch.zeros(3, 1, 5)},
        ValueError,
        r"coef: expected shape \[T, 2 or 1, 6 or more\], got \[3, 1, 5\]",
    ),
    ("solver_step", STEP | {"step": torch.tensor(1)}, TypeError, "step: expected a 0-dim int32 tensor"),
    ("solver_step", STEP | {"step": torch.tensor(3, dtype=torch.int32)}, IndexError, "step: expected 0 <= step < 3"),
    ("solver_step", STEP | {"step": torch.tensor(-1, dtype=torch.int32)}, IndexError, "step: expected 0 <= step < 3"),
    ("solver_step", STEP | {"results": 4}, ValueError, "results: expected 1 to 3, got 4"),
    ("solver_step", STEP | {"guided_channels": 7}, ValueError, "guided_channels: expected -1"),
]


@pytest.mark.parametrize("rung", ["none", "reference"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("op", "kwargs", "error", "words"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_input(op, kwargs, error, words, grad, rung) -> None:
    def run():
        with pytest.raises(error, match=words):
            OPS[op].call(**kwargs)

    if grad:  # the way through torch.library and autograd
        kwargs = {k: v.clone().requires_grad_() if k == "x" and v is X else v for k, v in kwargs.items()}
    if rung == "reference":
        with dk.rung("reference"):
            run()
    else:
        run()


# Threads, forks, imports


def test_threads_agree_and_the_gil_is_released() -> None:
    x, scale, shift = norm_args(4, 64, 256)
    expected = ops.norm_modulate(x, scale, shift)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(100):
            if not torch.equal(ops.norm_modulate(x, scale, shift), expected):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong

    big = torch.randn(1, 400, 66816)
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks[0] += 1
            time.sleep(1e-4)

    ticker = threading.Thread(target=tick)
    ticker.start()
    kernel, y = next(run for rung, op, _, run in _C.kernels if (rung, op) == ("cpu", "norm_modulate")), torch.empty_like(big)
    before = ticks[0]
    kernel(y, big, None, None, None, None, "layer", 1e-6, "inside")
    during = ticks[0] - before
    done.set()
    ticker.join()
    assert during > 3, "no other thread ran while a kernel worked"


def test_a_forked_child_works() -> None:
    out = python(
        "import os, torch, diffkernels as dk\n"
        "x = torch.randn(64, 4096)\n"
        "y = dk.ops.norm_modulate(x)\n"  # a parallel region in the parent
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    z = dk.ops.norm_modulate(x)\n"
        "    torch.set_num_threads(1)\n"  # torch's own pool did not survive either
        "    os._exit(0 if torch.equal(z, y) else 1)\n"
        "print(os.waitpid(pid, 0)[1])"
    )
    assert out.strip() == "0"


def test_import_surface() -> None:
    out = python(
        "import sys, torch\n"
        "import diffkernels\n"
        "heavy = ('triton', 'diffusers', 'sklearn', 'matplotlib', 'rich', 'PIL', 'tqdm', 'safetensors')\n"
        "loaded = [m for m in heavy if m in sys.modules and m not in BEFORE]\n"
        "omp = {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'libomp' in line}\n"
        "print(torch.cuda.is_initialized(), loaded, len(omp))".replace(
            "import diffkernels\n", "BEFORE = set(sys.modules)\nimport diffkernels\n"
        ),
        CUDA_VISIBLE_DEVICES="",
    )
    assert out.strip() == "False [] 1"


def test_import_without_triton_and_with_it_blocked() -> None:
    out = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, diffkernels as dk\n"
        "print(dk.ops.norm_modulate(torch.ones(2, 4)).sum().item())"
    )
    assert float(out) == 0.0


def test_a_missing_extension_says_how_to_build_it(tmp_path) -> None:
    import shutil
    from pathlib import Path

    source = Path(dk.__file__).parent
    shutil.copytree(source, tmp_path / "diffkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__", "assets"))
    env = os.environ | {"PYTHONPATH": ""}
    run = subprocess.run([sys.executable, "-c", "import diffkernels"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode and "Build it with `pip install .`" in run.stderr


def test_a_new_thread_honours_set_num_threads() -> None:
    out = python(
        "import os, threading, torch, diffkernels as dk\n"
        "torch.set_num_threads(1)\n"
        "x = torch.randn(256, 1152)\n"
        "grown = []\n"
        "def work():\n"
        "    before = len(os.listdir('/proc/self/task'))\n"
        "    dk.ops.norm_modulate(x)\n"
        "    grown.append(len(os.listdir('/proc/self/task')) - before)\n"
        "t = threading.Thread(target=work); t.start(); t.join()\n"
        "print(grown[0])"
    )
    assert out.strip() == "0"


def test_threads_are_torchs() -> None:
    """One thread gives the same bits as all of them."""
    x = torch.randn(64, 4096)
    expected, threads = ops.norm_modulate(x), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.norm_modulate(x), expected)
    finally:
        torch.set_num_threads(threads)
