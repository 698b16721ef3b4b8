"""Find the bug: all functions of a week, complete except for one planted bug.

    python -m course.bugs --week=3 --seed=5            # writes my_course/bug3_5.py
    python -m course.bugs --week=3 --seed=5 --reveal   # the answer

The bugs are those of tests/test_mutants.py, which checks that a test finds each of them.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

from course.exercises import ROOT, find, lines_of, names, week_file
from course.weeks import WEEKS
from tools.config import UserError, check_at_least, refuse_unused, run

HEADER = '''"""Week {week}: {title}. One line of this file is wrong. Which?

Read it first. Then let the tests show what breaks:

    python -m pytest --impl={path} -m week{week}
"""'''


def full_name(bug) -> str:
    """The name of the exercise that has the bug, such as model.RMSNorm.forward."""
    return f"{bug.file.removesuffix('.py').replace('/', '.')}.{bug.function}"


def test_of(bug) -> str:
    """The test that finds the bug, as "test_model.py::test_stop"."""
    return bug.test if "::" in bug.test else f"test_{Path(bug.file).stem}.py::{bug.test}"


def week_of(bug) -> int | None:
    """The week in which a check of the buggy exercise finds the bug, or None."""
    for week, (_, exercises) in WEEKS.items():
        for exercise in exercises:
            if exercise.name == full_name(bug) and test_of(bug).split("[")[0] in exercise.tests():
                return week
    return None


def buggy_week(bug, path: str) -> str | None:
    """The text of the bug's week with the bug in it; None if it belongs to no week."""
    week = week_of(bug)
    if week is None:
        return None
    text = week_file(week, path, solved=names(week), header=HEADER)
    right = "\n".join(lines_of(find(full_name(bug)), None)) + "\n"
    assert text.count(right) == 1 and right.count(bug.source) == 1, f"{bug.what}: not unique"
    return text.replace(right, right.replace(bug.source, bug.replacement))


def bugs_of(week: int) -> list:
    """The bugs of a week, shuffled, so that the seed does not tell which function has the bug."""
    sys.path.append(str(ROOT / "tests"))
    try:
        from test_mutants import BUGS
    except ImportError as error:
        raise UserError(f"{error}: the planted bugs need `pip install -r requirements-dev.txt`"
                        ) from None
    found = [bug for bug in BUGS if week_of(bug) == week]
    random.Random(week).shuffle(found)
    return found


@dataclass
class BugsConfig:
    week: int = 2  # 1 to 10
    seed: int = 0  # which bug: if the week has n bugs, seeds 0 to n - 1 give each of them
    reveal: bool = False  # only print the answer
    out: str = "my_course"  # folder to write to

    def __post_init__(self):
        check_at_least(self, 0, "seed")
        if self.week not in WEEKS:
            raise UserError(f"--week={self.week}: there are weeks {min(WEEKS)} to {max(WEEKS)}")
        if self.reveal:
            refuse_unused(self, ("out",), "--reveal writes no file")


def main(cfg: BugsConfig) -> dict:
    """Writes a file with one bug, or reveals the bug."""
    bugs = bugs_of(cfg.week)
    bug = bugs[cfg.seed % len(bugs)]
    if cfg.reveal:
        print(f"{full_name(bug)}: {bug.what}\n  wrong: {bug.replacement.strip()}\n"
              f"  right: {bug.source.strip()}\n  found by tests/{test_of(bug)}")
        return dict(what=bug.what)
    path = Path(cfg.out) / f"bug{cfg.week}_{cfg.seed}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():  # it may hold somebody's notes
        path.write_text(buggy_week(bug, str(path)), encoding="utf-8")
    print(f"{path} has one bug (of the {len(bugs)} of week {cfg.week}). Read it, then run\n"
          f"  python -m pytest --impl={path} -m week{cfg.week}\n"
          f"The answer: python -m course.bugs --week={cfg.week} --seed={cfg.seed} --reveal")
    return dict(path=str(path), bugs=len(bugs))


if __name__ == "__main__":
    run(main, BugsConfig)
