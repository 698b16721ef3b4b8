"""The toy world: a small synthetic world in which every question has a known answer.

    python -m toy.world                 # samples of each kind of training text
    python -m toy.world --split=pairs   # questions of one test split, with their answers
    python -m toy.world --facts=facts.jsonl    # where people live, for tools/evaluate.py

It has scenes of colored shapes, a hundred people with a home and a job, animals ordered by size,
sums, one-line programs, and stories. Three kinds of text are made from it: documents (for
pre-training), single-turn instructions with terse answers (like Alpaca's), and conversations with
full answers (like ShareGPT's).

What each test split holds out of training:
  scenes      combinations of objects
  pairs       a color on a shape, such as "pink diamond"
  later       combinations of objects; the answer depends on earlier turns
  facts       questions about half of the people, whom only the documents mention
  closed      some of the sums, comparisons and products (programs are not held out; of two numbers
              to add, only one order may be)
  phrasings   phrasings of the questions
  names       names of users, and words that they define
  more        three objects, and more turns than in training
  minimal     combinations of objects; the same scene twice, with one attribute edited
The oracle, `grade`, scores an answer between 0 and 1.
"""

import itertools
import json
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import data
from tools.config import refuse_unused, run

SIZES = ("small", "large")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "white", "brown", "cyan")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "moon")
PLACES = ("top", "left", "center", "right", "bottom")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
# 10 of the 80 pairs: one shape for each color
HELD_PAIRS = {(color, SHAPES[(3 * i + 1) % len(SHAPES)]) for i, color in enumerate(COLORS)}

SYLLABLES = ("ba be bi da do fa fe ga go ha ja jo ka ki la le li ma mi mo na ni no pa pe ra re ri "
             "ro sa se so ta ti to va vi wa ya zo").split()
TOWNS = ("Paris", "Oslo", "Cairo", "Lima", "Delhi", "Seoul", "Quito", "Dakar")
JOBS = ("baker", "doctor", "farmer", "singer", "teacher", "pilot", "painter", "cook")
ANIMALS = ("ant", "bee", "mouse", "frog", "rabbit", "cat", "fox", "dog", "sheep", "lion", "horse",
           "bear", "elephant", "whale")  # from the smallest to the largest
VALUES = dict(color=COLORS, shape=SHAPES, size=SIZES, place=PLACES, town=TOWNS, job=JOBS)
LEGS = {"spider": ("legs", 8), "ant": ("legs", 6), "bee": ("legs", 6), "dog": ("legs", 4),
        "horse": ("legs", 4), "cat": ("legs", 4), "bird": ("legs", 2), "car": ("wheels", 4),
        "bike": ("wheels", 2), "cart": ("wheels", 2), "hand": ("fingers", 5), "week": ("days", 7),
        "table": ("legs", 4), "stool": ("legs", 3)}
WORDS = ("hello", "yes", "cat", "sun", "moon", "red", "tree", "fish", "go", "stop", "tea", "rain")


class Object(NamedTuple):
    size: str
    color: str
    shape: str
    place: str

    @property
    def at(self) -> str:
        return "at " + self.place  # no article: nearer tokens are easier to attend to

    @property
    def thing(self) -> str:
        return f"{self.size} {self.color} {self.shape}"

    @property
    def noun_first(self) -> str:
        """The shape before its properties: a small model finds the color more easily once it has
        produced the shape."""
        return f"{self.shape}, {self.size} and {self.color}"


Scene = tuple[Object, ...]  # in the order in which they are mentioned


def make_names() -> list[str]:
    names = []
    for a, b in itertools.permutations(SYLLABLES, 2):
        names += [(a + b + end).capitalize() for end in ("", "n", "l")]
    random.Random(7).shuffle(names)
    return names


NAMES = make_names()
PEOPLE = NAMES[:100]
FACTS = {name: (random.Random(name).choice(TOWNS), random.Random(name + "'s job").choice(JOBS))
         for name in PEOPLE}
ASKED, UNASKED = PEOPLE[:50], PEOPLE[50:]  # fine-tuning asks about the first half only
# people who say "my name is ...", and words that a user defines; the NEW ones are held out
USERS, NEW_USERS = NAMES[100:250], NAMES[250:310]
NONSENSE = ("wug", "blick", "dax", "toma", "fep", "zup", "gorp", "lum", "nim", "pilk", "quib",
            "rop")
NEW_NONSENSE = ("snark", "vex", "tuz", "glim", "yop", "frim")


# -- scenes ---------------------------------------------------------------------------------------

def pick_scene(rng: random.Random, split: str = "train", n: int | None = None) -> Scene:
    """A scene of the split "train", "scenes", "pairs" (has a held-out pair), or "more" (3 objects).
    """
    while True:
        count = n or (3 if split == "more" else rng.choice((1, 2, 2, 2)))
        scene = tuple(Object(rng.choice(SIZES), rng.choice(COLORS), rng.choice(SHAPES), place)
                      for place in rng.sample(PLACES, count))
        if split == "pairs" and not held_pair(scene):
            chosen = rng.choice(scene)
            color, shape = rng.choice(sorted(HELD_PAIRS))
            scene = replace_object(scene, chosen, chosen._replace(color=color, shape=shape))
        if split_of(scene) == split:
            return scene


def held_pair(scene: Scene) -> Object | None:
    """The first object whose color-shape pair is held out."""
    return next((o for o in scene if (o.color, o.shape) in HELD_PAIRS), None)


def replace_object(scene: Scene, old: Object, new: Object) -> Scene:
    return tuple(new if o is old else o for o in scene)


def split_of(scene: Scene) -> str:
    """The split that a scene belongs to, regardless of the order of its objects."""
    if held_pair(scene):
        return "pairs"
    if len(scene) > 2:
        return "more"
    is_held_out = zlib.crc32(repr(sorted(scene)).encode()) % 5 == 0
    return "scenes" if is_held_out else "train"


# -- scenes in words ------------------------------------------------------------------------------

