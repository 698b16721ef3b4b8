"""Exercises made from the real code: one file per week, in which that week's functions are blank.

    python -m course.exercises --out=my_course        # my_course/week1.py ... week10.py
    python -m pytest --impl=my_course/week2.py -m week2
    python -m course.exercises --solutions            # the originals, in solutions/

The files are cut out of the source when they are written, so they cannot differ from it. The
exercises of each week and their hints are in course/weeks.py.
"""

import ast
import functools
import textwrap
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from course.weeks import WEEKS, Exercise
from tools.config import UserError, run

ROOT = Path(__file__).resolve().parent.parent


# -- the source -----------------------------------------------------------------------------------

class Source(NamedTuple):
    """Where the original of an exercise is."""
    module: str  # such as "tools.inside"
    owner: ast.ClassDef | None  # the class of a method
    function: ast.FunctionDef


def path_of(module: str) -> Path:
    return (ROOT / module.replace(".", "/")).with_suffix(".py")


@functools.cache
def parse(module: str) -> tuple[list[str], ast.Module]:
    """The lines of a file, and its syntax tree."""
    text = path_of(module).read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


def find(name: str) -> Source:
    """The original of "module.function" or "module.Class.method"."""
    parts = name.split(".")
    n = next(n for n in range(len(parts), 0, -1) if path_of(".".join(parts[:n])).is_file())
    module = ".".join(parts[:n])
    owner, node = None, parse(module)[1]
    for part in parts[n:]:
        owner, node = node, next(x for x in node.body if getattr(x, "name", "") == part)
    return Source(module, owner if isinstance(owner, ast.ClassDef) else None, node)


def docstring_end(node: ast.FunctionDef | ast.ClassDef) -> int:
    """The line number where the docstring ends; without a docstring, where the signature ends."""
    if ast.get_docstring(node, clean=False) is None:
        return node.body[0].lineno - 1
    return node.body[0].end_lineno


def lines_of(source: Source, blank: Exercise | None) -> list[str]:
    """The lines of a function. With `blank`, hints of that exercise replace the body."""
    lines, node = parse(source.module)[0], source.function
    begin = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    if blank is None:
        return lines[begin:node.end_lineno]
    indent = " " * (node.col_offset + 4)
    hints = []
    for depth, hint in enumerate(blank.hints, 1):
        hints += textwrap.wrap(f"Hint {depth}: {hint}", 94 - len(indent),
                               subsequent_indent="    ", break_on_hyphens=False)
    return [*lines[begin:docstring_end(node)], *(f"{indent}# {hint}" for hint in hints),
            f"{indent}raise NotImplementedError"]


# -- imports --------------------------------------------------------------------------------------

def import_lines(module: str, wanted: set[str]) -> dict[str, str]:
    """{name: a line that imports it} for the wanted names that the module imports or defines."""
    found = {}
    for node in parse(module)[1].body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                only_this = type(node)(**{**vars(node), "names": [alias]})
                found[name] = ast.unparse(only_this)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = f"from {module} import {node.name}"
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in getattr(node, "targets", None) or [node.target]:
                found[ast.unparse(target)] = f"from {module} import {ast.unparse(target)}"
    return {name: line for name, line in found.items() if name in wanted}


def imports(sources: list[Source]) -> list[str]:
    """Import lines for the names that the originals use and the week's file does not define."""
    own = {(source.owner or source.function).name for source in sources}
    lines: dict[str, str] = {}
    for source in sources:
        used = {n.id for n in ast.walk(source.function) if isinstance(n, ast.Name)}
        for base in source.owner.bases if source.owner else []:
            used |= {n.id for n in ast.walk(base) if isinstance(n, ast.Name)}
        for name, line in import_lines(source.module, used - own).items():
            lines.setdefault(name, line)
    ours = {path.stem for path in ROOT.glob("*.py")} | {"tools", "toy"}

    def libraries_first(line: str) -> tuple[bool, str]:
        package = line.split()[1].split(".")[0]
        return package in ours, line

    return ["from __future__ import annotations", "",
            *sorted(set(lines.values()), key=libraries_first)]


# -- one file per week ----------------------------------------------------------------------------

HEADER = '''"""Week {week}: {title}.

    python -m pytest --impl={path} -m week{week}

tests the functions below. Write one in place of its `raise NotImplementedError`, and run the tests
again. A function that still raises it is not tested, and ours is used in its place. Read
docs/course.md first, and read a hint only if the one before it was not enough. Numbers such as [2]
refer to the papers at the top of the source file.
"""'''


def week_file(week: int, path: str, solved: Container[str] = (), header: str = HEADER) -> str:
    """The text of a week's file. Exercises in `solved` are complete, all others are blank."""
    exercises = WEEKS[week].exercises
    sources = [find(exercise.name) for exercise in exercises]
    # The lines of each function or class, by module and name: one class holds all its methods
    blocks: dict[tuple, list[str]] = {}
    for exercise, source in zip(exercises, sources):
        key = (source.module, (source.owner or source.function).name)
        block = blocks.setdefault(key, [])
        if source.owner:
            block += [""] if block else class_head(source)
        block += lines_of(source, None if exercise.name in solved else exercise)
    header = header.format(week=week, title=WEEKS[week].title, path=path)
    parts = ["\n".join([header, "", *imports(sources)])]
    parts += ["\n".join(block) for block in blocks.values()]
    return "\n\n\n".join(parts) + "\n"


def class_head(source: Source) -> list[str]:
    """The first line of a class and its docstring; its __init__ as a comment, which says what
    `self` has."""
    lines, owner = parse(source.module)[0], source.owner
    head = lines[owner.lineno - 1:docstring_end(owner)]
    file = path_of(source.module).relative_to(ROOT)
    head.append(f"    # The other methods are ours: {file}, line {owner.lineno}.")
    for method in owner.body:
        if getattr(method, "name", "") == "__init__":
            head.append("    #")
            head += [f"    # {line[4:]}" for line in lines[method.lineno - 1:method.end_lineno]]
    return [*head, ""]


def names(week: int) -> list[str]:
    """The names of a week's exercises."""
    return [exercise.name for exercise in WEEKS[week].exercises]


@dataclass
class ExercisesConfig:
    out: str = ""  # folder to write to; default: my_course, or solutions with --solutions
    week: int = 0  # 1 to 10; 0: all
    solutions: bool = False  # write the originals, without blanks

    def __post_init__(self):
        self.out = self.out or ("solutions" if self.solutions else "my_course")
        if self.week and self.week not in WEEKS:
            raise UserError(f"--week={self.week}: there are weeks {min(WEEKS)} to {max(WEEKS)}")


def main(cfg: ExercisesConfig) -> dict:
    """Writes the files that do not exist yet."""
    folder = Path(cfg.out)
    written, kept = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for week in [cfg.week] if cfg.week else WEEKS:
        path = folder / f"week{week}.py"
        if path.exists():
            kept.append(path.name)
            continue
        solved = names(week) if cfg.solutions else ()
        path.write_text(week_file(week, str(path), solved), encoding="utf-8")
        written.append(path.name)
    if kept:
        print(f"kept in {folder}: {', '.join(kept)} (rename or delete a file to get a new one)")
    if written:
        print(f"wrote to {folder}: {', '.join(written)}")
    return dict(written=written, kept=kept)


if __name__ == "__main__":
    run(main, ExercisesConfig)
