"""A toy teacher for Self-Instruct and Evol-Instruct, and what their data is worth.

    python -m toy.instruct --seeds=seed_tasks.jsonl   # writes 175 seed tasks
    python -m toy.instruct --base=out/base            # the whole chain, and two tables

Like a language model, the teacher gets only text: `understand` parses an instruction, and `solve`
answers it about the scene that the input tells. An evolved instruction contains a simpler one, so
both functions are recursive. The teacher also makes the mistakes that the recipes filter out.
"""

import functools
import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import data
from tools.config import check_above, refuse_unused, run
from toy import exam, world
from toy.world import COLORS, PLACES, SHAPES, SIZES, Object, Scene, cap

# -- what an instruction means --------------------------------------------------------------------

SIZE, COLOR, SHAPE, PLACE = ("|".join(words) for words in (SIZES, COLORS, SHAPES, PLACES))
REF = rf"(?:(?:{SIZE}) )?(?:(?:{COLOR}) )?(?:{SHAPE})(?: at (?:{PLACE}))?"
THING = r"(?:an? )?\w+"
ATTRIBUTES = (*SIZES, *COLORS, *SHAPES, *PLACES)
# What stands in a blank of world.ASK; in all others, one word
BLANKS = dict(ref=REF, color=rf"(?:an? )?(?:{COLOR})", new=COLOR, shape=SHAPE,
              at=rf"at (?:{PLACE})", a=THING, b=THING)
# An added sentence, and what it makes of the answer
CONSTRAINTS = {"Begin with Well.": "Well, {0}", "Say it twice.": "{0} {0}",
               "Say that you are sure.": "{0} I am sure."}
EVOLVED = {  # operation: the form of its instructions, in which (.+) is an instruction itself
    "reasoning": rf"Suppose the ({REF}) were (gone|{COLOR})\. (.+)",
    "complicate": rf'First run draw\("({SIZE}) ({COLOR}) ({SHAPE}) at ({PLACE})"\)\. (.+)',
    "constraints": rf"(.+) ({'|'.join(map(re.escape, CONSTRAINTS))})",
    "deepen": r"(.+) And also: (.+)",
}


def form_pattern(form: str) -> re.Pattern:
    """A pattern for one form of world.ASK, with a named group for each blank."""
    parts = re.split(r"\{(\w+)\}", form.rstrip("?. "))
    pattern = re.escape(parts[0])
    for blank, text in zip(parts[1::2], parts[2::2]):
        pattern += f"(?P<{blank}>{BLANKS.get(blank, '[^ ]+')})" + re.escape(text)
    return re.compile(pattern, re.I)


PATTERNS = [(kind, form_pattern(form)) for kind in (*world.SCENE_KINDS, *world.OTHER_KINDS)
            for form in world.ASK[kind]]
WRAPPERS = [re.compile(re.escape(wrapper).replace(r"\{\}", "(.+)"), re.I)
            for wrapper in set(world.WRAPPERS) - {"{}"}]


@functools.cache
def understand(text: str) -> tuple | None:
    """The meaning of an instruction, or None if the teacher does not understand it.

    "What color is the ring?" is ("color", (("ref", "ring"),)): the kind, and the blanks with their
    words. An evolved instruction is (operation, *parts), and some parts are meanings themselves.
    """
    for operation, pattern in EVOLVED.items():
        if match := re.fullmatch(pattern, text):
            parts = list(match.groups())
            inner = dict(constraints=[0], deepen=[0, 1]).get(operation, [-1])
            for i in inner:
                parts[i] = understand(parts[i])
            return None if None in parts else (operation, *parts)
    for wrapper in WRAPPERS:
        if match := wrapper.fullmatch(text):
            text = match[1]
    for kind, pattern in PATTERNS:
        if match := pattern.fullmatch(text.rstrip("?. ")):
            words = match.groupdict()
            if "at" in words:  # "At top" begins a sentence
                words["at"] = words["at"].lower()
            return kind, tuple(words.items())
    return None


def read_scene(text: str) -> Scene:
    """The objects of a told scene. Every phrasing names the four attributes of an object in a row,
    in any order, before those of the next."""
    words = re.findall(rf"\b({SIZE}|{COLOR}|{SHAPE}|{PLACE})\b", text.lower())
    scene = []
    for i in range(0, len(words) - 3, 4):
        attributes = sorted(words[i:i + 4], key=ATTRIBUTES.index)  # sizes, then colors, ...
        scene.append(Object(*attributes))
    return tuple(scene)


# -- the true answer ------------------------------------------------------------------------------

