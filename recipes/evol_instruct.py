"""WizardLM's data: a model rewrites instructions, round by round, into harder ones and answers them
(Xu et al. 2023, Evol-Instruct, arXiv 2304.12244).

    python -m recipes.evol_instruct alpaca.json --teacher=MODEL@URL --rounds=4
    python -m recipes.evol_instruct alpaca.json --teacher=MODEL@URL --prompts=mine.json

In each round, one of six operations is drawn for every instruction of the pool. Five evolve it in
depth; breadth makes a new one. The result takes its parent's place in the pool. If it fails, it is
eliminated, and the parent stays. The replies are kept beside the output, so the same command
resumes.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import data
from recipes.output import open_teacher, refuse_overwrite, write_result
from tools.config import UserError, check_above, check_at_least, run, suggest
from tools.teacher import Replies, Reply

# -- the paper's prompts in our own words ---------------------------------------------------------

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
EQUAL = """Do these two prompts ask for the same thing, with the same requirements, in the same \
depth and breadth? Answer with one word: Equal or Different.

First prompt:
{prompt}

Second prompt:
{evolved}"""
PROMPTS = {operation: DEPTH.replace("{how}", how) for operation, how in HOW.items()}
PROMPTS |= dict(breadth=BREADTH, equal=EQUAL)
OPERATIONS = (*HOW, "breadth")


def load_prompts(path: str) -> dict[str, str]:
    """The prompts of a JSON file, {operation: text}. Raises UserError unless it has exactly the
    keys of PROMPTS, each with its blanks."""
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
    """Fills all blanks in one pass, since a text may itself contain "{prompt}"."""
    return re.sub(r"\{(prompt|evolved)\}", lambda match: texts[match[1]], template)


# -- elimination ----------------------------------------------------------------------------------

# Words of the prompts above that leak into an evolved instruction
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
    """The reason to drop an evolved instruction after the teacher compared it with its parent, or
    None."""
    if reply is None:
        return "no answer from the teacher"
    verdict = re.match(r"\W*(equal|different|not equal)\b", reply.text, re.I)
    if not verdict:
        return "the verdict about information gain is unreadable"
    if verdict[1].lower() == "equal":
        return "no information gain"
    return None


def why_no_answer(reply: Reply | None) -> str | None:
    """The reason to drop an evolved instruction because of the teacher's answer, or None."""
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

# (requests, label for the progress bar) -> a reply or None for each
Ask = Callable[[list[data.Conversation], str], Replies]
Children = dict[int, data.Conversation]  # evolved tasks, by the index of the parent in the pool


def evolve(pool: list[data.Conversation], number: int, ask: Ask, prompts: dict, seed: int,
           report: data.Report) -> Children:
    """Round `number`: the evolved tasks that are not eliminated, with their answers. The operation
    on a task depends only on the seed, the round and the task."""
    requests, operations = [], []
    for task in pool:
        operation = random.Random(f"{seed} {number} {task.id}").choice(OPERATIONS)
        operations.append(operation)
        text = fill(prompts[operation], prompt=task.turns[0].whole())
        requests.append(prompt(text, wanted=operation, task=task.turns[0]))
    children = {}
    for i, reply in enumerate(ask(requests, "evolving")):
        parent = pool[i]
        name = f"{parent.id}.{number}"
        if why := why_no_instruction(reply, parent.turns[0].text):
            report.add(name, f"dropped: {why}")
            continue
        asked = parent.turns[0]._replace(text=reply.text.strip())  # the input stays
        origin = dict(parent=parent.id, operation=operations[i], round=number)
        children[i] = replace(parent, turns=[asked], id=name, extra=origin)
    children = with_gain(pool, children, ask, prompts, report)
    return with_answers(children, ask, report)


def prompt(text: str, **extra) -> data.Conversation:
    """A request. `extra` tells the toy's oracle what is wanted, since it does not read prompts."""
    return data.Conversation([data.Turn("user", text)], extra=extra)


def with_gain(pool: list[data.Conversation], children: Children, ask: Ask, prompts: dict,
              report: data.Report) -> Children:
    """The children that the teacher finds different from their parents."""
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


def with_answers(children: Children, ask: Ask, report: data.Report) -> Children:
    """The children that the teacher can answer, with its answers."""
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
    file: str  # the instructions to begin with, in Alpaca's format
    teacher: str = ""  # who evolves and answers: MODEL@URL, a checkpoint, or oracle (for toy tasks)
    rounds: int = 4  # how many times the pool evolves
    out: str = "evolved.json"  # FILE's tasks and all rounds; beside it a report and the replies
    prompts: str = ""  # JSON file with other prompts, {operation: text}
    temperature: float = 1.0  # of the teacher
    max_new_tokens: int = 2048  # of one reply
    seed: int = 0  # which operation each instruction gets

    def __post_init__(self):
        check_above(self, 0, "rounds", "max_new_tokens")
        check_at_least(self, 0, "temperature")


def single_questions(file: str, report: data.Report) -> list[data.Conversation]:
    """The first pool: the tasks of the file, as round 0. Longer conversations are dropped."""
    pool = []
    for task in data.load_conversations(file, report):
        if len(task.turns) == 2:
            pool.append(replace(task, extra={**task.extra, "round": 0}))
        else:
            report.add(task.id, "dropped: more than one question")
    return pool


def main(cfg: Config) -> dict:
    refuse_overwrite(cfg.file, cfg.out)
    if not cfg.teacher:
        raise UserError("--teacher is missing: MODEL@URL, a checkpoint, or oracle")
    prompts = load_prompts(cfg.prompts) if cfg.prompts else PROMPTS
    report = data.Report()
    with open_teacher(cfg) as teacher:
        pool = single_questions(cfg.file, report)
        found = list(pool)
        most = 3 * len(pool) * cfg.rounds
        print(f"{len(pool)} instructions, {cfg.rounds} rounds: at most {most} requests")
        for number in range(1, cfg.rounds + 1):
            def ask(requests: list, what: str, number: int = number) -> Replies:
                # A parent that stays may get the same request again: the round number makes it new.
                return teacher.ask(requests, number, f"round {number}: {what}")

            children = evolve(pool, number, ask, prompts, cfg.seed, report)
            print(f"round {number}: {len(children)} of {len(pool)} evolved; "
                  f"{teacher.tokens} tokens so far")
            if not children:
                print("stopped: nothing evolved in this round")
                break
            found += children.values()
            pool = [children.get(i, task) for i, task in enumerate(pool)]
    return write_result(found, cfg.out, report, "alpaca")


if __name__ == "__main__":
    run(main, Config)
