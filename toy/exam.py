"""The toy world's exam: held-out questions, controls, and the tables that train_sft.py and
train_vlm.py print.

    python -m toy.exam out/base out/vicuna   # every row of the table, one column per model
    python -m toy.exam --probe               # where seeing loses: see toy/probe.py

A player answers questions: items -> (replies, whether each ended by itself). Controls are players,
too: they show what scores are reached without the scene, by lookup in the training data, or without
pre-training.

References: CHAIR (1809.02156) and POPE (2305.10355) for object hallucination.
"""

import functools
import json
import random
import re
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
from tools.config import check_above, refuse_unused, run
from toy import pictures, world

Player = Callable[[list], tuple[list[str], list[bool]]]


def toy_tokenizer(files: dict, vocab_size: int, path: Path) -> data.Tokenizer:
    """One tokenizer for the whole chain, trained on a sample of all training data. One trained on
    documents only would need almost twice the tokens for conversations."""
    lines = data.load_documents(files["base"])[:6000]
    for name in ("alpaca", "vicuna"):
        for c in data.load_conversations(files[name])[:3000]:
            lines += [f"{turn.input}\n{turn.text}" for turn in c.turns]
    return data.train_tokenizer(lines, vocab_size, path)


# -- players and controls -------------------------------------------------------------------------

def model_player(net, tokenizer: data.Tokenizer, template: str, shots: str = "") -> Player:
    """A player that decodes greedily from `net`. A base model is asked in the template "lines";
    `shots` are solved examples before the question."""
    def play(items: list) -> tuple[list[str], list[bool]]:
        conversations = []
        for item in items:
            turns = [data.Turn(role, text) for role, text in item.turns]
            turns[0] = turns[0]._replace(text=shots + turns[0].text)
            conversations.append(data.Conversation(turns))
        return data.generate_replies(net, tokenizer, template, conversations, max_new_tokens=64,
                                     batch=150)
    return play


def few_shot_examples(records: list[dict]) -> str:
    shots = [f"{(r['input'] + ' ' + r['instruction']).strip()}\n{r['output']}" for r in records[:4]]
    return "\n\n".join(shots) + "\n\n"


def without_scene(play: Player) -> Player:
    """Control: the same questions, but the scene is replaced by another one."""
    def play_blind(items: list) -> tuple[list[str], list[bool]]:
        rng, blind = random.Random(0), []
        for item in items:
            turns = []
            for role, text in item.turns:
                if item.told:
                    other = world.tell(world.pick_scene(rng, "scenes"), rng)
                    text = text.replace(item.told, other)
                turns.append([role, text])
            blind.append(replace(item, turns=turns))
        return play(blind)
    return play_blind


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[^\s,.?:]+", text.lower()))


def nearest_neighbor(records: list[dict]) -> Player:
    """Control: the answer of the most similar training question, by TF-IDF overlap."""
    bags = [words_of(r["input"] + " " + r["instruction"]) for r in records]
    index = {word: i for i, word in enumerate(sorted(set().union(*bags)))}

    def vectors(bags: list[set]) -> np.ndarray:
        rows = np.zeros((len(bags), len(index)), np.float32)
        for row, bag in zip(rows, bags):
            row[[index[word] for word in bag if word in index]] = 1
        return rows

    matrix = vectors(bags)
    idf = np.log(len(bags) / matrix.sum(0))
    matrix *= idf
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)

    def play(items: list) -> tuple[list[str], list[bool]]:
        bags = [words_of(item.told + " " + item.question.text) for item in items]
        nearest = (vectors(bags) * idf @ matrix.T).argmax(1)
        return [records[i]["output"] for i in nearest], [True] * len(items)
    return play