def named(ref: str, scene: Scene) -> list[Object]:
    """The objects that a name such as "red ring" or "ring at top" may mean."""
    return [o for o in scene if o.thing.endswith(ref) or f"{o.thing} {o.at}".endswith(ref)]


def solve(meaning: tuple | None, scene: Scene) -> str | None:
    """The terse answer, worded like those of world.instruction; None if there is no single one."""
    if meaning is None:
        return None
    kind, *parts = meaning
    if kind == "constraints":
        answer = solve(parts[0], scene)
        return answer and CONSTRAINTS[parts[1]].format(answer)
    if kind == "deepen":
        answers = [solve(part, scene) for part in parts]
        return None if None in answers else " ".join(answers)
    if kind == "reasoning":
        changed = suppose(parts[0], parts[1], scene)
        return None if changed is None else solve(parts[2], changed)
    if kind == "complicate":
        *words, asked = parts
        added = Object(*words)
        is_free = scene and added.place not in [o.place for o in scene]
        return solve(asked, (*scene, added)) if is_free else None
    if kind in world.OTHER_KINDS:
        return solve_fact(kind, dict(parts[0]))
    return solve_scene(kind, dict(parts[0]), scene) if scene else None


def suppose(ref: str, change: str, scene: Scene) -> Scene | None:
    """The scene with one object gone or in another color."""
    fits = named(ref, scene)
    if len(fits) != 1:
        return None
    if change == "gone":
        return tuple(o for o in scene if o is not fits[0])
    return world.replace_object(scene, fits[0], fits[0]._replace(color=change))


def solve_scene(kind: str, words: dict, scene: Scene) -> str | None:
    """The answer to a question about the scene. `words` has what stands in its blanks."""
    if kind == "paint":  # "If the ring were red, what would be at top?"
        scene = suppose(words["ref"], words["new"], scene)
        return scene and solve_scene("at", dict(at=words["at"]), scene)
    if kind == "exists":
        pair = words["color"].split()[-1], words["shape"]
        return "Yes." if pair in [(o.color, o.shape) for o in scene] else "No."
    if kind in ("count", "describe", "draw"):
        return world.answer_all(kind, scene, scene[0], "").short
    if kind == "at":
        fits = [o for o in scene if o.at == words["at"]]
    elif kind == "shape":
        fits = [o for o in scene if o.color == words["color"]]
    else:
        fits = named(words["ref"], scene)
    if not fits and kind in world.ABSENT:
        return "Nothing." if kind == "at" else "None."
    if len(fits) != 1:
        return None
    ref = words.get("ref", "")
    if kind == "gone":
        return world.answer_all(kind, scene, fits[0], ref).short
    found = world.answer_one(kind, scene, fits[0], ref, random.Random(0))
    return found and found.short


def solve_fact(kind: str, words: dict) -> str | None:
    """The answer to a question that needs no scene."""
    if kind in ("town", "job"):
        if words["name"] not in world.FACTS:
            return None
        town, job = world.FACTS[words["name"]]
        return f"{town}." if kind == "town" else f"A {job}."
    if kind == "loop":
        return f'for i in range({words["n"]}): print("{words["word"]}")'
    if kind == "legs":
        _, each = world.LEGS[words["things"].removesuffix("s")]
        return f"{each * int(words['n'])}."
    if kind == "sum":
        return f"{int(words['a']) + int(words['b'])}."
    animals = [words[name].split()[-1] for name in ("a", "b")]
    return f"{cap(world.an(max(animals, key=world.ANIMALS.index)))}."


# -- the teacher ----------------------------------------------------------------------------------

def reply(conversation: data.Conversation) -> tuple[str, bool]:
    """The teacher's reply to a request of a recipe, and whether it ended by itself."""
    asked, wanted = conversation.turns[-1], conversation.extra["wanted"]
    rng = random.Random(f"{wanted} {asked.whole()}")
    if wanted == "tasks":
        return write_tasks(asked.text, rng)
    if wanted == "equal":
        first, second = map(understand, conversation.extra["texts"])
        return "Equal" if first == second else "Different", True
    if wanted == "answer":
        return answer(asked, rng)
    return evolve(wanted, conversation.extra["task"], rng)


