"""Tests of toy/exam.py: the tables and their controls, the measures of descriptions, and the exam
of pictures."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import train_vlm
from conftest import ROOT
from tools import checkpoint, config, machine
from toy import exam, world


def question(kind: str, text: str = "?") -> world.Question:
    return world.Question(kind, "generic", text, "", "", {})


def item(q: world.Question, *texts: str, told: str = "") -> world.Item:
    turns = [[role, text] for role, text in zip(("user", "assistant", "user"), texts)]
    return world.Item(turns, q, "scenes", False, told)


# -- players and controls -------------------------------------------------------------------------

def test_a_reply_that_does_not_end_is_wrong():
    """A model that says everything it knows, without an end, would otherwise pass."""
    def babbler(items):
        return [i.question.full for i in items], [n % 2 == 0 for n in range(len(items))]

    table, ends = exam.examine({"babbler": babbler}, {"scenes": "a row"}, 10)
    assert table == {"scenes": {"babbler": 0.5}} and sum(ends["babbler"]) == 5


def test_a_minimal_pair_counts_only_if_both_are_right():
    """A player without eyes for the edit is right half the time."""
    assert exam.share_right([True, False, True, True], "scenes") == 0.75
    assert exam.share_right([True, False, True, True], "minimal") == 0.5


def test_without_scene_exchanges_the_scene_everywhere():
    """A scene that is left in an earlier turn would give the answer away."""
    seen = []

    def play(items):
        seen.extend(items)
        return [""] * len(items), [True] * len(items)

    told, q = "There is a small red ring at top.", question("color")
    original = item(q, f"{told} What is this?", "A ring.", f"{told} Color?", told=told)
    exam.without_scene(play)([original, item(q, "2 + 2?")])
    blind, untouched = seen
    assert all(told not in text for _, text in blind.turns)
    assert [text.rsplit(" ", 1)[-1] for _, text in blind.turns] == ["this?", "ring.", "Color?"]
    assert untouched.turns == [["user", "2 + 2?"]]
    assert original.turns[0][1].startswith(told), "the next player gets the same item"


def test_the_nearest_neighbor_goes_by_rare_words():
    """"ring" says more than "what is"."""
    asked = ["What is it?", "What is that?", "The ring: small?"]
    records = [dict(instruction=text, input="", output=text.upper()) for text in asked]
    items = [item(question("", text)) for text in ("What is a ring?", "that")]
    assert exam.nearest_neighbor(records)(items)[0] == ["THE RING: SMALL?", "WHAT IS THAT?"]


def test_the_majority_answers_each_kind_with_its_most_frequent_answer():
    records = [dict(id=f"color_{i}", output=f"{answer}.")
               for i, answer in enumerate(["Red", "Blue", "Blue"])]
    asked = [item(question(kind)) for kind in ("color", "where")]
    assert exam.majority(records)(asked)[0] == ["Blue.", "Yes."]


def test_shots_stand_before_the_first_question_only(monkeypatch):
    records = [dict(instruction="Q", input=scene, output="A") for scene in ("", "1", "2", "3", "4")]
    shots = exam.few_shot_examples(records)
    assert shots == "Q\nA\n\n1 Q\nA\n\n2 Q\nA\n\n3 Q\nA\n\n"
    heard = []
    monkeypatch.setattr(data, "generate_replies",
                        lambda net, tokenizer, template, asked, **_: heard.extend(asked))
    exam.model_player(None, None, "lines", shots)([item(question("color"), "one", "two", "three")])
    assert [turn.text for turn in heard[0].turns] == [shots + "one", "two", "three"]


def test_a_dialogue_is_continued_with_the_models_own_answers(capsys):
    """A model that errs once has to live with what it said; the error is marked."""
    heard = []

    def play(items):
        heard.append([text for role, text in items[0].turns if role == "assistant"])
        return [f"reply {len(heard)}"], [True]

    exam.print_dialogues(play)
    assert heard[2] == ["reply 1", "reply 2"]
    assert "ASSISTANT: reply 1   [true: " in capsys.readouterr().out


# -- what a description is worth ------------------------------------------------------------------

TWO = (world.Object("large", "red", "circle", "top"), world.Object("small", "blue", "star", "left"))


def description(scene: world.Scene) -> str:
    return f"There is {world.caption(scene)}."


@pytest.mark.parametrize("text, ended, reason", [
    (description(TWO[::-1]), True, ""),
    (description(TWO[:1]), True, "is wrong"),
    (description((*TWO, TWO[0]._replace(place="right"))), True, "is wrong"),
    (description(TWO), False, "does not stop"),
    (" \n", False, "empty"),
    ("a red circle a red", True, "fragment"), ("Circle.", True, "fragment"),
    ("The cat is red. The dog is blue. The cat is red.", True, "repeats itself"),
    ("on the red table " * 4, True, "repeats itself")])
def test_failures_of_descriptions(text, ended, reason):
    assert exam.failure(TWO, text, ended) == reason


def test_chair_counts_objects_that_are_not_there():
    moon = (TWO[0]._replace(color="pink", shape="moon"), TWO[0]._replace(shape="ring"))
    descriptions = ["A red circle, a blue star and a pink moon.", "A pink moon.", "None."]
    shares = exam.chair(descriptions, [TWO[:1], moon, ()])
    assert list(shares.values()) == [2 / 4, 1 / 3]
    assert exam.mentions(world.caption(moon)) == {("pink", "moon"), ("red", "ring")}
    assert exam.mentions("Two red circles.") == {("red", "circle")}


def test_pope_is_balanced_and_counts_right():
    """Who always says yes is right half the time; who says neither or both is wrong."""
    rng = random.Random(0)
    scenes = [world.pick_scene(rng) for _ in range(20)]
    scenes_seen, numbers, questions = exam.yes_no_exam(exam.PictureExam(scenes, range(20), []))
    assert len(questions) == 40
    for scene, number, q in zip(scenes_seen, numbers, questions):
        there = exam.mentions(world.caption(scene))
        assert q.truth["yesno"] == {"yes" if exam.mentions(q.text) <= there else "no"}
        assert scenes[number] is scene, "asked about its own picture"

    def shares(replies):
        return list(exam.pope(questions, replies).values())

    assert shares([q.full for q in questions]) == [1, 0.5], "as many yes as no"
    assert shares(["Yes, there is."] * 40) == [0.5, 1]
    assert shares(["Hm."] * 40) == shares(["Yes and no."] * 40) == [0, 0]


# -- the exam of pictures -------------------------------------------------------------------------

def test_minimal_pairs_of_pictures_differ_in_one_thing():
    """Two pictures with the same background; otherwise noise could answer the question."""
    e = exam.picture_exam("minimal", 6)
    for k in (0, 2, 4):
        a, b = e.scenes[k:k + 2]
        assert sum(x != y for one, two in zip(a, b) for x, y in zip(one, two)) == 1
        seen_a, seen_b = (picture.astype(int) for picture in e.pictures[k:k + 2])
        changed = (abs(seen_a - seen_b).max(-1) > 12).mean()
        assert 0 < changed < 0.15, "another background"
        assert e.questions[k].text == e.questions[k + 1].text
        assert e.questions[k].full != e.questions[k + 1].full


def test_the_exam_of_pictures_asks_about_the_held_out_pair():
    e, again = exam.picture_exam("pairs", 12), exam.picture_exam("pairs", 12)
    for scene, q in zip(e.scenes, e.questions):
        assert world.split_of(scene) == "pairs" and q.kind != "describe"
        assert q.kind == "count" or world.held_pair(scene).shape in q.full
    assert np.array_equal(e.pictures, again.pictures)


def test_the_tables_tell_who_sees_who_is_told_and_who_invents():
    """Players who describe their pictures or those of another, repeat what they are told, or say
    nothing."""
    def seeing(shift: int):
        def play(e, texts, texts_with_scene):
            said = [description(scene) for scene in e.scenes[shift:] + e.scenes[:shift]]
            if texts == [q.text for q in e.questions]:
                said = [q.full for q in e.questions]
            return said, [True] * len(texts)
        return play

    def told(e, texts, texts_with_scene):
        return texts_with_scene, [True] * len(texts)

    def silent(e, texts, texts_with_scene):
        return [""] * len(texts), [True] * len(texts)

    players = {"sees": seeing(0), "sees another": seeing(1), "told": told, "silent": silent}
    table, descriptions = exam.see_and_tell(players, 8, ["scenes", "minimal"])
    assert all(row["sees"] == 1 and row["silent"] == 0 for row in table.values())
    assert table["held-out scenes, descriptions"]["sees another"] == 0
    assert table["held-out scenes, descriptions"]["told"] > 0
    players.pop("told")
    said = {name: descriptions["scenes", name] for name in players}
    table = exam.failure_table(players, exam.picture_exam("scenes", 8), said)
    columns = {row: list(cells.values()) for row, cells in table.items()}
    assert columns["is wrong"] == [0, 1, 0] and columns["empty"] == [0, 0, 1]
    assert columns["fails in one of these ways"] == [0, 1, 1]
    assert columns["hallucinated objects (CHAIR-i)"][1] > 0
    assert columns["yes/no right (chance 50)"] == [1, 1, 0]


def test_the_sheet_shows_a_wrong_description_if_there_is_one(tmp_path):
    """Four right ones out of a hundred would show a better model than there is."""
    e = exam.picture_exam("scenes", 6)
    right = [description(scene) for scene in e.scenes]
    exam.save_sheet(e, right, tmp_path / "right.png")
    exam.save_sheet(e, [*right[:5], "Nothing."], tmp_path / "wrong.png")
    assert (tmp_path / "right.png").read_bytes() != (tmp_path / "wrong.png").read_bytes()


def test_each_player_sees_with_its_own_projection(tmp_path, monkeypatch):
    """Stage 1 and the final model share a network: each must be asked with its own weights."""
    net = SimpleNamespace(llama_proj=torch.nn.Linear(1, 1, bias=False))
    net.llama_proj.load_state_dict({"weight": torch.tensor([[10.0]])})
    seen = []

    def encode(network, pictures, machine):
        return torch.arange(len(pictures))[:, None] * network.llama_proj.weight.detach()

    def ask(network, vlm, texts, features):
        seen.append(None if features is None else features.flatten().tolist())
        return [""] * len(texts), [True] * len(texts)

    monkeypatch.setattr(train_vlm, "encode_images", encode)
    monkeypatch.setattr(train_vlm, "ask", ask)
    vlm = SimpleNamespace(cfg=train_vlm.VLMConfig(out=str(tmp_path)), machine=None, began=0.0)
    figures = exam.seeing_exam(vlm, net, {"weight": torch.tensor([[1.0]])}, [], 3)
    assert list(figures["table"]["held-out scenes, questions"]) == [
        "MiniGPT-4", "in words", "no picture", "shuffled", "stage 1"]
    assert seen[:10:2] == [[0, 10, 20], None, None, [20, 0, 10], [0, 1, 2]]
    assert json.loads((tmp_path / "seeing.json").read_text(encoding="utf-8")) == figures


# -- python -m toy.exam ---------------------------------------------------------------------------

def test_checkpoints_of_any_recipe_are_columns_of_one_table(tmp_path, monkeypatch, capsys):
    """Each is asked in its own template, a base on a line of its own. One of another recipe, whose
    template the toy chain does not have, was asked as a Vicuna without a word."""
    templates = dict(base="plain", alpaca="alpaca", vicuna="vicuna_v1.1", mine="koala")
    for name, template in templates.items():
        net, path, meta = checkpoint.load(ROOT / "tests" / "micro")
        checkpoint.save(tmp_path / name, net, dict(meta, template=template), path)
    asked = []

    def player(net, tokenizer, template):
        asked.append(template)
        return lambda items: ([item.question.full for item in items], [True] * len(items))

    monkeypatch.setattr(exam, "model_player", player)
    monkeypatch.setattr(machine, "measure_peak", lambda *_: 1e9)
    folders = [str(tmp_path / name) for name in templates]
    cfg = config.from_cli(exam.ExamConfig, [*folders, "--questions=2"])
    assert list(exam.main(cfg)["table"]["scenes"].values()) == [1, 1, 1, 1]
    assert asked == ["lines", "alpaca", "vicuna_v1.1", "koala"]
    printed = capsys.readouterr().out
    assert "mine is not of the toy chain: it is asked in its own template, koala" in printed
    assert ["right", "answers,", "%", *templates] in map(str.split, printed.splitlines())


def test_columns_have_names_of_their_own():
    """Two runs both have a vicuna: one column would have replaced the other."""
    assert exam.column_names(["out/base", "out/vicuna"]) == dict(base="out/base",
                                                                 vicuna="out/vicuna")
    assert list(exam.column_names(["a/vicuna", "b/vicuna"])) == ["a/vicuna", "b/vicuna"]