def join(parts: list[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene) -> str:
    return join([f"a {o.thing} {o.at}" for o in scene])


def cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def an(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


STATEMENTS = (  # about one object
    "There is a {o.thing} {o.at}.",
    "{o.at} there is a {o.thing}.",
    "A {o.thing} is {o.at}.",
    "{o.at} you see a {o.thing}.",
    "The {o.shape} {o.at} is {o.size} and {o.color}.",
    "{o.place}: {o.thing}.",
    "{o.thing}, {o.place}.",
)


# What one query of the vision encoder may see: an attribute, the end of an object, or nothing. Each
# is a word, and one piece of the tokenizer.
END, NOTHING = ";", "nothing"
N_SYMBOLS = 10  # for two objects: four attributes and an end each


def symbols(objects: Sequence[Object], attribute_order: Sequence[int]) -> list[str]:
    """Each object's attributes in the given order, then END; padded with NOTHING to N_SYMBOLS."""
    words = []
    for o in objects:
        words += [o[k] for k in attribute_order] + [END]
    return words + [NOTHING] * (N_SYMBOLS - len(words))


def tell_symbols(scene: Scene, rng: random.Random) -> str:
    """The symbols in words, the attributes of all objects in the same random order. In a picture,
    image vectors take the places of these words, and all tokens around them are the same."""
    words = symbols(scene, rng.sample(range(4), 4))
    return f"<Img> {' '.join(words)} </Img>"


OPENINGS = ("There is ", "I see ", "The picture shows ", "We have ", "In the scene there is ")


def tell(scene: Scene, rng: random.Random) -> str:
    """The scene in sentences, or sometimes in symbols, which prepares the language model for image
    vectors."""
    if rng.random() < 0.15:
        return tell_symbols(scene, rng)
    return tell_in_sentences(scene, rng)


def tell_in_sentences(scene: Scene, rng: random.Random) -> str:
    """In one of many phrasings."""
    style = rng.random()
    if style < 0.75:
        return rng.choice(OPENINGS) + caption(scene) + "."
    form = rng.choice(STATEMENTS)
    forms = [form if style < 0.87 else rng.choice(STATEMENTS) for _ in scene]
    return " ".join(cap(form.format(o=o)) for form, o in zip(forms, scene))


ALT_OPENINGS = ("{}", "{}", "there is {}", "I see {}", "the picture shows {}", "photo of {}")
REMARKS = ("{o.shape} is {o.color}", "{o.shape} is {o.size}", "{o.shape} is {o.at}",
           "{o.color} thing is a {o.shape}", "{o.at} is a {o.shape}")


def alt_text(scene: Scene, rng: random.Random, noise: float = 0.1) -> str:
    """Alt-text as on the web: short, without a full stop. Some lists what is there; the rest
    remarks on a single object, so that a projection also learns to support questions about one.
    `noise` is the chance of each fault: an omission, a wrong attribute, or (half as often)
    truncation."""
    if rng.random() < 0.4:
        o = rng.choice(scene)
        if rng.random() < noise:
            o = wrong_object(o, rng)
        return rng.choice(REMARKS).format(o=o)
    things = []
    for o in rng.sample(scene, len(scene)):
        if things and rng.random() < noise:  # leaves an object out
            continue
        if rng.random() < noise:
            o = wrong_object(o, rng)
        words = []
        for word in (o.size, o.color, o.shape, o.at):
            if word == o.shape or rng.random() >= noise:
                words.append(word)
        things.append(" ".join([an(words[0]), *words[1:]]))
    text = rng.choice(ALT_OPENINGS).format(join(things))
    if rng.random() < noise / 2:
        return text[:rng.randint(len(text) // 2, len(text))]
    return text


def wrong_object(o: Object, rng: random.Random) -> Object:
    """One attribute drawn again (perhaps the same), unless that would give a held-out pair."""
    kind = rng.choice(("size", "color", "shape", "place"))
    wrong = o._replace(**{kind: rng.choice(VALUES[kind])})
    return o if held_pair((wrong,)) else wrong


def refer(o: Object, scene: Scene) -> str | None:
    """The shortest unique name of an object: "circle", "red circle" or "small red circle"."""
    for name in (o.shape, f"{o.color} {o.shape}", o.thing):
        if sum(x.thing.endswith(name) for x in scene) == 1:
            return name
    return None


# -- questions ------------------------------------------------------------------------------------

@dataclass
class Question:
    kind: str
    category: str  # one of judge.CATEGORIES, or "identity", "memory"
    text: str
    full: str  # the answer as a sentence, as in conversations
    short: str  # the terse answer, as in instructions
    truth: dict  # what `grade` looks for: {"color": {"red"}, ...}
    needs_scene: bool = False
    open: bool = False  # no single right wording: graded by constraints
    ref: str | None = None  # how the question names its object


# Ways to ask, by kind of question. The last two of each kind are held out of training
# ("phrasings").
FORMS = """
color: What color is the {ref}? | Which color does the {ref} have? | Tell me the color of the
{ref}. | What is the color of the {ref}? | The {ref}: what color? | Name the color of the {ref}. |
I forgot the color of the {ref}. What is it? | The {ref} is of what color? | In what color is the
{ref} painted? | Say which color the {ref} is.
shape: What shape is the {color} thing? | Which shape is {color}? | Tell me the shape of the
{color} object. | The {color} one: what shape is it? | What is the {color} thing? | Name the
{color} shape. | There is something {color}. What is it? | What kind of shape is {color}? | What
form does the {color} thing have? | Say what the {color} thing is.
size: How big is the {ref}? | What size is the {ref}? | Tell me the size of the {ref}. | Is the
{ref} small or large? | What is the size of the {ref}? | Which size does the {ref} have? | The
{ref}: small or large? | Name the size of the {ref}. | Would you call the {ref} large or small? |
Say how big the {ref} is.
where: Where is the {ref}? | In which place is the {ref}? | Tell me where the {ref} is. | Where can
I find the {ref}? | What is the place of the {ref}? | The {ref}: where? | I am looking for the
{ref}. Where is it? | Where do you see the {ref}? | What place does the {ref} sit in? | Say where
the {ref} is.
at: What is {at}? | Tell me what is {at}. | What do you see {at}? | {at}, what is there? | Which
object is {at}? | Name the thing {at}. | What can be found {at}? | Is there something {at}? | What
sits {at}? | Say what is {at}.
count: How many things are there? | Count the objects. | How many objects do you see? | What is the
number of things? | Tell me how many things there are. | How many shapes are in it? | Count
everything you see. | Give me the number of objects. | What do you get if you count the things? |
Say how many things there are.
exists: Is there {color} {shape}? | Do you see {color} {shape}? | Can you find {color} {shape}? |
Tell me if there is {color} {shape}. | Is {color} {shape} in the scene? | {color} {shape}: is it
there? | Does it have {color} {shape}? | Look for {color} {shape}. | Could there be {color}
{shape}? | Say if there is {color} {shape}.
describe: Describe the scene. | What do you see? | Tell me everything you see. | Describe the
picture. | What is in the scene? | List all the objects. | Give me a description of it all. | Which
things are there, and where? | Say it all again in your own words. | Go through everything that is
there.
gone: If the {ref} were gone, what would remain? | Take away the {ref}. What remains? | What would
remain without the {ref}? | Imagine the {ref} is gone. What is still there? | Suppose someone takes
the {ref}. What remains? | If I remove the {ref}, what do I still see? | What remains if the {ref}
goes away? | Without the {ref}, what is there? | The {ref} disappears. What stays? | Say what is
still there if the {ref} is taken away.
paint: If the {ref} were {new}, what would be {at}? | Imagine the {ref} is {new}. What is {at}? |
Suppose the {ref} turns {new}. What is {at}? | Paint the {ref} {new}. What is {at} now? | What
would be {at} if the {ref} were {new}? | I paint the {ref} {new}. What do I see {at}? | Make the
{ref} {new}. What is {at} then? | What if the {ref} were {new}: what is {at}? | Think of the {ref}
as {new}. What sits {at}? | Say what is {at} once the {ref} is {new}.
draw: Write code that draws the scene. | Draw the scene in code. | Turn the scene into code. | Give
me a program that draws this. | Write a program for this picture. | Show the scene as code. | Which
code draws these things? | Code for the scene, please. | Put the scene into a program. | Say it in
code.
be: Pretend you are the {ref}. Who are you? | Speak as the {ref}. | You are the {ref} now.
Introduce yourself. | Play the {ref} and introduce yourself. | Act as the {ref}. | Imagine you are
the {ref}. Say hello. | Be the {ref} for a moment. | What would the {ref} say about itself? | Step
into the role of the {ref}. | Say hello as if you were the {ref}.
story: Write a short story about the {ref}. | Tell me a story about the {ref}. | Invent a tale of
the {ref}. | Can you write a story with the {ref}? | A story about the {ref}, please. | Make up a
story about the {ref}. | Write something nice about the {ref}. | I want to hear a story about the
{ref}. | Let the {ref} be the hero of a tale. | Say something long about the {ref}.
town: Where does {name} live? | In which town does {name} live? | Tell me where {name} lives. |
What is the home of {name}? | Which town is {name} from? | Do you know where {name} lives? | {name}
lives in which town? | Where is {name} from? | What town is home to {name}? | Say where {name}
lives.
job: What is the job of {name}? | What does {name} do? | Tell me the job of {name}. | Which job
does {name} have? | What work does {name} do? | Do you know the job of {name}? | {name} works as
what? | How does {name} earn money? | What is {name} by trade? | Say what {name} does for a living.
bigger: Which is bigger, {a} or {b}? | Is {a} bigger than {b}? | What is larger, {a} or {b}? | {a}
or {b}: which is bigger? | Tell me which is bigger: {a} or {b}. | Between {a} and {b}, which is
bigger? | Who is larger, {a} or {b}? | Compare {a} and {b}. | Which one is the bigger animal, {a}
or {b}? | Say which is larger: {a} or {b}.
legs: How many {part} do {n} {things} have? | About how many {part} are on {n} {things}? | Count
the {part} of {n} {things}. | {n} {things}: how many {part} in all? | Guess the number of {part} of
{n} {things}. | What is the number of {part} of {n} {things}? | I have {n} {things}. How many
{part} is that? | Roughly, how many {part} do {n} {things} have? | Estimate the {part} of {n}
{things}. | Say how many {part} {n} {things} have together.
sum: What is {a} + {b}? | {a} + {b} = ? | Add {a} and {b}. | How much is {a} + {b}? | What is {a}
plus {b}? | Calculate {a} + {b}. | Tell me {a} plus {b}. | What do {a} and {b} make? | Find the sum
of {a} and {b}. | Say what {a} + {b} is.
loop: Write code that prints {word} {n} times. | Print {word} {n} times in code. | Give me a
program that says {word} {n} times. | How do I print {word} {n} times? | Code that prints {word}
{n} times, please. | Write a loop that prints {word} {n} times. | I need {word} printed {n} times.
Write the code. | Show me code to print {word} {n} times. | Let the machine print {word} {n} times.
| Say {word} {n} times in code.
who: Who are you? | What is your name? | Tell me about yourself. | Are you a person? | What are
you? | Who am I talking to? | Who made you? | Please introduce yourself. | Do you have a name? |
Say who you are.
name: What is my name? | Do you remember my name? | Who am I? | Tell me my name. | What am I
called? | Say my name. | What did I say my name was? | Can you recall my name? | Which name did I
give you? | Say how I am called.
"""


def read_forms(text: str) -> dict[str, list[str]]:
    """{kind: its forms} of a text with "kind: form | form | ..." for each kind."""
    forms = {}
    for entry in re.split(r"\n(?=[a-z]+: )", text.strip()):
        kind, _, rest = entry.partition(": ")
        forms[kind] = [" ".join(form.split()) for form in rest.split("|")]
    return forms


ASK = read_forms(FORMS)
# MiniGPT-4's prompts, before the two forms that are held out
ASK["describe"][-2:-2] = [*data.IMAGE_INSTRUCTIONS, data.IMAGE_REQUEST]
SCENE_KINDS = ("color", "shape", "size", "where", "at", "count", "exists", "describe", "gone",
               "paint", "draw", "be", "story")
OTHER_KINDS = ("town", "job", "bigger", "legs", "sum", "loop")
CATEGORY = dict(town="knowledge", job="knowledge", be="roleplay", bigger="common-sense",
                legs="fermi", gone="counterfactual", paint="counterfactual", draw="coding",
                loop="coding", sum="math", story="writing", who="identity")
WRAPPERS = ("{}", "{}", "{}", "{}", "{}", "Please: {}", "Hi! {}", "One question. {}", "{} Thanks!",
            "Now, {}", "Hm, {}")
TYPO_WORDS = ("what", "which", "there", "tell", "describe", "write")  # may be misspelled


def phrase(kind: str, rng: random.Random, unseen: bool = False, **words) -> str:
    """A question of the kind in one of its forms; sometimes wrapped, in lower case, without its
    question mark, or with a typo."""
    forms = ASK[kind][-2:] if unseen else ASK[kind][:-2]
    text = cap(rng.choice(forms).format(**words))
    wrapper = rng.choice(WRAPPERS)
    if wrapper in ("Now, {}", "Hm, {}") and text.split()[0] not in PEOPLE:
        text = text[0].lower() + text[1:]
    text = wrapper.format(text)
    if rng.random() < 0.1:
        text = text.rstrip("?.")
        if kind not in ("town", "job"):  # names stay capitalized
            text = text.lower()
    if rng.random() < 0.05 and kind not in ("town", "job", "sum", "legs", "loop"):
        text = add_typo(text, rng)
    return text


def add_typo(text: str, rng: random.Random) -> str:
    """Swaps two adjacent letters of the first word that may be misspelled."""
    words = text.split(" ")
    for n, word in enumerate(words):
        if word.lower() in TYPO_WORDS:
            i = rng.randrange(1, len(word) - 1)
            words[n] = word[:i] + word[i + 1] + word[i] + word[i + 2:]
            break
    return " ".join(words)


class Answer(NamedTuple):
    full: str
    short: str
    truth: dict
    words: dict = {}  # blanks of the question, besides the object's ref, color and at


# Questions about one object: the full answer, the short one, and the attributes that must be right.
LOOKS = ("size", "color", "shape")
ABOUT_ONE = {
    "color": ("The {ref} is {o.color}.", "{o.color}.", ["color"]),
    "shape": ("The {o.color} thing is a {o.shape}.", "a {o.shape}.", ["shape"]),
    "size": ("The {ref} is {o.size}.", "{o.size}.", ["size"]),
    "where": ("The {ref} is {o.at}.", "{o.at}.", ["place"]),
    "at": ("{places}, so the {o.place} {o.shape} is {o.size} and {o.color}.", "a {o.thing}.",
           LOOKS),
    "paint": ("{o.at} would be a {o.shape}, {o.color} and {o.size}.", "a {o.thing}.", LOOKS),
    "be": ("Hello! I am the {o.noun_first}, and I live {o.at}.", "I am the {o.thing}.", LOOKS),
    "story": ("Once there was a {o.noun_first}, that {wish}. One day it met a {friend}. {end}",
              "a {o.thing} met a {friend}.", LOOKS),
}
OPEN = {"be": {"says": {"I am"}}, "story": {"sentences": 3}}  # what open answers must also have
FRIENDS = ("bird", "cat", "child", "cloud", "fish", "king", "dog", "tree")
WISHES = ("wanted to see the sea", "was never sad", "liked to sing", "dreamed of snow",
          "loved the rain")
ENDINGS = ("They were happy ever after.", "And they danced all night.")


def answer_one(kind: str, scene: Scene, o: Object, ref: str, rng: random.Random) -> Answer | None:
    """For the kinds in ABOUT_ONE. None if the question would contain its answer or be ambiguous."""
    if kind in ("color", "size") and getattr(o, kind) in ref:
        return None
    if kind == "shape" and sum(x.color == o.color for x in scene) > 1:
        return None
    if kind == "paint":
        allowed = [c for c in COLORS if c != o.color and (c, o.shape) not in HELD_PAIRS]
        o = o._replace(color=rng.choice(allowed))
    # The story depends on the object only, so that it can be predicted.
    blanks = dict(o=o, ref=ref, friend=FRIENDS[SHAPES.index(o.shape)],
                  wish=WISHES[COLORS.index(o.color) // 2], end=ENDINGS[SIZES.index(o.size)],
                  places=tell_places(scene))
    full, short, attributes = ABOUT_ONE[kind]
    truth = {name: {getattr(o, name)} for name in attributes}
    return Answer(cap(full.format(**blanks)), cap(short.format(**blanks)),
                  truth | OPEN.get(kind, {}), dict(new=o.color))


def tell_places(scene: Scene) -> str:
    """What is where, with each shape directly after its place: what has followed a word before is
    the easiest thing for a small model to find."""
    return "I see " + join([f"a {o.place} {o.shape}" for o in scene])


# The share of questions about a shape that is not in the scene, or a place where nothing is.
ABSENT = dict(color=0.12, size=0.12, where=0.12, at=0.25)


def answer_absent(kind: str, scene: Scene, rng: random.Random) -> Answer:
    used = {value for o in scene for value in o}
    if kind == "at":
        place = rng.choice([place for place in PLACES if place not in used])
        return Answer(f"{tell_places(scene)}, so the {place} has nothing.", "Nothing.",
                      {"yesno": {"no"}}, dict(at="at " + place))
    shape = rng.choice([shape for shape in SHAPES if shape not in used])
    return Answer(f"The {shape} is not there.", "None.", {"yesno": {"no"}}, dict(ref=shape))


def answer_all(kind: str, scene: Scene, o: Object, ref: str) -> Answer:
    """For the kinds about the whole scene: count, describe, draw, gone."""
    if kind == "count":
        n = len(scene)
        be, things = ("is", "thing") if n == 1 else ("are", "things")
        return Answer(f"There {be} {NUMBERS[n]} {things} in the scene.", f"{cap(NUMBERS[n])}.",
                      {"number": {str(n)}})
    if kind == "describe":
        return Answer(f"There is {caption(scene)}.", f"{cap(caption(scene))}.",
                      {"objects": set(scene)})
    if kind == "draw":
        calls = [f'draw("{x.thing} {x.at}")' for x in scene]
        code = " ".join(calls)
        return Answer(code, code, {"code": set(calls)})
    rest = tuple(x for x in scene if x is not o)
    if not rest:
        return Answer(f"Without the {ref} there is nothing.", "Nothing.",
                      {"objects": set(), "yesno": {"no"}})
    text = join([f"a {x.noun_first}, {x.at}" for x in rest])
    return Answer(f"Without the {ref} there is {text}.", f"{cap(caption(rest))}.",
                  {"objects": set(rest)})


def answer_exists(scene: Scene, o: Object, rng: random.Random, must_exist: bool) -> Answer:
    """Is there a red ring? Yes if it must exist, otherwise yes or no, half the time each."""
    if must_exist or rng.random() < 0.5:
        color, shape, truth = o.color, o.shape, "yes"
        reason = f"The {color} {shape} is {o.at}"
    else:
        color, shape = absent_pair(scene, rng)
        truth = "no"
        reason = f"The {color} {shape} is not there"
    return Answer(f"{reason}, so {truth}.", f"{cap(truth)}.", {"yesno": {truth}},
                  dict(color=an(color), shape=shape))


def absent_pair(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A color and a shape that no object combines (and no held-out pair). Each is often there on
    its own, so that it is not enough to look for one of them."""
    present = {(o.color, o.shape) for o in scene}
    while True:
        color = rng.choice(scene).color if rng.random() < 0.7 else rng.choice(COLORS)
        shape = rng.choice(scene).shape if rng.random() < 0.7 else rng.choice(SHAPES)
        if (color, shape) not in HELD_PAIRS | present:
            return color, shape


def ask_scene(kind: str, scene: Scene, rng: random.Random, unseen: bool = False,
              about: Object | None = None) -> Question | None:
    """A question of the kind about the scene, or None when it has no single answer there."""
    o = about or rng.choice(scene)
    ref = refer(o, scene)
    if ref is None and kind in ("color", "size", "where", "gone", "paint", "be", "story"):
        return None
    if about is None and kind in ABSENT and rng.random() < ABSENT[kind]:
        a = answer_absent(kind, scene, rng)
    elif kind == "exists":
        a = answer_exists(scene, o, rng, about is not None)
    elif kind in ABOUT_ONE:
        a = answer_one(kind, scene, o, ref, rng)
    else:
        a = answer_all(kind, scene, o, ref)
    if a is None:
        return None
    words = dict(ref=ref, color=o.color, at=o.at) | a.words
    text, category = phrase(kind, rng, unseen, **words), CATEGORY.get(kind, "generic")
    return Question(kind, category, text, a.full, a.short, a.truth, needs_scene=True,
                    open=kind in OPEN, ref=ref)


def held_out(a, b) -> bool:
    """Holds out one in six sums, comparisons and products."""
    return zlib.crc32(repr((a, b)).encode()) % 6 == 0


def pick_pair(kind: str, rng: random.Random, test: bool) -> Sequence:
    """bigger: the ranks of two animals. legs: a thing, and how many of it. sum: two numbers."""
    while True:
        if kind == "bigger":
            pair = rng.sample(range(len(ANIMALS)), 2)
        elif kind == "legs":
            pair = rng.choice(sorted(LEGS)), rng.randint(2, 6)
        else:
            pair = rng.randint(0, 12), rng.randint(0, 12)
        key = sorted(pair) if kind == "bigger" else pair
        if held_out(*key) == test:
            return pair


def answer_other(kind: str, rng: random.Random, test: bool) -> Answer:
    """For the kinds that need no scene."""
    if kind in ("town", "job"):
        name = rng.choice(UNASKED if test else ASKED)
        town, job = FACTS[name]
        if kind == "town":
            return Answer(f"{name} lives in {town}.", f"{town}.", {"town": {town}}, dict(name=name))
        return Answer(f"{name} is a {job}.", f"A {job}.", {"job": {job}}, dict(name=name))
    if kind == "who":
        return Answer("I am Vicuna, a small language model that was trained from scratch.",
                      "A language model.", {"says": {"Vicuna"}})
    if kind == "loop":
        word, n = rng.choice(WORDS), rng.randint(2, 9)
        code = f'for i in range({n}): print("{word}")'
        return Answer(code, code, {"code": {code}}, dict(word=word, n=n))
    a, b = pick_pair(kind, rng, test)
    if kind == "bigger":
        big, small = ANIMALS[max(a, b)], ANIMALS[min(a, b)]
        return Answer(f"{cap(an(big))} is bigger than {an(small)}.", f"{cap(an(big))}.",
                      {"first": {big}}, dict(a=an(ANIMALS[a]), b=an(ANIMALS[b])))
    if kind == "legs":
        part, each = LEGS[a]
        return Answer(f"{b} {a}s have {b * each} {part}.", f"{b * each}.",
                      {"last": {str(b * each)}}, dict(n=b, part=part, things=a + "s"))
    return Answer(f"{a} + {b} = {a + b}.", f"{a + b}.", {"last": {str(a + b)}}, dict(a=a, b=b))


def ask_other(kind: str, rng: random.Random, test: bool = False, unseen: bool = False) -> Question:
    """A question without a scene; with `test` a held-out one ("who" and "loop" have none)."""
    a = answer_other(kind, rng, test)
    text = phrase(kind, rng, unseen, **a.words)
    return Question(kind, CATEGORY[kind], text, a.full, a.short, a.truth)


# -- documents ------------------------------------------------------------------------------------

def document(rng: random.Random, times_told: int = 3) -> str:
    """A paragraph of plain text for pre-training, without questions or roles. `times_told`: how
    often a scene is told."""
    style = rng.random()
    if style < 0.14:
        return " ".join(fact(name, rng) for name in rng.sample(PEOPLE, rng.randint(2, 5)))
    if style < 0.20:
        return animal_document(rng)
    if style < 0.26:
        return number_document(rng)
    if style < 0.28:
        return odd_document(rng)
    return scene_document(rng, times_told)


FACT_FORMS = (
    "{name} lives in {town}.", "{name} is a {job}.", "{name} is a {job} and lives in {town}.",
    "The {job} {name} has a house in {town}.", "In {town} you can meet {name}, who is a {job}.",
    "{name} works as a {job}.", "The home of {name} is {town}.", "{name} from {town} is a {job}.",
    "The job of {name}: {job}.", "{name} was born in {town} and still lives there.",
    "If you need a {job}, ask {name} in {town}.", "{name}, a {job}, likes {town}.")


def fact(name: str, rng: random.Random) -> str:
    town, job = FACTS[name]
    return rng.choice(FACT_FORMS).format(name=name, town=town, job=job)


def animal_document(rng: random.Random) -> str:
    lines = []
    for _ in range(4):
        ranks = pick_pair("bigger", rng, test=False)
        small, big = (an(ANIMALS[rank]) for rank in sorted(ranks))
        lines.append(rng.choice((
            f"{cap(big)} is bigger than {small}.", f"{cap(small)} is smaller than {big}.",
            f"{cap(big)} is larger than {small}.", f"Next to {big}, {small} is small.")))
    return " ".join(lines)


def number_document(rng: random.Random) -> str:
    lines = []
    while len(lines) < 5:
        a, b = rng.randint(0, 12), rng.randint(0, 12)  # for a sum
        what, n = rng.choice(sorted(LEGS)), rng.randint(2, 6)  # or for a product
        part, each = LEGS[what]
        if rng.random() < 0.7 and not held_out(a, b):
            lines.append(rng.choice((f"{a} + {b} = {a + b}.", f"{a} plus {b} is {a + b}.")))
        elif rng.random() < 0.3:
            lines.append(f"{cap(an(what))} has {each} {part}.")
        elif not held_out(what, n):
            lines.append(rng.choice((f"{n} {what}s have {n * each} {part}.",
                                     f"There are {n * each} {part} on {n} {what}s.")))
    return " ".join(lines)


def odd_document(rng: random.Random) -> str:
    """Someone is called by name, or one line of code."""
    name, word, n = rng.choice(USERS), rng.choice(WORDS), rng.randint(2, 9)
    return rng.choice((
        f"Someone came in and said: my name is {name}. Good day, {name}! So {name} sat down and "
        "drank tea with us.",
        f"I met {name} on the road. {name} was tired. Go home, {name}, I said.",
        f'To print {word} {n} times, write: for i in range({n}): print("{word}")'))


def scene_document(rng: random.Random, times_told: int = 3) -> str:
    """A scene told several times, then ten statements about it. Repetition makes more tokens
    predictable; the loss of unpredictable ones is noise that hides the signal for retrieval."""
    scene = pick_scene(rng, n=1 if rng.random() < 0.1 else 2)
    lines = [tell(tuple(rng.sample(scene, len(scene))), rng) for _ in range(times_told)]
    # Places are most frequent, since they are learned last: five statements in eleven.
    kinds = ("where", "color", "where", "size", "where", "at", "where", "color", "where", "shape",
             "at")
    turn = rng.randrange(len(kinds))
    while len(lines) < times_told + 10:
        kind, o = kinds[turn % len(kinds)], rng.choice(scene)
        turn += 1
        if kind == "at":
            lines.append(f"{cap(o.at)} is a {o.noun_first}.")
        elif q := ask_scene(kind, scene, rng, about=o):
            lines.append(q.full)
    if rng.random() < 0.5:
        last_kinds = ("count", "gone", "paint", "draw", "be", "story")
        while not (q := ask_scene(rng.choice(last_kinds), scene, rng)):
            pass
        lines.append(suppose(q) if q.kind in ("gone", "paint") else q.full)
    return " ".join(lines)


def suppose(q: Question) -> str:
    """A counterfactual in plain text: what the question supposes, then what follows."""
    change = "gone"
    if q.kind == "paint":
        (change,) = q.truth["color"]
    return f"Suppose the {q.ref} were {change}. {q.full}"


# -- instructions and conversations ---------------------------------------------------------------

def instruction(rng: random.Random, number: int = 0) -> dict:
    """An Alpaca record: a question, the scene as its input, a terse answer. Its id is the kind of
    question and a number."""
    if rng.random() < 0.3:
        q = ask_other(rng.choice(OTHER_KINDS), rng)
        return dict(id=f"{q.kind}_{number}", instruction=q.text, input="", output=q.short)
    scene = pick_scene(rng)
    while not (q := ask_scene(rng.choice(SCENE_KINDS), scene, rng)):
        pass
    told = tell(scene, rng)
    return dict(id=f"{q.kind}_{number}", instruction=q.text, input=told, output=q.short)


INTRODUCTIONS = ("Hello, my name is {}.", "I am {}.", "Hi! My name is {}.", "You can call me {}.",
                 "My name is {}, by the way.")
LOOK = ("{}", "{}", "{}", "Look at this: {}", "Here is a scene. {}", "Imagine this. {}",
        "Listen: {}")
NAMING = ("Let us call the {} a {}.", "From now on a {} is a {}.", "I call the {} a {}.",
          "The {} is a {} for us.")
FIRST = ("What did I say first?", "What was the first thing I said?", "Repeat my first message.")
IT = {"color": ("What color is it?", "And its color?", "Which color does it have?"),
      "where": ("Where is it?", "And where is it?", "In which place is it?"),
      "size": ("How big is it?", "And its size?", "Is it small or large?")}
# what a round may be about; repeated kinds are sampled more often
ROUND_KINDS = SCENE_KINDS * 2 + OTHER_KINDS + (
    "at", "where", "who", "intro", "word", "word", "it", "it", "it", "name", "name", "first",
    "first", "describe", "describe", "gone", "at")


@dataclass
class Item:
    """A conversation up to a last question, and that question."""
    turns: list  # [role, text] pairs; the last one is the question
    question: Question
    split: str
    later: bool  # the answer depends on earlier turns
    told: str = ""  # the scene as it was told


@dataclass
class Dialogue:
    """A conversation while it is being made."""
    rng: random.Random
    split: str
    scene: Scene
    rounds: int
    turns: list = field(default_factory=list)
    told: str = ""  # the scene as it was told; "" until then
    name: str = ""  # the user's name
    word: tuple | None = None  # an object, and the word that the user has defined for it
    focus: Object | None = None  # the object that "it" means
    detour: int = 0  # rounds about something else that are still to come

    def is_last(self) -> bool:
        return len(self.turns) == 2 * (self.rounds - 1)

    def pick_kind(self) -> str:
        if not self.detour:
            return self.rng.choice(ROUND_KINDS)
        if not self.told:
            return self.rng.choice(SCENE_KINDS)
        self.detour -= 1
        return self.rng.choice(OTHER_KINDS)

    def add_round(self, asked: str, reply: str) -> None:
        self.turns += [["user", asked], ["assistant", reply]]

    def introduce(self) -> None:
        self.name = self.rng.choice(NEW_USERS if self.split == "names" else USERS)
        asked = self.rng.choice(INTRODUCTIONS).format(self.name)
        self.add_round(asked, f"Hello {self.name}, nice to meet you!")

    def ask(self, kind: str) -> Question | None:
        """A question of this kind, or None if it cannot be asked now. "intro", and "word" the first
        time, are statements: they add their round and return None."""
        last, unseen = self.is_last(), self.split == "phrasings"
        if kind == "intro" and not self.name and not last:
            self.introduce()
            return None
        if kind == "name" and self.name:
            text = phrase("name", self.rng, unseen)
            return Question("name", "memory", text, f"Your name is {self.name}.", self.name,
                            {"says": {self.name}})
        if kind == "first" and 0 < len(self.turns) < 8 and len(self.turns[0][1]) < 60:
            first = self.turns[0][1]
            return Question("first", "memory", self.rng.choice(FIRST), f"You said: {first}", first,
                            {"says": {first}})
        if kind == "word" and self.told:
            return self.ask_word()
        if kind == "it" and self.focus:
            return self.ask_about(self.focus)
        if kind in ("who", *OTHER_KINDS):
            return ask_other(kind, self.rng, unseen=unseen and last)
        if kind in SCENE_KINDS:
            target = held_pair(self.scene) if last else None  # None unless the split is "pairs"
            return ask_scene(kind, self.scene, self.rng, unseen and last, target)
        return None

    def ask_word(self) -> Question | None:
        """Defines a new word, or asks about the one that was defined."""
        o = held_pair(self.scene) or self.rng.choice(self.scene)
        if self.word:
            return self.ask_about(*self.word)
        ref = refer(o, self.scene)
        if ref and not self.is_last():
            word = self.rng.choice(NEW_NONSENSE if self.split == "names" else NONSENSE)
            self.word = o, word
            asked = self.rng.choice(NAMING).format(ref, word)
            self.add_round(asked, f"Good, the {ref} is a {word}.")
        return None

    def ask_about(self, o: Object, word: str = "") -> Question:
        """About the color, place or size of an object that the user calls `word`, or "it"."""
        kind = self.rng.choice(("color", "where", "size"))
        attribute = "place" if kind == "where" else kind
        value = getattr(o, attribute)
        said = o.at if kind == "where" else value
        truth = {attribute: {value}}
        if not word:
            return Question("it", "memory", self.rng.choice(IT[kind]), f"It is {said}.", said,
                            truth, needs_scene=True)
        text = phrase(kind, self.rng, self.split == "phrasings", ref=word)
        return Question("word", "memory", text, f"The {word} is {said}.", said, truth,
                        needs_scene=True)

    def tell_scene(self) -> str:
        """The scene in words or bare symbols, with an introduction."""
        if self.rng.random() < 0.2:
            self.told = tell_symbols(self.scene, self.rng)
        else:
            self.told = tell(self.scene, self.rng)
        return self.rng.choice(LOOK).format(self.told) + " "

    def move_focus(self, q: Question) -> None:
        """"It" is the one object that the last answer was about, if there is one."""
        if q.kind == "it":
            return
        self.focus = None
        if q.kind in ("color", "where", "size", "at", "shape") and "yesno" not in q.truth:
            text = conclusion(q.full) + q.text
            named = [o for o in self.scene
                     if all(w in text for w in (refer(o, self.scene) or "?").split())]
            if len(named) == 1:
                self.focus = named[0]


MAX_DETOUR = 14  # with up to four other rounds, a conversation has about 510 tokens


def converse(rng: random.Random, split: str = "train", rounds: int | None = None,
             detour: int = 0, short: bool = False) -> Item:
    """A conversation of `rounds` rounds (2 to 5 if None) with full answers (or terse ones, if
    `short`), up to its last question. With a detour, the first round tells the scene, and as many
    more rounds follow it that are about something else."""
    scene = pick_scene(rng, split if split in ("scenes", "pairs", "more") else "train")
    d = Dialogue(rng, split, scene, (rounds or rng.randint(2, 5)) + detour, detour=detour)
    while True:
        kind = d.pick_kind()
        q = d.ask(kind)
        if q is None:
            continue
        later = q.category == "memory" or bool(q.needs_scene and d.told)
        lead = d.tell_scene() if kind in SCENE_KINDS and not d.told else ""
        asked = lead + q.text
        if d.is_last():
            return Item([*d.turns, ["user", asked]], q, split, later, d.told)
        d.move_focus(q)
        d.add_round(asked, q.short if short else q.full)


def conversation(rng: random.Random, single_turn: bool = False, short: bool = False) -> dict:
    """A ShareGPT record: a few rounds with full answers. One in five makes a long detour after the
    scene is told. In one in four, the user sends symbols without a question and gets alt-text back,
    as in the first stage of MiniGPT-4's training. toy/claims.py asks for single-turn
    conversations, or for short answers."""
    style = rng.random()
    if style < 0.25:
        scene = pick_scene(rng)
        reply = alt_text(scene, rng).lower()
        turns = [["user", tell_symbols(scene, rng)], ["assistant", reply]]
    else:
        rounds, detour = None, 0
        if single_turn:
            rounds = 1
        elif style < 0.45:
            rounds, detour = rng.randint(2, 4), rng.randint(1, MAX_DETOUR)
        item = converse(rng, rounds=rounds, detour=detour, short=short)
        answer = item.question.short if short else item.question.full
        turns = [*item.turns, ["assistant", answer]]
    speaker = dict(user="human", assistant="gpt")
    return dict(conversations=[{"from": speaker[role], "value": text} for role, text in turns])


# -- the oracle -----------------------------------------------------------------------------------

_SIZE, _COLOR, _SHAPE, _PLACE = ("|".join(words) for words in (SIZES, COLORS, SHAPES, PLACES))
_OBJECT = re.compile(rf"({_SIZE}) ({_COLOR}) ({_SHAPE}),? at ({_PLACE})")
_NOUN_FIRST = re.compile(rf"({_SHAPE}), ({_SIZE}) and ({_COLOR}), at ({_PLACE})")


def objects_in(text: str) -> set[Object]:
    """The objects that a lower-case text describes completely."""
    text = _NOUN_FIRST.sub(r"\2 \3 \1 at \4", text)
    return {Object(*words) for words in _OBJECT.findall(text)}


def found(what: str, answer: str, truth=frozenset()) -> set:
    """What an answer says about one field, for example the set of colors it names."""
    text = " ".join(answer.lower().split())
    if what in VALUES:
        return {w for w in VALUES[what] if re.search(rf"\b{w.lower()}\b", text)}
    if what == "number":
        return {str(i) for i, w in enumerate(NUMBERS) if re.search(rf"\b({w}|{i})\b", text)}
    if what == "yesno":
        forms = {"no": r"\b(no|none|nothing|not)\b", "yes": r"\byes\b"}
        return {word for word, form in forms.items() if re.search(form, text)}
    if what == "objects":
        return objects_in(text)
    if what == "code":
        return set(re.findall(r'draw\("[^"]*"\)|for i in range\(\d+\): print\("[^"]*"\)', text))
    if what == "first":  # the animal that is named first
        return set(re.findall(rf"\b({'|'.join(ANIMALS)})\b", text)[:1])
    if what == "last":  # the last number
        return set(re.findall(r"\d+", text)[-1:])
    if what == "sentences":
        return truth if len(re.findall(r"[.!?](?: |$)", text)) >= truth else set()
    return {s for s in truth if s.lower() in text}  # "says"


def conclusion(answer: str) -> str:
    """What follows the reasons: "so yes." of "The red ring is at left, so yes."."""
    return answer.rpartition(", so ")[2]


def grade(question: Question, answer: str) -> float:
    """The fraction of the expected fields that an answer gets exactly right. Naming a wrong value,
    too, makes a field wrong. Only the conclusion counts, not the reasons before it."""
    answer = conclusion(answer)
    right = [found(what, answer, truth) == truth for what, truth in question.truth.items()]
    return sum(right) / len(right)


def repair_caption(text: str) -> str:
    """A rule-based text-only teacher: keeps the objects that are described completely, one per
    place, in one sentence. "INCOMPLETE" if there is none."""
    pattern = rf"\b({_SIZE}) ({_COLOR}) ({_SHAPE})\W* (?:at )?({_PLACE})\b"
    by_place: dict = {}
    for words in re.findall(pattern, " ".join(text.lower().split())):
        o = Object(*words)
        by_place.setdefault(o.place, o)
    if not by_place:
        return "INCOMPLETE"
    return f"There is {caption(tuple(by_place.values()))}."


# -- held-out questions ---------------------------------------------------------------------------

def minimal_pair(rng: random.Random) -> list[Item]:
    """The same question about the same scene, told in the same words, before and after one color or
    size is edited."""
    while True:
        kind, scene = rng.choice(("color", "size")), pick_scene(rng, "scenes", 2)
        o = rng.choice(scene)
        other = rng.choice([value for value in VALUES[kind] if value != getattr(o, kind)])
        edited = o._replace(**{kind: other})
        style, form = rng.random(), rng.random()
        items = []
        for s, about in ((scene, o), (replace_object(scene, o, edited), edited)):
            told = tell(s, random.Random(style))
            q = ask_scene(kind, s, random.Random(form), about=about)
            if q and split_of(s) == "scenes":
                items.append(Item([["user", f"{told} {q.text}"]], q, "minimal", False, told))
        if len(items) == 2 and items[0].question.text == items[1].question.text:
            return items


def belongs(item: Item, split: str) -> bool:
    """Does the last question test what the split is about?"""
    if split == "later":
        return item.later
    if split == "names":
        return item.question.kind in ("name", "word")
    if split == "more":
        return item.question.needs_scene
    return item.question.kind in SCENE_KINDS


def test_set(split: str, n: int, seed: int = 1) -> list[Item]:
    """n questions of a held-out split, each at the end of a conversation; the same for a seed."""
    rng = random.Random(f"{split} {seed}")
    items = []
    while len(items) < n:
        if split == "minimal":
            items += minimal_pair(rng)
        elif split in ("facts", "closed"):
            kinds = ("town", "job") if split == "facts" else ("bigger", "legs", "sum", "loop")
            q = ask_other(rng.choice(kinds), rng, test=True)
            items.append(Item([["user", q.text]], q, split, False))
        else:
            many, few, usual = rng.randint(6, 8), rng.randint(2, 4), rng.choice((1, 1, 2, 3, 4))
            rounds = {"more": many, "later": few}.get(split, usual)
            item = converse(rng, "scenes" if split == "later" else split, rounds)
            if belongs(item, split):
                items.append(item)
    return items[:n]  # minimal pairs come in twos


# -- files in the public formats ------------------------------------------------------------------

def write_files(folder: Path, sizes: dict, seed: int) -> dict[str, Path]:
    """Writes documents (JSON lines), instructions (Alpaca) and conversations (ShareGPT). Returns
    their paths as base, alpaca, vicuna."""
    rng = random.Random(seed)
    documents = [json.dumps(dict(text=document(rng))) for _ in range(sizes["documents"])]
    instructions = [instruction(rng, i) for i in range(sizes["instructions"])]
    numbers = range(sizes["conversations"])
    conversations = [dict(id=f"toy_{i}", **conversation(rng)) for i in numbers]
    files = dict(base=folder / "pretrain.jsonl", alpaca=folder / "alpaca.json",
                 vicuna=folder / "sharegpt.json")
    folder.mkdir(parents=True, exist_ok=True)
    files["base"].write_text("\n".join(documents) + "\n", encoding="utf-8")
    files["alpaca"].write_text(json.dumps(instructions, indent=0), encoding="utf-8")
    files["vicuna"].write_text(json.dumps(conversations, indent=0), encoding="utf-8")
    return files


def write_facts(path) -> int:
    """Writes where each of the people lives, as multiple choice for tools/evaluate.py. A model that
    no longer answers the question may still find the true town the most likely. Returns how many.
    """
    lines = []
    for name in PEOPLE:
        town, _ = FACTS[name]
        group = "asked" if name in ASKED else "unasked"
        record = dict(question=f"{name} lives in", choices=TOWNS, answer=town, group=group)
        lines.append(json.dumps(record) + "\n")
    with data.atomic_write(path) as file:
        file.write("".join(lines))
    return len(lines)


# -- python -m toy.world --------------------------------------------------------------------------

Split = Literal["train", "scenes", "pairs", "later", "facts", "closed", "phrasings", "names",
                "more", "minimal"]


@dataclass
class WorldConfig:
    split: Split = "train"  # questions of a test split; train: samples of the training text
    count: int = 5  # samples of each kind, or questions
    seed: int = 1  # which ones; the exam's questions have seed 1
    facts: str = ""  # write this file for tools/evaluate.py instead: where the people live

    def __post_init__(self):
        if self.facts:
            refuse_unused(self, ("split", "count", "seed"), "--facts writes all facts")


def main(cfg: WorldConfig) -> dict:
    if cfg.facts:
        n = write_facts(cfg.facts)
        print(f"{cfg.facts}: where {n} people live. Next: python -m tools.evaluate {cfg.facts}")
        return dict(facts=n)
    rng = random.Random(cfg.seed)
    if cfg.split == "train":
        for make in (document, instruction, conversation):
            print(f"\n--- {make.__name__}s")
            for _ in range(cfg.count):
                print(make(rng))
        return {}
    for item in test_set(cfg.split, cfg.count, cfg.seed):
        print()
        for role, text in item.turns:
            print(f"{role.upper()}: {text}")
        print(f"  true: {item.question.full}   looked for: {item.question.truth}")
    return {}


if __name__ == "__main__":
    run(main, WorldConfig)
