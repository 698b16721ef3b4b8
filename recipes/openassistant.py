"""OpenAssistant's trees of messages as conversations.

    python -m recipes.openassistant trees.jsonl.gz --pick=best --out=oasst.json

A conversation is a path from the first question of a tree to a reply. Most messages have several
replies, which people have ranked; the table that is printed shows what each way of picking gives.
"""

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import data
from data import ROLES, Conversation, Report, Turn
from recipes.output import refuse_overwrite, write_result
from tools.config import UserError, run

KINDS = {"oasst": ({"message_id"}, {"message_tree_id"})}


class Tree(NamedTuple):
    id: str
    state: str | None  # complete ones are "ready_for_export"; some files do not say
    root: dict  # the first message, with the messages that answer it in its "replies"


def read_trees(records: Iterable[dict], report: Report) -> list[Tree]:
    """Trees from the two forms that were published: whole trees, and messages in any order."""
    trees, messages = [], {}
    for record in records:
        if "prompt" in record:
            trees.append(Tree(record["message_tree_id"], record.get("tree_state"),
                              record["prompt"]))
        else:
            messages[record["message_id"]] = {**record, "replies": []}
    return trees + link_messages(messages, report)


def link_messages(messages: dict[str, dict], report: Report) -> list[Tree]:
    """Trees from loose messages by id: adds each message to the "replies" of its parent."""
    roots = []
    for message_id, message in messages.items():
        parent = message.get("parent_id")
        if parent is None:
            roots.append(Tree(message_id, message.get("tree_state"), message))
        elif parent in messages:
            messages[parent]["replies"].append(message)
        else:
            report.add(message_id, "dropped with its replies: the file lacks its parent")
    return roots


def why_unusable(message: dict, role: str) -> str | None:
    """Why a message cannot stand where it is the turn of `role`, or None."""
    if message.get("deleted"):
        return "deleted"
    if message.get("synthetic"):
        return "written by a machine"
    if message.get("review_result") is False:
        return "rejected in review"
    if data.is_blank(message["text"]):
        return "has no text"
    if ROLES.get(message["role"]) != role:
        return "its role does not follow"
    return None


def rank(message: dict) -> float:
    """0 is best; infinity for a message without a rank."""
    given = message.get("rank")
    return float("inf") if given is None else given


def paths(tree: Tree, pick: str, report: Report) -> Iterator[list[dict]]:
    """Paths from the first question to a last reply.

    pick="all" follows all replies; "top2" those that are ranked first or second, and one without a
    rank if it is the only one; "best" the best-ranked reply to the best-ranked reply, which is one
    path. A question without a reply is not part of a path. If it is the first answer to the reply
    above it, the path to that reply is taken, so that this path appears once.
    """
    def usable(messages: Iterable[dict], role: str) -> list[dict]:
        kept = []
        for message in messages:
            reason = why_unusable(message, role)
            if reason is None:
                kept.append(message)
            else:
                report.add(message["message_id"], f"dropped with its replies: {reason}")
        return kept

    def walk(path: list[dict], is_first: bool) -> Iterator[list[dict]]:
        role = "assistant" if len(path) % 2 else "user"  # of the replies
        replies = usable(path[-1].get("replies") or [], role)
        if pick == "best":
            replies = sorted(replies, key=rank)[:1]
        if not replies and role == "user":
            yield path
        elif not replies and is_first:
            yield path[:-1]
        for i, reply in enumerate(replies):
            if role == "user" or is_picked(reply, pick, is_alone=len(replies) == 1):
                yield from walk([*path, reply], i == 0)

    for root in usable([tree.root], "user"):
        yield from walk([root], False)


def is_picked(reply: dict, pick: str, is_alone: bool) -> bool:
    if not pick.startswith("top"):
        return True
    return rank(reply) < int(pick[3:]) or is_alone and rank(reply) == float("inf")


def to_conversations(records: Iterable[dict], report: Report,
                     pick: str = "all") -> list[Conversation]:
    """The picked paths of all trees. What is left out is counted in the report."""
    found = []
    for tree in read_trees(records, report):
        if tree.state not in (None, "ready_for_export"):
            report.add(tree.id, f"dropped: the tree is {tree.state}")
            continue
        picked = list(paths(tree, pick, report))
        if not picked:
            report.add(tree.id, "dropped: a tree without a reply that could be kept")
        for number, path in enumerate(picked):
            turns = [Turn(ROLES[m["role"]], m["text"]) for m in path]
            extra = dict(tree=tree.id, messages=[m["message_id"] for m in path])
            found.append(Conversation(turns, f"{tree.id}_{number}", extra=extra))
    return found


@dataclass
class Config:
    file: str  # trees or messages
    out: str = "oasst.json"  # the conversations; the report is written beside it
    pick: str = "all"  # all, best (one path a tree), or top1, top2, ... (the best-ranked replies)
    valid: float = 0.0  # share of the trees that goes into a second file, OUT.valid.json

    def __post_init__(self):
        if not re.fullmatch(r"all|best|top[1-9]\d*", self.pick):
            raise UserError(f"--pick={self.pick}: expected all, best, top1, top2, ...")
        if not 0 <= self.valid < 1:
            raise UserError(f"--valid={self.valid} must be at least 0 and less than 1")


def compare_picks(records: list[dict]) -> dict:
    """Prints and returns what each way of picking gives; "different" counts a message once."""
    figures = {}
    print(f"{'pick':<8}{'trees':>8}{'threads':>9}{'messages':>10}{'different':>11}")
    for pick in ("all", "top2", "top1", "best"):
        found = to_conversations(records, Report(), pick)
        trees, messages = {c.extra["tree"] for c in found}, []
        for c in found:
            messages += c.extra["messages"]
        row = dict(trees=len(trees), threads=len(found), messages=len(messages),
                   different=len(set(messages)))
        print("{:<8}{trees:>8}{threads:>9}{messages:>10}{different:>11}".format(pick, **row))
        figures[pick] = row
    return figures


def main(cfg: Config) -> dict:
    refuse_overwrite(cfg.file, cfg.out)
    records = data.parse_records(data.read_text(cfg.file), cfg.file)
    if not data.kind_of_records(records, KINDS):
        raise UserError(f"{cfg.file} does not come from OpenAssistant")
    report = Report()
    found = to_conversations(records, report, cfg.pick)
    if not found:
        raise UserError(f"{cfg.file}: no usable conversation{report}")
    figures = compare_picks(records)
    trees = list(dict.fromkeys(c.extra["tree"] for c in found))
    held_out = set(random.Random(0).sample(trees, round(cfg.valid * len(trees))))
    if held_out:  # whole trees, since two paths through a tree share their beginning
        valid = [c for c in found if c.extra["tree"] in held_out]
        n = data.save_conversations(valid, f"{cfg.out}.valid.json")
        print(f"{len(held_out)} of {len(trees)} trees, {n} conversations: {cfg.out}.valid.json")
    train = [c for c in found if c.extra["tree"] not in held_out]
    return write_result(train, cfg.out, report) | figures


if __name__ == "__main__":
    run(main, Config)
