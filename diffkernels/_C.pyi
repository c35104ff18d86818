"""The compiled border: see csrc/bindings.cpp."""

from collections.abc import Callable
from typing import Any

build: dict[str, str]
kernels: list[tuple[str, str, list[tuple[str, str]], Callable[..., str | None]]]

def init(api: Any, torch: dict[str, Any]) -> None: ...
def attempt(first: Any, allocate: Any, *args: Any) -> Any: ...
def cpu_features() -> list[str]: ...
