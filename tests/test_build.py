"""What was built, and how the sources hang together: symbols, inner loops, SASS, headers, layers, budgets, files."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from mutation import MUTATIONS

from diffkernels import _C

ROOT = Path(__file__).resolve().parents[1]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "diffkernels"

# Budgets, in lines. They are there to be lowered.
KERNEL_LINES = 600
OP_LINES = 250
FRAME_LINES = 462  # _op.py + _ladder.py
BORDER_LINES = 600  # op.h + dispatch.h + bindings.cpp
FILE_BYTES = 2_500_000  # of anything in git

GPUS = {"cuda": ("sm_80", "sm_90"), "sm90": ("sm_90a",)}  # by folder of csrc

# Functions whose inner loops go through the stack on purpose: pattern of the demangled name, and why.
THROUGH_THE_STACK = {
    r"(normalize|means|run|attend|encode)<[^,]*, false": "rows of any stride are gathered through a line in L1",
    r"run<.*>\(.*Call const&, long, long\)": "norm_backward is one function: operands of other dtypes go through a line",
    r"run<.*, true, (true|false)>\(.*Call const&, [^,]*\*, long, long\)": "erf has more coefficients than AVX2 registers",
    r"run<.*, true, [123], (true|false)>\(.*Codes const&": "an exponential or erf has more coefficients than AVX2 registers",
    r"encode<.*, true, true>\(": "the same in group_norm_quantize",
    r"has_nan<": "row_abs_quantile asks it only of a sample that holds something infinite or worse",
    r"(half|int8)\(long\)": "roofline's narrow numbers are read from a line in the first cache, as a kernel's are",
    r"moments_of<[34],": "row_covariance of 3 or 4 tensors has more sums than AVX2 registers",
}
NO_LOOP = {"td_params": "the loop over the times reads tau, of any dtype, in a loop of its own"}

needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="csrc is not beside the tests")
pytestmark = needs_sources


def tool(name: str) -> str:
    """The path of a build tool: from PATH, CUDA_HOME, or Triton's own copies of NVIDIA's. Skips where there is none."""
    folders = [os.environ["PATH"]]
    if "CUDA_HOME" in os.environ:
        folders.insert(0, str(Path(os.environ["CUDA_HOME"], "bin")))
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        folders.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# What the build says: CMakeLists.txt is the only truth, so the flags are read there.

AS_INSTALLED = ("\nDK_SANITIZE:STRING=\n", "\nDK_LAST_FLAGS:STRING=\n", "\nCMAKE_BUILD_TYPE:STRING=\n")  # so Release
SETTINGS = {  # what CMake makes of its own settings
    "set(CMAKE_CXX_STANDARD 20)": ["-std=c++20"],
    "set(CMAKE_POSITION_INDEPENDENT_CODE ON)": ["-fPIC"],
    "set(CMAKE_CXX_VISIBILITY_PRESET hidden)": ["-fvisibility=hidden"],
    "set(CMAKE_BUILD_TYPE Release)": ["-O3", "-DNDEBUG"],
}


@dataclass(frozen=True)
class Rung:
    name: str
    flags: tuple[str, ...]
    sources: tuple[str, ...]


def rungs() -> dict[str, Rung]:
    if not CSRC.is_dir():
        return {}
    cmake = re.sub(r"(?m)(^|\s)#.*$", "", text(ROOT / "CMakeLists.txt"))
    lists = {m[1]: m[2] for m in re.finditer(r"set\((\w+) ((?:csrc/\S+\s*)+)\)", cmake)}
    found = {}
    for name, flags, sources in re.findall(r"\brung\((\w+)\s+\"([^\"]*)\"\s+([^)]*)\)", cmake):
        flags = re.sub(r"\$<\$<COMPILE_LANGUAGE:\w+>:([^>]*)>", lambda m: m[1].replace(";", " "), flags)
        sources = re.sub(r"\$\{(\w+)\}", lambda m: lists[m[1]], sources)
        found[name] = Rung(name, tuple(flags.split()), tuple(sources.split()))
    return found


RUNGS = rungs()
ENTRIES = {tuple(k) for k in re.findall(r"(?m)^K\((\w+), (\w+)\)", text(CSRC / "kernels.def"))} if RUNGS else set()
KERNELS = sorted(p for p in CSRC.glob("*/*.c*") if "DK_ENTRY" in text(p) and p.suffix in (".cpp", ".cu"))
CPU = [(r, s) for r in RUNGS.values() for s in r.sources if s.endswith(".cpp")]
CUDA = [(r, s, arch) for r in RUNGS.values() for s in r.sources if s.endswith(".cu") for arch in GPUS[Path(s).parent.name]]


def test_cmake_is_understood_and_builds_every_kernel() -> None:
    cmake = text(ROOT / "CMakeLists.txt")
    assert not [s for s in SETTINGS if s not in cmake]
    assert {s for r in RUNGS.values() for s in r.sources} == {relative(p) for p in KERNELS}
    assert {rung for rung, _ in ENTRIES} == set(RUNGS)
    assert CPU and CUDA


# CPU objects

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="an x86-64 compiler's flags")


@cache
def left_by_cmake(rung: str, source: str) -> Path | None:
    """The object that an installation of this tree has left behind, where no source that goes into it is newer: as they are
    compiled for users, and without doing it again."""
    for build in ROOT.glob("build/temp*"):
        cache, found = build / "CMakeCache.txt", build / f"CMakeFiles/{rung}.dir/{source}.o"
        if found.exists() and cache.exists() and all(line in text(cache) for line in AS_INSTALLED):
            sources = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), ROOT / source, ROOT / "CMakeLists.txt"]
            if found.stat().st_mtime > max(p.stat().st_mtime for p in sources):
                return found
    return None


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Future[Path]]]:
    """(rung, source) → its object: CMake's, or compiled as CMake does, two at a time."""
    cxx, folder = tool("g++"), tmp_path_factory.mktemp("objects")
    cmake = text(ROOT / "CMakeLists.txt")
    common = re.search(r"target_compile_options\(dk_flags INTERFACE \$<\$<COMPILE_LANGUAGE:CXX>:([^>]*)>", cmake)
    assert common
    flags = [*(f for s in SETTINGS.values() for f in s), *re.split(r"[\s;]+", common[1])]

    def compiled(rung: Rung, source: str) -> Path:
        if found := left_by_cmake(rung.name, source):
            return found
        out = folder / f"{rung.name}_{Path(source).stem}.o"
        run(cxx, *flags, *rung.flags, f"-DDK_RUNG={rung.name}", "-Icsrc", "-c", source, "-o", out)
        return out

    with ThreadPoolExecutor(2) as pool:
        yield {(r.name, s): pool.submit(compiled, r, s) for r, s in CPU}


