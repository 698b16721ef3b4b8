"""Tests of tools/config.py: what people type, and what they read when it was wrong. Also: no file
imports what it must not."""

import ast
import dataclasses
import graphlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from conftest import our_modules
from tools import config


@dataclass
class Demo:
    rate: float = 1e-3  # the peak, reached after 3 % of the steps
    steps: int = 100  # how many updates
    fused: bool = True  # the fast kernel
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrices
    out_dir: str = "out"  # where it goes


@dataclass
class Reader:
    path: str  # the file to read; 100 % of it
    count: int = 3  # how many


PRESETS = {"small": dict(rate=0.5, steps=7), "large": dict(rate=0.25)}


def parse(*argv: str, cls=Demo):
    return config.from_cli(cls, list(argv), PRESETS if cls is Demo else None)


# -- the command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("line, expected", [
    ("--rate=3e-4 --steps -5", dict(rate=3e-4, steps=-5)),
    ("--out-dir=a-b_c", dict(out_dir="a-b_c")),
    ("--out_dir=--x=y", dict(out_dir="--x=y")),
    ("--out_dir=", dict(out_dir="")),
    ("--fused", dict(fused=True)),
    ("--fused=Yes", dict(fused=True)),
    ("--fused no", dict(fused=False)),
    ("--fused=false", dict(fused=False)),
    ("--dtype=bfloat16", dict(dtype="bfloat16")),
    ("small", dict(rate=0.5, steps=7)),
    ("--steps=9 small", dict(rate=0.5, steps=9))])
def test_understood(line, expected):
    """bool("False") is True, so a flag could not be switched off; and a value may contain "="."""
    got = parse(*line.split())
    assert got == Demo(**expected)
    for name, value in expected.items():
        assert type(getattr(got, name)) is type(value)


@pytest.mark.parametrize("line, message", [
    ("--out-dri=x", "unknown option --out_dri=x; did you mean --out_dir?"),
    ("--zzz=5", "unknown option --zzz=5; see --help"),
    # no abbreviations: they change their meaning when an option is added
    ("--ste=5", "unknown option --ste=5"),
    ("--steps=1e3", "--steps=1e3: expected int, such as --steps=3"),
    ("--rate=fast", "--rate=fast: expected float, such as --rate=0.1"),
    ("--rate=nan", "expected a finite number"),
    ("--fused=maybe", "--fused=maybe: expected true or false"),
    ("--dtype=bfloat61", "expected one of float32, bfloat16; did you mean bfloat16?"),
    ("--out-dir=a --out_dir=b", "--out_dir is given twice"),
    ("smal", "unknown preset smal; did you mean small?"),
    ("small large", "large")])
