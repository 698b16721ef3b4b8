"""The one configuration helper: a dataclass *is* the command line.

    @dataclass
    class Config:
        learning_rate: float = 1e-3  # peak; cosine down to a tenth of it

    if __name__ == "__main__":
        run(main, Config, presets={"big": dict(learning_rate=1e-4)})

gives `python script.py big --learning_rate=3e-4`, `--help` from the comments, and one-line errors.
"""

import argparse
import dataclasses
import difflib
import inspect
import math
import re
import sys
from typing import Callable, Literal, NoReturn, Optional, Union, get_args, get_origin


class Problem(Exception):
    """Something the person at the keyboard can mend. The message says what is wrong and what to do, in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Problem(message)  # argparse would print the whole usage first


class _Once(argparse.Action):
    def __call__(self, parser, namespace, value, option=None):
        if hasattr(namespace, self.dest):
            parser.error(f"--{self.dest} is given twice")
        setattr(namespace, self.dest, value)


def comments(cls: type) -> dict[str, str]:
    """The trailing comment of each field, read from the class itself, so that --help cannot drift."""
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.M))


def _reader(name: str, kind) -> Callable[[str], object]:
    """A function from the text after `--name=` to a value of type `kind`, or a Problem."""
    if get_origin(kind) is Union:  # Optional[X]
        kind = get_args(kind)[0]

    def read(text: str):
        if get_origin(kind) is Literal:
            if text not in get_args(kind):
                near = difflib.get_close_matches(text, get_args(kind), 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise Problem(f"--{name}={text}: expected one of {', '.join(get_args(kind))}{hint}")
            return text
        if kind is bool:
            value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.lower())
            if value is None:
                raise Problem(f"--{name}={text}: expected true or false")
            return value
        try:
            value = kind(text)
        except ValueError:
            raise Problem(f"--{name}={text}: expected {kind.__name__}, such as "
                          f"--{name}={'3' if kind is int else '0.1'}") from None
        if kind is float and not math.isfinite(value):
            raise Problem(f"--{name}={text}: expected a finite number")
        return value

    return read


def from_cli(cls: type, argv: list[str], presets: Optional[dict] = None, prog: Optional[str] = None):
    """Builds `cls` from `[preset] --key=value ...`. Raises Problem for anything it does not understand."""
    notes, fields = comments(cls), dataclasses.fields(cls)
    parser = _Parser(prog=prog, allow_abbrev=False, description=inspect.getmodule(cls).__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    for f in fields:
        note = notes.get(f.name, "").replace("%", "%%")
        if f.default is dataclasses.MISSING:
            parser.add_argument(f.name, help=note)
        else:
            flag = dict(nargs="?", const=True) if f.type is bool else {}
            parser.add_argument("--" + f.name, type=_reader(f.name, f.type), action=_Once, **flag,
                                metavar=getattr(f.type, "__name__", "VALUE").upper(),
                                help=f"{note} (default: {f.default})")
    if presets:
        parser.add_argument("preset_", metavar="preset", nargs="?", help="one of: " + ", ".join(presets))
    # accept - for _ in names, and say which option was meant when one is unknown
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    space, extra = parser.parse_known_args(argv)
    if extra:
        near = difflib.get_close_matches(extra[0].split("=")[0], ["--" + f.name for f in fields], 1, 0.5)
        raise Problem(f"unknown option {extra[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    given = vars(space)  # what stood in argv, and nothing else
    preset = given.pop("preset_", None)
    if preset and preset not in presets:
        near = difflib.get_close_matches(preset, presets, 1)
        raise Problem(f"unknown preset {preset}; " + (f"did you mean {near[0]}?" if near else
                      f"there are {', '.join(presets)}"))
    return cls(**{**(presets[preset] if preset else {}), **given})


def describe(cfg) -> str:
    """The resolved configuration; what differs from the default is marked with *."""
    rows = [(f.name, getattr(cfg, f.name), getattr(cfg, f.name) != f.default) for f in dataclasses.fields(cfg)]
    return "  ".join(f"{'*' if changed else ''}{name}={value}" for name, value, changed in rows)


def run(main: Callable, cls, presets: Optional[dict] = None) -> None:
    """Script entry. `cls` is a dataclass, or {command: (main, dataclass)} when the script has commands; the command
    "" is the one that need not be named."""
    script, argv = sys.argv[0].split("/")[-1], sys.argv[1:]
    try:
        if isinstance(cls, dict):
            word = argv[0] if argv and not argv[0].startswith("-") else ""
            if word not in cls:
                near = difflib.get_close_matches(word, cls, 1)
                raise Problem(f"unknown command {word}; did you mean {near[0]}?" if near else
                              f"say what to do: python {script} {'|'.join(filter(None, cls))} ...")
            main, cls = cls[word]
            script, argv = f"{script} {word}".strip(), argv[bool(word):]
        main(from_cli(cls, argv, presets, prog=script))
    except Problem as problem:
        sys.exit(f"{script}: {problem}")
    except OSError as error:  # missing file, no permission, disk full
        sys.exit(f"{script}: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except KeyboardInterrupt:
        sys.exit(130)
