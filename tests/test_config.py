"""Tests of config.py: what people type, and what they read when it was not what they meant."""

import dataclasses
import importlib
import sys
from dataclasses import dataclass
from typing import Literal, Optional

import pytest

import config
from conftest import ROOT


@dataclass
class Demo:
    rate: float = 1e-3  # the peak, reached after 3 % of the steps
    steps: int = 100  # how many updates
    fused: bool = True  # the fast kernel
    seed: Optional[int] = None  # random when not given
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrices
    out_dir: str = "out"  # where it goes


@dataclass
class Reader:
    path: str  # the file to read; 100 % of it
    count: int = 3  # how many


PRESETS = {"small": dict(rate=0.5, steps=7), "large": dict(rate=0.25)}


def parse(*argv: str, cls=Demo):
    return config.from_cli(cls, list(argv), PRESETS if cls is Demo else None, prog="demo.py")


@pytest.mark.parametrize("argv, expected", [
    ([], dict()),
    (["--rate=3e-4", "--steps=5"], dict(rate=3e-4, steps=5)),
    (["--rate", "2", "--steps", "-5"], dict(rate=2.0, steps=-5)),
    (["--out-dir=a"], dict(out_dir="a")), (["--out_dir=a-b_c"], dict(out_dir="a-b_c")),
    (["--out_dir=a=b=c"], dict(out_dir="a=b=c")), (["--out_dir="], dict(out_dir="")),
    (["--out_dir=--x-y"], dict(out_dir="--x-y")),
    (["--fused"], dict(fused=True)), (["--fused=Yes"], dict(fused=True)), (["--fused=1"], dict(fused=True)),
    (["--fused=false"], dict(fused=False)), (["--fused", "no"], dict(fused=False)),
    (["--seed=3"], dict(seed=3)), (["--dtype=bfloat16"], dict(dtype="bfloat16")),
    (["small"], dict(rate=0.5, steps=7)), (["small", "--steps=9"], dict(rate=0.5, steps=9)),
    (["--steps=9", "small"], dict(rate=0.5, steps=9)), (["--steps", "9", "large"], dict(rate=0.25, steps=9)),
], ids=" ".join)
def test_understood(argv, expected):
    """bool("False") is True, which is how flags get stuck; and a value may contain '='."""
    got = parse(*argv)
    assert got == Demo(**expected)
    for name, value in expected.items():
        assert type(getattr(got, name)) is type(value)


@pytest.mark.parametrize("argv, message", [
    (["--stpes=5"], "unknown option --stpes=5; did you mean --steps?"),
    (["--out-dri=x"], "did you mean --out_dir?"),
    (["--zzz=5"], "unknown option --zzz=5; see --help"),
    (["--ste=5"], "unknown option --ste=5"),  # no abbreviations: they change meaning when an option is added
    (["--steps=many"], "--steps=many: expected int"),
    (["--steps=1e3"], "--steps=1e3: expected int, such as --steps=3"),
    (["--steps=5.0"], "expected int"),
    (["--rate=fast"], "--rate=fast: expected float, such as --rate=0.1"),
    (["--rate=nan"], "expected a finite number"), (["--rate=inf"], "expected a finite number"),
    (["--rate"], "expected one argument"),
    (["--fused=maybe"], "--fused=maybe: expected true or false"),
    (["--seed=none"], "--seed=none: expected int"),
    (["--dtype=bfloat61"], "expected one of float32, bfloat16; did you mean bfloat16?"),
    (["--dtype=x"], "expected one of float32, bfloat16"),
    (["--steps=5", "--steps=6"], "--steps is given twice"),
    (["--out-dir=a", "--out_dir=b"], "--out_dir is given twice"),
    (["smal"], "unknown preset smal; did you mean small?"),
    (["huge-one"], "unknown preset huge-one; there are small, large"),
    (["small", "large"], "large"),
], ids=" ".join)
def test_refused(argv, message):
    """One line that says what is wrong, instead of a usage text or a silent default."""
    with pytest.raises(config.Problem) as caught:
        parse(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_without_a_default_are_positional():
    assert parse("a-file.txt", "--count=5", cls=Reader) == Reader("a-file.txt", 5)
    assert parse("--count=5", "a-file.txt", cls=Reader) == Reader("a-file.txt", 5)
    for argv, message in (([], "required: path"), (["a", "b"], "b")):
        with pytest.raises(config.Problem, match=message):
            parse(*argv, cls=Reader)


@pytest.mark.parametrize("cls", [Demo, Reader])
def test_help_is_made_of_the_comments(cls, capsys):
    """Written once, beside the field: a second copy would be wrong within a week. Percent signs included."""
    with pytest.raises(SystemExit) as left:
        parse("--help", cls=cls)
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(cls):
        assert field.name in text and config.comments(cls)[field.name] in text
        if field.default is not dataclasses.MISSING:
            assert f"(default: {field.default})" in text


def test_describe_marks_what_was_changed():
    line = config.describe(Demo(steps=5))
    assert "*steps=5" in line and " rate=0.001" in " " + line and "*rate" not in line


@pytest.mark.parametrize("error, code", [
    (config.Problem("no such model"), "demo.py: no such model"),
    (FileNotFoundError(2, "No such file or directory", "x"), "demo.py: No such file or directory: x"),
    (OSError("the disk is full"), "demo.py: the disk is full"),
    (KeyboardInterrupt(), 130)], ids=lambda x: type(x).__name__)
def test_run_ends_with_one_line(monkeypatch, error, code):
    """No traceback for what the person at the keyboard can mend; one for our own bugs."""
    monkeypatch.setattr(sys, "argv", ["some/where/demo.py", "--steps=5"])

    def main(cfg):
        assert cfg.steps == 5
        raise error

    with pytest.raises(SystemExit) as left:
        config.run(main, Demo)
    assert left.value.code == code
    with pytest.raises(ZeroDivisionError):
        config.run(lambda cfg: 1 / 0, Demo)


def test_run_with_commands(monkeypatch):
    done = []
    commands = {"read": (done.append, Reader), "train": (done.append, Demo)}
    monkeypatch.setattr(sys, "argv", ["demo.py", "read", "file.txt", "--count=1"])
    config.run(None, commands)
    assert done == [Reader("file.txt", 1)]
    for argv, message in ((["demo.py", "raed"], "did you mean read?"), (["demo.py"], "read|train"),
                          (["demo.py", "--count=1"], "read|train"), (["demo.py", "read"], "required: path")):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as left:
            config.run(None, commands)
        assert message in left.value.code


SHAPES = ("LLaMAConfig", "ViTConfig", "QFormerConfig", "SightConfig")  # of networks, not command lines


def configurations() -> list[type]:
    """The command line of every script."""
    found = []
    for path in sorted(ROOT.glob("*.py")):
        try:
            module = importlib.import_module(path.stem)
        except ImportError:  # an optional dependency that is not installed
            continue
        found += [cls for name, cls in vars(module).items()
                  if name.endswith("Config") and name not in SHAPES and cls.__module__ == path.stem]
    return found


@pytest.mark.parametrize("cls", configurations(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_option_is_explained(cls, capsys):
    missing = [f.name for f in dataclasses.fields(cls) if not config.comments(cls).get(f.name, "").strip()]
    assert not missing, f"the comment beside a field is its --help; {cls.__name__} has none for {missing}"
    with pytest.raises(SystemExit):
        config.from_cli(cls, ["--help"])
    assert "usage" in capsys.readouterr().out
