"""The configuration helper: it makes a command line of a dataclass.

    @dataclass
    class Config:
        learning_rate: float = 1e-3  # peak of the schedule

    if __name__ == "__main__":
        run(main, Config, presets={"big": dict(learning_rate=1e-4)})

gives `python script.py big --learning_rate=3e-4`, a `--help` made from the comments, and error
messages of one line.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin


class UserError(Exception):
    """Something the user can fix. The message says in one line what is wrong and what to do."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after everything was saved: the same command resumes."""


# -- checks of option values --------------------------------------------------------------------

def check_above(cfg, limit: float, *names: str) -> None:
    """Raises UserError unless each of these options is greater than `limit`."""
    for name in names:
        if not getattr(cfg, name) > limit:
            raise UserError(f"--{name}={getattr(cfg, name)} must be greater than {limit}")


def check_at_least(cfg, limit: float, *names: str) -> None:
    """Raises UserError unless each of these options is `limit` or more."""
    for name in names:
        if not getattr(cfg, name) >= limit:
            raise UserError(f"--{name}={getattr(cfg, name)} must be at least {limit}")


def refuse_unused(cfg, names: Iterable[str], why: str) -> None:
    """Raises UserError if one of these options, which would have no effect, is not its default."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in names and value != field.default:
            raise UserError(f"--{field.name}={value} has no effect: {why}")


def check_regular(path) -> None:
    """Raises UserError for a pipe or a device, which may never end, for a folder, and for what a
    failed download leaves in place of a file. A missing file is left to open()."""
    if not Path(path).exists():
        return
    if not Path(path).is_file():
        raise UserError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        head = file.read(100).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git-LFS pointer, not the file; run `git lfs pull`")
    if head.startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path} is a web page, not the file; download it again")


# -- from the command line to a dataclass -------------------------------------------------------

class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)  # argparse would print the whole usage first


class _Several(argparse.Action):
    def __call__(self, parser, namespace, values, option=None):
        setattr(namespace, self.dest, ",".join(values))


class _Once(argparse.Action):
    def __call__(self, parser, namespace, value, option=None):
        if hasattr(namespace, self.dest):
            parser.error(f"--{self.dest} is given twice")
        setattr(namespace, self.dest, value)


def comments(cls: type) -> dict[str, str]:
    """The comment beside each field, read from the source, so that --help cannot drift from it."""
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.M))


def suggest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """"; did you mean X?" when one of the known words is close, else `otherwise`."""
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else otherwise


BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_value(name: str, kind: Any, text: str):
    """The value that `--name=text` gives a field of type `kind`. Raises UserError."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if text not in choices:
            expected = ", ".join(c for c in choices if c) + suggest(text, choices)
            raise UserError(f"--{name}={text}: expected one of {expected}")
        return text
    if kind is bool:
        if text.lower() not in BOOLEANS:
            raise UserError(f"--{name}={text}: expected true or false")
        return BOOLEANS[text.lower()]
    if kind is str:  # the shell expands ~ only where a word begins
        return ",".join(os.path.expanduser(part) for part in text.split(","))
    try:
        value = kind(text)
    except ValueError:
        example = "3" if kind is int else "0.1"
        expected = f"expected {kind.__name__}, such as --{name}={example}"
        raise UserError(f"--{name}={text}: {expected}") from None
    if not abs(value) < 2 ** 63:  # nan, inf, or beyond torch's integers
        raise UserError(f"--{name}={text}: expected a finite number of at most 18 digits")
    return value


def make_parser(cls: type, presets: Iterable[str], prog: str | None) -> _Parser:
    """An argparse parser with one option for each field of `cls`. Fields without a default are
    positional; so is one with metadata "positional", which may be left out, and one with "several",
    which takes several words and joins them by commas."""
    notes = comments(cls)
    parser = _Parser(
        prog=prog, allow_abbrev=False, description=inspect.getmodule(cls).__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(cls):
        note = notes.get(field.name, "").replace("%", "%%")
        parse = functools.partial(parse_value, field.name, field.type)
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, type=parse, help=note)
            continue
        if "positional" in field.metadata:
            parser.add_argument(field.name, type=parse, help=note, nargs="?")
            continue
        if "several" in field.metadata:
            parser.add_argument(field.name, type=parse, help=note, nargs="*", action=_Several)
            continue
        flag = dict(nargs="?", const=True) if field.type is bool else {}
        kind = getattr(field.type, "__name__", "").upper()
        if get_origin(field.type) is Literal:
            kind = "{" + ",".join(choice for choice in get_args(field.type) if choice) + "}"
        parser.add_argument(
            "--" + field.name, type=parse, action=_Once, **flag, metavar=kind,
            help=f"{note} (default: {field.default})")
    if presets:
        names = ", ".join(presets)
        parser.add_argument("preset_", metavar="preset", nargs="?", help=f"one of: {names}")
    return parser


