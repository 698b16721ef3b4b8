"""Tests of toy/exam.py: the tables and their controls, the measures of descriptions, and the exam
of pictures."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train_vlm
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
    assert exam.nearest_neighbor(records)(items) == (["THE RING: SMALL?", "WHAT IS THAT?"],
                                                     [True, True])


def test_the_majority_answers_each_kind_with_its_most_frequent_answer():
    outputs = [("color", "Red."), ("color", "Blue."), ("color", "Blue."), ("count", "Two.")]
    records = [dict(kind=kind, output=output) for kind, output in outputs]
    asked = [item(question(kind)) for kind in ("color", "count", "where")]
    assert exam.majority(records)(asked) == (["Blue.", "Two.", "Yes."], [True] * 3)


def test_shots_stand_before_the_first_question_only(monkeypatch):
    records = [dict(instruction=f"Q{i}", input="scene" if i else "", output=f"A{i}")
               for i in range(6)]
    shots = exam.few_shot_examples(records)
    assert shots == "Q0\nA0\n\nscene Q1\nA1\n\nscene Q2\nA2\n\nscene Q3\nA3\n\n"
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
    assert capsys.readouterr().out.count("[true: ") == 12


def test_the_tokenizer_is_trained_on_all_three_files(tmp_path):
    """One that has seen documents only needs almost twice the tokens for conversations."""
    sizes = dict(documents=30, instructions=30, conversations=30)
    files = world.write_files(tmp_path, sizes, 0)
    tokenizer = exam.toy_tokenizer(files, 600, tmp_path / "all.model")
    documents = data.load_documents(files["base"])
    alone = data.train_tokenizer(documents, 600, tmp_path / "alone.model")
    said = [turn.text for c in data.load_conversations(files["vicuna"]) for turn in c.turns]
    assert len(tokenizer.encode("\n".join(said))) < 0.95 * len(alone.encode("\n".join(said)))


# -- what a description is worth ------------------------------------------------------------------

TWO = (world.Object("large", "red", "circle", "top"), world.Object("small", "blue", "star", "left"))


def description(scene: world.Scene) -> str:
    return f"There is {world.caption(scene)}."


@pytest.mark.parametrize("text, ended, reason", [
    (description(TWO), True, ""), (description(TWO[::-1]), True, ""),
    (description(TWO[:1]), True, "is wrong"),
    (description((*TWO, TWO[0]._replace(place="right"))), True, "is wrong"),
    (description(TWO), False, "does not stop"),
    ("", True, "empty"), (" \n", False, "empty"),
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
    rng, questions = random.Random(0), []
    for _ in range(20):
        scene = world.pick_scene(rng)
        there = exam.mentions(world.caption(scene))
        for q in exam.pope_questions(scene, rng):
            assert q.truth["yesno"] == {"yes" if exam.mentions(q.text) <= there else "no"}
            questions.append(q)
    truth = [next(iter(q.truth["yesno"])) for q in questions]
    assert truth.count("yes") == truth.count("no") == 20

    def shares(replies):
        return list(exam.pope(questions, replies).values())

    assert shares([q.full for q in questions]) == [1, 0.5]
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


@pytest.mark.parametrize("split", ["scenes", "pairs"])
def test_the_exam_of_pictures_holds_out_what_it_says(split):
    e, again = exam.picture_exam(split, 12), exam.picture_exam(split, 12)
    assert all(world.split_of(scene) == split for scene in e.scenes)
    assert all(q.kind != "describe" and world.grade(q, q.full) == 1 for q in e.questions)
    assert np.array_equal(e.pictures, again.pictures)
    for scene, q in zip(e.scenes, e.questions):
        held = world.held_pair(scene)
        assert held is None or q.kind == "count" or held.shape in q.full


def sighted(shift: int = 0):
    """A player that describes its pictures rightly or, with a shift, those of another; and answers
    questions with the truth."""
    def play(e, texts, texts_with_scene):
        ended = [True] * len(texts)
        if texts == [q.text for q in e.questions]:
            return [q.full for q in e.questions], ended
        return [description(scene) for scene in e.scenes[shift:] + e.scenes[:shift]], ended
    return play


def silent(e, texts, texts_with_scene):
    return [""] * len(texts), [True] * len(texts)


def test_see_and_tell_tells_who_sees_and_who_is_told():
    def told(e, texts, texts_with_scene):
        return texts_with_scene, [True] * len(texts)  # repeats the scene as it was told

    players = {"sees": sighted(), "told": told, "silent": silent}
    table, descriptions = exam.see_and_tell(players, 4, ["scenes", "minimal"])
    assert len(table) == 4
    assert all(row["sees"] == 1 and row["silent"] == 0 for row in table.values())
    assert table["held-out scenes, descriptions"]["told"] > 0
    assert descriptions["scenes", "silent"] == ([""] * 4, [True] * 4)


def test_the_failure_table_counts_wrong_descriptions_and_invented_objects():
    e = exam.picture_exam("scenes", 3)
    players = {"stage 1": sighted(shift=1), "MiniGPT-4": sighted(), "silent": silent}
    descriptions = {name: play(e, ["Describe it."] * 3, []) for name, play in players.items()}
    table = exam.failure_table(players, e, descriptions)
    assert table["is wrong"] == {"stage 1": 1, "MiniGPT-4": 0, "silent": 0}
    assert table["empty"] == {"stage 1": 0, "MiniGPT-4": 0, "silent": 1}
    assert table["fails in one of these ways"] == {"stage 1": 1, "MiniGPT-4": 0, "silent": 1}
    assert table["hallucinated objects (CHAIR-i)"]["stage 1"] > 0
    assert table["descriptions with one (CHAIR-s)"]["MiniGPT-4"] == 0
    assert table["yes/no right (chance 50)"] == {"stage 1": 1, "MiniGPT-4": 1, "silent": 0}


def test_the_sheet_shows_a_wrong_description_if_there_is_one(tmp_path):
    """Four right ones out of a hundred would show a better model than there is."""
    e = exam.picture_exam("scenes", 6)
    right = [description(scene) for scene in e.scenes]

    def red_pixels(replies):
        exam.save_sheet(e, replies, tmp_path / "seen.png")
        below = np.asarray(Image.open(tmp_path / "seen.png")).astype(int)[255:]
        return ((below[..., 0] - below[..., 1]) > 100).sum()  # firebrick

    assert red_pixels(right) == 0 and red_pixels([*right[:5], "Nothing."]) > 0


def test_each_player_sees_with_its_own_projection(tmp_path, monkeypatch):
    """Stage 1 and the final model share a network: each must be asked with its own weights."""
    net = SimpleNamespace(llama_proj=torch.nn.Linear(1, 1, bias=False))
    aligned = {"weight": torch.tensor([[1.0]])}
    net.llama_proj.load_state_dict({"weight": torch.tensor([[10.0]])})
    heard = []

    def encode(network, pictures, machine):
        return torch.arange(len(pictures))[:, None] * network.llama_proj.weight.detach()

    def ask(network, vlm, texts, features):
        heard.append((texts, None if features is None else features.flatten().tolist()))
        return [""] * len(texts), [True] * len(texts)

    monkeypatch.setattr(train_vlm, "encode_images", encode)
    monkeypatch.setattr(train_vlm, "ask", ask)
    vlm = SimpleNamespace(cfg=train_vlm.VLMConfig(out=str(tmp_path)), machine=None, began=0.0)
    figures = exam.seeing_exam(vlm, net, aligned, [], 3)
    assert list(figures["table"]["held-out scenes, questions"]) == [
        "MiniGPT-4", "in words", "no picture", "shuffled", "stage 1"]
    texts, seen = zip(*heard[:10:2])  # descriptions of the first split
    assert seen == ([0, 10, 20], None, None, [20, 0, 10], [0, 1, 2])
    assert texts[0] == texts[2] == texts[3] == texts[4]
    assert all(text.endswith("Describe the scene.") for text in texts[1])
    assert json.loads((tmp_path / "seeing.json").read_text(encoding="utf-8")) == figures
