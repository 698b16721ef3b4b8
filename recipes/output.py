"""Shared by the recipes: writing the result, and a report beside it."""

import json
from collections.abc import Sequence
from pathlib import Path

import data
from tools.config import UserError


def refuse_overwrite(source: str, out: str) -> None:
    if Path(source).resolve() == Path(out).resolve():
        raise UserError(f"--out={out} is the input file; choose another name")


def write_result(conversations: Sequence[data.Conversation], out: str, report: data.Report,
                 kind: str = "sharegpt") -> dict:
    """Writes `out`, and to out.report.json what happened to which conversation."""
    written = data.save_conversations(conversations, out, kind)
    entries = [dict(id=name, what=reason) for name, reason in report.entries]
    content = dict(written=written, reasons=report, conversations=entries)
    with data.atomic_write(f"{out}.report.json") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
    print(f"{written} conversations written to {out}; changes: {out}.report.json")
    for reason, n in report.most_common():
        print(f"{n:>8}  {reason}")
    return dict(written=written, **report)
