"""Shared by the recipes: writing the result, and a report beside it; asking a teacher."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import data
from tools import teacher
from tools.config import Stopped, UserError, refuse_unused


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


def open_teacher(cfg):
    """The teacher that the options name."""
    if teacher.kind(cfg.teacher) == "toy":
        refuse_unused(cfg, ("temperature", "max_new_tokens"), "the toy's oracle has none")
    return teacher.teacher(cfg.teacher, cfg.temperature, cfg.max_new_tokens)


@contextlib.contextmanager
def replies_beside(out: str) -> Iterator[teacher.ReplyCache]:
    """A teacher's replies, kept in out.replies.jsonl as they arrive: after Ctrl-C or kill -9 the
    same command asks only for those that are missing."""
    cache = teacher.ReplyCache(Path(f"{out}.replies.jsonl"))
    try:
        yield cache
    except KeyboardInterrupt:
        raise Stopped(f"{len(cache.replies)} replies are kept in {cache.path}") from None


def count_tokens(replies: Sequence[teacher.Reply | None]) -> int:
    """The tokens that were paid for: those of the prompts, and those written."""
    return sum(r.prompt_tokens + r.completion_tokens for r in replies if r)