def write_tasks(prompt: str, rng: random.Random) -> tuple[str, bool]:
    """Continues the list of the prompt with a few of the world's instructions. Some repeat a task
    of the prompt, answer with the instruction, or need a picture; some lists are cut off."""
    shown = re.findall(r"^\d\. Instruction: (.+)$", prompt, re.M)
    lines = []
    for n in range(4, 4 + rng.randint(4, 8)):
        task, fault = new_task(rng), rng.random()
        if fault < 0.05:
            task["instruction"] = rng.choice(shown)
        elif fault < 0.1:
            task["output"] = task["instruction"]
        elif fault < 0.15:
            task["instruction"] = "Find a picture of this on the web."
        lines += [f"{n}. Instruction: {task['instruction']}", f"{n}. Input:",
                  task["input"] or "<noinput>", f"{n}. Output:", task["output"], "###"]
    text = "\n".join(lines)
    if rng.random() < 0.2:
        return text[:rng.randrange(len(text))], False
    return text, True


def answer(asked: data.Turn, rng: random.Random) -> tuple[str, bool]:
    """The true answer. Sometimes it is an apology, says nothing, or was cut off."""
    text, fault = solve(understand(asked.text), read_scene(asked.input)), rng.random()
    if text is None or fault < 0.03:
        return "I am sorry, I cannot answer that.", True
    if fault < 0.06:
        return "It is so.", True
    return text, fault < 0.97


def evolve(operation: str, task: data.Turn, rng: random.Random) -> tuple[str, bool]:
    """The evolved instruction. Sometimes it only says the same in other words, repeats words of the
    prompt, or was cut off."""
    fault = rng.random()
    if fault < 0.1:
        return paraphrase(task.text, rng), True
    text = rewrite(operation, task, rng)
    if fault > 0.95:
        return f"#Rewritten Prompt#: {text}", True
    return text, fault < 0.93


def new_task(rng: random.Random) -> dict:
    """One of the world's instructions, without a typo."""
    while True:
        task = world.instruction(rng)
        if understand(task["instruction"]):
            return task


def paraphrase(text: str, rng: random.Random) -> str:
    """A simple question in other words; an evolved one as it is."""
    kind, *parts = understand(text) or ("",)
    if kind not in (*world.SCENE_KINDS, *world.OTHER_KINDS):
        return text
    return cap(rng.choice(world.ASK[kind][:-2]).format(**dict(parts[0])))


def rewrite(operation: str, asked: data.Turn, rng: random.Random) -> str:
    """The evolved instruction, or the same one where the operation makes no sense."""
    text, scene = asked.text, read_scene(asked.input)
    if operation == "constraints":
        return f"{text} {rng.choice(list(CONSTRAINTS))}"
    if operation in ("deepen", "breadth"):
        other = ask_about(scene, rng)
        return other if operation == "breadth" else f"{text} And also: {other}"
    if not scene:
        return text
    o = rng.choice(scene)
    if operation == "concretize":
        return concretize(text, scene, rng)
    color, shape = world.absent_pair(scene, rng)  # never a held-out pair
    if operation == "complicate":
        used = [x.place for x in scene]
        place = rng.choice([place for place in PLACES if place not in used])
        added = Object(rng.choice(SIZES), color, shape, place)
        return f'First run draw("{added.thing} {added.at}"). {text}'
    ref, changes = world.refer(o, scene), ["gone"]
    if not ref:
        return text
    for color in COLORS:
        if color != o.color and (color, o.shape) not in world.HELD_PAIRS:
            changes.append(color)
    return f"Suppose the {ref} were {rng.choice(changes)}. {text}"


def ask_about(scene: Scene, rng: random.Random) -> str:
    """A new question about the scene; without a scene, one that needs none."""
    while True:
        if scene:
            question = world.ask_scene(rng.choice(world.SCENE_KINDS), scene, rng)
        else:
            question = world.ask_other(rng.choice(world.OTHER_KINDS), rng)
        if question and understand(question.text):
            return question.text


def concretize(text: str, scene: Scene, rng: random.Random) -> str:
    """The question with a longer name for its object: "ring" becomes "red ring". The answer stays
    the same, and the name does not contain it."""
    match, answer = re.search(rf"\b{REF}\b", text), solve(understand(text), scene)
    fits = named(match[0], scene) if match else []
    if len(fits) != 1 or not answer:
        return text
    name, o = match[0], fits[0]
    names = [f"{o.color} {o.shape}", o.thing, f"{o.shape} {o.at}", f"{o.thing} {o.at}"]
    for longer in rng.sample(names, len(names)):
        if len(longer) <= len(name) or answer.rstrip(".").lower() in longer:
            continue
        changed = text.replace(name, longer, 1)
        if solve(understand(changed), scene) == answer:
            return changed
    return text


# -- training files -------------------------------------------------------------------------------