@x86
@pytest.mark.parametrize("rung", sorted({r.name for r, _ in CPU}))
def test_objects_export_their_entries_and_nothing_else(objects, rung) -> None:
    """A weak function or a constructor built for AVX-512 would run on machines without it."""
    nm, readelf = tool("nm"), tool("readelf")
    exported = []
    for (name, source), built in objects.items():
        if name != rung:
            continue
        symbols = [line.split()[-2:] for line in run(nm, built.result()).stdout.splitlines()]
        assert not [s for kind, s in symbols if kind in "WVu"], f"{source}: weak symbols"
        exported += [s for kind, s in symbols if kind.isupper() and kind != "U"]
        sections = run(readelf, "-SW", built.result()).stdout
        assert not re.findall(r"\.(?:preinit_array|init_array|ctors)\S*", sections), f"{source}: constructors"
    assert sorted(exported) == sorted(f"dk_{r}_{op}" for r, op in ENTRIES if r == rung)


# Inner loops

Instruction = tuple[int, str, str]  # address, mnemonic, operands
FMA = re.compile(r"vfn?m(?:add|sub)(?:132|213|231)ps|vdpbf16ps|vpdpbusd|vpmaddwd")
# A spilled register's place; with an index it is an array. %rbp is any register where it holds no frame.
SLOT = {True: re.compile(r"\(%r[sb]p\)"), False: re.compile(r"\(%rsp\)")}