def from_cli(cls: type, argv: list[str], presets: dict | None = None, prog: str | None = None):
    """Builds `cls` from `[preset] --key=value ...`. Raises UserError for what it does not know."""
    presets = presets or {}
    parser = make_parser(cls, presets, prog)
    for word in argv:
        if re.search("[\ud800-\udfff]", word):  # Python's stand-ins for bytes it could not decode
            raise UserError(f"{word!r} is not UTF-8")
    # --batch-size means --batch_size
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        options = ["--" + field.name for field in dataclasses.fields(cls)]
        hint = suggest(unknown[0].split("=")[0], options, "; see --help")
        kind = "option" if unknown[0].startswith("-") else "argument"
        raise UserError(f"unknown {kind} {unknown[0]}{hint}")
    given = vars(namespace)
    preset = given.pop("preset_", None)
    if preset and preset not in presets:
        hint = suggest(preset, presets, f"; choose from {', '.join(presets)}")
        raise UserError(f"unknown preset {preset}{hint}")
    return cls(**{**presets.get(preset, {}), **given})


def describe(cfg, names: Iterable[str]) -> str:
    """These settings in one line, those that differ from the default marked with *."""
    words = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.name in names:
            mark = "*" if value != field.default else ""
            words.append(f"{mark}{field.name}={value}")
    return "  ".join(words)


# -- the entry point of every script ------------------------------------------------------------

def choose_command(script: str, commands: dict, argv: list[str]) -> tuple:
    """`python script.py COMMAND ...`: main, its dataclass, the program's name, the remaining
    arguments. The command "" is the default one."""
    word = argv[0] if argv and not argv[0].startswith("-") else ""
    named = ", ".join(name for name in commands if name)
    if not word and {"-h", "--help"} & set(argv):
        print(f"commands (`{script} COMMAND --help` lists the options of one):")
        for name in filter(None, commands):
            what = inspect.getdoc(commands[name][0]) or ""
            print(f"  {name:<9} {textwrap.shorten(what, 80, placeholder=' ...')}")
        print()
        if "" not in commands:
            print(sys.modules["__main__"].__doc__)
            sys.exit(0)
    if word not in commands:
        if not word:
            raise UserError(f"missing command; choose from {named}")
        hint = suggest(word, commands, f"; choose from {named}")
        raise UserError(f"unknown command {word}{hint}")
    main, cls = commands[word]
    return main, cls, f"{script} {word}".strip(), argv[1:] if word else argv


def program_name() -> str:
    """train_sft.py, or `python -m recipes.koala`."""
    path = Path(sys.argv[0])
    if path.parent.name in ("tools", "toy", "recipes", "course"):
        return f"python -m {path.parent.name}.{path.stem}"
    return path.name


def typed_command() -> str:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "the same torchrun command"
    return shlex.join(sys.orig_argv)


def run(main: Callable | None, cls, presets: dict | None = None) -> None:
    """Runs main(cfg) with a `cls` made of the command line, and prints user errors as one line.

    `cls` is a dataclass, or {command: (main, dataclass)} for a script with commands; then `main`
    is None.
    """
    script, argv = program_name(), sys.argv[1:]
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # None if it was closed
    for stream in (sys.stdin, sys.stdout):  # stderr replaces by default
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        if isinstance(cls, dict):
            main, cls, script, argv = choose_command(script, cls, argv)
        main(from_cli(cls, argv, presets, prog=script))
    except UserError as error:
        sys.exit(f"{script}: {error}")
    except OSError as error:  # missing file, no permission, disk full
        where = f": {error.filename}" if error.filename else ""
        sys.exit(f"{script}: {error.strerror or error}{where}")
    except Stopped as stopped:
        print(f"\n{stopped}. To resume: {typed_command()}")
        sys.exit(130)
    except (KeyboardInterrupt, EOFError):  # Ctrl-C; Ctrl-D where something is asked
        sys.exit(130)
