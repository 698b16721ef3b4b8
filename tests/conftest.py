"""Shared by all tests: the path, the threads, the seeds, and `--impl`.

    pytest                        # the repository's own code
    pytest --impl=my_model.py     # the same tests; what my_model.py defines takes the place of ours
"""

import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits, and for ever on a busy machine

header: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--impl", action="append", default=[], metavar="FILE",
                     help="test what FILE defines instead of ours (may be given several times)")


def pytest_configure(config):
    for file in config.getoption("--impl"):  # before collection: tests see the names when they are imported
        replaced = install(file)
        header.append(f"--impl={file} replaces {', '.join(replaced)}; all else is ours")


def pytest_report_header(config):
    return header


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def install(file: str) -> list[str]:
    """Puts what `file` defines into our modules. Tests say `model.RMSNorm`, so they meet the new one."""
    student = load(file)
    theirs = own(student)
    ours = {path.stem: module for path in sorted(ROOT.glob("*.py")) if (module := imported(path.stem))}
    # `main` and the like stand in several files: they belong to the one that the student's resembles most
    by_likeness = sorted(ours.values(), key=lambda m: -len(own(m).keys() & theirs.keys()))
    replaced = []
    for name, value in theirs.items():
        home = next((m for m in by_likeness if name in own(m)), None)
        old = getattr(home, name, value)
        if old is value:  # not one of ours, or a constant that is the same
            continue
        for module in ours.values():  # also where it was taken over by `from home import name`
            if getattr(module, name, None) is old:
                setattr(module, name, value)
        replaced.append(f"{home.__name__}.{name}")
    if not replaced:
        raise pytest.UsageError(f"--impl={file} defines none of our names, such as RMSNorm or attention")
    return replaced


def load(file: str) -> ModuleType:
    path = Path(file).resolve()
    if not path.is_file():
        raise pytest.UsageError(f"--impl={file}: there is no such file")
    name = f"impl_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise pytest.UsageError(f"--impl={file} is not a Python file")
    sys.path.append(str(path.parent))  # it may import its neighbours
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is somebody else's file: anything may happen
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f" (line {lines[-1]})" if lines else ""
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise pytest.UsageError(f"--impl={file} does not import: {first}{where}") from None
    return module


def own(module: ModuleType) -> dict:
    """What a module defines itself: no imported modules, no names imported from elsewhere."""
    return {name: value for name, value in vars(module).items()
            if not name.startswith("__") and not inspect.ismodule(value)
            and getattr(value, "__module__", module.__name__) == module.__name__}


def imported(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:  # a file whose optional dependency is not installed
        return None