def functions(obj: Path) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in run(tool("objdump"), "-d", "--no-show-raw-insn", "-C", "-w", obj).stdout.splitlines():
        if m := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            code = found.setdefault(m[1], [])
        elif m := re.match(r"\s+([0-9a-f]+):\s+(?:notrack |bnd )?(\S+)\s*(.*)$", line):
            code.append((int(m[1], 16), m[2], m[3]))
    return found


def innermost_loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The natural loops that hold no other: a jump backwards alone may be the layout's doing."""
    at = {address: i for i, (address, _, _) in enumerate(code)}
    target = {}
    for i, (_, name, operands) in enumerate(code):
        if name[0] == "j" and (m := re.match(r"[0-9a-f]+", operands)) and int(m[0], 16) in at:
            target[i] = at[int(m[0], 16)]
    after = (i + 1 for i, (_, name, _) in enumerate(code[:-1]) if name[0] == "j" or name == "ret")
    begins = sorted({0, *target.values(), *after})
    ends = [*begins[1:], len(code)]
    block = {begin: k for k, begin in enumerate(begins)}
    successors: list[list[int]] = [[] for _ in begins]
    predecessors: list[list[int]] = [[] for _ in begins]
    for k, end in enumerate(ends):
        if end - 1 in target:
            successors[k].append(block[target[end - 1]])
        if code[end - 1][1] not in ("jmp", "ret", "ud2") and end < len(code):
            successors[k].append(block[end])
        for s in successors[k]:
            predecessors[s].append(k)

    reached, todo = {0}, [0]
    while todo:
        new = set(successors[todo.pop()]) - reached
        reached |= new
        todo += new
    dominators = {k: {0} if k == 0 else set(reached) for k in reached}
    changed = True
    while changed:
        changed = False
        for k in sorted(reached - {0}):
            new = {k} | set.intersection(*(dominators[p] for p in predecessors[k] if p in reached))
            changed, dominators[k] = changed or new != dominators[k], new

    loops: dict[int, set[int]] = {}
    for k in reached:
        for head in dominators[k].intersection(successors[k]):
            body, todo = loops.setdefault(head, {head}), [k]
            while todo:
                if (b := todo.pop()) not in body:
                    body.add(b)
                    todo += reached.intersection(predecessors[b])
    for head, body in loops.items():
        if not any(other in body for other in loops if other != head):
            yield [code[i] for k in sorted(body) for i in range(begins[k], ends[k])]


def hot_loops(obj: Path) -> Iterator[tuple[str, list[str]]]:
    """Every innermost loop with two packed multiply-adds or more and no call: its function, its vectors on the stack."""
    for name, code in functions(obj).items():
        slot = SLOT[any(o == "%rsp,%rbp" for _, _, o in code)]
        for loop in innermost_loops(code):
            if sum(bool(FMA.fullmatch(i)) for _, i, _ in loop) >= 2 and not any(i.startswith("call") for _, i, _ in loop):
                stack = [f"{a:x}: {i} {o}" for a, i, o in loop if re.search(r"%[yz]mm", o) and slot.search(o)]
                yield name, stack


@x86
@pytest.mark.parametrize("op", sorted({op for _, op in ENTRIES}))
@pytest.mark.parametrize("rung", [r for r in RUNGS if r.startswith("avx")])
def test_inner_loops_stay_in_registers(objects, rung, op) -> None:
    """gcc 12 was seen to spill accumulators under -fPIC."""
    source = f"csrc/cpu/{op}.cpp"
    if (rung, source) not in objects:
        pytest.skip(f"{op} has no kernel on {rung}")
    loops = list(hot_loops(objects[rung, source].result()))
    assert loops or op in NO_LOOP, "no loop was found: the test sees nothing"
    spilled = [(f, s) for f, s in loops if s and not any(re.search(p, f) for p in THROUGH_THE_STACK)]
    assert not spilled, "\n".join(f"{f}\n    " + "\n    ".join(s) for f, s in spilled)