def majority(records: list[dict]) -> Player:
    """Control: the most frequent answer to this kind of question."""
    answers: dict[str, Counter] = {}
    for r in records:
        kind = r["id"].rpartition("_")[0]
        answers.setdefault(kind, Counter())[r["output"]] += 1
    best = {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}

    def play(items: list) -> tuple[list[str], list[bool]]:
        return [best.get(item.question.kind, "Yes.") for item in items], [True] * len(items)
    return play


# -- the exam of the language models --------------------------------------------------------------

SHORT_ROWS = dict(scenes="held-out scenes", pairs="held-out color-shape pairs",
                  later="needs earlier turns")
ALL_ROWS = dict(SHORT_ROWS, facts="facts from pre-training alone",
                closed="held-out sums, sizes, legs", phrasings="held-out phrasings",
                names="held-out names and words", more="more objects, more turns",
                minimal="minimal pairs, both right")


def share_right(right: list[bool], split: str) -> float:
    """In the split "minimal", questions come in pairs, and both must be right."""
    if split == "minimal":
        right = [a and b for a, b in zip(right[::2], right[1::2])]
    return sum(right) / len(right)


def check(items: list, replies: list[str], ended: list[bool]) -> list[bool]:
    """Which replies are right. One that was cut off is not, whatever it says."""
    return [end and world.grade(item.question, reply) == 1
            for item, reply, end in zip(items, replies, ended)]


def answer(play: Player, items: list) -> tuple[list[bool], list[bool]]:
    """Which of a player's replies are right, and which ended."""
    replies, ended = play(items)
    return check(items, replies, ended), ended


def examine(players: dict[str, Player], rows: dict, n: int) -> tuple[dict, dict]:
    """The share of right answers, table[row][player]; and whether each of a player's replies
    ended."""
    table, ends = {}, {}
    for split in rows:
        items = world.test_set(split, n)
        for name, play in tqdm(players.items(), desc=f"exam: {rows[split]}", leave=False):
            right, ended = answer(play, items)
            table.setdefault(split, {})[name] = share_right(right, split)
            ends.setdefault(name, []).extend(ended)
    return table, ends


def print_table(title: str, table: dict) -> None:
    widths = {name: max(11, len(name) + 2) for name in next(iter(table.values()))}
    first = 2 + max(len(row) for row in table)
    print(f"\n{title:<{first}}" + "".join(f"{name:>{width}}" for name, width in widths.items()))
    for row, cells in table.items():
        values = [f"{100 * cells[name]:>{width}.0f}" for name, width in widths.items()]
        print(f"{row:<{first}}" + "".join(values))


def run_toy_exam(models: dict, tokenizer: data.Tokenizer, files: dict, n: int, full: bool) -> dict:
    """Examines base, Alpaca and Vicuna beside the controls; prints dialogues and the table."""
    records = json.loads(files["alpaca"].read_text(encoding="utf-8"))
    vicuna = model_player(models["Vicuna"], tokenizer, "vicuna_v1.1")
    players = {"base": model_player(models["base"], tokenizer, "lines"),
               "Alpaca": model_player(models["Alpaca"], tokenizer, "alpaca"),
               "Vicuna": vicuna,
               "no scene": without_scene(vicuna),
               "neighbor": nearest_neighbor(records),
               "majority": majority(records)}
    if full:
        shots = few_shot_examples(records)
        players["few-shot"] = model_player(models["base"], tokenizer, "lines", shots)
        players["random init"] = model_player(models["random init"], tokenizer, "vicuna_v1.1")
        players["Alpaca ="] = model_player(models["Alpaca ="], tokenizer, "alpaca")
    rows = ALL_ROWS if full else SHORT_ROWS
    table, ends = examine(players, rows, n)
    print_dialogues(vicuna)
    print_table("right answers, %", {rows[split]: cells for split, cells in table.items()})
    ended = sum(ends["Vicuna"]) / len(ends["Vicuna"])
    print(f"{n} questions per row; {100 * ended:.1f}% of Vicuna's replies end by themselves")
    print("no scene: Vicuna, told another scene. neighbor: the answer of the most similar training "
          "question.\nmajority: the most frequent answer to this kind of question.")
    if full:
        print("few-shot: the base with four solved examples. random init: Vicuna's data without "
              "pre-training.\nAlpaca =: Alpaca on as many supervised tokens as Vicuna.")
    return dict(table=table, ends=ended)


