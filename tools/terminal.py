"""The terminal chat of `python sample.py`: it reads messages and commands, and prints answers.

A line is a message, or a command if it begins with /; /help lists the commands. A message of
several lines begins and ends with three quotation marks. Where Python has readline, the arrow keys
edit a line and recall earlier ones, including those of earlier chats.
"""

import contextlib
import dataclasses
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import data
import model
from tools import config, inside
from tools.config import UserError

QUOTES = '"""'
SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed")


def talk(chat) -> None:
    """Reads and answers until /quit or the end of the input. `chat` is a sample.Chat."""
    interactive = sys.stdin.isatty()
    if interactive:
        size = model.count_parameters(chat.net.config) / 1e6
        print(f"{size:.1f} M parameters, template {chat.template}, context {chat.window} tokens. "
              "/help for commands, Ctrl-C to stop an answer.")
    with history() if interactive else contextlib.nullcontext():
        while True:
            try:
                respond(chat, interactive)
            except (EOFError, BrokenPipeError):  # as in `python sample.py < questions.txt | head`
                break
            except (UserError, OSError) as error:
                print(f"({error})", file=sys.stderr)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                print("\n(type /quit to exit)")


def respond(chat, interactive: bool) -> None:
    """Reads a message and prints the answer, or reads a command and runs it. Raises EOFError at the
    end of the input, and to leave the chat."""
    line = read_line(interactive, "> ").strip()
    if line.startswith(QUOTES):
        message = read_block(line, interactive)
        print_answer(chat, chat.answer(message))
    elif line.startswith("/"):
        command(chat, line)
    elif interactive and line in ("quit", "exit"):
        raise EOFError
    elif line:
        print_answer(chat, chat.answer(line))


def read_line(interactive: bool, prompt: str) -> str:
    """The next line. Raises EOFError at the end of the input."""
    if interactive:
        try:
            return input(prompt)
        except EOFError:
            print()
            raise
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def read_block(first: str, interactive: bool) -> str:
    """A message of several lines. `first` is its first line, with the opening quotation marks. The
    closing ones may be missing at the end of the input."""
    text = first.removeprefix(QUOTES)
    with contextlib.suppress(EOFError):
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + read_line(interactive, "... ")
    return text.rstrip().removesuffix(QUOTES).strip("\n")


def print_answer(chat, pieces: Iterator[str]) -> None:
    """Prints an answer while it is generated, and the prompt before a completion. Ctrl-C stops the
    answer, not the program."""
    if chat.vlm and not chat.turns and not chat.pending:
        print("(no picture yet: use /image FILE, or --image)", file=sys.stderr)
    with contextlib.closing(pieces):  # closing it stores what was said so far
        try:
            echo = chat.template == "plain"
            for piece in pieces:
                if echo:  # the prompt is among the turns from the first piece on
                    print(chat.turns[-1].text, end="")
                    echo = False
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
    print()
    for notice in chat.notices:
        print(f"({notice})", file=sys.stderr)
    if sys.stdout.isatty():
        print(f"\033[90m({chat.speed})\033[0m")  # gray