@x86
@pytest.mark.parametrize("accumulators,spills", [(8, False), (40, True)])
def test_the_loop_finder_sees_spills(tmp_path, accumulators, spills) -> None:
    """A control: 8 vectors fit into 32 registers, 40 do not."""
    source = tmp_path / "f.cpp"
    source.write_text(f"""
        typedef float F __attribute__((vector_size(64)));
        void f(F* y, const float* a, const F* b, long n) {{
            F sum[{accumulators}] = {{}};
            for (long i = 0; i < n; ++i)
#pragma GCC unroll 64
                for (int k = 0; k < {accumulators}; ++k) sum[k] += a[i * {accumulators} + k] * b[i];
            for (int k = 0; k < {accumulators}; ++k) y[k] = sum[k];
        }}""")
    run(tool("g++"), "-O3", "-fPIC", "-mavx512f", "-ffp-contract=fast", "-c", source, "-o", tmp_path / "f.o")
    assert [bool(stack) for _, stack in hot_loops(tmp_path / "f.o")] == [spills]


# CUDA


@dataclass(frozen=True)
class Cubin:
    usage: str  # what cuobjdump says of registers and memory
    sass: str


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Future[Cubin]]]:
    """(source, arch) → its machine code: CMake's, or compiled with CMake's flags, two at a time."""
    nvcc, nvdisasm, cuobjdump = tool("nvcc"), tool("nvdisasm"), tool("cuobjdump")
    folder = tmp_path_factory.mktemp("cubins")

    def cubin(rung: Rung, source: str, arch: str) -> Path:
        if found := left_by_cmake(rung.name, source):
            apart = folder / Path(source).stem
            apart.mkdir(exist_ok=True)
            run(cuobjdump, "-xelf", arch, found, cwd=apart)
            if extracted := list(apart.glob(f"*.{arch}.cubin")):
                return extracted[0]
        out = folder / f"{rung.name}_{Path(source).stem}_{arch}.cubin"
        flags = ["-std=c++20", *rung.flags, f"-arch={arch}", f"-DDK_RUNG={rung.name}", "-Icsrc"]
        run(nvcc, *dict.fromkeys(flags), "-cubin", source, "-o", out)
        return out

    def read(rung: Rung, source: str, arch: str) -> Cubin:
        path = cubin(rung, source, arch)
        return Cubin(run(cuobjdump, "-res-usage", path).stdout, run(nvdisasm, "-c", path).stdout)

    with ThreadPoolExecutor(2) as pool:
        yield {(s, arch): pool.submit(read, r, s, arch) for r, s, arch in CUDA}


cuda_files = pytest.mark.parametrize("source,arch", [pytest.param(s, a, id=f"{s}-{a}") for _, s, a in CUDA])


@cuda_files
def test_cuda_kernels_do_not_spill(cubins, source, arch) -> None:
    cubin = cubins[source, arch].result()
    frames = re.findall(r"STACK:(\d+) .*\bLOCAL:(\d+)", cubin.usage)
    assert frames and set(frames) == {("0", "0")}, cubin.usage
    assert not re.findall(r"\b(?:LDL|STL)\b.*", cubin.sass)


@cuda_files
def test_cuda_kernels_move_16_bytes_an_instruction(cubins, source, arch) -> None:
    sass = cubins[source, arch].result().sass
    loads = "LDG(?:STS)?"  # or from global to shared memory
    for move in (loads,) if "/row_" in source else (loads, "STG"):  # a reduction writes a few numbers
        assert re.search(rf"\b{move}\.E(?:\.\w+)*\.128\b", sass), f"no {move} of 16 bytes"


# The compile line that every kernel file's first comment names


