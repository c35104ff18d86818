"""Triton kernels compile for real GPUs: the interpreter that the other tests run in accepts what the compiler refuses.

Each kernel is specialised as the launcher would do it: pointers and extents that are multiples of 16, unit strides as
constants. A new kernel needs a function here that gives its signature.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ARCHS = (80, 90)
DTYPES = ("fp32", "bf16")

CHILD = '''
import importlib, json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def norm_modulate(t):
    """LayerNorm with every operand: a program that keeps its row, and one that walks a wide one."""
    operands = ("scale", "shift", "weight", "bias")
    signature = {"y": "*" + t, "x": "*" + t, "x_row": "i32", "D": "i32", "eps": "fp32"}
    for name in operands:
        signature |= {name: "*" + t, name + "_row": "i32", name + "_repeat": "i32"}
    flags = {"x_column": 1, "LAYER": True, "INSIDE": True} | {"HAS_" + name.upper(): True for name in operands}
    yield "kept", signature, flags | {"KEEP": True, "BLOCK": 2048}, 4
    yield "walked", signature, flags | {"KEEP": False, "BLOCK": 4096}, 8


def solver_step(t):
    """Two outputs, two rows of weights; x, two of history and noise; two results."""
    signature = {
        "outputs": ("*" + t,) * 2, "output_samples": ("i32",) * 2,
        "terms": ("*fp32",) * 4, "term_samples": ("i32",) * 4, "results": ("*fp32",) * 2,
        "coef": "*fp32", "coef_step": "i32", "coef_sample": "i32", "T": "i32", "step": "*i32", "E": "i32", "guided": "i32",
    }
    yield "", signature, {"coef_column": 1, "OUTPUTS": 2, "TERMS": 4, "RESULTS": 2, "TWO_ROWS": True, "BLOCK": 1024}, 4


def multiples_of_16(signature):
    for i, (name, kinds) in enumerate(signature.items()):
        if isinstance(kinds, tuple):
            yield from ((i, j) for j in range(len(kinds)))
        elif kinds[0] == "*" or (kinds == "i32" and name not in ("T", "coef_step", "coef_sample")):
            yield (i,)


def build(op, variants, dtype, arch):
    kernel = importlib.import_module("diffkernels.triton." + op)._kernel
    for variant, kinds, constants, warps in variants(dtype):
        signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
        attrs = {path: [["tt.divisibility", 16]] for path in multiples_of_16(signature)}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
        sass = built.asm["sass"]
        yield {
            "op": op, "dtype": dtype, "arch": arch, "variant": variant,
            "cubin": len(built.asm["cubin"]), "elf": built.asm["cubin"][:4] == b"\\x7fELF",
            "local": re.findall(r"\\b(?:LDL|STL)\\b.*", sass),
            "wide": [len(re.findall(r"\\b" + name + r"\\.E(?:\\.\\w+)*\\.128\\b", sass)) for name in ("LDG", "STG")],
        }


op, dtypes, archs = sys.argv[1], sys.argv[2].split(","), [int(a) for a in sys.argv[3].split(",")]
print(json.dumps([row for dtype in dtypes for arch in archs for row in build(op, globals()[op], dtype, arch)]))
'''


def names() -> list[str]:
    folder = Path(__file__).resolve().parents[1] / "diffkernels" / "triton"
    return sorted(p.stem for p in folder.glob("*.py") if p.stem[0] != "_")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("op", names())
def test_kernel_compiles(op, tmp_path) -> None:
    """A cubin comes out for each dtype and architecture; nothing is spilled; rows move 16 bytes an instruction."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    (tmp_path / "child.py").write_text(CHILD)  # a file: Triton reads the source of what it compiles
    command = [sys.executable, "child.py", op, ",".join(DTYPES), ",".join(map(str, ARCHS))]
    # The folder is the test's own, so that a source tree beside the tests does not hide the installed package.
    env["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {(r["dtype"], r["arch"]) for r in rows} == {(d, a) for d in DTYPES for a in ARCHS}
    for row in rows:
        assert row["elf"] and row["cubin"] > 0, row
        assert not row["local"], row
        assert all(row["wide"]), row