def print_dialogues(play: Player) -> None:
    """Three conversations in which the model sees its own earlier replies. Replies that differ from
    the reference are marked."""
    rng = random.Random(5)
    for number in range(1, 4):
        print(f"\n--- dialogue {number}")
        item = world.converse(rng, "scenes", 4)
        answers = [text for role, text in item.turns if role == "assistant"]
        answers.append(item.question.full)
        turns = []
        for (_, text), answer in zip(item.turns[::2], answers):
            turns.append(["user", text])
            reply = play([replace(item, turns=turns)])[0][0]
            turns.append(["assistant", reply])
            mark = "" if reply == answer else f"   [true: {answer}]"
            print(f"USER: {text}\nASSISTANT: {reply}{mark}")


# -- while the models are trained -----------------------------------------------------------------

WATCHED = 25  # questions


@functools.cache
def watched_items() -> list[world.Item]:
    """Questions about held-out scenes, which every model is asked while it is trained. The first
    one, about a color, is also shown."""
    items = [item for item in world.test_set("scenes", 500, seed=2) if len(item.turns) == 1]
    shown = next(item for item in items if list(item.question.truth) == ["color"])
    return [shown, *items[:WATCHED - 1]]


def print_watched_question() -> None:
    item = watched_items()[0]
    print(f"every 100 steps the model is asked {WATCHED} questions, such as: {item.turns[0][1]}\n"
          f"  true: {item.question.full}")


def watcher(tokenizer: data.Tokenizer, template: str) -> Callable:
    """A callback for train(): prints the model's current answer to the first watched question, and
    the share of all of them that it answers right, which goes into metrics.jsonl."""
    items = watched_items()

    def watch(net, step: int) -> dict:
        net.eval()
        replies, ended = model_player(net, tokenizer, template)(items)
        net.train()
        right = check(items, replies, ended)
        share = sum(right) / len(right)
        mark = "right" if right[0] else "wrong"
        tqdm.write(f"  step {step}, {100 * share:.0f}% right: "
                   f"{textwrap.shorten(replies[0], 80)}   [{mark}]")
        return dict(accuracy=share)
    return watch


def smoothed(losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A curve to draw: steps, and the mean of the losses up to each, over a fiftieth of all."""
    width = max(1, len(losses) // 50)
    means = np.convolve(losses, np.ones(width) / width, "valid")
    return np.arange(width - 1, len(losses)), means


def plot_losses(out: Path) -> None:
    """Loss curves of all stages as out/loss.png, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    from tools.run import read_metrics
    figure = Figure()
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
    for log in sorted(out.glob("*/metrics.jsonl")):
        loss = [line["loss"] for line in read_metrics(log)]
        if not loss:  # it was killed before the first step was saved
            continue
        axes.plot(*smoothed(loss), label=log.parent.name)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120)
    print(f"loss curves: {out / 'loss.png'}")


def print_next_steps(cfg, minutes: float) -> None:
    """Commands that work for the settings of train_sft.py that were given."""
    out = Path(cfg.out)
    to_out = "" if out == Path("out") else f" --out={out}"
    again = to_out + (f" --seed={cfg.seed}" if cfg.seed else "") + (" --fast" if cfg.fast else "")
    commands = [
        f"python sample.py --ckpt={out}/vicuna   # talk to it",
        f"python data.py show {out}/data/sharegpt.json --tokenizer={out}/base   # the loss mask",
        f"python train_vlm.py --init={out}/vicuna{to_out}   # teach it to see",
        f"python train_sft.py{to_out} --data=FILE   # your own conversations or text",
    ]
    if not cfg.full:
        commands.append(f"python train_sft.py{again} --full   # trained controls, all test splits")
    print(f"\n{minutes:.1f} minutes in all. Next:")
    for command in commands:
        print("  " + command)


