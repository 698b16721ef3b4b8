"""Tests of tools/config.py: what people type, and what they read when it was wrong. Also: no file
imports what it must not."""

import ast
import dataclasses
import graphlib
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

import data
import vision
from conftest import our_modules
from tools import checkpoint, config, convert


@dataclass
class Demo:
    rate: float = 1e-3  # the peak, reached after 3 % of the steps
    steps: int = 100  # how many updates
    fused: bool = True  # the fast kernel
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrices
    out_dir: str = "out"  # where it goes


@dataclass
class Readers:
    paths: str = dataclasses.field(default="a,b", metadata=dict(several=True))  # the files to read
    count: int = 3  # how many


@dataclass
class Reader:
    path: str  # the file to read; 100 % of it
    count: int = 3  # how many


def parse(*argv: str, cls=Demo):
    presets = {"small": dict(rate=0.5, steps=7)} if cls is Demo else None
    return config.from_cli(cls, list(argv), presets)


# -- the command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("line, expected", [
    ("--rate=3e-4 --steps -5", Demo(rate=3e-4, steps=-5)),
    ("--out-dir=a-b_c", Demo(out_dir="a-b_c")),
    ("--out_dir=--x=y", Demo(out_dir="--x=y")),
    # the shell leaves ~ alone after "="
    ("--out_dir=~/a,b~,~/c", Demo(out_dir="/home/me/a,b~,/home/me/c")),
    ("--fused", Demo(fused=True)),
    ("--fused=false", Demo(fused=False)),
    ("--dtype=bfloat16", Demo(dtype="bfloat16")),
    ("--steps=9 small", Demo(rate=0.5, steps=9))])
def test_understood(line, expected, monkeypatch):
    """bool("False") is True, so a flag could not be switched off; and a value may contain "="."""
    monkeypatch.setenv("HOME", "/home/me")
    assert repr(parse(*line.split())) == repr(expected)  # 5 == 5.0, but they are not the same


def test_several_words_for_one_field(monkeypatch):
    """`python -m toy.exam out/base out/vicuna`: the second word was an unknown argument."""
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("x", "~/y", "--count=5", cls=Readers) == Readers("x,/home/me/y", 5)
    assert parse("--count=5", cls=Readers) == Readers("a,b", 5)


@pytest.mark.parametrize("line, message", [
    ("--out-dri=x", "did you mean --out_dir?"),
    # no abbreviations: they change their meaning when an option is added
    ("--ste=5", "unknown option --ste=5"),
    ("--steps=1e3", "--steps=1e3: expected int"),
    # torch's and numpy's integers end there
    ("--steps=99999999999999999999", "expected a finite number of at most 18 digits"),
    ("--out_dir=caf\udce9", "'--out_dir=caf\\udce9' is not UTF-8"),
    ("--rate=nan", "--rate=nan: expected a finite number"),
    ("--fused=maybe", "--fused=maybe: expected true or false"),
    ("--dtype=bfloat61", "did you mean bfloat16?"),
    ("--out-dir=a --out_dir=b", "--out_dir is given twice"),
    ("smal", "did you mean small?")])
