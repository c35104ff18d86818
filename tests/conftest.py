"""Triton kernels run in Triton's interpreter where there is no GPU: that has to be said before Triton is imported."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser) -> None:
    parser.addoption("--full", action="store_true", help="every combination, where the default takes pairs")
    parser.addoption("--op", action="append", help="of test_ops.py's calls of kernels this op's alone; may be repeated")
    parser.addoption("--fuzz", action="store_true", help="2,000 random calls of each op on each rung instead of 64")
    parser.addoption("--big", action="store_true", help="also run what needs 10 GB of memory and minutes")


NOT_RUN: dict[str, str] = {}  # "device/rung": why; test_ops.py fills it, the summary prints it


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: threads that wait for one another on a busy machine make a file twenty times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config, items) -> None:
    for item in items:
        if item.get_closest_marker("big") and not config.getoption("--big"):
            item.add_marker(pytest.mark.skip(reason="big: 10 GB and minutes, pytest --big"))


def pytest_terminal_summary(terminalreporter) -> None:
    if NOT_RUN:
        terminalreporter.section("rungs not run here")
        for rung, why in sorted(NOT_RUN.items()):
            terminalreporter.write_line(f"{rung}: {why}")
