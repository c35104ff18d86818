"""The result files: one a machine, JSON, written by the bench only; the newest row of each case."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from . import machine

FORMAT = 2
Row = dict[str, Any]


def key(row: Row) -> tuple[Any, ...]:
    """What a row is the newest of."""
    return row["op"], row["case"], row["dtype"], row["rung"], tuple(row["shape"]), row["l2"], row.get("threads")


def load(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError, with its name, for one that is cut or not ours."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        for row in content["rows"]:
            key(row)
            if "not_measured" not in row and not row["us"] > 0:
                raise ValueError(f"{row['op']}: {row['us']} µs")
        if not isinstance(content["machine"], dict):
            raise TypeError("machine")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a result file of format {FORMAT} ({type(error).__name__}: {error})") from None
    return content


def stamped(rows: list[Row], here: dict[str, Any]) -> list[Row]:
    """The rows with what they were measured with, and the day."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return [row | {name: here[name] for name in machine.BUILD if name in here} | {"when": now} for row in rows]


def _peaks(new: Any, old: Any) -> Any:
    if isinstance(new, dict):
        was = old if isinstance(old, dict) else {}
        return was | {name: _peaks(value, was.get(name)) for name, value in new.items()}
    return max((peak for peak in (new, old) if isinstance(peak, int | float)), default=None)


def merge(path: Path, here: dict[str, Any], rows: list[Row]) -> None:
    """Writes the rows into the machine's file, whole or not at all; rows of other cases stay, and a row that could not be
    measured does not replace one that was. A roofline is a peak: what a busier hour measures does not lower it.

    Raises ValueError for a file that is no result file of ours.
    """
    before = load(path) if path.exists() else {"machine": {}, "rows": []}
    known = {key(row): row for row in before["rows"]}
    for row in stamped(rows, here):
        old = known.get(key(row))
        if "not_measured" not in row or old is None or "not_measured" in old:
            known[key(row)] = row
    told = {name: value for name, value in here.items() if name not in machine.BUILD}
    if "rooflines" in told:
        told["rooflines"] = _peaks(told["rooflines"], before["machine"].get("rooflines"))
    content = {"format": FORMAT, "machine": told, "rows": sorted(known.values(), key=lambda row: str(key(row)))}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    os.chmod(name, 0o644)
    os.replace(name, path)


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Row]:
    """A row for each case that both files have measured: the time then and now, and now over then.

    `certain` where the two ranges from the 10th to the 90th percentile do not meet.
    """
    before = {key(row): row for row in old["rows"] if "not_measured" not in row}
    found = []
    for row in new["rows"]:
        then = before.get(key(row))
        if then is None or "not_measured" in row:
            continue
        (low, high), (a, b) = row["us_p10_p90"], then["us_p10_p90"]
        named = {name: row[name] for name in ("op", "case", "dtype", "rung", "shape", "l2")}
        found.append(
            named | {"old_us": then["us"], "us": row["us"], "slower": row["us"] / then["us"], "certain": low > b or high < a}
        )
    return found
