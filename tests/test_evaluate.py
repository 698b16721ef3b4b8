"""Tests of tools/evaluate.py: scores equal those by hand, and published files are read as meant.

    NANOVICUNA_DATA=FOLDER pytest tests/test_evaluate.py    # also with published weights
"""

import json
import os
from pathlib import Path

import pytest
import torch

from test_convert import MICRO, TOKENIZER, hugging_face
from tools import checkpoint, evaluate
from tools.config import UserError
from toy import world


def write(path: Path, records: list) -> str:
    path.write_text("\n".join(json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return str(path)


# -- scores ---------------------------------------------------------------------------------------

PROVERBS = {  # choices of unequal length, so that their rows are padded
    "A bird in the hand is worth": ["two in the bush", "it", "a lot of money today"],
    "Birds of a feather": ["flock together", "fly", "sing in the old tree"],
    "The early bird": ["catches the worm", "is tired", "sleeps until it is noon and then eats"],
    "Too many cooks": ["spoil the broth", "eat", "are red"],
    "All that glitters is": ["not gold", "a star", "on the left side of the scene"],
    "Still waters": ["run deep", "are here", "a"],
    "When the cat is away": ["the mice will play", "it rains", "the dog"],
    "A rolling stone": ["gathers no moss", "stops", "is small, round and grey"],
    "Rome was not": ["built in a day", "far", "a town in which many people live"],
    "Where there is smoke": ["there is fire", "I cough", "no"],
}


def by_hand(theirs, context: str, choice: str) -> float:
    """log P(choice | context) from transformers' logits for the whole text, tokenized at once."""
    ids = [1, *TOKENIZER.encode(f"{context} {choice}")]
    n = len(TOKENIZER.encode(context))
    with torch.no_grad():
        log_p = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_p[i, ids[i + 1]]) for i in range(n, len(ids) - 1))


def test_scores_equal_transformers_by_hand(tmp_path):
    """Both normalizations. A choice that saw padding, or whose first token is not scored, would
    differ."""
    theirs = hugging_face("tinyllama", tmp_path / "tinyllama")
    net = checkpoint.load(tmp_path / "tinyllama")[0]
    for question, choices in PROVERBS.items():
        after_question = [by_hand(theirs, question, choice) for choice in choices]
        after_answer = [by_hand(theirs, "Answer:", choice) for choice in choices]
        expected = {
            "characters": [p / len(choice) for p, choice in zip(after_question, choices)],
            "answer": [p - q for p, q in zip(after_question, after_answer)],
        }
        for normalize, numbers in expected.items():
            item = evaluate.Item(question, choices, 0, normalize)
            rows = evaluate.make_rows(item, "", TOKENIZER)
            got = evaluate.scores(net, item, rows).tolist()
            assert got == pytest.approx(numbers, abs=1e-4), (question, normalize)


def test_a_likely_choice_must_be_likely_after_this_question(tmp_path, monkeypatch):
    """By its characters the longer choice wins. It is that likely after "Answer:" already, so that
    the shorter one wins by the answer."""
    log_p = torch.tensor([-6.0, -8.0, -9.0, -8.0])  # two after the question, two after "Answer:"

    def likelihoods(net, rows):
        return log_p[:len(rows)]

    monkeypatch.setattr(evaluate, "log_likelihoods", likelihoods)
    record = dict(question="A pet is", choices=["cat", "elephant"], answer="cat")
    file = write(tmp_path / "q.jsonl", [record])
    for normalize, right in (("characters", 0), ("answer", 1), ("auto", 0)):
        cfg = evaluate.EvaluateConfig(file, str(MICRO), normalize=normalize)
        assert evaluate.main(cfg)["accuracy"] == right


def test_the_interval_of_a_few_questions():
    """Wilson's, from tables. The simple interval of 0 right out of 10 would be 0 to 0."""
    assert evaluate.interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert evaluate.interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert evaluate.interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


# -- files ----------------------------------------------------------------------------------------