# -- the exam of MiniGPT-4 ------------------------------------------------------------------------

class PictureExam(NamedTuple):
    """Pictures with a question each."""
    scenes: list
    pictures: list
    questions: list  # world.Question


PICTURE_KINDS = [kind for kind in world.SCENE_KINDS if kind != "describe"]


def picture_exam(split: str, n: int) -> PictureExam:
    """Deterministic. In "pairs", the question is about the object whose color-shape pair is held
    out. In "minimal", pictures come in pairs that are identical except for one color or size."""
    rng, e = random.Random(f"pictures {split} 1"), PictureExam([], [], [])
    if split == "minimal":
        while len(e.scenes) < n:
            add_minimal_pair(e, rng)
        return e
    while len(e.scenes) < n:
        scene = world.pick_scene(rng, split)
        q = world.ask_scene(rng.choice(PICTURE_KINDS), scene, rng, about=world.held_pair(scene))
        if q:
            e.scenes.append(scene)
            e.questions.append(q)
    e.pictures.extend(pictures.draw(scene, rng) for scene in e.scenes)
    return e


def add_minimal_pair(e: PictureExam, rng: random.Random) -> None:
    """Adds two pictures with the same background, unless the drawn pair is unsuitable."""
    pair = world.minimal_pair(rng)
    scenes = []
    for item in pair:
        objects = world.found("objects", item.told)
        scenes.append(sorted(objects, key=lambda o: world.PLACES.index(o.place)))
    if any(len(scene) < 2 for scene in scenes):  # told in a form that the oracle cannot read
        return
    background = rng.random()
    for item, scene in zip(pair, scenes):
        e.scenes.append(scene)
        e.pictures.append(pictures.draw(scene, random.Random(background)))
        e.questions.append(item.question)


def instructions(n: int) -> list[str]:
    """Requests for n descriptions."""
    return [data.IMAGE_INSTRUCTIONS[i % len(data.IMAGE_INSTRUCTIONS)] for i in range(n)]


def exact(scene: world.Scene, description: str) -> bool:
    """Does it describe all objects, and no others?"""
    return world.found("objects", description) == set(scene)


def failure(scene: world.Scene, description: str, ended: bool) -> str:
    """How a description fails, or "" if it does not: one of the failures that MiniGPT-4's stage 2
    is meant to fix, or "is wrong" if it is well formed but not exact."""
    words = description.lower().split()
    runs = Counter(tuple(words[i:i + 4]) for i in range(len(words) - 3))
    sentences = re.split(r"[.!?\n]", description)
    long = Counter(s.strip().lower() for s in sentences if len(s.split()) > 2)
    if not words:
        return "empty"
    if max(runs.values(), default=0) > 2 or max(long.values(), default=0) > 1:
        return "repeats itself"
    if not ended:
        return "does not stop"
    if len(words) < 3 or description.rstrip()[-1] not in ".!?\"'":
        return "fragment"
    return "" if exact(scene, description) else "is wrong"


def mentions(description: str) -> set[tuple[str, str]]:
    """The (color, shape) of all objects that a description mentions."""
    colors, shapes = "|".join(world.COLORS), "|".join(world.SHAPES)
    return set(re.findall(rf"\b({colors}) ({shapes})s?\b", description.lower()))


def chair(descriptions: Sequence[str], scenes: Sequence[world.Scene]) -> dict:
    """CHAIR: the share of mentioned objects that are not there, and the share of descriptions that
    mention such an object."""
    mentioned, invented, bad = 0, 0, 0
    for text, scene in zip(descriptions, scenes):
        found = mentions(text)
        wrong = found - {(o.color, o.shape) for o in scene}
        mentioned += len(found)
        invented += len(wrong)
        bad += bool(wrong)
    return {"hallucinated objects (CHAIR-i)": invented / max(1, mentioned),
            "descriptions with one (CHAIR-s)": bad / len(descriptions)}