def history_file() -> Path:
    folder = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(folder, "nanovicuna", "history")


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Inside this context, input() has arrow keys and knows the lines of earlier chats. A history
    file that cannot be read or written is ignored."""
    try:
        import readline
    except ImportError:  # as on Windows
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(history_file())
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history_file().parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history_file())


# -- commands: each function gets the chat and the text after the command -------------------------

def show_image(chat, file: str) -> None:
    chat.show_image(file)
    print("(the next question is about this picture)")


def reset(chat, _) -> None:
    chat.reset()
    print("(chat cleared)")


def undo(chat, _) -> None:
    print(f"(removed: {chat.undo()})")
    if chat.pending:
        print("(the picture is attached to the next question)")


def retry(chat, _) -> None:
    print_answer(chat, chat.retry())


def save(chat, file: str) -> None:
    print(f"(saved {chat.save(file)} rounds to {file})")


def load(chat, file: str) -> None:
    chat.load(file)
    for turn in chat.turns:
        print(("> " if turn.role == "user" else "") + turn.text)


def set_option(chat, text: str) -> None:
    """Changes a setting of generation and prints it. Without a value, only prints it; without a
    name, prints all settings."""
    name, _, value = text.replace("=", " ", 1).partition(" ")
    if name and name not in SETTINGS:
        hint = config.suggest(name, SETTINGS, f"; choose from {', '.join(SETTINGS)}")
        raise UserError(f"there is no setting {name}{hint}")
    if value:
        kinds = {field.name: field.type for field in dataclasses.fields(chat.cfg)}
        try:
            parsed = config.parse_value(name, kinds[name], value.strip())
            chat.cfg = dataclasses.replace(chat.cfg, **{name: parsed})  # checks the value
        except UserError as error:
            raise UserError(str(error).replace("--", "")) from None
    notes = config.comments(type(chat.cfg))
    for shown in [name] if name else SETTINGS:
        setting = f"{shown} {getattr(chat.cfg, shown)}"
        print(f"{setting:<24} {notes[shown]}")


def set_system(chat, text: str) -> None:
    """Changes the system text if one is given ("" in quotes: to none), and prints it."""
    if text:
        chat.system = "" if text == '""' else text
    system = chat.system
    if system is None:
        system = data.get_template(chat.template).system
    print(f"(system text: {system})" if system else "(no system text)")


def is_toy(tokenizer: data.Tokenizer) -> bool:
    """Whether the tokenizer was trained on the toy world: it is small, and each color and shape is
    a single piece."""
    from toy import world
    words = world.COLORS + world.SHAPES
    return tokenizer.vocab_size < 10000 and all(len(tokenizer.encode(word)) == 1 for word in words)


def show_example(chat, _) -> None:
    """Prints a question about a scene that was not in the training data. The scene is drawn and
    attached if the model can see; otherwise the question begins with it."""
    if not is_toy(chat.tokenizer):
        raise UserError("/example is only for models of the toy world")
    from toy import world
    rng = random.Random()
    scene, question = world.pick_scene(rng, "scenes", n=2), None
    while question is None:
        kind, about = rng.choice(("color", "size", "where")), rng.choice(scene)
        question = world.ask_scene(kind, scene, rng, about=about)
    told, text = f"There is {world.caption(scene)}.", question.text
    if chat.vlm:
        show_image(chat, draw(scene, rng))
        print(f"(to compare: {told})")
    elif chat.template == "plain":  # a sentence to be completed: "The star is"
        text = told + " " + question.full.rpartition(" ")[0]
    else:
        text = told + " " + text
    print(f"try: {text}")
    with contextlib.suppress(ImportError):
        import readline
        readline.add_history(text)  # so that the up arrow recalls it


def draw(scene, rng: random.Random) -> str:
    """Draws a scene of the toy world to a temporary file, and returns its path."""
    from PIL import Image

    from toy import pictures
    handle, path = tempfile.mkstemp(prefix="scene-", suffix=".png")
    with os.fdopen(handle, "wb") as file:
        Image.fromarray(pictures.draw(scene, rng, size=192)).save(file, "PNG")
    print(f"(drew {path})")
    return path


def explain(chat, _) -> None:
    """Prints each token of the last answer with its probability, and its likeliest alternatives."""
    logits = chat.reply_logits()
    print("(probabilities before temperature, top_k, top_p and repetition_penalty)")
    for token, row in zip(chat.reply_ids, logits):
        probability = row.float().softmax(-1)[token].item()
        line = f"{visible(chat, token):<14}{probability:>7.1%}   "
        for other, p in inside.likeliest(row, k=4):
            if other != token and p >= 0.0005:  # 0.1% when rounded
                line += f"  {visible(chat, other)} {p:.1%}"
        print(line)


def visible(chat, token: int) -> str:
    return chat.spell(token).replace(" ", "·")


def print_help(chat, _) -> None:
    for name, (argument, help, _) in COMMANDS.items():
        print(f"{name + ' ' + argument:<22}{help}")
    print(f'{QUOTES:<22}begins and ends a message of several lines')


def leave(chat, _) -> None:
    raise EOFError


class Command(NamedTuple):
    argument: str  # FILE is required, [TEXT] is not
    help: str
    run: Callable


COMMANDS = {
    "/image": Command("FILE", "attach a picture to the next question", show_image),
    "/example": Command("", "show a question about a scene of the toy world", show_example),
    "/why": Command("", "show the alternatives to each token of the last answer", explain),
    "/retry": Command("", "generate another answer to the last question", retry),
    "/undo": Command("", "take back the last question and its answer", undo),
    "/reset": Command("", "begin a new chat, with the system text of the template", reset),
    "/system": Command("[TEXT]", 'show or change the system text; "" removes it', set_system),
    "/set": Command("[NAME [VALUE]]", "show or change a setting, as in /set temperature 0.5",
                    set_option),
    "/save": Command("FILE", "save the chat in ShareGPT format", save),
    "/load": Command("FILE", "load the first chat of a ShareGPT file", load),
    "/help": Command("", "show this list", print_help),
    "/quit": Command("", "leave, as do quit, exit and Ctrl-D", leave),
    "/exit": Command("", "leave, too", leave),
}


def command(chat, line: str) -> None:
    """Runs a command. Raises UserError if there is no such command."""
    name, *rest = line.split(maxsplit=1)
    argument = rest[0] if rest else ""
    if name not in COMMANDS:
        hint = config.suggest(name, COMMANDS, "; /help lists the commands")
        raise UserError(f"unknown command {name}{hint}")
    expected = COMMANDS[name].argument
    if argument and not expected:
        raise UserError(f"{name} takes no argument")
    if expected == "FILE":
        if not argument:
            raise UserError(f"{name} needs a file, as in {name} FILE")
        argument = os.path.expanduser(argument)
    COMMANDS[name].run(chat, argument)
