"""Shared by the recipes: the result, the report beside it, and a teacher with its replies."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import data
from tools import teacher
from tools.config import Stopped, UserError, refuse_unused
from tools.teacher import Replies


def refuse_overwrite(source: str, out: str) -> None:
    if Path(source).resolve() == Path(out).resolve():
        raise UserError(f"--out={out} is the input file; choose another name")


def write_result(conversations: Sequence[data.Conversation], out: str, report: data.Report,
                 kind: str = "sharegpt") -> dict:
    """Writes the conversations to `out`. Writes out.report.json, which says what was dropped or
    changed, and why. Returns the counts."""
    written = data.save_conversations(conversations, out, kind)
    entries = [dict(id=name, what=reason) for name, reason in report.entries]
    content = dict(written=written, reasons=report, conversations=entries)
    with data.atomic_write(f"{out}.report.json") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
    print(f"{written} conversations written to {out}; what was changed: {out}.report.json")
    for reason, n in report.most_common():
        print(f"{n:>8}  {reason}")
    return dict(written=written, **report)


class CachedTeacher:
    """A teacher whose replies are kept in OUT.replies.jsonl. `tokens` is what they cost: prompts
    and replies together, also of replies that this run found in the file."""

    def __init__(self, cfg):
        if teacher.kind(cfg.teacher) == "toy":
            refuse_unused(cfg, ("temperature", "max_new_tokens"), "the toy's oracle has none")
        self.model = teacher.teacher(cfg.teacher, cfg.temperature, cfg.max_new_tokens)
        self.settings = [cfg.temperature, cfg.max_new_tokens]
        self.cache = teacher.ReplyCache(Path(f"{cfg.out}.replies.jsonl"))
        self.tokens = 0

    def ask(self, requests: list[data.Conversation], number: int, label: str = "") -> Replies:
        """One reply per request, or None. `number` is part of the cache's key: the same request
        under another number gets another reply. Without a label, no progress is shown."""
        replies = self.cache.ask(self.model, requests, [*self.settings, number], label)
        for reply in replies:
            if reply:
                self.tokens += reply.prompt_tokens + reply.completion_tokens
        return replies


@contextlib.contextmanager
def open_teacher(cfg) -> Iterator[CachedTeacher]:
    """The teacher that the options name. Each reply is written as it arrives: after Ctrl-C or
    kill -9, the same command asks only for the missing ones."""
    cached = CachedTeacher(cfg)
    try:
        yield cached
    except KeyboardInterrupt:
        cache = cached.cache
        raise Stopped(f"{len(cache.replies)} replies are kept in {cache.path}") from None