def pope_questions(scene: world.Scene, rng: random.Random) -> list[world.Question]:
    """POPE: one question "Is there ...?" with the answer yes, and one with no. The latter mostly
    recombines what is there (adversarial)."""
    by_answer: dict = {}
    for _ in range(100):
        if q := world.ask_scene("exists", scene, rng):
            by_answer.setdefault(next(iter(q.truth["yesno"])), q)
    return list(by_answer.values())


def yes_no_exam(e: PictureExam) -> PictureExam:
    """The yes/no questions about these pictures; a picture appears once for each of its own."""
    rng, asked = random.Random(3), PictureExam([], [], [])
    for scene, picture in zip(e.scenes, e.pictures):
        for question in pope_questions(scene, rng):
            asked.scenes.append(scene)
            asked.pictures.append(picture)
            asked.questions.append(question)
    return asked


YES_NO = "yes/no right (chance 50)"


def pope(questions: Sequence[world.Question], replies: Sequence[str]) -> dict:
    """Accuracy, and the share of yes. A reply with neither or both of yes and no is wrong."""
    said = [world.found("yesno", reply) for reply in replies]
    right = [s == q.truth["yesno"] for s, q in zip(said, questions)]
    return {YES_NO: sum(right) / len(right),
            "answered yes (50 expected)": said.count({"yes"}) / len(said)}


def see_and_tell(players: dict[str, Callable], n: int, splits: Sequence[str]) -> tuple[dict, dict]:
    """Descriptions and zero-shot questions about held-out pictures. A player is
    play(exam, texts, texts_with_scene) -> (replies, ended); the last argument holds the scene in
    words for a player that sees no picture.

    Returns table[row][player] and descriptions[split, player], each (replies, ended).
    """
    rng, table, descriptions = random.Random(0), {}, {}
    for split in splits:
        e = picture_exam(split, n)
        told = [world.tell(scene, rng) for scene in e.scenes]
        wishes = instructions(len(told))
        questions = [q.text for q in e.questions]
        for name, play in players.items():
            said = play(e, wishes, [f"{t} Describe the scene." for t in told])
            replies, _ = play(e, questions, [f"{t} {q}" for t, q in zip(told, questions)])
            right = dict(
                descriptions=[exact(scene, reply) for scene, reply in zip(e.scenes, said[0])],
                questions=[world.grade(q, reply) == 1 for q, reply in zip(e.questions, replies)])
            for what in right:
                row = table.setdefault(f"{ALL_ROWS[split]}, {what}", {})
                row[name] = share_right(right[what], split)
            descriptions[split, name] = said
    return table, descriptions


def failure_table(players: dict[str, Callable], e: PictureExam, descriptions: dict) -> dict:
    """How the descriptions of each player fail, and what it sees that is not there."""
    table, yes_no = {}, yes_no_exam(e)
    texts = [q.text for q in yes_no.questions]
    for name, play in players.items():
        said, ended = descriptions[name]
        reasons = Counter(map(failure, e.scenes, said, ended))
        kinds = ("empty", "repeats itself", "does not stop", "fragment", "is wrong")
        rows = {kind: reasons[kind] / len(said) for kind in kinds}
        rows["fails in one of these ways"] = 1 - reasons[""] / len(said)
        rows |= chair(said, e.scenes) | pope(yes_no.questions, play(yes_no, texts, texts)[0])
        for row, share in rows.items():
            table.setdefault(row, {})[name] = share
    return table