def test_refused(line, message):
    """One line that says what is wrong, instead of a usage text or a silent default."""
    with pytest.raises(config.UserError) as caught:
        parse(*line.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_without_a_default_are_positional():
    assert parse("a-file.txt", "--count=5", cls=Reader) == Reader("a-file.txt", 5)
    assert parse("--count=5", "a-file.txt", cls=Reader) == Reader("a-file.txt", 5)
    with pytest.raises(config.UserError, match="required: path"):
        parse(cls=Reader)


@pytest.mark.parametrize("cls", [Demo, Reader])
def test_help_is_made_of_the_comments(cls, capsys):
    """A second copy of them would be wrong within a week. Percent signs must survive argparse."""
    with pytest.raises(SystemExit):
        parse("--help", cls=cls)
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(cls):
        assert field.name in text and config.comments(cls)[field.name] in text
        if field.default is not dataclasses.MISSING:
            assert f"(default: {field.default})" in text


def test_describe_marks_what_was_changed():
    line = config.describe(Demo(steps=5), ("rate", "steps"))
    assert line.split() == ["rate=0.001", "*steps=5"]


def test_limits():
    """The limit itself is refused by check_above only. NaN is neither above nor below anything."""
    for check, good, bad in ((config.check_above, 1e-9, 0.0), (config.check_at_least, 0.0, -1e-9)):
        check(Demo(rate=good), 0, "steps", "rate")
        for value in (bad, float("nan")):
            with pytest.raises(config.UserError, match=f"--rate={value} must be"):
                check(Demo(rate=value), 0, "steps", "rate")


def test_refuse_unused():
    """An option that would be ignored is an error, so that nobody believes it has acted."""
    config.refuse_unused(Demo(rate=2.0), ("steps", "fused"), "there is nothing to train")
    with pytest.raises(config.UserError, match="--steps=5 has no effect: nothing is trained"):
        config.refuse_unused(Demo(steps=5), ("steps", "fused"), "nothing is trained")


# -- run ------------------------------------------------------------------------------------------

def run_and_leave(main, cls=Demo):
    """The exit status, or the text that sys.exit prints."""
    with pytest.raises(SystemExit) as left:
        config.run(main, cls)
    return left.value.code


@pytest.mark.parametrize("error, code", [
    (config.UserError("no such model"), "demo.py: no such model"),
    (FileNotFoundError(2, "No such file or directory", "x"),
     "demo.py: No such file or directory: x"),
    (OSError("the disk is full"), "demo.py: the disk is full"),
    (KeyboardInterrupt(), 130)], ids=lambda x: type(x).__name__)
def test_run_ends_with_one_line(monkeypatch, error, code):
    """No traceback for what the user can fix; one for our own bugs. The line begins with the
    program as it was called."""
    def main(cfg):
        assert cfg.steps == 5
        raise error

    monkeypatch.setattr(sys, "argv", ["some/where/demo.py", "--steps=5"])
    assert run_and_leave(main) == code
    monkeypatch.setattr(sys, "argv", ["/some/where/tools/demo.py", "--steps=5"])
    if isinstance(code, str):
        assert run_and_leave(main) == "python -m tools." + code.replace(".py", "", 1)
    with pytest.raises(ZeroDivisionError):
        config.run(lambda cfg: 1 / 0, Demo)


def test_a_stopped_run_says_how_to_resume(monkeypatch, capsys):
    """The command is printed as it was typed, `-m` and quotes included: it is meant to be copied.
    And Stopped is a KeyboardInterrupt, or an `except Exception` on the way would swallow it."""
    typed = ["python", "-m", "tools.demo", "small", "--out_dir=my runs"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/tools/demo.py", "--out_dir=my runs"])
    monkeypatch.setattr(sys, "orig_argv", typed)

    def main(cfg):
        raise config.Stopped("stopped after step 7")

    assert run_and_leave(main) == 130
    last = capsys.readouterr().out.splitlines()[-1]
    want = "python -m tools.demo small '--out_dir=my runs'"
    assert last == f"stopped after step 7. To resume: {want}"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun typed this one
    run_and_leave(main)
    assert "torchrun" in capsys.readouterr().out
    assert issubclass(config.Stopped, KeyboardInterrupt)


def test_run_with_commands(monkeypatch):
    done = []
    commands = {"read": (done.append, Reader), "train": (done.append, Demo)}
    monkeypatch.setattr(sys, "argv", ["demo.py", "read", "file.txt", "--count=1"])
    config.run(None, commands)
    assert done == [Reader("file.txt", 1)]
    for argv, message in ((["raed"], "did you mean read?"), (["--count=1"], "read, train"),
                          (["read"], "demo.py read: the following arguments are required: path")):
        monkeypatch.setattr(sys, "argv", ["demo.py", *argv])
        assert message in run_and_leave(None, commands)
    commands[""] = commands.pop("train")  # the command that need not be named
    monkeypatch.setattr(sys, "argv", ["demo.py", "--steps=1"])
    config.run(None, commands)
    assert done[1:] == [Demo(steps=1)]


# -- who imports whom -----------------------------------------------------------------------------

CODE = {name: Path(module.__file__).read_text(encoding="utf-8")
        for name, module in our_modules().items()}


def imports(code: str, inside_functions: bool = False) -> set[str]:
    """The modules of ours that are imported when this file is, or also later."""
    found = set()
    indent = r"\s*" if inside_functions else ""
    for package, names in re.findall(rf"^{indent}(?:from (\S+) )?import (.+)$", code, re.M):
        found.add(package)
        for name in names.split(", "):
            found |= {name, f"{package}.{name}"}
    return found & CODE.keys()


def test_no_import_cycle():
    """With a cycle, whether a file can be imported depends on which one is imported first."""
    graph = {name: imports(code) for name, code in CODE.items()}
    assert {"model", "tools.config"} <= graph["tools.checkpoint"], "the imports are misread"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_who_may_import_the_toy_world():
    """It is an example of data, so the program works without it: train_sft, train_vlm, judge and
    teacher import it in the function that needs it. The recipes, the benchmark and the course
    stand on top."""
    for name, code in CODE.items():
        if not name.startswith(("toy", "recipes", "course", "tools.bench")):
            toys = [other for other in imports(code, name == "data") if other.startswith("toy")]
            assert not toys, f"{name} imports {toys}"


@pytest.mark.parametrize("name, allowed", [
    ("tools.config", set()), ("model", {"tools.config"}), ("data", {"tools.config"}),
    ("tools.checkpoint", {"model", "tools.config"})])
def test_the_ground_stands_by_itself(name, allowed):
    """A student reads these files first, and alone."""
    assert imports(CODE[name]) <= allowed


@pytest.mark.parametrize("name", CODE)
def test_importing_a_file_does_nothing(name):
    """A call at the top of a file runs in every program that imports it."""
    after_docstring = ast.parse(CODE[name]).body[1:]
    calls = [node.lineno for node in after_docstring if isinstance(node, ast.Expr)]
    assert not calls, f"{name} does something in lines {calls}"
