"""Triton kernels compile for real GPUs: the interpreter that the other tests run in accepts what the compiler refuses.

Each kernel is specialised as the launcher would do it: pointers and extents that are multiples of 16, unit strides as
constants. A new kernel needs a function here that gives its arguments: a type, or a constant's value, for each.

An architecture changes instructions, a dtype what is loaded: each signature is compiled in one of PAIRS, and the kernel's next
one in the other, a kernel's only signature in both; with --full every signature in every dtype for every architecture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

PAIRS = [("fp32", 80), ("bf16", 90)]
EVERY = [(dtype, arch) for dtype in ("fp32", "bf16") for arch in (80, 90)]
SHARED = 99 * 1024  # bytes that a block may have on every GPU since sm_80

CHILD = """
import importlib, json, re, sys
from collections import Counter
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOW = {"LAYER": True, "INSIDE": True}
UNFUSED = ("solver_step", "row_abs_quantile")  # launched so, for the sake of equal bits
ANY = ("T", "B", "coef_step", "coef_sample", "unit", "runs", "rows", "rank", "chunks", "H", "W", "window")  # often odd


def pointers(names, t):
    return {name: "*" + t for name in names.split()}


def matrices(names, t):
    "Data, row stride, column stride."
    return {name: ("*" + t, "i32", 1) for name in names.split()}


def operands(names, t):
    "Data, row stride, repeat."
    return {name: ("*" + t, "i32", "i32") for name in names.split()}


def integers(names):
    return dict.fromkeys(names.split(), "i32")


AFFINE = "scale shift weight bias"


def norm_modulate(t):
    "LayerNorm with every operand: a program that keeps its row, and one that walks a wide one."
    given = pointers("y", t) | matrices("x", t) | operands(AFFINE, t) | {"D": "i32", "eps": "fp32"} | HOW
    yield "_kernel", given | {"KEEP": True, "BLOCK": 2048}, 4
    yield "_kernel", given | {"KEEP": False, "BLOCK": 4096}, 8


def norm_quantize(t):
    "LayerNorm with every operand; four codes, of as many columns as x's 16 bytes hold, go into an instruction."
    given = pointers("codes", "i8") | pointers("scales", "fp32") | matrices("x", t) | operands(AFFINE, t)
    given |= pointers("smooth", t) | {"D": "i32", "eps": "fp32"} | HOW
    for rotate in (0, 128):
        yield "_kernel", given | {"ROTATE": rotate, "KEEP": True, "BLOCK": 2048}, 4, "STG"
        yield "_kernel", given | {"ROTATE": rotate, "KEEP": False, "BLOCK": 4096}, 8, "STG"