ARC = dict(stem="What is hot?", choices=[dict(text="ice", label="A"), dict(text="fire", label="B")])
HUGGING_FACE = dict(text=["ice", "fire"], label=["1", "2"])
FILES = {
    "plain, by text": (
        dict(question="Fire is", choices=["hot ", "cold"], answer="hot"),
        "Fire is", ["hot", "cold"], 0, "characters"),
    "plain, by index": (
        dict(question="Two is", choices=["3", "0", "2"], answer=2),
        "Two is", ["3", "0", "2"], 2, "characters"),
    "plain, a text that looks like an index": (
        dict(question="Zero is", choices=["3", "0", "2"], answer="0"),
        "Zero is", ["3", "0", "2"], 1, "characters"),
    "piqa": (
        dict(goal="Open it.", sol1="Push.", sol2="Eat.", label=1),
        "Question: Open it.\nAnswer:", ["Push.", "Eat."], 1, "characters"),
    "hellaswag": (
        dict(ind=4, activity_label="Cooking", ctx_a="A man cooks. [title] Eggs", ctx_b="then he",
             ctx="A man cooks. [title] Eggs then he", endings=["eats. [step] Slowly.", "sings."],
             label="0"),
        "Cooking: A man cooks.. Eggs Then he", ["eats. Slowly.", "sings."], 0, "characters"),
    "hellaswag, short": (
        dict(ctx="A man cooks, then he", endings=["eats.", "sings.", "runs."], label=2),
        "A man cooks, then he", ["eats.", "sings.", "runs."], 2, "characters"),
    "arc": (
        dict(id="M_1", question=ARC, answerKey="B"),
        "Question: What is hot?\nAnswer:", ["ice", "fire"], 1, "characters"),
    "arc of Hugging Face": (
        dict(question="What is hot?", choices=HUGGING_FACE, answerKey="2"),
        "Question: What is hot?\nAnswer:", ["ice", "fire"], 1, "characters"),
    "openbookqa": (
        dict(question_stem="What is hot?", choices=HUGGING_FACE, answerKey="1"),
        "Question: What is hot?\nAnswer:", ["ice", "fire"], 0, "answer"),
    "boolq": (
        dict(question="is fire hot", title="Fire", passage="Fire burns.", answer=True),
        "Fire burns.\nQuestion: is fire hot?\nAnswer:", ["no", "yes"], 1, "answer"),
    "boolq, false": (
        dict(question="is ice hot?", passage="Ice is cold.", answer=False),
        "Ice is cold.\nQuestion: is ice hot?\nAnswer:", ["no", "yes"], 0, "answer"),
}


@pytest.mark.parametrize("record, question, choices, right, normalize", FILES.values(), ids=FILES)
def test_published_fields(record, question, choices, right, normalize):
    assert evaluate.parse(record) == evaluate.Item(question, choices, right, normalize)


def test_what_is_skipped_is_counted_by_reason(tmp_path):
    """A published test split has no labels: it would be scored as if the first choice were right.
    """
    usable = dict(question="Fire is", choices=["hot", "cold"], answer="hot")
    records = [
        usable, usable,
        dict(goal="Open it.", sol1="Push.", sol2="Eat.", label=-1),
        dict(ctx="He", endings=["eats.", "sings."], label=""),
        dict(usable, answer="warm"),
        dict(usable, choices=["hot", " "]), dict(usable, choices=["hot"]),
        dict(usable, choices=[1, 2]), dict(text="Fire is hot."), 7,
        dict(usable, question="Fire is hot. " * 500),
    ]
    figures = evaluate.main(evaluate.EvaluateConfig(write(tmp_path / "q", records), str(MICRO)))
    window = checkpoint.window(*reversed(checkpoint.peek(MICRO)[::2]))
    assert figures["questions"] == 2
    assert figures["skipped"] == {
        "no right answer": 3, "fewer than two choices, or an empty one": 2, "unknown fields": 3,
        f"longer than the context of {window} tokens": 1}


