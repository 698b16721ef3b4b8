"""Tests of toy/instruct.py: the toy's teacher knows what instructions mean, and its faults are such
that each filter of the two recipes has something to do."""

import json
import random
from collections import Counter

import pytest

import data
from recipes import evol_instruct, self_instruct
from toy import instruct, world
from toy.world import Object

RING, MOON = Object("small", "red", "ring", "top"), Object("large", "blue", "moon", "left")
SCENE = (RING, MOON)


def test_the_teacher_answers_as_the_world_does():
    """It has only the text; the world knew the scene when it asked."""
    rng, kinds = random.Random(0), Counter()
    for _ in range(1500):
        task = world.instruction(rng)
        meaning = instruct.understand(task["instruction"])
        if meaning:  # else it has a typo
            assert instruct.solve(meaning, instruct.read_scene(task["input"])) == task["output"]
            kinds[task["id"].split("_")[0]] += 1
    assert kinds.keys() == {*world.SCENE_KINDS, *world.OTHER_KINDS} and min(kinds.values()) > 40


def test_a_scene_is_read_in_every_way_to_tell_it():
    rng = random.Random(0)
    for _ in range(300):
        scene = world.pick_scene(rng)
        assert instruct.read_scene(world.tell(scene, rng)) == scene


@pytest.mark.parametrize("text, answer", [
    ("What color is the ring? Say it twice.", "Red. Red."),
    ("What color is the ring? And also: Where is the moon?", "Red. At left."),
    ("What color is the ring? And also: Where is the moon? Begin with Well.",
     "Well, Red. At left."),
    ("Where is the large blue moon?", "At left."),
    ("What color is the ring at top?", "Red."),
    ("Suppose the ring were gone. How many things are there?", "One."),
    ("Suppose the ring were gone. What color is the ring?", "None."),
    ("Suppose the ring were green. Suppose the moon were gone. Describe the scene.",
     "A small green ring at top."),
    ('First run draw("small pink star at right"). Count the objects.', "Three."),
    ('First run draw("small pink ring at right"). What color is the ring?', None),
    ('First run draw("small pink star at top"). Count the objects.', None),
    ("What color is the red ring?", None), ("What is love?", None)])
def test_evolved_instructions_have_true_answers(text, answer):
    """Of two rings there is no color; where something is, nothing can be drawn."""
    assert instruct.solve(instruct.understand(text), SCENE) == answer


def test_every_operation_makes_questions_that_have_an_answer():
    """What it cannot evolve it repeats, and the recipe drops that."""
    rng = random.Random(0)
    for operation in evol_instruct.OPERATIONS:
        outcomes = Counter()
        for _ in range(100):
            task = instruct.new_task(rng)
            asked = data.Turn("user", task["instruction"], task["input"])
            text = instruct.rewrite(operation, asked, rng)
            answer = instruct.solve(instruct.understand(text), instruct.read_scene(asked.input))
            outcomes["same" if text == asked.text else answer is not None] += 1
        assert outcomes[True] > 20 and outcomes[False] < 25, (operation, outcomes)


def test_more_scenes_are_training_scenes_with_true_answers():
    """And the answer is not mostly "None.": the object that is asked about is there."""
    asked = [world.ask_scene(kind, SCENE, random.Random(1), about=RING).text
             for kind in ("color", "paint", "exists", "shape")]
    tasks = [data.Conversation([data.Turn("user", text, world.caption(SCENE)),
                                data.Turn("assistant", "?")]) for text in asked]
    records = instruct.more_scenes(tasks, 200, random.Random(0))
    assert [record["instruction"] for record in records] == asked * 50
    assert len({record["input"] for record in records}) > 150
    answers = Counter()
    for record in records:
        scene = instruct.read_scene(record["input"])
        assert world.split_of(scene) == "train"
        assert record["output"] == instruct.solve(instruct.understand(record["instruction"]), scene)
        answers[record["output"]] += 1
    assert answers["None."] + answers["Nothing."] < 40 and 10 < answers["Yes."] < 40


def test_questions_are_held_out_and_evolved():
    for row in (*instruct.SIMPLE, *instruct.HARDER):
        asked = instruct.questions(row, 20)
        assert asked == instruct.questions(row, 20), "every model gets the same ones"
        for turn, answer in asked:
            scene = instruct.read_scene(turn.input)
            meaning = instruct.understand(turn.text)
            if scene:
                assert world.split_of(scene) == ("pairs" if row == "pairs" else "scenes")
            if row in instruct.HARDER:
                assert answer == instruct.solve(meaning, scene) and (
                    row == "concretize" or meaning[0] in instruct.EVOLVED)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The toy's seeds, Self-Instruct, and two rounds of Evol-Instruct; all with the oracle."""
    out = tmp_path_factory.mktemp("chain")
    instruct.write_json(out / "seeds.json", instruct.seed_tasks(0))
    self_instruct.main(self_instruct.Config(
        seeds=f"{out}/seeds.json", teacher="oracle", count=150, out=f"{out}/self.json"))
    evol_instruct.main(evol_instruct.Config(
        f"{out}/self.json", teacher="oracle", rounds=2, out=f"{out}/evol.json"))
    return out


def reasons(out, name: str) -> dict:
    return json.loads((out / f"{name}.json.report.json").read_text(encoding="utf-8"))["reasons"]


def test_each_filter_has_something_to_do(chain):
    said = " ".join(reasons(chain, "self"))
    for reason in ("no reply", "resembles an", "also the output", "text cannot show", "short"):
        assert reason in said
    said = " ".join(reasons(chain, "evol"))
    for reason in ("no information gain", "sorry", "punctuation and stop words",
                   "words of the evolving prompt", "empty or cut off", "answer is cut off"):
        assert reason in said


def test_what_is_kept_is_true_and_says_where_it_is_from(chain):
    tasks = data.load_conversations(chain / "evol.json")
    by_id = {task.id: task for task in tasks}
    assert len(by_id) == len(tasks) > 250
    rounds = Counter(task.extra["round"] for task in tasks)
    assert rounds[0] == 150 and rounds[1] > 40 and rounds[2] > 40
    operations = Counter(task.extra.get("operation") for task in tasks)
    assert set(operations) == {None, *evol_instruct.OPERATIONS}
    for task in tasks:
        asked, reply = task.turns
        scene = instruct.read_scene(asked.input)
        assert reply.text == instruct.solve(instruct.understand(asked.text), scene)
        if task.extra["round"]:
            parent = by_id[task.extra["parent"]]
            assert parent.extra["round"] < task.extra["round"]
            assert parent.turns[0].input == asked.input and parent.turns[0].text != asked.text


def test_the_table_has_means_and_says_what_is_noise(capsys):
    """Of 200 answers in all, a lead of 10 points can be chance."""
    instruct.print_results("right, %", dict(a=dict(x=0.5, y=1.0), b=dict(x=0.7, y=0.8)), 100)
    printed = capsys.readouterr().out
    assert ["mean", "60", "90"] in map(str.split, printed.splitlines())
    assert "below 10 points is noise" in printed