def written_line(path: Path) -> list[str]:
    comment = re.match(r"(?://.*\n)+", text(path))
    assert comment, f"{relative(path)}: does not begin with a comment"
    words = " ".join(line.removeprefix("//").strip() for line in comment[0].splitlines())
    line = re.search(r"Compile: ((?:nvcc|g\+\+) .*? -c \S+)", words)
    assert line, f"{relative(path)}: its first comment names no compile line"
    return shlex.split(line[1])


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernel_files_name_their_compile_line(path, request) -> None:
    line = written_line(path)
    assert line[-1] == relative(path)
    least = min((p for p in KERNELS if p.suffix == path.suffix), key=lambda p: p.stat().st_size)
    assert line[:-1] == written_line(least)[:-1]
    if path == least:
        run(tool(line[0]), *line[1:], "-o", os.devnull)  # one whole compilation: the others differ in the name
    elif path.suffix == ".cpp" and request.config.getoption("--full"):
        run(tool(line[0]), *line[1:], "-fsyntax-only")


# Headers, and what a kernel may not do


def uncommented(path: Path) -> str:
    """Without comments."""
    return re.sub(r"//.*|/\*[\s\S]*?\*/", "", text(path))


def test_one_file_knows_python_and_none_knows_torch() -> None:
    for path in CSRC.rglob("*"):
        if path.is_file():
            names = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", uncommented(path))
            assert not [n for n in names if re.match(r"torch|ATen|c10", n)], relative(path)
            if path.name != "bindings.cpp":
                assert not [n for n in names if re.match(r"Python\.h|pybind11", n)], relative(path)


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernels_include_the_contract_and_their_own_folder(path) -> None:
    for name in re.findall(r"#\s*include\s*\"([^\"]+)", uncommented(path)):
        assert (path.parent / name).resolve().parent in (CSRC, path.parent), name


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernels_neither_allocate_nor_wait_nor_abort(path) -> None:
    words = "cudaMalloc\\w* cudaFree\\w* cuda\\w*Synchronize malloc calloc free new delete assert abort exit printf"
    assert not re.findall(rf"\b(?:{words.replace(' ', '|')})\b(?=\s*[\w(])", uncommented(path))


# Layers


def trees(folder: str) -> Iterator[tuple[Path, ast.Module]]:
    """The modules of one layer: a folder of the package, or one file."""
    where = PACKAGE / folder
    for path in sorted(where.rglob("*.py")) if where.is_dir() else [where.with_suffix(".py")]:
        if path.is_file():
            yield path, ast.parse(text(path))


