"""Shared by all tests: threads, seeds, `--impl`, and partial credit for the weeks of the course.

    pytest                                        # the repository's own code
    pytest --impl=my_model.py                     # the same tests on what my_model.py defines
    pytest --impl=my_course/week2.py -m week2     # the checks of a week, and how many are passed
    pytest --impl=my_course/week2.py -m week2 --report=ada.json     # the same for a grader
"""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import json
import re
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from course.weeks import WEEKS, exercises_by_test, find_test

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # the tensors are tiny, and other tests run beside this one


class Swap(NamedTuple):
    """A name of ours that a student's file defines."""
    owner: type | None  # our class, if it is a single method
    name: str
    ours: Any
    theirs: Any


header: list[str] = []
filled: dict[str, Swap] = {}  # by full name: model.apply_rope, model.RMSNorm.forward
blank: set[str] = set()  # full names that the files of --impl leave open with NotImplementedError


def pytest_addoption(parser):
    parser.addoption("--impl", action="append", default=[], metavar="FILE",
                     help="test what FILE defines instead of ours; may be given several times")
    parser.addoption("--report", default="", metavar="FILE",
                     help="write the score of --impl in the weeks of -m to this JSON file")


@pytest.hookimpl(tryfirst=True)  # before xdist reads it
def pytest_cmdline_main(config):
    """A student's checks run in one process: they are few, and breakpoint() works there."""
    has_xdist = hasattr(config.option, "numprocesses")
    if has_xdist and config.getoption("--impl") and weeks_asked(config):
        config.option.numprocesses = 0


def pytest_configure(config):
    for week in WEEKS:
        config.addinivalue_line("markers", f"week{week}: {WEEKS[week].title}")
    if config.getoption("--report") and not (config.getoption("--impl") and weeks_asked(config)):
        raise pytest.UsageError("--report needs --impl=FILE and -m weekN")
    marks = config.getoption("-m") or ""
    if config.getoption("--impl") and marks and not (weeks_asked(config) or "not " in marks):
        raise pytest.UsageError(f"-m {marks}: there are week1 to week{max(WEEKS)}")
    for file in config.getoption("--impl"):  # before the tests are imported
        try:
            header.extend(install(file))
        except pytest.UsageError as error:  # a grader gets a file for everybody
            write_report(config, dict(score(exercises_asked(config)), error=str(error)))
            raise
    for name in exercises_asked(config):
        if name in filled:
            switch(name, on=False)


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
    new one. What the file leaves blank stays ours. Returns lines that say what was replaced, and
    what was not known."""
    theirs, modules = load(file), our_modules().values()
    student = own_names(theirs)
    # `main` and the like are defined in several files: take the one the student's resembles most.
    by_likeness = sorted(modules, key=lambda m: -len(own_names(m).keys() & student.keys()))
    replaced, empty, unknown = [], [], []
    for name, value in student.items():
        home = next((m for m in by_likeness if name in own_names(m)), None)
        if home is None:
            unknown.append(name)
            continue
        ours = getattr(home, name)
        if ours is value:  # a constant that is the same
            continue
        full_name = f"{home.__name__}.{name}"
        if inspect.isclass(value) and inspect.isclass(ours) and not is_whole(value, ours):
            before = dict(vars(ours))
            new, open_ones, strange = graft(value, ours)
            for method in new:
                swap = Swap(ours, method, before.get(method), vars(ours)[method])
                filled[f"{full_name}.{method}"] = swap
            replaced += [f"{full_name}.{method}" for method in new]
            empty += [f"{full_name}.{method}" for method in open_ones]
            unknown += [f"{name}.{method}" for method in strange]
            setattr(theirs, name, ours)
        elif is_blank(value):
            empty.append(full_name)
            setattr(theirs, name, ours)
        else:
            replaced.append(full_name)
            swap = Swap(None, name, ours, value)
            for filled_name in (full_name, *(f"{full_name}.{m}" for m in functions_of(value))):
                filled[filled_name] = swap
            replace_everywhere(ours, value, name)
    blank.update(empty)
    hint = did_you_mean(unknown, modules)
    if not replaced and not empty:
        raise pytest.UsageError(f"--impl={file} defines none of our names{hint}")
    lines = [f"--impl={file} replaces {', '.join(replaced) or 'nothing yet'}; all else is ours"]
    if empty:
        lines.append(f"--impl={file}: still blank, so ours are used: {', '.join(empty)}")
    if unknown:
        lines.append(f"--impl={file}: not ours, so not tested: {', '.join(unknown)}{hint}")
    return lines


def replace_everywhere(ours, value, name: str) -> None:
    """In the module that defines it, and where it was imported by name."""
    others = [module for key, module in sys.modules.items() if key.startswith(("impl_", "test_"))]
    for module in (*our_modules().values(), *others):
        if getattr(module, name, None) is ours:
            setattr(module, name, value)


def switch(name: str, on: bool) -> None:
    """Puts the student's function in the place of ours, or ours back."""
    swap = filled[name]
    old, new = (swap.ours, swap.theirs) if on else (swap.theirs, swap.ours)
    if swap.owner:
        setattr(swap.owner, swap.name, new)
    else:
        replace_everywhere(old, new, swap.name)