def seed_tasks(seed: int) -> list[dict]:
    """175 of the world's instructions in the format of Self-Instruct's seed tasks."""
    rng, tasks = random.Random(f"seed tasks {seed}"), {}
    while len(tasks) < 175:
        task = new_task(rng)
        instances = [dict(input=task["input"], output=task["output"])]
        kind = task["id"].split("_")[0]
        tasks[task["instruction"]] = dict(
            id=f"seed_task_{len(tasks)}", name=kind, instruction=task["instruction"],
            instances=instances, is_classification=False)
    return list(tasks.values())


def more_scenes(tasks: Sequence[data.Conversation], n: int, rng: random.Random) -> list[dict]:
    """n Alpaca records: the instructions in turn, again and again, each time about another scene
    and with the true answer. An instruction that needs no scene is repeated as it is."""
    records = []
    for task in itertools.cycle(tasks):
        if len(records) == n:
            return records
        asked = task.turns[0]
        record = dict(instruction=asked.text, input=asked.input, output=task.turns[1].text)
        meaning = understand(asked.text)
        if meaning and asked.input:
            scene, answer = new_scene(meaning, rng)
            record.update(input=world.tell(scene, rng), output=answer)
        records.append(record)


def new_scene(meaning: tuple, rng: random.Random) -> tuple[Scene, str]:
    """A training scene in which a simple instruction has an answer, and that answer. The object
    that is asked about is in it as often as in the world's own instructions."""
    kind, words = meaning[0], dict(meaning[1])
    said = " ".join(words.get(blank, "") for blank in ("ref", "color", "shape", "at")).split()
    absent = 0.5 if kind == "exists" else world.ABSENT.get(kind, 0)
    while True:
        scene = world.pick_scene(rng)
        if rng.random() >= absent:
            scene = with_object(said, scene, rng)
        is_scene = len({o.place for o in scene}) == len(scene)
        if is_scene and world.split_of(scene) == "train" and (answer := solve(meaning, scene)):
            return scene, answer


def with_object(words: list[str], scene: Scene, rng: random.Random) -> Scene:
    """The scene, in which one object gets the attributes that are among the words."""
    old = new = rng.choice(scene)
    for attribute, values in zip(Object._fields, (SIZES, COLORS, SHAPES, PLACES)):
        for value in values:
            if value in words:
                new = new._replace(**{attribute: value})
                break
    return world.replace_object(scene, old, new)


def write_training_files(cfg) -> dict[str, Path]:
    """Four training files with the same number of records."""
    from recipes import evol_instruct, self_instruct
    out, rng = Path(cfg.out), random.Random(cfg.seed)
    write_json(out / "seed_tasks.json", seed_tasks(cfg.seed))
    self_instruct.main(self_instruct.Config(
        seeds=f"{out}/seed_tasks.json", teacher="oracle", count=cfg.count,
        out=f"{out}/self_instruct.json", seed=cfg.seed))
    seeds = data.load_conversations(out / "seed_tasks.json")
    kept = data.load_conversations(out / "self_instruct.json")
    records = dict(world=[world.instruction(rng, i) for i in range(cfg.records)],
                   seeds=more_scenes(seeds, cfg.records, rng),
                   simple=more_scenes(kept, cfg.records, rng))
    files = {name: out / "data" / f"{name}.json" for name in (*records, "evolved")}
    for name in records:
        write_json(files[name], records[name])
    evol_instruct.main(evol_instruct.Config(
        str(files["simple"]), teacher="oracle", rounds=cfg.rounds, out=f"{out}/all_rounds.json",
        seed=cfg.seed))
    everything = data.load_conversations(out / "all_rounds.json")
    data.save_conversations(rng.sample(everything, cfg.records), files["evolved"], "alpaca")
    return files


