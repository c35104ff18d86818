"""`diffkernels verify`'s fuzz, 64 calls of every op on every rung (2,000 with --fuzz), and that it sees what it should.

Interpreted, a call takes seconds: half as many as the command makes, and as many with --full.
"""

from __future__ import annotations

import json
import re

import pytest
import torch

from diffkernels import _ladder
from diffkernels._op import OPS
from diffkernels.bench import fuzz
from diffkernels.cli import main, verify

pytestmark = pytest.mark.usefixtures("one_thread")
KERNELS = [(op, rung, device) for op in OPS.values() for rung, device in verify.rungs(op)]


@pytest.mark.parametrize(("op", "rung", "device"), KERNELS, ids=[f"{op.name}-{device}-{rung}" for op, rung, device in KERNELS])
def test_fuzz(op, rung, device, request) -> None:
    cases = 2000 if request.config.getoption("--fuzz") else 64
    if rung == "triton" and device == "cpu":
        cases = verify.INTERPRETED // (1 if request.config.getoption("--full") else 2)
    wrong = [o for o in (fuzz.check(op, rung, seed, device) for seed in range(cases)) if o.problem is not None]
    assert not wrong, "\n".join(f"{o.problem}\n  {o.what}\n  {verify.again(o)}" for o in wrong)


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_what_is_drawn_differs(op) -> None:
    """In dtype, layout and values; the same seed draws the same."""
    drawn = [fuzz.drawn(op, seed) for seed in range(64)]
    assert {draw.dtype for _, draw in drawn} == set(fuzz.DTYPES.values())
    assert len({layout for _, draw in drawn for layout in draw.laid}) == 6
    assert len({draw.kind for _, draw in drawn}) >= 5
    assert [str(fuzz.drawn(op, seed)[0]) for seed in range(8)] == [str(args) for args, _ in drawn[:8]]
    seed = next(i for i, (args, draw) in enumerate(drawn) if draw.kind == "normal" and not re.search(r"nan|\[\]", str(args)))
    assert str(drawn[seed][0]) != str(fuzz.drawn(op, seed, again=1)[0])


def broken(kernel, how):
    def run(out, *args):
        why = kernel(out, *args)
        how(out, *args)
        return why

    return run


BUGS = {
    "a wrong element": lambda out, x, *_: out.view(-1)[-1:].add_(1),
    "one not written": lambda out, x, *_: out.view(-1)[:1].fill_(torch.nan),
    "past the end": lambda out, x, *_: out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0),
    "before the start": lambda out, x, *_: out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(0),
    "an input": lambda out, x, *_: x.view(-1)[:1].add_(1) if x.is_contiguous() else None,
    "now and then": lambda out, x, *_: out.view(-1)[:1].add_(torch.rand(1)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_seen(bug, monkeypatch) -> None:
    op = OPS["norm_modulate"]
    monkeypatch.setitem(_ladder._native, ("cpu", op.name), broken(_ladder.kernel("cpu", op.name), BUGS[bug]))
    assert any(fuzz.check(op, "cpu", seed).problem for seed in range(16))


def test_the_command(capsys, monkeypatch) -> None:
    assert main(["verify", "--op", "geglu,td_params", "--rung", "cpu", "--cases", "3"]) == 0
    assert "6 calls, 0 wrong" in capsys.readouterr().out
    op = OPS["geglu"]
    monkeypatch.setitem(_ladder._native, ("cpu", op.name), broken(_ladder.kernel("cpu", op.name), BUGS["a wrong element"]))
    assert main(["verify", "--op", "geglu", "--rung", "cpu", "--cases", "8", "--seed", "70"]) == 1
    line = capsys.readouterr().out.partition("\n  diffkernels ")[2].splitlines()[0]
    assert line.startswith("verify --op geglu --rung cpu --seed 7") and main(line.split()) == 1
    capsys.readouterr()
    assert main(["verify", "--op", "geglu", "--rung", "cpu", "--cases", "8", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"][0]["again"].startswith("diffkernels verify --op geglu")
    monkeypatch.undo()
    monkeypatch.setattr(fuzz, "check", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["verify", "--op", "geglu", "--rung", "cpu"]) == 130


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--op", "gelu"], "--op: expected one of act_quantize"),
        (["--rung", "fast"], "--rung: expected one of sm90"),
        (["--rung", "sm90"], "nothing to run on 'sm90' here: does not run on cpu tensors"),
        (["--cases", "0"], "--cases, --seed: expected 1 or more"),
    ],
)
def test_bad_input(argv, words, capsys) -> None:
    assert main(["verify", *argv]) == 2
    assert words in capsys.readouterr().err