def save_sheet(e: PictureExam, replies: Sequence[str], path: Path) -> None:
    """Four pictures with their descriptions, at least one of them wrong if any is."""
    right = [i for i, (scene, reply) in enumerate(zip(e.scenes, replies)) if exact(scene, reply)]
    wrong = [i for i in range(len(replies)) if i not in right]
    chosen = (right[:3] + wrong[:1] + right[3:] + wrong[1:])[:4]
    sheet = Image.new("RGB", (4 * 260, 330), "white")
    pen = ImageDraw.Draw(sheet)
    for column, i in enumerate(chosen):
        picture = Image.fromarray(e.pictures[i]).resize((240, 240), Image.Resampling.NEAREST)
        sheet.paste(picture, (260 * column + 10, 10))
        text, color = replies[i], "black"
        if i in wrong:
            text, color = f"{text} [wrong]", "firebrick"
        lines = "\n".join(textwrap.wrap(text, 32)[:4])
        pen.multiline_text((260 * column + 10, 256), lines, fill=color,
                           font=ImageFont.load_default(15))
    sheet.save(path)


# -- train_vlm.py on toy pictures -----------------------------------------------------------------

# pictures for stage 1, for curation, and in each row of the exam
TOY = dict(alt=4000, curate=1600, questions=100)
FAST = dict(alt=300, curate=40, questions=10)


def toy_pictures(vlm):
    """What train_vlm's stages work on: pictures with noisy alt-text, pictures to describe, the
    oracle as a teacher, and the exam."""
    import train_vlm
    cfg, folder = vlm.cfg, Path(vlm.cfg.out) / "data"
    sizes = FAST if cfg.fast else TOY
    pictures.write_toy_album(folder / "alt", sizes["alt"], f"alt {cfg.seed}", world.alt_text)
    scenes = pictures.write_toy_album(folder / "curate", sizes["curate"], f"curate {cfg.seed}",
                                      lambda scene, rng: world.caption(scene))
    alt, pool = train_vlm.load_album(folder / "alt"), train_vlm.load_album(folder / "curate")
    return train_vlm.VLMData(
        alt, pool, train_vlm.caption_repairer(cfg.teacher or "oracle", cfg.out),
        is_true=lambda i, text: exact(scenes[i], text), min_tokens=8,
        evaluate=lambda run, net, aligned: seeing_exam(run, net, aligned, alt, sizes["questions"]))


def random_encoder(vlm, net, alt: Sequence):
    """Control: a MiniGPT-4 with an untrained encoder, whose projection is trained for as many
    steps."""
    import torch

    import train_vlm
    import vision
    from tools import checkpoint
    torch.manual_seed(vlm.cfg.seed + 1)
    vit, qformer = vision.ViT(net.vit.config), vision.QFormer(net.qformer.config)
    control = vision.MiniGPT4(vlm.llama, vit, qformer).to(vlm.machine.device)
    out = Path(vlm.cfg.out)
    parts = dict(llama_crc=checkpoint.fingerprint(vlm.folder), vision="random")
    train_vlm.train_projection(vlm, "1", control, parts, alt, "random-align")
    curated = train_vlm.load_album(out / "curated")
    train_vlm.train_projection(vlm, "2", control, parts, curated, "random-minigpt4",
                               str(out / "random-align"))
    return control.eval()