def write_json(path: Path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with data.atomic_write(path) as file:
        json.dump(records, file, indent=0)


# -- the exam -------------------------------------------------------------------------------------

SIMPLE = dict(scenes="held-out scenes", pairs="held-out color-shape pairs",
              phrasings="held-out phrasings", closed="held-out sums, sizes, legs")
HARDER = ("constraints", "deepen", "concretize", "reasoning", "complicate")


def questions(row: str, n: int) -> list[tuple[data.Turn, str]]:
    """n held-out questions in Alpaca's format, and their answers. `row` is in SIMPLE; or in HARDER,
    and names the operation that evolves a question about a held-out scene."""
    rng, found = random.Random(f"instruct {row}"), []
    while len(found) < n:
        asked, answer = simple_question(row, rng)
        if asked and row in HARDER:
            before, asked = asked, asked._replace(text=rewrite(row, asked, rng))
            answer = solve(understand(asked.text), read_scene(asked.input))
            if asked == before:
                continue
        if answer:
            found.append((asked, answer))
    return found


def simple_question(row: str, rng: random.Random) -> tuple[data.Turn | None, str | None]:
    """A question of a row of SIMPLE (or about a held-out scene) and its answer, if it has one."""
    scene = world.pick_scene(rng, "pairs" if row == "pairs" else "scenes")
    q = world.ask_scene(rng.choice(world.SCENE_KINDS), scene, rng, unseen=row == "phrasings",
                        about=world.held_pair(scene))
    if row == "closed":
        q, scene = world.ask_other(rng.choice(("bigger", "legs", "sum")), rng, test=True), ()
    if q is None:
        return None, None
    return data.Turn("user", q.text, world.tell(scene, rng) if scene else ""), q.short


def right_answers(net, tokenizer: data.Tokenizer, row: str, n: int) -> float:
    """The share of questions to which the model gives exactly the terse answer, and ends."""
    asked, answers = zip(*questions(row, n))
    conversations = [data.Conversation([turn]) for turn in asked]
    replies, ended = data.generate_replies(net, tokenizer, "alpaca", conversations, 64, batch=150)
    right = [end and reply.strip() == answer for reply, end, answer in zip(replies, ended, answers)]
    return sum(right) / n


@dataclass
class InstructConfig:
    seeds: str = ""  # only write 175 seed tasks to this file
    base: str = "out/base"  # the toy base model to fine-tune
    out: str = "out/instruct"  # folder for all files and models
    count: int = 600  # tasks that Self-Instruct collects
    records: int = 3000  # of each training file
    rounds: int = 3  # of Evol-Instruct
    steps: int = 200  # of each fine-tuning
    questions: int = 100  # in each row of the tables
    seed: int = 0  # of the data and of the training

    def __post_init__(self):
        check_above(self, 0, "count", "records", "rounds", "steps", "questions")


def main(cfg: InstructConfig) -> dict:
    if cfg.seeds:
        refuse_unused(cfg, ("base", "out", "count", "records", "rounds", "steps", "questions"),
                      "--seeds only writes seed tasks")
        write_json(Path(cfg.seeds), seed_tasks(cfg.seed))
        print(f"{cfg.seeds}: 175 seed tasks. Next: python -m recipes.self_instruct "
              f"--seeds={cfg.seeds} --teacher=oracle")
        return {}
    simple, harder = train_and_examine(cfg, write_training_files(cfg))
    print_results("simple questions, %", simple, cfg.questions)
    print_results("harder questions, %", harder, cfg.questions)
    print(f"\n{cfg.records} records and {cfg.steps} steps per column. world: the world's own "
          "instructions.\nseeds: the 175 seed tasks. simple: Self-Instruct. evolved: Evol-Instruct "
          "of simple, a sample\nof all rounds.")
    figures = dict(simple=simple, harder=harder, seed=cfg.seed)
    write_json(Path(cfg.out) / "instruct.json", figures)
    return figures


def train_and_examine(cfg: InstructConfig, files: dict[str, Path]) -> tuple[dict, dict]:
    """The share of right answers of one model per file, table[row][file]: simple, then harder."""
    import train_sft
    from tools.machine import choose_machine
    machine = choose_machine("auto", "float32")
    tokenizer = data.find_tokenizer(cfg.base)
    simple = {title: {} for title in SIMPLE.values()}
    harder = {row: {} for row in HARDER}
    for name, file in files.items():
        train = train_sft.SFTConfig(out=cfg.out, steps=cfg.steps, optimizer="muon", seed=cfg.seed)
        net = train_sft.fine_tune(train, name, machine, file, cfg.base)
        for row, title in SIMPLE.items():
            simple[title][name] = right_answers(net, tokenizer, row, cfg.questions)
        for row in HARDER:
            harder[row][name] = right_answers(net, tokenizer, row, cfg.questions)
    return simple, harder


def print_results(title: str, table: dict, n: int) -> None:
    """Prints the table, the mean of its rows, and how far chance alone moves two means apart."""
    first = next(iter(table.values()))
    means = {name: sum(cells[name] for cells in table.values()) / len(table) for name in first}
    exam.print_table(title, {**table, "mean": means})
    noise = 100 * (2 / (n * len(table))) ** 0.5  # 2 standard errors of a difference, near 50%
    print(f"{n} questions per row; a difference of two means below {noise:.0f} points is noise")


if __name__ == "__main__":
    run(main, InstructConfig)