def functions_of(value) -> dict:
    """The functions in the body of a class; none of anything else."""
    if not inspect.isclass(value):
        return {}
    return {name: member for name, member in vars(value).items() if inspect.isfunction(member)}


def is_blank(value) -> bool:
    """Does this function still raise NotImplementedError?"""
    code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
    return code is not None and "NotImplementedError" in code.co_names


def is_whole(theirs: type, ours: type) -> bool:
    """Has the class every method of ours, written out? Then it replaces ours as it is."""
    given = {name for name, method in functions_of(theirs).items() if not is_blank(method)}
    asked = {name for name in functions_of(ours) if name == "__init__" or name[:2] != "__"}
    return asked <= given


def graft(theirs: type, ours: type) -> tuple[list[str], list[str], list[str]]:
    """Puts single methods into our class. Returns their names, those of blank methods, and those
    that ours does not have."""
    new, empty, strange = [], [], []
    for name, method in functions_of(theirs).items():
        if is_blank(method):
            empty.append(name)
            continue
        (new if hasattr(ours, name) else strange).append(name)
        bare = inspect.unwrap(method)
        for variable, cell in zip(bare.__code__.co_freevars, bare.__closure__ or ()):
            if variable == "__class__":  # what super() goes by
                cell.cell_contents = ours
        setattr(ours, name, method)
    return new, empty, strange


def did_you_mean(unknown: list[str], modules) -> str:
    ours = set()
    for module in modules:
        for name, value in own_names(module).items():
            ours |= {name, *(f"{name}.{method}" for method in functions_of(value))}
    ours -= set(unknown)  # they stand in our class now
    close = [match for name in unknown for match in difflib.get_close_matches(name, ours, 1, 0.8)]
    return f"; did you mean {', '.join(close)}?" if close else ""


def load(file: str) -> ModuleType:
    path = Path(file).resolve()
    if not path.is_file():
        raise pytest.UsageError(f"--impl={file}: no such file")
    name = f"impl_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.path.append(str(path.parent))  # it may import its neighbors
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with time_limit(60):
            spec.loader.exec_module(module)
    except (Exception, SystemExit, pytest.fail.Exception) as error:  # it may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f" (line {lines[-1]})" if lines else ""
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise pytest.UsageError(f"--impl={file} does not import: {reason}{where}") from None
    return module


@contextlib.contextmanager
def time_limit(seconds: float):
    """Turns an endless loop into a failure after so many seconds of computing. (Windows does not
    have this timer.)"""
    def stop(*_):
        pytest.fail(f"more than {seconds} seconds: an endless loop?")

    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def own_names(module: ModuleType) -> dict:
    """What a module defines itself, without what it imports."""
    names = {}
    for name, value in vars(module).items():
        home = getattr(value, "__module__", module.__name__)
        if not name.startswith("__") and not inspect.ismodule(value) and home == module.__name__:
            names[name] = value
    return names


# -- partial credit: -m week2 ---------------------------------------------------------------------

checks: dict[str, str] = {}  # the exercise of each check, by node id
outcomes: dict[str, str] = {}  # of every check that was run


def weeks_asked(config) -> list[int]:
    """The weeks that -m names. `-m "not week3"` asks for none."""
    expression = config.getoption("-m") or ""
    if re.search(r"\bnot\b", expression):
        return []
    named = re.findall(r"\bweek(\d+)\b", expression)
    return sorted({int(week) for week in named} & set(WEEKS))


