"""The `diffkernels` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    from .. import __version__
    from . import bench, doctor, info, sample, verify

    parser = argparse.ArgumentParser(prog="diffkernels", description="Fast kernels for diffusion models.")
    parser.add_argument("--version", action="version", version=f"diffkernels {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for command in (info, doctor, verify, sample, bench):
        command.register(subparsers)
    args = parser.parse_args(argv)
    args.own_process = argv is None  # not called from somebody's program
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("diffkernels: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