def test_refused(line, message):
    """One line that says what is wrong, instead of a usage text or a silent default."""
    with pytest.raises(config.UserError) as caught:
        parse(*line.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", [Demo, Reader])
def test_help_is_made_of_the_comments(cls, capsys):
    """A second copy of them would be wrong within a week. Percent signs must survive argparse."""
    with pytest.raises(SystemExit):
        parse("--help", cls=cls)
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(cls):
        assert field.name in text and config.comments(cls)[field.name] in text
        if get_origin(field.type) is Literal:
            assert f"--{field.name} {{{','.join(get_args(field.type))}}}" in text
        if field.default is not dataclasses.MISSING:
            assert f"(default: {field.default})" in text


def test_describe_marks_what_was_changed():
    line = config.describe(Demo(steps=5), ("rate", "steps"))
    assert line.split() == ["rate=0.001", "*steps=5"]


@pytest.mark.parametrize("check, good, bad", [
    (config.check_above, 1e-9, 0.0), (config.check_at_least, 0.0, -1e-9)])
def test_limits(check, good, bad):
    """NaN is neither above nor below anything."""
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

def run_and_leave(monkeypatch, typed: str, error=None, cls=Demo):
    """Runs a script that raises this error. The exit status, or the text that sys.exit prints."""
    def main(cfg):
        raise error

    monkeypatch.setattr(sys, "argv", typed.split())
    with pytest.raises(SystemExit) as left:
        config.run(main, cls)
    return left.value.code


@pytest.mark.parametrize("typed, error, code", [
    ("some/where/demo.py", config.UserError("no such model"), "demo.py: no such model"),
    ("/some/where/tools/demo.py", OSError("disk is full"), "python -m tools.demo: disk is full"),
    ("demo.py", FileNotFoundError(2, "No such file", "x"), "demo.py: No such file: x"),
    ("demo.py", KeyboardInterrupt(), 130)])
def test_run_ends_with_one_line(monkeypatch, typed, error, code):
    """No traceback for what the user can fix. The line begins with the program as it was called."""
    assert run_and_leave(monkeypatch, typed, error) == code


def test_a_stopped_run_says_how_to_resume(monkeypatch, capsys):
    """The command is printed as it was typed, `-m` and quotes included: it is meant to be copied.
    And Stopped is a KeyboardInterrupt, or an `except Exception` on the way would swallow it."""
    error = config.Stopped("stopped after step 7")
    typed = ["python", "-m", "tools.demo", "small", "--out_dir=my runs"]
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert run_and_leave(monkeypatch, "demo.py", error) == 130
    want = "stopped after step 7. To resume: python -m tools.demo small '--out_dir=my runs'\n"
    assert capsys.readouterr().out.endswith(want)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # torchrun typed this one
    run_and_leave(monkeypatch, "demo.py", error)
    assert "torchrun" in capsys.readouterr().out
    assert isinstance(error, KeyboardInterrupt)


def test_run_with_commands(monkeypatch):
    """The command "" need not be named. Fields without a default are positional."""
    done = []
    commands = {"read": (done.append, Reader), "": (done.append, Demo)}
    for typed in ("demo.py read --count=1 file.txt", "demo.py --steps=1"):
        monkeypatch.setattr(sys, "argv", typed.split())
        config.run(None, commands)
    assert done == [Reader("file.txt", 1), Demo(steps=1)]
    for typed, message in (("demo.py raed", "did you mean read?"),
                           ("demo.py read", "demo.py read: the following arguments")):
        assert message in run_and_leave(monkeypatch, typed, cls=commands)


def test_help_of_a_script_with_commands(monkeypatch, capsys):
    """-h was a missing command, and what the commands do could be read in the code alone."""
    def read(cfg):
        """Reads a file. It may be long."""

    for typed in ("demo.py -h", "demo.py --help"):
        assert run_and_leave(monkeypatch, typed, cls={"read": (read, Reader)}) == 0
        assert "\n  read      Reads a file. It may be long.\n" in capsys.readouterr().out


def test_any_console(monkeypatch):
    """In another locale, the first character beyond it ended the program with a traceback."""
    out, typed = io.BytesIO(), io.BytesIO("a é".encode("latin-1"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii", write_through=True))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, "utf-8"))
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    config.run(lambda cfg: print("안녕", sys.stdin.read().startswith("a")), Demo)
    assert out.getvalue() == b"?? True\n"


# -- files ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git-LFS pointer"),
    (b"\n<!DOCTYPE html><html><body>404</body></html>", "is a web page")])
def test_what_a_failed_download_leaves_has_one_message(content, words, tmp_path):
    """Three readers had three messages for it, and those of tokenizers and checkpoints had none."""
    path, messages = tmp_path / "file", set()
    path.write_bytes(content)
    for read in (data.read_text, data.Tokenizer, vision.open_image, convert.open_tensors,
                 convert.read_json, checkpoint.read):
        with pytest.raises(config.UserError, match=words) as error:
            read(path)
        messages.add(str(error.value))
    assert len(messages) == 1


# -- who imports whom -----------------------------------------------------------------------------

CODE = {name: Path(module.__file__).read_text(encoding="utf-8")
        for name, module in our_modules().items()}


def imports(name: str) -> set[str]:
    """The modules of ours that are imported when this one is, not those in its functions."""
    found = set()
    for package, names in re.findall(r"^(?:from (\S+) )?import (.+)$", CODE[name], re.M):
        found.add(package)
        for word in names.split(", "):
            found |= {word, f"{package}.{word}"}
    return found & CODE.keys()


def test_who_may_import_the_toy_world():
    """It is an example of data: what needs it imports it in a function. The recipes, the course and
    the benchmark stand on top."""
    for name in CODE:
        if not name.startswith(("toy", "recipes", "course", "tools.bench")):
            toys = [other for other in imports(name) if other.startswith("toy")]
            assert not toys, f"{name} imports {toys}"


def test_the_ground_stands_by_itself():
    """A student reads these files first, and alone. With a cycle among the others, whether a file
    can be imported would depend on which one is imported first."""
    assert imports("tools.config") == set()
    assert imports("model") == imports("data") == {"tools.config"}
    assert imports("tools.checkpoint") == {"model", "tools.config"}
    graphlib.TopologicalSorter({name: imports(name) for name in CODE}).prepare()  # CycleError


def test_importing_a_file_does_nothing():
    """A call at the top of a file runs in every program that imports it."""
    for name, code in CODE.items():
        after_docstring = ast.parse(code).body[1:]
        calls = [node.lineno for node in after_docstring if isinstance(node, ast.Expr)]
        assert not calls, f"{name} does something in lines {calls}"