@pytest.mark.parametrize("text, message", [
    ("Fire is hot.\n", "broken JSON at line 1"),
    ('{"question": "Fire is", "choices": ["hot", "cold"], "answer": 0}\n{"question": \n',
     "broken JSON at line"),
    ('{"text": "Fire is hot."}\n', "no usable question; unknown fields: 1; expected question"),
    ('{"goal": "Open it.", "sol1": "Push.", "sol2": "Eat."}\n', "no right answer: 1"),
    ("", "is empty")])
def test_a_wrong_file_is_one_line(tmp_path, text, message):
    (tmp_path / "wrong.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        evaluate.main(evaluate.EvaluateConfig(str(tmp_path / "wrong.jsonl"), str(MICRO)))
    assert "\n" not in str(caught.value)


def test_solved_examples_stand_in_front(tmp_path, monkeypatch):
    """They are not asked themselves, and "Answer:", which normalizes, stands alone."""
    records = [dict(question=f"{n} is", choices=["odd", "even"], answer=n % 2 ^ 1)
               for n in range(1, 6)]
    seen = []

    def listen(net, rows):
        seen.extend(TOKENIZER.decode(context[1:]) for context, _ in rows)
        return torch.zeros(len(rows))

    monkeypatch.setattr(evaluate, "log_likelihoods", listen)
    options = dict(file=write(tmp_path / "q", records), ckpt=str(MICRO), normalize="answer")
    figures = evaluate.main(evaluate.EvaluateConfig(**options, shots=3))
    shots = "1 is odd\n\n2 is even\n\n3 is odd\n\n"
    assert figures["questions"] == 2
    assert seen == [f"{shots}4 is"] * 2 + ["Answer:"] * 2 + [f"{shots}5 is"] * 2 + ["Answer:"] * 2
    with pytest.raises(UserError, match="--shots=5 leaves none of 5 questions"):
        evaluate.main(evaluate.EvaluateConfig(**options, shots=5))


# -- the toy world --------------------------------------------------------------------------------

def test_where_the_people_live(tmp_path, monkeypatch):
    """The choices are the towns, and a model that remembers only whom it was asked about has all of
    the one group right."""
    def remembers_the_asked(net, item, rows):
        name = item.question.split()[0]
        town = world.FACTS[name][0] if name in world.ASKED else "none"
        return torch.tensor([float(choice == town) for choice in item.choices[::-1]]).flip(0)

    file = tmp_path / "facts.jsonl"
    world.main(world.WorldConfig(facts=str(file)))
    items, skipped = evaluate.read_items(file)
    assert len(items) == 100 and not skipped
    for item in items:
        name = item.question.removesuffix(" lives in")
        assert item.choices == list(world.TOWNS)
        assert item.choices[item.right] == world.FACTS[name][0]
    monkeypatch.setattr(evaluate, "scores", remembers_the_asked)
    groups = evaluate.main(evaluate.EvaluateConfig(str(file), str(MICRO)))["groups"]
    assert {name: figures["questions"] for name, figures in groups.items()} == {
        "asked": 50, "unasked": 50}
    assert groups["asked"]["accuracy"] == 1
    first = sum(world.FACTS[name][0] == world.TOWNS[0] for name in world.UNASKED)
    assert groups["unasked"]["accuracy"] == first / 50


# -- published weights ----------------------------------------------------------------------------

# the beginning of a story, and below it the ending
STORIES = """
Once upon a time, there was a little dog named Max. Max was very hungry.
    He ate a big bone and was full.
Lily had a red balloon. The wind blew and the string slipped out of her hand.
    The balloon flew up into the sky.
Tom was tired after a long day. His mom turned off the light.
    He closed his eyes and went to sleep in his bed.
It was a cold day and snow was on the ground. Anna and Ben wanted to play.
    They made a big snowman and gave it a hat.
Tim found a ball in the park. He kicked it very hard.
    The ball rolled far away and he ran after it.
The little bird could not fly. Her mom told her to try again.
    The bird flapped her wings and flew to the tree.
Mia wanted to bake a cake. She put sugar and eggs in the bowl.
    Her mom put the cake in the oven and it smelled good.
Sam lost his toy car. He looked under the bed.
    He found the car and was happy to play with it again.
It started to rain. Sara had no coat.
    She got all wet and ran home to get dry.
The cat saw a mouse. The mouse saw the cat, too.
    The mouse ran fast and hid in a hole.
Ben fell off his bike and hurt his knee. He started to cry.
    His mom put a bandage on his knee and gave him a hug.
Lucy saw a pretty flower in the garden. She wanted to give it to her mom.
    She picked the flower and her mom said, "Thank you."
The boy went to the sea with his dad. They had a bucket and a shovel.
    They built a big castle in the sand.
The frog lived in a pond. He was very hot.
    He jumped into the water and swam.
Jack broke the vase. He was scared to tell his mom.
    He said, "I am sorry, I broke it," and she was not angry.
It was the birthday of Emma. All her friends came to her house.
    They sang a song, ate cake and gave her gifts.
Tom and Sue both wanted the same doll. They pulled it and shouted.
    Their mom said, "You must share the doll."
The bunny had a big carrot. He met a sad, hungry friend.
    The bunny gave him half of the carrot to eat.
A girl saw a big box in her room. She did not know what was inside.
    She opened the box and found a teddy bear.
The sun was hot. The flower was dry and sad.
    A girl gave water to the flower and it grew tall.
Dad and Tim went to the lake. They had a long stick with a string.
    They caught a big fish in the lake.
The baby was crying. Mom did not know why.
    She gave the baby some milk and the baby stopped crying.
Bob saw a dark cave. He heard a loud noise in it.
    He was scared and ran away from the cave.
Amy wanted to draw a picture. She took her crayons and some paper.
    She drew a house and a yellow sun.
The fox was in a trap. A kind man heard him.
    The man set the fox free, and the fox said, "Thank you."
Mom made hot soup. Leo took a big spoon of it at once.
    It was too hot and he burned his mouth.
The duck lost her babies. She called and called.
    The little ducks came and swam to their mom.
Kim had a kite. It was a windy day.
    The kite went up high in the sky.
Joe climbed a tall tree. Then he could not get down.
    His dad got a ladder and helped him down.
The girl was sick. She had to stay in bed.
    The doctor gave her medicine and she felt better.
Zoe had a loose tooth. She wiggled it all day.
    The tooth fell out and she put it under her pillow.
The bear was sleeping. A bee sat on his nose.
    The bear woke up and the bee flew away.
Max found a shiny coin on the street. He saw an old man looking for it.
    He gave the coin back and the man smiled.
The room was a mess. Toys were all over the floor.
    Mom said, "Please clean up," and they put the toys away.
Nina went to the zoo. She wanted to see the biggest animal.
    She saw an elephant with a long nose.
The train was late. The children waited with their bags.
    Then they heard the train and got on it.
Tom had a sandwich. A bird took it when he looked away.
    He was sad because he had no lunch.
A little fish was lonely. He had nobody to play with.
    He met another fish and they became friends.
The princess lived in a castle. A dragon came and roared.
    The brave knight came and the dragon flew away.
Ella was afraid of the dark. She called her dad.
    Her dad turned on a small light and she was not afraid.
"""


def test_a_published_model_knows_how_stories_go_on(tmp_path):
    """The true ending among those of the next three stories: chance is a quarter. An error in the
    likelihood, such as a shift by one, would bring a real model there."""
    folder = Path(os.environ.get("NANOVICUNA_DATA", "no such folder")) / "stories260K"
    if not folder.is_dir():
        pytest.skip("NANOVICUNA_DATA names no folder with stories260K")
    lines = [line.strip() for line in STORIES.strip().splitlines()]
    stories = list(zip(lines[0::2], lines[1::2]))
    records = []
    for i, (beginning, ending) in enumerate(stories):
        choices = [stories[(i + k) % len(stories)][1] for k in range(4)]
        choices = choices[i % 4:] + choices[:i % 4]  # the right one is at each index equally often
        records.append(dict(question=beginning, choices=choices, answer=ending))
    file = write(tmp_path / "stories.jsonl", records)
    figures = evaluate.main(evaluate.EvaluateConfig(file, str(folder)))
    assert figures["questions"] == 40 and figures["chance"] == 0.25
    assert figures["low"] > 0.25