def seeing_exam(vlm, net, aligned: dict, alt: Sequence, n: int) -> dict:
    """Descriptions and zero-shot questions on held-out splits beside the controls, and how
    descriptions fail before and after stage 2. `aligned`: the projection after stage 1."""
    from train_vlm import ask, copy_projection, encode_images
    cfg, out = vlm.cfg, Path(vlm.cfg.out)

    def seeing(network, weights: dict, shift: int = 0) -> Callable:
        def play(e, texts, texts_with_scene):
            network.llama_proj.load_state_dict(weights)  # players share a network
            features = encode_images(network, e.pictures, vlm.machine).roll(shift, 0)
            return ask(network, vlm, texts, features)
        return play

    def told(e, texts, texts_with_scene):
        return ask(net, vlm, texts_with_scene, None)

    def blind(e, texts, texts_with_scene):
        return ask(net, vlm, texts, None)

    final = copy_projection(net)
    players = {"MiniGPT-4": seeing(net, final), "in words": told, "no picture": blind,
               "shuffled": seeing(net, final, shift=1), "stage 1": seeing(net, aligned)}
    if cfg.full:
        control = random_encoder(vlm, net, alt)
        players["random enc."] = seeing(control, copy_projection(control))
    splits = ("scenes", "pairs", "minimal") if cfg.full else ("scenes", "pairs")
    table, descriptions = see_and_tell(players, n, splits)
    print_table("right, %", table)
    print(f"{n} pictures per row. in words: the same language model, told the scene in words. "
          "shuffled: with another picture.\nquestions: zero-shot, since stage 2 has descriptions "
          "only")
    stages = {name: players[name] for name in ("stage 1", "MiniGPT-4")}
    said = {name: descriptions["scenes", name] for name in stages}
    e = picture_exam("scenes", n)
    failures = failure_table(stages, e, said)
    print_table("descriptions and answers, %", failures)
    save_sheet(e, said["MiniGPT-4"][0], out / "seen.png")
    minutes = (time.time() - vlm.began) / 60
    figures = dict(table=table, failures=failures, seed=cfg.seed, minutes=round(minutes, 2))
    with data.atomic_write(out / "seeing.json") as file:
        json.dump(figures, file, indent=1)
    print(f"\n{minutes:.1f} minutes in all. Four pictures with their descriptions: "
          f"{out / 'seen.png'}. Next:\n"
          f"  python sample.py --ckpt={out}/minigpt4 --image={out}/data/curate/image/0.png")
    return figures


# -- python -m toy.exam ---------------------------------------------------------------------------

@dataclass
class ExamConfig:
    ckpts: str = field(default="out/vicuna", metadata=dict(several=True))  # the models to examine
    probe: bool = False  # instead, find where the MiniGPT-4 in --out loses what it sees
    out: str = "out"  # for --probe: folder of a run of train_sft.py and train_vlm.py
    questions: int = 100  # in each row; --probe: pictures in each column

    def __post_init__(self):
        check_above(self, 0, "questions")


def load_player(folder: str, device: str) -> Player:
    """A checkpoint of any recipe, which is asked in the template that it was trained in. Of a
    MiniGPT-4, the language model is asked."""
    import vision
    net, path, meta = vision.load(folder, device)
    net = getattr(net, "llama", net)
    template = meta["template"]
    if template == "plain":
        template = "lines"  # a base model answers on the next line
    elif template not in ("alpaca", "vicuna_v1.1"):
        print(f"{folder} is not of the toy chain: it is asked in its own template, {template}")
    return model_player(net.eval(), data.Tokenizer(path), template)


def column_names(folders: list[str]) -> dict[str, str]:
    """A short name for each folder: its own, or the whole path where two would be equal."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(set(folders)):
        names = folders
    return dict(zip(names, folders))


def main(cfg: ExamConfig) -> dict:
    if cfg.probe:
        from toy import probe
        refuse_unused(cfg, ("ckpts",), "--probe looks at the models in --out")
        return probe.probe(Path(cfg.out), cfg.questions)
    refuse_unused(cfg, ("out",), "only --probe uses it")
    from tools.machine import choose_machine
    device = choose_machine("auto", "float32").device
    folders = column_names(cfg.ckpts.split(","))
    players = {name: load_player(folder, device) for name, folder in folders.items()}
    table, ends = examine(players, ALL_ROWS, cfg.questions)
    ended = {name: sum(ends[name]) / len(ends[name]) for name in players}
    rows = {ALL_ROWS[split]: cells for split, cells in table.items()}
    print_table("right answers, %", {**rows, "replies that end by themselves": ended})
    print(f"{cfg.questions} questions per row")
    return dict(table=table, ends=ended)


if __name__ == "__main__":
    run(main, ExamConfig)
