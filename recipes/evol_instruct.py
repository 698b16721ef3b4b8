"""WizardLM's data: instructions that a model rewrites, round by round, into harder ones, and then
answers (Xu et al. 2023, Evol-Instruct, arXiv 2304.12244).

    python -m recipes.evol_instruct alpaca.json --teacher=MODEL@URL --rounds=4
    python -m recipes.evol_instruct alpaca.json --teacher=MODEL@URL --prompts=mine.json

In each round one of six operations is drawn for every instruction. Five of them evolve it in depth;
breadth makes a new one. What fails is eliminated, and its parent stays in the pool for the next
round. The replies are kept beside the output, so the same command resumes.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import data
from recipes.output import (
    count_tokens,
    open_teacher,
    refuse_overwrite,
    replies_beside,
    write_result,
)
from tools.config import UserError, check_above, check_at_least, run, suggest
from tools.teacher import Reply

# -- prompts: our own words, for what the paper's ask for -----------------------------------------

DEPTH = """You make instructions for AI assistants harder. Below is a given prompt. Write a \
rewritten prompt that today's assistants find somewhat harder, but that people still understand \
and can answer. {how}
The rewritten prompt has 10 to 20 words more than the given prompt. An input that follows the \
instruction stays as it is: do not repeat it. Reply with the rewritten prompt alone, without the \
words "given prompt" and "rewritten prompt".

Given prompt:
{prompt}"""
HOW = dict(
    constraints="Add one more requirement or constraint.",
    deepen="If it asks about a topic, ask about it in more depth and more breadth.",
    concretize="Replace general concepts by more specific ones.",
    reasoning="If a short thought would answer it, make it need several steps of reasoning.",
    complicate="Add a piece of data that the answer depends on, as a table, JSON, XML or code.")
BREADTH = """Below is a given prompt for an AI assistant. Write a new prompt of the same domain, \
about something rarer. It is about as long and as difficult, and people can answer it. An input \
that follows the instruction stays as it is: ask about it, and do not repeat it. Reply with the \
new prompt alone, without the words "given prompt" and "new prompt".

Given prompt:
{prompt}"""
EQUAL = """Do these two prompts ask for the same: the same requirements, in the same depth and \
breadth? Answer with one word: Equal or Different.

First prompt:
{prompt}

Second prompt:
{evolved}"""
PROMPTS = {operation: DEPTH.replace("{how}", how) for operation, how in HOW.items()}
PROMPTS |= dict(breadth=BREADTH, equal=EQUAL)
OPERATIONS = (*HOW, "breadth")


def load_prompts(path: str) -> dict[str, str]:
    """The prompts of a JSON file, {operation: text}. Raises UserError."""
    found = data.parse_records(data.read_text(path), path)[0]
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object with the prompts {', '.join(PROMPTS)}")
    for name in found:
        if name not in PROMPTS:
            raise UserError(f"{path}: unknown prompt {name}{suggest(name, PROMPTS)}")
    for name, ours in PROMPTS.items():
        if name not in found:
            raise UserError(f"{path}: the prompt {name} is missing")
        for blank in re.findall(r"\{\w+\}", ours):
            if blank not in found[name]:
                raise UserError(f"{path}: the prompt {name} has no {blank}")
    return found


def fill(template: str, **texts: str) -> str:
    """Fills the blanks at once: a text may itself contain "{prompt}"."""
    return re.sub(r"\{(prompt|evolved)\}", lambda match: texts[match[1]], template)


# -- elimination ----------------------------------------------------------------------------------

# Words of the evolving prompts
LEAK = re.compile(r"\b(given|rewritten|created|new) prompt\b", re.I)
STOP_WORDS = set("""a about all also am an and any are as at be been but by can could did do does
for from had has have he her here him his how i if in into is it its just me more most my no nor not
of on only or other our out own she should so some such than that the their them then there these
they this those to too up us very was we were what when where which who why will with would you
your""".split())


def why_no_instruction(reply: Reply | None, parent: str) -> str | None:
    """The reason to drop an evolved instruction before it is judged, or None."""
    if reply is None:
        return "no answer from the teacher"
    text = reply.text.strip()
    if not text or not reply.ended:
        return "the instruction is empty or cut off"
    if LEAK.search(text) and not LEAK.search(parent):
        return "the instruction has words of the evolving prompt"
    if text == parent:
        return "no information gain"
    return None


def why_no_gain(reply: Reply | None) -> str | None:
    """The reason to drop an evolved instruction by the teacher's verdict, or None."""
    if reply is None:
        return "no answer from the teacher"
    verdict = re.match(r"\W*(equal|different|not equal)\b", reply.text, re.I)
    if not verdict:
        return "the verdict about information gain is unreadable"
    if verdict[1].lower() == "equal":
        return "no information gain"
    return None


def why_no_answer(reply: Reply | None) -> str | None:
    """The reason to drop an evolved instruction for the teacher's answer, or None."""
    if reply is None:
        return "no answer from the teacher"
    words = re.findall(r"\w+", reply.text.lower())
    if "sorry" in words and len(words) < 80:
        return "the answer is short and says sorry"
    if STOP_WORDS.issuperset(words):
        return "the answer has only punctuation and stop words"
    if not reply.ended:
        return "the answer is cut off"
    return None


