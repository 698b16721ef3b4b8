"""Shared by all tests: threads, seeds, and `--impl`.

    pytest                        # the repository's own code
    pytest --impl=my_model.py     # the same tests on what my_model.py defines
"""

import difflib
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
torch.set_num_threads(1)  # the tensors are tiny, and other tests run beside this one

header: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--impl", action="append", default=[], metavar="FILE",
                     help="test what FILE defines instead of ours; may be given several times")


def pytest_configure(config):
    for file in config.getoption("--impl"):  # before the tests are imported
        header.extend(install(file))


def pytest_report_header(config):
    return header


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def our_modules() -> dict[str, ModuleType]:
    """The files of the project by name: data, model, ..., toy.world, ..."""
    modules = {}
    for package in (ROOT, *(file.parent for file in ROOT.glob("*/__init__.py"))):
        for file in sorted(package.glob("[!_]*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            modules[name] = importlib.import_module(name)
    return modules


# -- --impl ---------------------------------------------------------------------------------------

def install(file: str) -> list[str]:
    """Replaces our names by those that `file` defines; tests say `model.RMSNorm`, so they find the
    new one. Returns lines that say what was replaced, and what was not known."""
    student, modules = own_names(load(file)), our_modules().values()
    # `main` and the like are defined in several files: take the one the student's resembles most.
    by_likeness = sorted(modules, key=lambda m: -len(own_names(m).keys() & student.keys()))
    replaced, unknown = [], []
    for name, value in student.items():
        home = next((m for m in by_likeness if name in own_names(m)), None)
        if home is None:
            unknown.append(name)
            continue
        old = getattr(home, name)
        if old is value:  # a constant that is the same
            continue
        for module in modules:  # also where it was imported by name
            if getattr(module, name, None) is old:
                setattr(module, name, value)
        replaced.append(f"{home.__name__}.{name}")
    ours = {name for module in modules for name in own_names(module)}
    close = [match for name in unknown for match in difflib.get_close_matches(name, ours, 1, 0.8)]
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    if not replaced:
        raise pytest.UsageError(f"--impl={file} defines none of our names{hint}")
    lines = [f"--impl={file} replaces {', '.join(replaced)}; all else is ours"]
    if unknown:
        lines.append(f"--impl={file}: not ours, so not tested: {', '.join(unknown)}{hint}")
    return lines


def load(file: str) -> ModuleType:
    path = Path(file).resolve()
    if not path.is_file():
        raise pytest.UsageError(f"--impl={file}: no such file")
    name = f"impl_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.path.append(str(path.parent))  # it may import its neighbors
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a student's file may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f" (line {lines[-1]})" if lines else ""
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise pytest.UsageError(f"--impl={file} does not import: {reason}{where}") from None
    return module


def own_names(module: ModuleType) -> dict:
    """What a module defines itself, without what it imports."""
    names = {}
    for name, value in vars(module).items():
        home = getattr(value, "__module__", module.__name__)
        if not name.startswith("__") and not inspect.ismodule(value) and home == module.__name__:
            names[name] = value
    return names