def act_quantize(t):
    given = pointers("codes", "i8") | pointers("scales", "fp32") | matrices("x", t) | {"smooth": None, "D": "i32"}
    kinds = ((0, False, 2048, 64), (1, True, 2048, 0), (2, False, 8192, 256), (2, False, 8192, 0), (3, True, 4096, 0))
    for kind, gated, block, rotate in kinds:
        how = {"KIND": kind, "GATED": gated, "ROTATE": rotate, "KEEP": True, "BLOCK": block}
        yield "_kernel", given | how, min(16, block // 512), "STG"
    wide = given | pointers("smooth", t) | {"KIND": 3, "GATED": True, "ROTATE": 0, "KEEP": False, "BLOCK": 4096}
    yield "_kernel", wide, 8, "STG"


def gate_residual_norm(t):
    given = pointers("x_new y", t) | matrices("x delta", t) | operands("gate " + AFFINE, t) | {"D": "i32", "eps": "fp32"} | HOW
    yield "_kernel", given | {"KEEP": True, "BLOCK": 2048}, 4
    yield "_kernel", given | {"KEEP": True, "BLOCK": 8192}, 16
    yield "_kernel", given | {"KEEP": False, "BLOCK": 4096}, 8


def slice_moments(t):
    given = pointers("z", t) | pointers("moments", "fp32") | matrices("x", t) | operands("weight", t) | {"D": "i32"}
    yield "_kernel", given | {"KEEP": True, "BLOCK": 1024}, 2
    yield "_kernel", given | {"KEEP": False, "BLOCK": 4096}, 8


def norm_backward(t):
    "Every sum in registers; the widest row with two; operands of each row's own; a row that does not fit."
    given = pointers("dx", t) | matrices("grad x", t) | {"D": "i32", "eps": "fp32"} | HOW
    kernel = given | integers("unit runs rows") | {"scalars": None, "own": (None,) * 5, "parts": ("*fp32",) * 5}
    plain = kernel | {"d_delta": None, "residual": None, "delta": None, "gate": None, "bias": None}
    gated = kernel | pointers("d_delta", t) | matrices("residual delta", t) | operands("gate scale weight bias", t)
    two = ("*fp32", "*fp32", None, None, None)
    yield "_kernel", gated | {"BLOCK": 4096}, 16
    yield "_kernel", plain | operands("scale", t) | {"weight": None, "parts": two, "BLOCK": 8192}, 16
    each = ("*" + t, "*" + t, None, None, None)
    own = {"own": each, "parts": (None, None, "*fp32", None, None), "BLOCK": 2048}
    yield "_kernel", plain | operands("scale weight", t) | own, 8
    yield "_kernel", gated | pointers("scalars", "fp32") | {"BLOCK": 2048}, 8
    yield "_walk", given | pointers("scalars", "fp32") | operands("scale weight", t) | {"BLOCK": 2048}, 8, "STG"
    sums = {"outs": ("*" + t,) * 2, "counts": ("i32",) * 2, "groups": ("i32",) * 2, "OUTS": 2, "PARTS": 32, "BLOCK": 64}
    yield "_sums._kernel", pointers("parts", "fp32") | integers("size D") | sums, 4, "STG"


def td_params(t):
    yield "_kernel", pointers("y p0 p1 w b", t) | pointers("tau", "fp32") | integers("P T") | {"BLOCK": 1024}, 4


def td_params_backward(t):
    given = pointers("d_p0 d_p1 d_w d_b grad p0 p1 w b", t) | pointers("d_tau tau", "fp32")
    yield "_kernel", given | integers("grad_time P T") | {"grad_column": 1, "BLOCK": 1024}, 4


def geglu(t):
    for tanh in (False, True):
        yield "_kernel", pointers("y", t) | matrices("a b", t) | {"D": "i32", "TANH": tanh, "BLOCK": 1024}, 4


def group_norm_quantize(t):
    "A ResBlock's norm with every operand; without a norm, of few channels; what is written once a channel is narrow."
    where = pointers("x", t) | integers("x_sample x_pixel P C chunks") | {"x_channel": 1}
    tile = {"PIXELS": 64, "CHANNELS": 64}
    for norm, few in ((True, {}), (False, {"PIXELS": 1024, "CHANNELS": 4, "C": "i32"})):
        yield "_look", pointers("parts", "fp32") | where | {"NORM": norm} | tile | few, 4, "STG", "LDG" if few else ""
        fold = pointers("coefs parts", "fp32") | pointers("largest", "i32") | {"eps": "fp32"}
        fold |= integers("P C chunks unit units")
        given = dict.fromkeys("weight bias scale shift smooth".split(), None if few else "*" + t)
        how = {"NORM": norm, "SILU": norm, "PIXELS": 64, "CHUNKS": 64 if norm else 16, "CHANNELS": 16 if norm else 64}
        yield "_fold", fold | given | how, 8, "LDG", "STG"
        codes = pointers("codes", "i8") | pointers("coefs inverses", "fp32") | where | {"smooth": given["smooth"], "SILU": norm}
        yield "_codes", codes | tile | few, 4, "STG", "LDG" if few else ""
    scale = pointers("scales inverses", "fp32") | pointers("largest", "i32") | {"units": "i32", "BLOCK": 32}
    yield "_scale", scale, 1, "LDG", "STG"


def linear_w8a8(t):
    "Every epilogue, with a branch and without, at the tile of many rows and that of few; codes come by cp.async or in words."
    given = {"y": "*" + t, "weight": "*u8", "weight_scale": ("*fp32", 1), "x_scale": ("*fp32", 1)} | integers("M N K R")
    given |= {"x": ("*i8", "i32", 1), "bias": ("*" + t, 1)} | operands("gate residual", t) | matrices("low up", t)
    given |= {"window": None, "group_scale": None, "GROUP": 1, "MIXED": False}
    for activation, rows, block, step in (("TANH", 64, 64, 32), ("GELU", 64, 64, 32), ("SILU", 16, 64, 128)):
        which = {name: name == activation for name in ("GELU", "TANH", "SILU")} | {"ROWS": rows, "BLOCK": block, "STEP": step}
        which |= {"low": None, "up": None} if activation == "GELU" else {}
        yield "_linear._kernel", given | which, 8, "LDG", "STG" if rows < 64 else ""


def linear_w4a8_lowrank(t):
    for name, given, warps, *_ in linear_w8a8(t):
        yield name, given | {"group_scale": "*u8", "GROUP": 64 if given["GELU"] else 128}, warps, "LDG", "STG"


def linear_w4a16(t):
    "Codes that become floats leave the tensor cores' operands no other way than through registers."
    for name, given, warps, *_ in linear_w8a8(t):
        floats = {"x": ("*" + t, "i32", 1), "x_scale": None, "group_scale": "*u8", "GROUP": 64 if given["GELU"] else 128}
        if t == "fp32" and given["STEP"] == 128:
            floats["STEP"] = 64
        yield name, given | floats, warps, "LDG", "STG"


def conv2d_w8a8(t):
    "Three by three with all there is, of many windows and of few; a single tap."
    none = {"low": None, "up": None}
    for name, given, warps, *narrow in linear_w8a8(t):
        window = ("i32",) * 5 + (1 if given["GELU"] else 3, 1, 1, 1)
        yield name, given | none | {"x": ("*i8", "i32", "i32", "i32", 1), "window": window}, warps, *narrow


def depthwise_conv2d(t):
    given = pointers("y x weight bias", t) | integers("x_sample x_line x_pixel H W C pixels") | {"x_channel": 1}
    yield "_kernel", given | {"KH": 7, "KW": 7, "RESIDUAL": True, "PIXELS": 32, "CHANNELS": 64}, 4


COEF = pointers("coef", "fp32") | integers("coef_step coef_sample T E guided") | {"step": "*i32", "coef_column": 1}


def solver_step(t):
    "Two outputs, x and history, two results, noise: a stochastic solver; then with all there is."
    given = COEF | {"outputs": ("*" + t,) * 2, "output_samples": ("i32",) * 2, "results": ("*fp32",) * 2, "seed": "*i64"}
    given |= {"B": "i32", "OUTPUTS": 2, "RESULTS": 2, "BLOCK": 1024}
    none = dict.fromkeys("copy flags masks mask_samples gain bound".split())
    few = {"terms": ("*fp32",) * 2, "term_samples": ("i32",) * 2, "TERMS": 2, "TWO_ROWS": False, "COPIES": 0}
    yield "_kernel", given | none | few, 4
    all_of = {"terms": ("*fp32",) * 6, "term_samples": ("i32",) * 6, "TERMS": 6, "TWO_ROWS": True, "COPIES": 2}
    all_of |= pointers("flags gain bound", "fp32") | {"masks": ("*fp32",) * 2, "mask_samples": ("i32",) * 2, "copy": "*" + t}
    yield "_kernel", given | all_of, 4


def row_abs_quantile(t):
    given = COEF | {"outputs": ("*" + t,) * 2, "output_samples": ("i32",) * 2, "OUTPUTS": 2, "TWO_ROWS": True}
    given |= pointers("out x gain", "fp32") | {"x_sample": "i32", "rank": "i32", "fraction": "fp32"}
    yield "_kernel", given | {"BLOCK": 2048}, 8, "STG"


def row_covariance(t):
    for count in (2, 4):
        given = {"tensors": ("*" + t,) * count, "tensor_samples": ("i32",) * count, "COUNT": count, "BLOCK": 4096}
        yield "_kernel", pointers("parts", "fp64") | integers("chunks E") | given, 8, "STG"
    merged = pointers("out", "fp32") | pointers("parts", "fp64") | integers("chunks E")
    yield "_merge", merged | {"COUNT": 4, "BLOCK": 4096, "TILE": 64}, 1, "LDG", "STG"


def qkv_prep(t):
    "A norm of each head with neighbours rotated; across heads with halves; LayerNorm with all there is; values' bias."
    given = pointers("y bias weight shift", t) | {"x": ("*" + t, "i32", "i32", "i32", 1)} | integers("T H D half")
    given |= dict.fromkeys(("cos", "sin"), ("*fp32", "i32", "i32")) | {"eps": "fp32"}
    given |= {"NORM": 1, "ACROSS": False, "APART": False, "scales": None, "center": None}
    few = {"bias": None, "shift": None}
    yield "_kernel", given | few | {"HEADS": 16, "BLOCK": 128, "PAIRS": 64}, 4
    yield "_kernel", given | few | {"ACROSS": True, "APART": True, "HEADS": 16, "BLOCK": 128, "PAIRS": 64}, 4
    yield "_kernel", given | {"NORM": 2, "ACROSS": True, "HEADS": 64, "BLOCK": 128, "PAIRS": 64}, 16
    yield "_kernel", given | {"NORM": 2, "APART": True, "HEADS": 32, "BLOCK": 64, "PAIRS": 32}, 4
    none = dict.fromkeys(("weight", "shift", "cos", "sin")) | {"NORM": 0}
    yield "_kernel", given | none | {"HEADS": 16, "BLOCK": 128, "PAIRS": 64}, 4


def qkv_quantize(t):
    "The first two of these to codes, k's less a center; and with nothing but that."
    coded = {"y": "*i8", "scales": "*fp32", "center": ("*fp32", "i32", "i32", 1)}
    variants = list(qkv_prep(t))
    for name, given, warps in (*variants[:2], variants[-1]):
        yield "qkv_prep." + name, given | coded, warps, "STG"


SHOWN = {"bias": ("*fp32", "i32", "i32", "i32", 1), "mask": ("*u8", "i32", 0, "i32", 1)}


def attention(module, t, d, more):
    "The arguments of a call with heads of d columns, and how it is compiled."
    module = importlib.import_module("diffkernels.triton." + module)
    dtype = torch.float32 if t == "fp32" else torch.bfloat16
    tiles = module._attention.widest(module.TILES, dtype, d, "bias" in more)
    given = {name: ("*" + t, "i32", "i32", "i32", 1) for name in ("q", "k", "v")} | {"scale": "fp32", "D": d, "DV": d}
    given |= integers("q_tokens k_samples k_tokens samples blocks group") | dict.fromkeys(("bias", "mask"))
    given |= {"PARTS": module._attention.parts(d), "V_PARTS": module._attention.parts(d), "CAUSAL": 0, "index": (None,) * 4}
    given |= dict.fromkeys(("q_scale", "k_scale"))
    return given | {"QUERIES": tiles.queries, "KEYS": tiles.keys} | more, (tiles.warps, tiles.stages)


def attention_forward(t):
    "A head of two parts; the widest; with all there is; packed."
    all_of = SHOWN | {"CAUSAL": 1, "index": ("*i32", None, None, "*i32"), "SCALED": True}
    for d, more in ((72, {}), (256, {}), (128, all_of), (40, {"CAUSAL": 2, "index": (None, "*i32", "*i32", None)})):
        given, how = attention("attention_forward", t, d, more)
        yield "_kernel", pointers("o", t) | pointers("lse", "fp32") | {"SCALED": False} | given, how


def attention_int8(t):
    "The same of codes: theirs are rows of 72 and 40 bytes, which are not read by sixteens."
    for name, given, how in attention_forward(t):
        d = given["D"]
        coded = dict.fromkeys("qk", ("*i8", "i32", "i32", "i32", 1)) | dict.fromkeys(
            ("q_scale", "k_scale"), ("*fp32", "i32", "i32", "i32")
        )
        parts = importlib.import_module("diffkernels.triton._attention").parts(d, 32)
        yield "attention_forward." + name, given | coded | {"PARTS": parts}, how, "LDG"


def attention_backward(t):
    for name, outs in (("_keys", "dk dv"), ("_queries", "dq")):
        all_of = SHOWN | {"CAUSAL": 1, "index": ("*i32", None, None, "*i32")}
        packed = {"CAUSAL": 2, "index": (None, "*i32", "*i32", None)}
        for d, more in ((72, {}), (256, {}), (128, all_of), (40, packed)):
            given, how = attention("attention_backward", t, d, more)
            given |= {"grad": given["q"]} | dict.fromkeys(("lse", "delta"), ("*fp32", "i32", "i32", 1))
            yield name, pointers(outs, t) | integers("q_samples") | given, how
    given, how = attention("attention_backward", t, 72, SHOWN | {"ALONG": (True, False, False, False)})
    given |= {"grad": given["q"], "d_bias": ("*fp32", "i32", "i32", "i32", 1)}
    given |= dict.fromkeys(("lse", "delta"), ("*fp32", "i32", "i32", 1))
    yield "_bias", given | integers("q_samples heads own_heads q_blocks k_blocks"), how, "STG"
    four = {name: ("*" + t, "i32", "i32", "i32", 1) for name in ("grad", "o")} | {"grad_lse": ("*fp32", "i32", "i32", 1)}
    sizes = integers("tokens heads count") | {"DV": 72, "ROWS": 16, "WIDE": 128}
    yield "_delta", pointers("delta", "fp32") | four | sizes, 4, "STG"


def decode_attention(t):
    "A token to a cache in parts, and their merge; two parts of a head, rotated; all there is; the widest."
    module = importlib.import_module("diffkernels.triton.decode_attention")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[t]
    caches = {name: ("*" + t, "i32", "i32", "i32", 1) for name in ("q", "k", "v", "k_cache", "v_cache")}
    table = dict.fromkeys(("cos", "sin"), ("*fp32", "i32", 1))
    for d, rows, parts, more in (
        (64, 1, 8, {"cos": None, "sin": None, "ROTARY": 0}),
        (72, 16, 1, {}),
        (128, 64, 4, {"SCALED": True, "INTERLEAVED": False}),
        (80, 64, 1, {"ROTARY": 32, "CAUSAL": False}),
        (256, 64, 1, {}),
    ):
        tiles = module._attention.widest(module.TILES, dtype, d, False).cut(rows, 1024)
        given = pointers("o", t) | dict.fromkeys(("totals", "tops")) | pointers("index", "i32") | {"scale": "fp32"}
        if parts > 1:
            given |= pointers("o totals tops", "fp32")
        given |= integers("end tokens length sinks slots count kv_heads group blocks") | caches | table
        given |= {"D": d, "DV": d, "PARTS": module._attention.parts(d), "V_PARTS": module._attention.parts(d), "ROTARY": d}
        given |= {"INTERLEAVED": True, "CAUSAL": True, "SCALED": False, "ROWS": tiles.queries, "KEYS": tiles.keys}
        yield "_kernel", given | more, (tiles.warps, tiles.stages)
    given = pointers("o", t) | pointers("held totals tops", "fp32") | integers("parts count") | {"factor": "fp32"}
    yield "_merge", given | {"DV": 64, "WIDE": 64, "PARTS": 8, "MERGED": module.MERGED}, 1, "STG"
    yield "_merge", given | {"DV": 256, "WIDE": 256, "PARTS": 256, "MERGED": module.MERGED}, 1, "STG"


def specialise(kernel, given):
    "The signature; constants and multiples of 16, by place."
    signature, constants, attrs = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        kinds = given[name] if isinstance(given[name], tuple) else (given[name],)
        typed = [k if isinstance(k, str) else "constexpr" for k in kinds]
        signature[name] = tuple(typed) if isinstance(given[name], tuple) else typed[0]
        for j, kind in enumerate(kinds):
            place = (i, j) if isinstance(given[name], tuple) else (i,)
            if not isinstance(kind, str):
                constants[place] = kind
            elif kind[0] == "*" or (kind == "i32" and name not in ANY):
                attrs[place] = [["tt.divisibility", 16]]
    return {"signature": signature, "constexprs": constants, "attrs": attrs}


def chosen(op, pair, full):
    "The signatures that a pair, the first or the second, compiles."
    variants, turn = list(globals()[op](pairs[pair][0])), Counter()
    signatures = Counter(name for name, *_ in variants)
    for name, *how in variants:
        if full or signatures[name] == 1 or turn[name] % 2 == pair:
            yield name, *how
        turn[name] += 1


def build(op, pair, full):
    dtype, arch = pairs[pair]
    for name, given, warps, *narrow in chosen(op, pair, full):
        module, _, name = name.rpartition(".")
        kernel = getattr(importlib.import_module("diffkernels.triton." + (module or op)), name)
        source = ASTSource(fn=kernel, **specialise(kernel, given))
        warps, stages = warps if isinstance(warps, tuple) else (warps, 3)
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": op not in UNFUSED}
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        sass = built.asm["sass"]
        yield {
            "op": op, "dtype": dtype, "arch": arch, "kernel": kernel.__name__, "given": str(given),
            "cubin": len(built.asm["cubin"]), "elf": built.asm["cubin"][:4] == b"\\x7fELF",
            "shared": built.metadata.shared,
            "local": re.findall(r"\\b(?:LDL|STL)\\b.*", sass),
            "wide": {
                i: len(re.findall(r"\\b" + i + r"\\.E(?:\\.\\w+)*\\.128\\b", sass)) for i in ("LDG", "STG") if i not in narrow
            },
        }


op, full, pairs = sys.argv[1], sys.argv[2] == "full", json.loads(sys.argv[3])
print(json.dumps([row for pair in range(len(pairs)) for row in build(op, pair, full)]))
"""


def names() -> list[str]:
    folder = Path(__file__).resolve().parents[1] / "diffkernels" / "triton"
    return sorted(p.stem for p in folder.glob("*.py") if p.stem[0] != "_")


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """Each op that is asked for → the process that compiled its kernels, two at a time."""
    pytest.importorskip("triton")
    full = request.config.getoption("--full")
    folder = tmp_path_factory.mktemp("compiled")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    # The folder is the test's own, so that a source tree beside the tests does not hide the installed package.
    env["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    (folder / "child.py").write_text(CHILD)  # a file: Triton reads the source of what it compiles

    def run(op: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "child.py", op, "full" if full else "", json.dumps(EVERY if full else PAIRS)]
        return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=600)

    ops = [item.callspec.params["op"] for item in request.session.items if item.function is test_kernel_compiles]
    with ThreadPoolExecutor(2) as pool:
        yield {op: pool.submit(run, op) for op in ops}


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("op", names())
def test_kernel_compiles(op, compiled, request) -> None:
    """A cubin comes out for each dtype and architecture; nothing is spilled; rows move 16 bytes an instruction."""
    done = compiled[op].result()
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    pairs = EVERY if request.config.getoption("--full") else PAIRS
    assert {(r["dtype"], r["arch"]) for r in rows} == set(pairs)
    for row in rows:
        assert row["elf"] and row["cubin"] > 0, row
        assert not row["local"], row
        assert row["shared"] <= SHARED, row
        assert all(row["wide"].values()), row