# -- a round --------------------------------------------------------------------------------------

Ask = Callable[[list[data.Conversation], str], list[Reply | None]]


def evolve(pool: list[data.Conversation], number: int, ask: Ask, prompts: dict, seed: int,
           report: data.Report) -> dict[int, data.Conversation]:
    """Round `number`: the evolved task, with its answer, for each task of the pool where nothing is
    eliminated. Operations depend on the seed, the round and the task alone."""
    requests, operations = [], []
    for task in pool:
        operation = random.Random(f"{seed} {number} {task.id}").choice(OPERATIONS)
        operations.append(operation)
        text = fill(prompts[operation], prompt=task.turns[0].whole())
        requests.append(prompt(text, wanted=operation, task=task.turns[0]))
    children = {}
    for i, reply in enumerate(ask(requests, "evolving")):
        parent, name = pool[i], f"{pool[i].id}.{number}"
        why = why_no_instruction(reply, parent.turns[0].text)
        if why:
            report.add(name, f"dropped: {why}")
            continue
        asked = parent.turns[0]._replace(text=reply.text.strip())  # the input stays
        origin = dict(parent=parent.id, operation=operations[i], round=number)
        children[i] = replace(parent, turns=[asked], id=name, extra=origin)
    children = with_gain(pool, children, ask, prompts, report)
    return with_answers(children, ask, report)


def prompt(text: str, **extra) -> data.Conversation:
    """`extra` is for the toy's oracle, which does not read prompts."""
    return data.Conversation([data.Turn("user", text)], extra=extra)


def with_gain(pool: list[data.Conversation], children: dict, ask: Ask, prompts: dict,
              report: data.Report) -> dict[int, data.Conversation]:
    """Those that the teacher finds different from their parents."""
    requests = []
    for i, child in children.items():
        before, after = pool[i].turns[0], child.turns[0]
        text = fill(prompts["equal"], prompt=before.whole(), evolved=after.whole())
        requests.append(prompt(text, wanted="equal", texts=(before.text, after.text)))
    kept = {}
    for (i, child), reply in zip(children.items(), ask(requests, "comparing")):
        if why := why_no_gain(reply):
            report.add(child.id, f"dropped: {why}")
        else:
            kept[i] = child
    return kept


def with_answers(children: dict, ask: Ask, report: data.Report) -> dict[int, data.Conversation]:
    """Those to which the teacher has an answer, which is added."""
    requests = [replace(child, extra=dict(wanted="answer")) for child in children.values()]
    kept = {}
    for (i, child), reply in zip(children.items(), ask(requests, "answering")):
        if why := why_no_answer(reply):
            report.add(child.id, f"dropped: {why}")
        else:
            turns = [*child.turns, data.Turn("assistant", reply.text.strip())]
            kept[i] = replace(child, turns=turns)
    return kept


# -- the command ----------------------------------------------------------------------------------

@dataclass
class Config:
    file: str  # Alpaca: the instructions to begin with
    teacher: str = ""  # who evolves and answers: MODEL@URL, a checkpoint; for the toy's, oracle
    rounds: int = 4  # how often the pool evolves
    out: str = "evolved.json"  # all rounds, the first instructions included; beside it the replies
    prompts: str = ""  # JSON file with other prompts, {operation: text}
    temperature: float = 1.0  # of the teacher
    max_new_tokens: int = 2048  # of one reply
    seed: int = 0  # which operation evolves which instruction

    def __post_init__(self):
        check_above(self, 0, "rounds", "max_new_tokens")
        check_at_least(self, 0, "temperature")


def main(cfg: Config) -> dict:
    refuse_overwrite(cfg.file, cfg.out)
    if not cfg.teacher:
        raise UserError("--teacher is missing: MODEL@URL, a checkpoint, or oracle")
    prompts = load_prompts(cfg.prompts) if cfg.prompts else PROMPTS
    model = open_teacher(cfg)
    report, pool, tokens = data.Report(), [], 0
    for task in data.load_conversations(cfg.file, report):
        if len(task.turns) == 2:
            pool.append(replace(task, extra={**task.extra, "round": 0}))
        else:
            report.add(task.id, "dropped: more than one question")
    found = list(pool)
    print(f"{len(pool)} instructions, {cfg.rounds} rounds: at most {3 * len(pool) * cfg.rounds} "
          "requests")
    with replies_beside(cfg.out) as cache:
        for number in range(1, cfg.rounds + 1):
            def ask(requests, what, number=number):
                nonlocal tokens
                # The round is in the key: a parent that stays may be asked the same again.
                settings = [cfg.temperature, cfg.max_new_tokens, number]
                replies = cache.ask(model, requests, settings, f"round {number}: {what}")
                tokens += count_tokens(replies)
                return replies

            children = evolve(pool, number, ask, prompts, cfg.seed, report)
            print(f"round {number}: {len(children)} of {len(pool)} evolved; {tokens} tokens so far")
            if not children:
                print("stopped: nothing evolved in this round")
                break
            found += children.values()
            pool = [children.get(i, task) for i, task in enumerate(pool)]
    return write_result(found, cfg.out, report, "alpaca")


if __name__ == "__main__":
    run(main, Config)