def exercises_asked(config) -> list[str]:
    return [exercise.name for week in weeks_asked(config) for exercise in WEEKS[week].exercises]


def pytest_ignore_collect(collection_path, config):
    """The other test files need not even be imported."""
    weeks = weeks_asked(config)
    if weeks and collection_path.suffix == ".py":
        tests = {test for week in weeks for e in WEEKS[week].exercises for test in e.tests()}
        if collection_path.name not in {test.split("::")[0] for test in tests}:
            return True
    return None


def pytest_generate_tests(metafunc):
    """A check of a week runs once for each of its exercises, and is skipped for the blank ones."""
    if not metafunc.config.getoption("--impl"):
        return
    asked, params = exercises_asked(metafunc.config), []
    for _, exercise in exercises_by_test().get(find_test(metafunc.definition.nodeid), ()):
        name = exercise.name
        if name in asked:
            skip = [] if name in filled else [pytest.mark.skip(reason=f"blank: {name}")]
            params.append(pytest.param(name, id=name, marks=skip))
    if params:
        metafunc.parametrize("exercise", params, indirect=True)


@pytest.fixture(autouse=True)
def exercise(request):
    """In the checks of a week: this exercise is the student's, and all others are ours. So no
    function turns red because of another one."""
    name = getattr(request, "param", None)
    if name is None:
        yield
        return
    switch(name, on=True)
    with time_limit(10):  # the slowest check takes one second
        yield
    switch(name, on=False)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    """Marks the checks of each week. Without -m, a file may hold anything: then a check is skipped
    if its exercises are blank."""
    for item in items:
        names = set()
        for week, exercise in exercises_by_test().get(find_test(item.nodeid), ()):
            item.add_marker(f"week{week}")
            names.add(exercise.name)
        if config.getoption("--impl") and exercises_asked(config):
            if hasattr(item, "callspec") and "exercise" in item.callspec.params:
                checks[item.nodeid] = item.callspec.params["exercise"]
        elif names & blank and not names & filled.keys():
            item.add_marker(pytest.mark.skip(reason=f"blank: {', '.join(sorted(names))}"))


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def score(names: list[str]) -> dict:
    """How many exercises are solved and how many checks passed, and of each exercise its state:
    solved, wrong, blank, or "not run" if the run was interrupted."""
    exercises = {}
    for name in names:
        mine = {node: outcomes.get(node, "not run") for node, of in checks.items() if of == name}
        failed = sorted(node for node, outcome in mine.items() if outcome == "failed")
        exercises[name] = dict(state=state_of(name, set(mine.values())), failed=failed)
    return dict(
        exercises=exercises, n_exercises=len(exercises),
        solved=sum(e["state"] == "solved" for e in exercises.values()),
        n_checks=len(checks), passed=sum(outcomes.get(node) == "passed" for node in checks))


def state_of(name: str, results: set[str]) -> str:
    """The state of an exercise, given the outcomes of its checks."""
    if name not in filled:
        return "blank"
    if "failed" in results:
        return "wrong"
    return "solved" if "passed" in results and "not run" not in results else "not run"


def write_report(config, figures: dict) -> None:
    if config.getoption("--report") and not hasattr(config, "workerinput"):  # once under xdist
        asked = dict(files=config.getoption("--impl"), weeks=weeks_asked(config), notes=header)
        text = json.dumps(asked | figures, indent=1)
        Path(config.getoption("--report")).write_text(text + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--impl") or not weeks_asked(config):
        return
    figures = score(exercises_asked(config))
    write_report(config, figures)
    terminalreporter.section("partial credit")
    for name, exercise in figures["exercises"].items():
        tests = sorted({find_test(node).split("::")[1] for node in exercise["failed"]})
        failed = f": {', '.join(tests)}" if tests else ""
        terminalreporter.line(f"{exercise['state']:<7} {name}{failed}")
    for line in header:
        if "not ours" in line:  # a misspelled name counts as blank
            terminalreporter.line(line)
    terminalreporter.line(f"{figures['solved']} of {figures['n_exercises']} exercises, "
                          f"{figures['passed']} of {figures['n_checks']} checks")
