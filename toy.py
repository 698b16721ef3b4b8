"""The toy world: a small complete universe whose every true answer is known.

    python toy.py                 # look at it: a page of each kind of text, questions with their answers
    python toy.py --split=pairs   # questions of one held-out split
    python toy.py --album=out/album --count=20   # pictures of scenes, with captions

Scenes of coloured shapes, a hundred people with facts, sizes of animals, sums, code, stories. Three kinds of text
come from it: plain text (pre-training), single-turn instructions with terse answers (as Alpaca's), and
conversations with full answers (as ShareGPT's). What the splits hold out was never in any of them:
  scenes    combinations of objects                      pairs     a colour on a shape ("pink cross")
  phrasings ways to ask                                  names     names of people, words defined in the chat
  more      three objects, more turns than trained       minimal   the same scene twice, one attribute edited
Facts about people stand in plain text for everybody; questions are trained for half of them, tested for the others.
The oracle, `grade`, reads an answer and says how much of the truth is in it.
"""

import json
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Optional, Sequence

import numpy as np
from PIL import Image

from config import run

SIZES = ("small", "large")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "white", "brown", "cyan")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "moon")
PLACES = ("top", "left", "center", "right", "bottom")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
HELD_PAIRS = {(color, SHAPES[(3 * i + 1) % 8]) for i, color in enumerate(COLORS)}  # 10 of the 80

SYLLABLES = ("ba be bi da do fa fe ga go ha ja jo ka ki la le li ma mi mo na ni no pa pe ra re ri ro sa se so ta ti "
             "to va vi wa ya zo").split()
TOWNS = ("Paris", "Oslo", "Cairo", "Lima", "Delhi", "Seoul", "Quito", "Dakar")
JOBS = ("baker", "doctor", "farmer", "singer", "teacher", "pilot", "painter", "cook")
ANIMALS = ("ant", "bee", "mouse", "frog", "rabbit", "cat", "fox", "dog", "sheep", "lion", "horse", "bear", "elephant",
           "whale")  # from the smallest to the largest
LEGS = {"spider": ("legs", 8), "ant": ("legs", 6), "bee": ("legs", 6), "dog": ("legs", 4), "horse": ("legs", 4),
        "cat": ("legs", 4), "bird": ("legs", 2), "car": ("wheels", 4), "bike": ("wheels", 2), "cart": ("wheels", 2),
        "hand": ("fingers", 5), "week": ("days", 7), "table": ("legs", 4), "stool": ("legs", 3)}
WORDS = ("hello", "yes", "cat", "sun", "moon", "red", "tree", "fish", "go", "stop", "tea", "rain")


class Object(NamedTuple):
    size: str
    color: str
    shape: str
    place: str


Scene = tuple  # of Objects, in the order in which they are told


def make_names(n: int, skip: int = 0) -> list[str]:
    names = [(a + b).capitalize() + c for a in SYLLABLES for b in SYLLABLES for c in ("", "n", "l") if a != b]
    random.Random(7).shuffle(names)
    return names[skip:skip + n]


PEOPLE = make_names(100)  # each has a town and a job: 200 facts
FACTS = {name: (random.Random(name).choice(TOWNS), random.Random(name + "'s job").choice(JOBS)) for name in PEOPLE}
ASKED, UNASKED = PEOPLE[:50], PEOPLE[50:]  # fine-tuning asks about the first half only
USERS, NEW_USERS = make_names(150, skip=100), make_names(60, skip=250)  # people who say "my name is ..."
NONSENSE = ("wug", "blick", "dax", "toma", "fep", "zup", "gorp", "lum", "nim", "pilk", "quib", "rop")
NEW_NONSENSE = ("snark", "vex", "tuz", "glim", "yop", "frim")


def pick_scene(rng: random.Random, split: str = "train", n: Optional[int] = None) -> Scene:
    """A scene that belongs to the split: "train", "scenes", "pairs" (holds a held-out pair), or "more" (3 objects)."""
    assert n is None or (n > 2) == (split == "more"), "one or two objects; three in the split \"more\""
    while True:
        count = n or (3 if split == "more" else rng.choice((1, 2, 2, 2)))
        places = rng.sample(range(len(PLACES)), count)
        scene = tuple(Object(rng.choice(SIZES), rng.choice(COLORS), rng.choice(SHAPES), PLACES[p]) for p in places)
        if split == "pairs" and not any((o.color, o.shape) in HELD_PAIRS for o in scene):
            o = rng.choice(scene)
            color, shape = rng.choice(sorted(HELD_PAIRS))
            scene = tuple(x._replace(color=color, shape=shape) if x is o else x for x in scene)
        if where_belongs(scene) == split:
            return scene


def where_belongs(scene: Scene) -> str:
    if any((o.color, o.shape) in HELD_PAIRS for o in scene):
        return "pairs"
    if len(scene) > 2:
        return "more"
    return "scenes" if zlib.crc32(repr(sorted(scene)).encode()) % 5 == 0 else "train"  # in whatever order it is told


# -- scenes in words -----------------------------------------------------------------------------------------

def at(place: str) -> str:
    return "at " + place  # as newspapers write under photos; the fewer words between a thing and its place, the better


def thing(o: Object) -> str:
    return f"{o.size} {o.color} {o.shape}"


def noun_first(o: Object) -> str:
    """What is asked for comes after what it is asked of: a small model looks up a color by the shape it has just said."""
    return f"{o.shape}, {o.size} and {o.color}"


def join(parts: list[str], word: str = "and") -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" {word} " + parts[-1]


def caption(scene: Scene) -> str:
    return join([f"a {thing(o)} {at(o.place)}" for o in scene])


def cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def an(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


STATEMENTS = (  # how one object may be put; a scene uses one form throughout, or mixes them
    lambda o: f"There is a {thing(o)} {at(o.place)}.",
    lambda o: f"{cap(at(o.place))} there is a {thing(o)}.",
    lambda o: f"A {thing(o)} is {at(o.place)}.",
    lambda o: f"{cap(at(o.place))} you see a {thing(o)}.",
    lambda o: f"The {o.shape} {at(o.place)} is {o.size} and {o.color}.",
    lambda o: f"{cap(o.place)}: {thing(o)}.",
    lambda o: f"{cap(thing(o))}, {o.place}.",
)


def symbols(scene: Scene, rng: random.Random) -> str:
    """Words without grammar, in any order but the same for all objects."""
    order = rng.sample(range(4), 4)
    return " ".join(" ".join(o[k] for k in order) + " ;" for o in scene)


def tell(scene: Scene, rng: random.Random) -> str:
    """The scene in words: one of many phrasings."""
    style = rng.random()
    if style < 0.65:
        opening = rng.choice(("There is ", "I see ", "The picture shows ", "We have ", "In the scene there is "))
        return opening + join([f"a {thing(o)} {at(o.place)}" for o in scene]) + "."
    if style < 0.8:
        return f"<Img>{symbols(scene, rng)}</Img>"
    form = rng.choice(STATEMENTS)
    return " ".join((form if style < 0.9 else rng.choice(STATEMENTS))(o) for o in scene)


def refer(o: Object, scene: Scene) -> Optional[str]:
    """The shortest unique name of an object: "circle", "red circle" or "small red circle"."""
    same = [x for x in scene if x.shape == o.shape]
    if len(same) == 1:
        return o.shape
    if sum(x.color == o.color for x in same) == 1:
        return f"{o.color} {o.shape}"
    return thing(o) if sum(x.size == o.size and x.color == o.color for x in same) == 1 else None


# -- scenes in pictures --------------------------------------------------------------------------------------

RGB = {"red": (215, 40, 40), "green": (45, 150, 60), "blue": (50, 80, 220), "yellow": (245, 220, 50),
       "purple": (130, 45, 175), "orange": (245, 135, 25), "pink": (250, 160, 195), "white": (245, 245, 245),
       "brown": (140, 85, 40), "cyan": (70, 210, 220)}
CENTERS = {"top": (0.5, 0.17), "left": (0.17, 0.5), "center": (0.5, 0.5), "right": (0.83, 0.5),
           "bottom": (0.5, 0.83)}  # x, y as shares of the side
RADIUS = {"small": 0.12, "large": 0.165}
STAR = np.array([[np.sin(2 * np.pi * k / 5), -np.cos(2 * np.pi * k / 5)] for k in range(5)])  # where its tips point


def outside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far a point lies outside a shape of radius 1 around the origin; negative inside. y points down."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.95
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85
    if shape == "triangle":
        return np.maximum(y, 0.87 * abs(x) - 0.5 * y) - 0.55
    if shape == "diamond":
        return 0.8 * abs(x) + 0.6 * abs(y) - 0.64
    if shape == "star":  # inside all of five half-planes but one at most
        return np.partition(np.tensordot(-STAR, np.stack((x, y)), 1), 3, axis=0)[3] - 0.36
    if shape == "cross":
        return np.maximum(np.minimum(abs(x), abs(y)) - 0.3, np.maximum(abs(x), abs(y)) - 0.95)
    if shape == "ring":
        return abs(r - 0.75) - 0.22
    return np.maximum(r - 1, 0.8 - np.hypot(x - 0.55, y))  # moon


def draw(scene: Scene, rng: random.Random, size: int = 48) -> np.ndarray:
    """The scene as a picture, uint8 (size, size, 3), each time on another ground, a little moved, turned, noisy."""
    dice = np.random.default_rng(rng.getrandbits(64))
    at = np.arange(size, dtype=np.float32) + 0.5  # middles of the pixels
    tint, slope = dice.uniform(15, 75) + dice.uniform(-12, 12, 3), dice.uniform(-25, 25, 2)
    shade = slope[0] * (at / size - 0.5) + slope[1] * (at[:, None] / size - 0.5)
    picture = (shade[..., None] + tint).astype(np.float32)  # (size, size, 3)
    for o in scene:
        radius = size * RADIUS[o.size] * dice.uniform(0.93, 1.07)
        middle = size * (np.array(CENTERS[o.place]) + dice.uniform(-0.025, 0.025, 2))
        columns, rows = (slice(max(0, int(m - 1.4 * radius)), int(m + 1.4 * radius) + 2) for m in middle)
        x, y = (at[columns] - middle[0]) / radius, (at[rows, None] - middle[1]) / radius
        turn = dice.uniform(-0.15, 0.15)
        edge = outside(o.shape, np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x)
        cover = np.clip(0.5 - edge * radius, 0, 1)[..., None]  # of each pixel, so that edges are smooth
        color = RGB[o.color] + dice.uniform(-12, 12, 3)
        picture[rows, columns] += cover * (color - picture[rows, columns])
    picture = picture * dice.uniform(0.92, 1.05) + 4 * dice.standard_normal(picture.shape, np.float32)
    return picture.clip(0, 255).round().astype(np.uint8)


def alt_text(scene: Scene, rng: random.Random, noise: float = 0.1) -> str:
    """What stands beside pictures on web pages: short, without a full stop; with `noise`, as often incomplete, wrong,
    or cut off."""
    things = []
    for o in rng.sample(scene, len(scene)):
        if things and rng.random() < noise:  # not everything is mentioned
            continue
        if rng.random() < noise:  # an error, but never a held-out pair
            kind = rng.choice(("size", "color", "shape", "place"))
            wrong = o._replace(**{kind: rng.choice(dict(size=SIZES, color=COLORS, shape=SHAPES, place=PLACES)[kind])})
            o = o if (wrong.color, wrong.shape) in HELD_PAIRS else wrong
        words = [o.size] * (rng.random() >= noise) + [o.color] * (rng.random() >= noise) + [o.shape]
        things.append(" ".join([an(words[0]), *words[1:]] + [at(o.place)] * (rng.random() >= noise)))
    text = rng.choice(("{}", "{}", "there is {}", "I see {}", "the picture shows {}", "photo of {}")).format(join(things))
    return text[:rng.randint(len(text) // 2, len(text))] if rng.random() < noise / 2 else text


_LOOSE = re.compile(rf"\b({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\W* (?:at )?"
                    rf"({'|'.join(PLACES)})\b")


def mend(text: str) -> str:
    """What a repairer makes of a description without seeing the picture: objects that are told completely, each once,
    in one good sentence; what breaks off or says nothing is left out. "INCOMPLETE" when nothing remains."""
    objects: dict = {}
    for words in _LOOSE.findall(" ".join(text.lower().split())):
        objects.setdefault(words[3], Object(*words))
    return f"There is {caption(tuple(objects.values()))}." if objects else "INCOMPLETE"


def write_album(folder, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    """Pictures with captions in MiniGPT-4's layout: image/ID.png, and filter_cap.json with an annotation for each."""
    folder = Path(folder)
    (folder / "image").mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / "image" / f"{i}.png")
    annotations = [dict(image_id=str(i), caption=text) for i, text in enumerate(captions)]
    (folder / "filter_cap.json").write_text(json.dumps(dict(annotations=annotations), indent=0))


# -- questions -----------------------------------------------------------------------------------------------

@dataclass
class Question:
    kind: str
    category: str  # one of judge.CATEGORIES, or "identity", "memory"
    text: str
    full: str  # the answer in a sentence, as in conversations
    short: str  # the terse one, as in single-turn instructions
    truth: dict  # what `grade` looks for: {"color": {"red"}, ...}
    needs_scene: bool = False
    open: bool = False  # no single right wording: scored by constraints


# MiniGPT-4's instructions of stage 2 and its curation's request, as published: weights depend on them.
INSTRUCTIONS = ("Describe this image in detail.", "Take a look at this image and describe what you notice.",
                "Please provide a detailed description of the picture.",
                "Could you describe the contents of this image for me?")
REQUEST = "Describe this image in detail. Give as many details as possible. Say everything you see."

# Ways to ask; the last two of each are held out of training ("phrasings").
ASK = {
    "color": ("What color is the {ref}?", "Which color does the {ref} have?", "Tell me the color of the {ref}.",
              "What is the color of the {ref}?", "The {ref}: what color?", "Name the color of the {ref}.",
              "I forgot the color of the {ref}. What is it?", "The {ref} is of what color?",
              "In what color is the {ref} painted?", "Say which color the {ref} is."),
    "shape": ("What shape is the {color} thing?", "Which shape is {color}?", "Tell me the shape of the {color} object.",
              "The {color} one: what shape is it?", "What is the {color} thing?", "Name the {color} shape.",
              "There is something {color}. What is it?", "What kind of shape is {color}?",
              "What form does the {color} thing have?", "Say what the {color} thing is."),
    "size": ("How big is the {ref}?", "What size is the {ref}?", "Tell me the size of the {ref}.",
             "Is the {ref} small or large?", "What is the size of the {ref}?", "Which size does the {ref} have?",
             "The {ref}: small or large?", "Name the size of the {ref}.",
             "Would you call the {ref} large or small?", "Say how big the {ref} is."),
    "where": ("Where is the {ref}?", "In which place is the {ref}?", "Tell me where the {ref} is.",
              "Where can I find the {ref}?", "What is the place of the {ref}?", "The {ref}: where?",
              "I am looking for the {ref}. Where is it?", "Where do you see the {ref}?",
              "What place does the {ref} sit in?", "Say where the {ref} is."),
    "at": ("What is {at}?", "Tell me what is {at}.", "What do you see {at}?", "{At}, what is there?",
           "Which object is {at}?", "Name the thing {at}.", "What can be found {at}?", "Is there something {at}?",
           "What sits {at}?", "Say what is {at}."),
    "count": ("How many things are there?", "Count the objects.", "How many objects do you see?",
              "What is the number of things?", "Tell me how many things there are.", "How many shapes are in it?",
              "Count everything you see.", "Give me the number of objects.",
              "What do you get if you count the things?", "Say how many things there are."),
    "exists": ("Is there {color} {shape}?", "Do you see {color} {shape}?", "Can you find {color} {shape}?",
               "Tell me if there is {color} {shape}.", "Is {color} {shape} in the scene?",
               "{Color} {shape}: is it there?", "Does it have {color} {shape}?", "Look for {color} {shape}.",
               "Could there be {color} {shape}?", "Say if there is {color} {shape}."),
    "describe": ("Describe the scene.", "What do you see?", "Tell me everything you see.", "Describe the picture.",
                 "What is in the scene?", "List all the objects.", "Give me a description of it all.",
                 "Which things are there, and where?", *INSTRUCTIONS, REQUEST,
                 "Say it all again in your own words.", "Go through everything that is there."),
    "gone": ("If the {ref} were gone, what would remain?", "Take away the {ref}. What remains?",
             "What would remain without the {ref}?", "Imagine the {ref} is gone. What is still there?",
             "Suppose someone takes the {ref}. What remains?", "If I remove the {ref}, what do I still see?",
             "What remains if the {ref} goes away?", "Without the {ref}, what is there?",
             "The {ref} disappears. What stays?", "Say what is still there if the {ref} is taken away."),
    "paint": ("If the {ref} were {new}, what would be {at}?", "Imagine the {ref} is {new}. What is {at}?",
              "Suppose the {ref} turns {new}. What is {at}?", "Paint the {ref} {new}. What is {at} now?",
              "What would be {at} if the {ref} were {new}?", "I paint the {ref} {new}. What do I see {at}?",
              "Make the {ref} {new}. What is {at} then?", "What if the {ref} were {new}: what is {at}?",
              "Think of the {ref} as {new}. What sits {at}?", "Say what is {at} once the {ref} is {new}."),
    "draw": ("Write code that draws the scene.", "Draw the scene in code.", "Turn the scene into code.",
             "Give me a program that draws this.", "Write a program for this picture.", "Show the scene as code.",
             "Which code draws these things?", "Code for the scene, please.",
             "Put the scene into a program.", "Say it in code."),
    "be": ("Pretend you are the {ref}. Who are you?", "Speak as the {ref}.", "You are the {ref} now. Introduce yourself.",
           "Play the {ref} and introduce yourself.", "Act as the {ref}.", "Imagine you are the {ref}. Say hello.",
           "Be the {ref} for a moment.", "What would the {ref} say about itself?",
           "Step into the role of the {ref}.", "Say hello as if you were the {ref}."),
    "story": ("Write a short story about the {ref}.", "Tell me a story about the {ref}.", "Invent a tale of the {ref}.",
              "Can you write a story with the {ref}?", "A story about the {ref}, please.",
              "Make up a story about the {ref}.", "Write something nice about the {ref}.",
              "I want to hear a story about the {ref}.",
              "Let the {ref} be the hero of a tale.", "Say something long about the {ref}."),
    "town": ("Where does {name} live?", "In which town does {name} live?", "Tell me where {name} lives.",
             "What is the home of {name}?", "Which town is {name} from?", "Do you know where {name} lives?",
             "{name} lives in which town?", "Where is {name} from?",
             "What town is home to {name}?", "Say where {name} lives."),
    "job": ("What is the job of {name}?", "What does {name} do?", "Tell me the job of {name}.", "Which job does {name} have?",
            "What work does {name} do?", "Do you know the job of {name}?", "{name} works as what?",
            "How does {name} earn money?",
            "What is {name} by trade?", "Say what {name} does for a living."),
    "bigger": ("Which is bigger, {a} or {b}?", "Is {a} bigger than {b}?", "What is larger, {a} or {b}?",
               "{A} or {b}: which is bigger?", "Tell me which is bigger: {a} or {b}.",
               "Between {a} and {b}, which is bigger?", "Who is larger, {a} or {b}?",
               "Compare {a} and {b}.",
               "Which one is the bigger animal, {a} or {b}?", "Say which is larger: {a} or {b}."),
    "legs": ("How many {part} do {n} {things} have?", "About how many {part} are on {n} {things}?",
             "Count the {part} of {n} {things}.", "{n} {things}: how many {part} in all?",
             "Guess the number of {part} of {n} {things}.", "What is the number of {part} of {n} {things}?",
             "I have {n} {things}. How many {part} is that?", "Roughly, how many {part} do {n} {things} have?",
             "Estimate the {part} of {n} {things}.", "Say how many {part} {n} {things} have together."),
    "sum": ("What is {a} + {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "How much is {a} + {b}?", "What is {a} plus {b}?",
            "Calculate {a} + {b}.", "Tell me {a} plus {b}.", "What do {a} and {b} make?",
            "Find the sum of {a} and {b}.", "Say what {a} + {b} is."),
    "loop": ("Write code that prints {word} {n} times.", "Print {word} {n} times in code.",
             "Give me a program that says {word} {n} times.", "How do I print {word} {n} times?",
             "Code that prints {word} {n} times, please.", "Write a loop that prints {word} {n} times.",
             "I need {word} printed {n} times. Write the code.", "Show me code to print {word} {n} times.",
             "Let the machine print {word} {n} times.", "Say {word} {n} times in code."),
    "who": ("Who are you?", "What is your name?", "Tell me about yourself.", "Are you a person?", "What are you?",
            "Who am I talking to?", "Who made you?", "Please introduce yourself.",
            "Do you have a name?", "Say who you are."),
    "name": ("What is my name?", "Do you remember my name?", "Who am I?", "Tell me my name.", "What am I called?",
             "Say my name.", "What did I say my name was?", "Can you recall my name?",
             "Which name did I give you?", "Say how I am called."),
}
SCENE_KINDS = ("color", "shape", "size", "where", "at", "count", "exists", "describe", "gone", "paint", "draw", "be",
               "story")
CATEGORY = dict(town="knowledge", job="knowledge", be="roleplay", bigger="common-sense", legs="fermi",
                gone="counterfactual", paint="counterfactual", draw="coding", loop="coding", sum="math", story="writing",
                who="identity", name="memory", it="memory", word="memory", first="memory")
WRAPPERS = ("{}", "{}", "{}", "{}", "{}", "Please: {}", "Hi! {}", "One question. {}", "{} Thanks!", "Now, {}", "Hm, {}")


def phrase(kind: str, rng: random.Random, unseen: bool = False, /, **words) -> str:
    """A question of the kind in one of its forms, sometimes wrapped, in lower case, or with a typo."""
    forms = ASK[kind]
    text = rng.choice(forms[-2:] if unseen else forms[:-2]).format(**words)
    wrapper = rng.choice(WRAPPERS)
    if wrapper in ("Now, {}", "Hm, {}") and not text[0].isdigit() and not text.split()[0] in PEOPLE:
        text = text[0].lower() + text[1:]
    text = wrapper.format(text)
    if rng.random() < 0.1:
        text = text.lower().rstrip("?.") if kind not in ("town", "job") else text.rstrip("?.")
    if rng.random() < 0.05 and kind not in ("town", "job", "sum", "legs", "loop"):  # a typo in a word that carries nothing
        words_ = text.split(" ")
        spots = [i for i, w in enumerate(words_) if w.lower() in ("what", "which", "there", "tell", "describe", "write")]
        if spots:
            w = words_[spots[0]]
            i = rng.randrange(1, len(w) - 1)
            words_[spots[0]] = w[:i] + w[i + 1] + w[i] + w[i + 2:]
            text = " ".join(words_)
    return text


def ask_scene(kind: str, scene: Scene, rng: random.Random, new: bool = False, about: Optional[Object] = None):
    """A question of the kind about the scene, or None when it has no single answer there."""
    o = about or rng.choice(scene)
    ref = refer(o, scene)
    q = lambda full, short, truth, open=False, **words: Question(
        kind, CATEGORY.get(kind, "generic"), phrase(kind, rng, new, **words), full, short, truth, True, open)
    if kind in ("color", "size", "where", "gone", "paint", "be", "story") and ref is None:
        return None
    if kind in ("color", "size", "where") and about is None and rng.random() < 0.12:  # something that is not there
        absent = rng.choice([s for s in SHAPES if s not in {x.shape for x in scene}])
        return q(f"The {absent} is not there.", "None.", {"yesno": {"no"}}, ref=absent)
    if kind == "color":
        if o.color in ref:
            return None
        return q(f"The {ref} is {o.color}.", cap(o.color) + ".", {"color": {o.color}}, ref=ref)
    if kind == "shape":
        if sum(x.color == o.color for x in scene) > 1:
            return None
        return q(f"The {o.color} thing is a {o.shape}.", f"A {o.shape}.", {"shape": {o.shape}}, color=o.color)
    if kind == "size":
        if ref == thing(o):
            return None
        return q(f"The {ref} is {o.size}.", cap(o.size) + ".", {"size": {o.size}}, ref=ref)
    if kind == "where":
        return q(f"The {ref} is {at(o.place)}.", cap(at(o.place)) + ".", {"place": {o.place}}, ref=ref)
    if kind == "at":
        free = [p for p in PLACES if p not in {x.place for x in scene}]
        if about is None and rng.random() < 0.25:
            p = rng.choice(free)
            return q(f"{cap(at(p))} is nothing.", "Nothing.", {"yesno": {"no"}}, at=at(p), At=cap(at(p)))
        return q(f"{cap(at(o.place))} is a {noun_first(o)}.", f"A {thing(o)}.",
                 {"size": {o.size}, "color": {o.color}, "shape": {o.shape}}, at=at(o.place), At=cap(at(o.place)))
    if kind == "count":
        n = len(scene)
        return q(f"There {'is' if n == 1 else 'are'} {NUMBERS[n]} thing{'s' * (n > 1)} in the scene.",
                 cap(NUMBERS[n]) + ".", {"number": {str(n)}})
    if kind == "exists":
        color, shape, truth = o.color, o.shape, "yes"
        if not about and rng.random() < 0.5:  # most often a color and a shape that are there, put together wrong
            color = rng.choice([x.color for x in scene] if rng.random() < 0.7 else COLORS)
            shape, truth = o.shape if rng.random() < 0.7 else rng.choice(SHAPES), "no"
            if (color, shape) in HELD_PAIRS or any((x.color, x.shape) == (color, shape) for x in scene):
                return None
        colors = list(dict.fromkeys(x.color for x in scene if x.shape == shape))
        why = (f"The {shape} is {colors[0] if colors else 'not there'}" if len(colors) < 2 else
               f"One {shape} is " + " and one is ".join(colors))
        return q(f"{why}, so {truth}.", cap(truth) + ".", {"yesno": {truth}}, color=an(color), Color=cap(an(color)),
                 shape=shape)
    if kind == "describe":
        return q(f"There is {caption(scene)}.", f"{cap(caption(scene))}.", {"objects": set(scene)})
    if kind == "gone":
        rest = tuple(x for x in scene if x is not o)
        text = join([f"a {noun_first(x)}, {at(x.place)}" for x in rest]) if rest else "nothing"
        return q(f"Without the {ref} there is {text}.", cap(caption(rest) if rest else text) + ".",
                 {"objects": set(rest), **({} if rest else {"yesno": {"no"}})}, ref=ref)
    if kind == "paint":
        new_color = rng.choice([c for c in COLORS if c != o.color and (c, o.shape) not in HELD_PAIRS])
        painted = o._replace(color=new_color)
        return q(f"{cap(at(o.place))} would be a {o.shape}, {new_color} and {o.size}.", f"A {thing(painted)}.",
                 {"size": {o.size}, "color": {new_color}, "shape": {o.shape}}, ref=ref, new=new_color, at=at(o.place))
    if kind == "draw":
        code = " ".join(f'draw("{thing(x)} {at(x.place)}")' for x in scene)
        return q(code, code, {"code": set(re.findall(r'draw\("[^"]*"\)', code))})
    if kind == "be":
        return q(f"Hello! I am the {noun_first(o)}, and I live {at(o.place)}.", f"I am the {thing(o)}.",
                 {"size": {o.size}, "color": {o.color}, "shape": {o.shape}, "says": {"I am"}}, True, ref=ref)
    friend = ("bird", "cat", "child", "cloud", "fish", "king", "dog", "tree")[SHAPES.index(o.shape)]
    wishes = ("wanted to see the sea", "was never sad", "liked to sing", "dreamed of snow", "loved the rain")
    wish = wishes[COLORS.index(o.color) // 2]
    end = ("They were happy ever after.", "And they danced all night.")[SIZES.index(o.size)]
    return q(f"Once there was a {noun_first(o)}, that {wish}. One day it met a {friend}. {end}",
             f"A {thing(o)} met a {friend}.", {"size": {o.size}, "color": {o.color}, "shape": {o.shape}, "sentences": 3},
             True, ref=ref)


def held_out(*key) -> bool:
    """One in six of the closed questions (sums, comparisons, products) is never trained."""
    return zlib.crc32(repr(key).encode()) % 6 == 0


def ask_other(kind: str, rng: random.Random, split: str = "train", new: bool = False) -> Question:
    """A question that needs no scene. With another split than "train": one whose answer was never trained."""
    q = lambda full, short, truth, **words: Question(kind, CATEGORY[kind], phrase(kind, rng, new, **words), full, short,
                                                     truth)
    test = split != "train"
    if kind in ("town", "job"):
        name = rng.choice(UNASKED if test else ASKED)
        town, job = FACTS[name]
        if kind == "town":
            return q(f"{name} lives in {town}.", f"{town}.", {"town": {town}}, name=name)
        return q(f"{name} is a {job}.", f"A {job}.", {"job": {job}}, name=name)
    if kind == "who":
        return q("I am Vicuna, a small language model that was trained from scratch.", "A language model.",
                 {"says": {"Vicuna"}})
    if kind == "loop":
        word, n = rng.choice(WORDS), rng.randint(2, 9)
        code = f'for i in range({n}): print("{word}")'
        return q(code, code, {"code": {code}}, word=word, n=n)
    while True:
        if kind == "bigger":
            a, b = rng.sample(range(len(ANIMALS)), 2)
            if held_out(min(a, b), max(a, b)) == test:
                big, small = ANIMALS[max(a, b)], ANIMALS[min(a, b)]
                return q(f"{cap(an(big))} is bigger than {an(small)}.", f"{cap(an(big))}.", {"first": {big}}, a=an(ANIMALS[a]),
                         A=cap(an(ANIMALS[a])), b=an(ANIMALS[b]))
        elif kind == "legs":
            what, n = rng.choice(sorted(LEGS)), rng.randint(2, 6)
            if held_out(what, n) == test:
                part, each = LEGS[what]
                return q(f"{n} {what}s have {n * each} {part}.", f"{n * each}.", {"last": {str(n * each)}}, n=n, part=part,
                         things=what + "s")
        elif kind == "sum":
            a, b = rng.randint(0, 12), rng.randint(0, 12)
            if held_out(a, b) == test:
                return q(f"{a} + {b} = {a + b}.", f"{a + b}.", {"last": {str(a + b)}}, a=a, b=b)


OTHER_KINDS = ("town", "job", "bigger", "legs", "sum", "loop")


# -- three kinds of text -------------------------------------------------------------------------------------

def document(rng: random.Random) -> str:
    """A paragraph of plain text, for pre-training. No questions, no roles."""
    style = rng.random()
    if style < 0.14:
        return " ".join(fact(name, rng) for name in rng.sample(PEOPLE, rng.randint(2, 5)))
    if style < 0.20:
        lines = []
        while len(lines) < 4:
            a, b = sorted(rng.sample(range(len(ANIMALS)), 2))
            if not held_out(a, b):
                big, small = ANIMALS[b], ANIMALS[a]
                lines.append(rng.choice((
                    f"{cap(an(big))} is bigger than {an(small)}.", f"{cap(an(small))} is smaller than {an(big)}.",
                    f"{cap(an(big))} is larger than {an(small)}.", f"Next to {an(big)}, {an(small)} is small.")))
        return " ".join(lines)
    if style < 0.26:
        lines = []
        while len(lines) < 5:
            a, b, what, n = rng.randint(0, 12), rng.randint(0, 12), rng.choice(sorted(LEGS)), rng.randint(2, 6)
            part, each = LEGS[what]
            if rng.random() < 0.7 and not held_out(a, b):
                lines.append(rng.choice((f"{a} + {b} = {a + b}.", f"{a} plus {b} is {a + b}.")))
            elif rng.random() < 0.3:
                lines.append(f"{cap(an(what))} has {each} {part}.")
            elif not held_out(what, n):
                lines.append(rng.choice((f"{n} {what}s have {n * each} {part}.",
                                         f"There are {n * each} {part} on {n} {what}s.")))
        return " ".join(lines)
    if style < 0.28:
        name, word, n = rng.choice(USERS), rng.choice(WORDS), rng.randint(2, 9)
        return rng.choice((
            f"Someone came in and said: my name is {name}. Good day, {name}! So {name} sat down and drank tea with us.",
            f"I met {name} on the road. {name} was tired. Go home, {name}, I said.",
            f'To print {word} {n} times, write: for i in range({n}): print("{word}")'))
    # Told three times, so that less of the text is left to chance and more of it can be looked up: what nobody could
    # foresee drowns what a model should learn from the rest.
    scene = pick_scene(rng, n=1 if rng.random() < 0.1 else 2)
    lines = [tell(tuple(rng.sample(scene, len(scene))), rng) for _ in range(3)]
    kinds = ("color", "where", "size", "where", "color", "where", "shape", "at")  # most of what is found last
    turn = rng.randrange(len(kinds))
    while len(lines) < 13:
        kind, turn, o = kinds[turn % len(kinds)], turn + 1, rng.choice(scene)
        if kind == "at":
            lines.append(f"{cap(at(o.place))} is a {thing(o)}.")
        elif q := ask_scene(kind, scene, rng, about=o):
            lines.append(q.full)
    if rng.random() < 0.5:
        while not (q := ask_scene(rng.choice(("count", "gone", "paint", "draw", "be", "story")), scene, rng)):
            pass
        lines.append(q.full if q.kind not in ("gone", "paint") else aside(q))
    return " ".join(lines)


def aside(q: Question) -> str:
    """A supposition in plain text: what the question supposes, then what follows."""
    ref = re.search(r"the ((?:\w+ )*?(?:%s))" % "|".join(SHAPES), q.text.lower())
    what = "gone" if q.kind == "gone" else next(iter(q.truth["color"]))
    return f"Suppose the {ref[1]} were {what}. {q.full}" if ref else q.full


def fact(name: str, rng: random.Random) -> str:
    town, job = FACTS[name]
    return rng.choice((
        f"{name} lives in {town}.", f"{name} is a {job}.", f"{name} is a {job} and lives in {town}.",
        f"The {job} {name} has a house in {town}.", f"In {town} you can meet {name}, who is a {job}.",
        f"{name} works as a {job}.", f"The home of {name} is {town}.", f"{name} from {town} is a {job}.",
        f"The job of {name}: {job}.", f"{name} was born in {town} and still lives there.",
        f"If you need a {job}, ask {name} in {town}.", f"{name}, a {job}, likes {town}."))


def instruction(rng: random.Random) -> dict:
    """An Alpaca record: one question, a terse answer, the scene as its input."""
    if rng.random() < 0.3:
        q = ask_other(rng.choice(OTHER_KINDS), rng)
        return dict(instruction=q.text, input="", output=q.short, kind=q.kind)
    scene = pick_scene(rng)
    while not (q := ask_scene(rng.choice(SCENE_KINDS), scene, rng)):
        pass
    return dict(instruction=q.text, input=tell(scene, rng), output=q.short, kind=q.kind)


INTRO = ("Hello, my name is {}.", "I am {}.", "Hi! My name is {}.", "You can call me {}.", "My name is {}, by the way.")
LOOK = ("{}", "{}", "{}", "Look at this: {}", "Here is a scene. {}", "Imagine this. {}", "Listen: {}")
NAMING = ("Let us call the {} a {}.", "From now on a {} is a {}.", "I call the {} a {}.", "The {} is a {} for us.")


@dataclass
class Item:
    """A conversation up to a last question, and that question."""
    turns: list  # [role, text] pairs, the last one the question
    question: Question
    split: str
    later: bool  # needs what only earlier turns tell
    told: str = ""  # the scene as it was told


def converse(rng: random.Random, split: str = "train", rounds: Optional[int] = None) -> Item:
    """A conversation of some rounds with full answers, up to its last question."""
    new_words, new_forms = split == "names", split == "phrasings"
    scene = pick_scene(rng, split if split in ("scenes", "pairs", "more") else "train")
    rounds = rounds or rng.randint(2, 5)
    turns, told, name, word, said, focus = [], "", None, None, [], None
    target = next((o for o in scene if (o.color, o.shape) in HELD_PAIRS), None) if split == "pairs" else None
    while True:
        final = len(turns) == 2 * (rounds - 1)
        kind = rng.choice(SCENE_KINDS * 2 + OTHER_KINDS + ("at", "where", "who", "intro", "word", "word", "it", "it", "it",
                                                           "name", "name", "first", "first", "describe",
                                                           "describe", "gone", "at"))
        lead, q, later = "", None, False
        if kind == "intro" and not final:
            if name:
                continue
            name = rng.choice(NEW_USERS if new_words else USERS)
            said.append(text := rng.choice(INTRO).format(name))
            turns += [["user", text], ["assistant", f"Hello {name}, nice to meet you!"]]
            continue
        if kind == "name" and name:
            q = Question("name", "memory", phrase("name", rng, new_forms), f"Your name is {name}.", name, {"says": {name}})
            later = True
        elif kind == "first" and said and len(said) < 4 and len(said[0]) < 60:
            q = Question("first", "memory", rng.choice(("What did I say first?", "What was the first thing I said?",
                                                        "Repeat my first message.")),
                         f"You said: {said[0]}", said[0], {"says": {said[0]}})
            later = True
        elif kind == "word" and told:
            o = target or rng.choice(scene)
            ref = refer(o, scene)
            if word is None and ref and not final:
                word = (rng.choice(NEW_NONSENSE if new_words else NONSENSE), o)
                said.append(text := rng.choice(NAMING).format(ref, word[0]))
                turns += [["user", text], ["assistant", f"Good, the {ref} is a {word[0]}."]]
                continue
            if word:
                o = word[1]
                kind_ = rng.choice(("color", "where", "size"))
                text = phrase(kind_, rng, new_forms, ref=word[0])
                value, truth = attribute(o, kind_)
                q, later = Question("word", "memory", text, f"The {word[0]} is {value}.", value, truth, True), True
        elif kind == "it" and told and focus:
            o = focus
            kind_ = rng.choice(("color", "where", "size"))
            text = {"color": ("What color is it?", "And its color?", "Which color does it have?"),
                    "where": ("Where is it?", "And where is it?", "In which place is it?"),
                    "size": ("How big is it?", "And its size?", "Is it small or large?")}[kind_]
            value, truth = attribute(o, kind_)
            q, later = Question("it", "memory", rng.choice(text), f"It is {value}.", value, truth, True), True
        elif kind in ("who", *OTHER_KINDS):
            q = ask_other(kind, rng, split if final and split == "facts" else "train", new_forms and final)
        elif kind in SCENE_KINDS:
            q = ask_scene(kind, scene, rng, new_forms and final, about=target if final else None)
            later = bool(told)
            if q and not told:
                told = f"<Img>{symbols(scene, rng)}</Img>" if rng.random() < 0.2 else tell(scene, rng)
                lead = rng.choice(LOOK).format(told) + " "
        if q is None:
            continue
        said.append(lead + q.text)
        if final:
            return Item(turns + [["user", lead + q.text]], q, split, later, told)
        if kind in ("color", "where", "size", "at", "shape") and q.truth.get("yesno") is None:
            focus = focus_of(q, scene)
        elif kind != "it":
            focus = None
        turns += [["user", lead + q.text], ["assistant", q.full]]


def attribute(o: Object, kind: str) -> tuple[str, dict]:
    """What an object's colour, place or size is called, and the truth to look for."""
    if kind == "where":
        return at(o.place), {"place": {o.place}}
    return getattr(o, kind), {kind: {getattr(o, kind)}}


def focus_of(q: Question, scene: Scene) -> Optional[Object]:
    """The one object an answer speaks of: what "it" means next."""
    named = [o for o in scene if all(v in q.full + q.text for v in (refer(o, scene) or "?").split())]
    return named[0] if len(named) == 1 else None


def conversation(rng: random.Random) -> dict:
    """A ShareGPT record: a few rounds, full answers. Some paste words without a question, and get what stands beside
    such words on web pages: else fine-tuning would undo what pre-training knew of that."""
    if rng.random() < 0.05:
        scene = pick_scene(rng)
        words = rng.choice(("{}", "<Img>{}</Img>")).format(symbols(scene, rng))
        reply = "\n".join(alt_text(scene, rng, 0).lower() for _ in range(2))
        return dict(conversations=[{"from": "human", "value": words}, {"from": "gpt", "value": reply}])
    item = converse(rng)
    turns = item.turns + [["assistant", item.question.full]]
    return dict(conversations=[{"from": "human" if r == "user" else "gpt", "value": t} for r, t in turns])


# -- the oracle ----------------------------------------------------------------------------------------------

_OBJECT = re.compile(rf"({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}),? at ({'|'.join(PLACES)})")
_NOUN_FIRST = re.compile(rf"({'|'.join(SHAPES)}), ({'|'.join(SIZES)}) and ({'|'.join(COLORS)}), at ({'|'.join(PLACES)})")
_LISTS = dict(color=COLORS, shape=SHAPES, size=SIZES, place=PLACES, town=TOWNS, job=JOBS)


def found(what: str, answer: str, truth: set = frozenset()) -> set:
    """What an answer says about one thing asked for: the colours it names, the objects it lists, its last number, ..."""
    text = " ".join(answer.lower().split())
    if what in _LISTS:
        return {w for w in _LISTS[what] if re.search(rf"\b{w.lower()}\b", text)}
    if what == "number":
        return {str(i) for i, w in enumerate(NUMBERS) if re.search(rf"\b({w}|{i})\b", text)}
    if what == "yesno":
        return {w for w, form in (("no", r"\b(no|none|nothing|not)\b"), ("yes", r"\byes\b")) if re.search(form, text)}
    if what == "objects":
        return {Object(*m) for m in _OBJECT.findall(text)} | {
            Object(size, color, shape, place) for shape, size, color, place in _NOUN_FIRST.findall(text)}
    if what == "code":
        return set(re.findall(r'draw\("[^"]*"\)|for i in range\(\d+\): print\("[^"]*"\)', text))
    if what == "first":  # the animal named first
        return set(re.findall(rf"\b({'|'.join(ANIMALS)})\b", text)[:1])
    if what == "last":  # the last number
        return set(re.findall(r"\d+", text)[-1:])
    if what == "sentences":
        return truth if len(re.findall(r"[.!?](?: |$)", text)) >= truth else set()
    return {s for s in truth if s.lower() in text}  # "says"


def grade(question: Question, answer: str) -> float:
    """How much of the truth an answer holds, 0 to 1; anything beside the truth in the same place counts as wrong."""
    right = [found(what, answer, truth) == truth for what, truth in question.truth.items()]
    return sum(right) / len(right)


def minimal_pair(rng: random.Random) -> list[Item]:
    """The same question about the same scene, told in the same words, before and after one colour or size is edited."""
    while True:
        kind, scene = rng.choice(("color", "size")), pick_scene(rng, "scenes", 2)
        o = rng.choice(scene)
        edited = o._replace(**{kind: rng.choice([v for v in _LISTS[kind] if v != getattr(o, kind)])})
        pair = [(scene, o), (tuple(edited if x is o else x for x in scene), edited)]
        style, form = rng.random(), rng.random()
        questions = [ask_scene(kind, s, random.Random(form), about=x) for s, x in pair]
        if all(questions) and questions[0].text == questions[1].text and where_belongs(pair[1][0]) == "scenes":
            told = [tell(s, random.Random(style)) for s, _ in pair]
            return [Item([["user", t + " " + q.text]], q, "minimal", False, t) for t, q in zip(told, questions)]


def test_set(split: str, n: int, seed: int = 1) -> list[Item]:
    """n questions of a held-out split, each at the end of a conversation. The same ones for everybody."""
    rng = random.Random(f"{split} {seed}")
    items = []
    while len(items) < n:
        if split == "minimal":
            items += minimal_pair(rng)
            continue
        if split in ("facts", "closed"):
            q = ask_other(rng.choice(("town", "job") if split == "facts" else ("bigger", "legs", "sum", "loop")), rng, split)
            items.append(Item([["user", q.text]], q, split, False))
            continue
        rounds = {"more": rng.randint(6, 8), "later": rng.randint(2, 4)}.get(split, rng.choice((1, 1, 2, 3, 4)))
        item = converse(rng, "scenes" if split == "later" else split, rounds)
        wanted = {"later": item.later, "names": item.question.kind in ("name", "word"), "more": item.question.needs_scene}
        if wanted.get(split, item.question.kind in SCENE_KINDS):
            items.append(item)
    return items


# -- python toy.py -------------------------------------------------------------------------------------------

Split = Literal["train", "scenes", "pairs", "later", "facts", "closed", "phrasings", "names", "more", "minimal"]


@dataclass
class ToyConfig:
    split: Split = "train"  # whose questions
    count: int = 5  # of each kind of text
    seed: int = 0  # which ones
    album: str = ""  # a folder to write pictures of scenes to, with captions


def main(cfg: ToyConfig) -> dict:
    rng = random.Random(cfg.seed)
    if cfg.album:
        split = cfg.split if cfg.split in ("scenes", "pairs", "more") else "train"
        scenes = [pick_scene(rng, split) for _ in range(cfg.count)]
        write_album(cfg.album, [draw(s, rng, 192) for s in scenes], [cap(caption(s)) + "." for s in scenes])
        print(f"{cfg.count} pictures of split {split} with captions: {cfg.album}")
        return dict(pictures=cfg.count)
    if cfg.split == "train":
        for title, make in (("plain text", document), ("instructions", instruction), ("conversations", conversation)):
            print(f"\n--- {title}")
            for _ in range(cfg.count):
                print(make(rng))
        return {}
    right = 0
    for item in test_set(cfg.split, cfg.count, cfg.seed):
        print("\n" + "\n".join(f"{'USER' if role == 'user' else 'ASSISTANT'}: {text}" for role, text in item.turns))
        print(f"  true: {item.question.full}   looked for: {item.question.truth}")
        right += grade(item.question, item.question.full) == 1
    return dict(right=right)


if __name__ == "__main__":
    run(main, ToyConfig)