def inside(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name below diffkernels) of every import from this package."""
    here = ["diffkernels", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: -node.level], *([node.module] if node.module else [])] if node.level else [node.module or ""]
            names = [".".join([*base, a.name]) for a in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "diffkernels":
                yield node.lineno, rest.partition(".")[0]


MAY_IMPORT = {
    "nn": {"nn", "ops"},
    "sampling": {"sampling", "ops"},
    "models": {"models", "nn", "sampling", "ops"},
    "ops": {"ops", "_op", "_case"},
    "triton": {"triton", "ops"},
    "_op": {"_ladder", "_C", "_case", "_grad", "_writes"},
    "_case": set(),
    "_grad": set(),
    "_writes": {"_op"},  # for its type alone
    "_ladder": {"_C", "_op"},  # _op for its type alone
}
ABOVE = ("cli", "stream", "patch", "quantize", "models", "nn", "sampling")  # the layers above the ops


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layers_import_what_is_below_them(layer) -> None:
    for path, tree in trees(layer):
        assert not [f"{relative(path)}:{line}: {name}" for line, name in inside(path, tree) if name not in MAY_IMPORT[layer]]


@pytest.mark.parametrize("layer", ABOVE)
def test_no_kernel_above_the_ops(layer) -> None:
    for path, tree in trees(layer):
        assert not [f"{relative(path)}:{line}: {name}" for line, name in inside(path, tree) if name in ("_C", "triton")]


def test_imports_at_the_top_are_declared_dependencies() -> None:
    """What only some installations have is imported where it is used, so that everything else works without it."""
    project = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]
    declared = {re.split(r"\W", d)[0] for d in project["dependencies"]} - {"pillow"} | {"PIL", *sys.stdlib_module_names}
    for path, tree in trees("."):
        allowed = declared | ({"triton"} if path.parent.name == "triton" else set())
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not [f"{relative(path)}:{node.lineno}: {n}" for n in names if n.partition(".")[0] not in allowed]


@pytest.mark.parametrize("layer", ABOVE)
def test_nothing_above_the_ops_tests_a_device(layer) -> None:
    for path, tree in trees(layer):
        found = [
            f"{relative(path)}:{n.lineno}: {ast.unparse(n)}"
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and (n.attr in ("is_cuda", "is_cpu") or ast.unparse(n).endswith("device.type"))
        ]
        assert not found


# Budgets


def lines(*paths: Path) -> int:
    return sum(len(text(p).splitlines()) for p in paths)


def test_budgets() -> None:
    assert not [(relative(p), lines(p)) for p in KERNELS if lines(p) > KERNEL_LINES]
    ops = [p for p in (PACKAGE / "ops").glob("*.py") if p.name[0] != "_"]
    assert not [(relative(p), lines(p)) for p in ops if lines(p) > OP_LINES]
    assert lines(PACKAGE / "_op.py", PACKAGE / "_ladder.py") <= FRAME_LINES
    assert lines(*(CSRC / name for name in ("op.h", "dispatch.h", "bindings.cpp"))) <= BORDER_LINES


def test_every_planted_bug_has_its_place() -> None:
    """tests/mutation.py takes a quarter of an hour: what it can't plant is said before."""
    assert not [m.name for m in MUTATIONS if text(ROOT / m.file).count(m.old) != 1]


# What is shipped


def test_the_module_links_no_framework() -> None:
    """Not libtorch, so that one build serves every torch; not libgomp, since torch's pool is shared; not the driver."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run(tool("readelf"), "-d", _C.__file__).stdout)
    assert needed
    assert not [n for n in needed if re.match(r"lib(torch|c10|gomp|iomp|cuda|cudart|nvrtc|python)", n)]


def test_no_large_file_in_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = [ROOT / name for name in run(tool("git"), "ls-files", "-z").stdout.split("\0") if name]
    assert not [(relative(p), p.stat().st_size) for p in tracked if p.is_file() and p.stat().st_size > FILE_BYTES]


def test_assets_are_safetensors() -> None:
    """A pickle runs code where it is loaded."""
    assets = [p for p in (PACKAGE / "assets").rglob("*") if p.is_file() and p.name != "__init__.py"]
    assert assets
    assert not [relative(p) for p in assets if p.suffix != ".safetensors"]


NETWORK = ("socket", "ssl", "http", "urllib", "ftplib", "requests", "httpx", "aiohttp", "huggingface_hub")
PICKLE = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


def test_no_network_and_no_pickle() -> None:
    for path, tree in trees("."):
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not [n for n in names if n.partition(".")[0] in NETWORK + PICKLE], f"{relative(path)}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("torch.load", "torch.hub", "torch.save"), f"{relative(path)}:{node.lineno}"
    # And in fact: a process in which a connection is an error imports the package and runs an op.
    child = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(hook)
import torch, diffkernels
x = torch.randn(2, 3, 8)
diffkernels.ops.norm_modulate(x, x[:, 0], x[:, 1])
"""
    # -P and our own path: from a checkout's root, a plain `python -c` would import the tree, not the installed package.
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    done = subprocess.run([sys.executable, "-P", "-c", child], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_build_fetches_nothing() -> None:
    for name in ("CMakeLists.txt", "setup.py"):
        assert not re.findall(r"FetchContent|ExternalProject|file\s*\(DOWNLOAD|urllib|requests|https?://", text(ROOT / name))
