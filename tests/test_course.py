"""Tests of course/: exercises, partial credit, planted bugs, plots."""

import importlib.util
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import conftest
import data
from conftest import ROOT
from course import bugs, exercises, plots
from course.weeks import WEEKS
from test_vlm import MICRO, save_encoder, small_minigpt4
from tools import checkpoint
from tools.config import UserError

EVERY_WEEK = " or ".join(f"week{week}" for week in WEEKS)


def grade(folder, solved) -> dict:
    """All ten weeks at once, in a process of their own, with these exercises filled in."""
    files = []
    for week in WEEKS:
        path = folder / f"week{week}.py"
        path.write_text(exercises.week_file(week, str(path), solved), encoding="utf-8")
        files.append(f"--impl={path}")
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-m", EVERY_WEEK, f"--report={report}",
         "-o", "addopts=", "-p", "no:cacheprovider", "-q"],
        cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 5), done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(report.read_text(encoding="utf-8"))


def every_exercise() -> list[str]:
    return [name for week in WEEKS for name in exercises.names(week)]


def states(figures) -> dict[str, str]:
    return {name: exercise["state"] for name, exercise in figures["exercises"].items()}


# -- what a class gets, and what it scores --------------------------------------------------------

def test_blank_files_score_0_and_are_all_skips(tmp_path):
    figures = grade(tmp_path, solved=())
    assert states(figures) == dict.fromkeys(every_exercise(), "blank")
    assert (figures["solved"], figures["passed"]) == (0, 0) and figures["n_checks"] > 150


def test_the_solutions_score_full(tmp_path):
    figures = grade(tmp_path, solved=every_exercise())
    assert states(figures) == dict.fromkeys(every_exercise(), "solved")
    assert figures["solved"] == figures["n_exercises"] == len(every_exercise())
    assert figures["passed"] == figures["n_checks"]


def test_a_half_filled_file_scores_its_half(tmp_path):
    """In every week: no blank may redden, or credit, what its neighbors do."""
    half = [name for week in WEEKS for name in exercises.names(week)[::2]]
    figures = grade(tmp_path, solved=half)
    assert states(figures) == {name: "solved" if name in half else "blank"
                               for name in every_exercise()}
    assert figures["solved"] == len(half) and 0 < figures["passed"] < figures["n_checks"]


ADA = '''
import torch
from torch import nn

class RMSNorm(nn.Module):
    def forward(self, x):
        y = x.float()
        y = y / (y.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)
        return y.type_as(x) * self.weight.type_as(x)

    def foward(self, x):
        return x

class LLaMA(nn.Module):
    def init_weights(self, shared_mean=False):
        for p in self.parameters():
            nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.02)

    def train(self, mode=True):
        return super().train(mode)

def apply_rope(x, cos, sin):
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)

def rope_table(seq_len, head_dim, theta=10000.0, scaling=1.0):
    freqs = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    torch.outer(torch.arange(seq_len) / scaling, freqs)

def rotat(x, c):
    pass

def count_parameters(config):
    raise NotImplementedError
'''


def test_a_students_file_as_she_runs_it(tmp_path):
    """A wrong method, a function that returns nothing, a right one, a blank one, two misspelled
    names, and an initialization of her own, which is no condition. The right function shares checks
    with the wrong ones, and counts nevertheless: in its checks, they are ours."""
    (tmp_path / "ada.py").write_text(ADA)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", f"--impl={tmp_path}/ada.py", "-m", "week2",
         f"--report={tmp_path}/ada.json"], cwd=ROOT, capture_output=True, text=True)
    said = done.stdout
    assert done.returncode == 1
    assert ("replaces model.RMSNorm.forward, model.LLaMA.init_weights, model.LLaMA.train, "
            "model.apply_rope, model.rope_table; all else is ours") in said, said[:2000]
    assert "still blank, so ours are used: model.count_parameters" in said
    assert said.count("not ours, so not tested: RMSNorm.foward, rotat; did you mean "
                      "RMSNorm.forward, rotate?") == 2, "at the beginning, and beside the score"
    assert ("wrong   model.RMSNorm.forward: test_equals_golden_values, "
            "test_rmsnorm_eps_is_inside_the_root\n") in said, said[-2000:]
    assert "wrong   model.rope_table: " in said
    assert "solved  model.apply_rope\n" in said
    assert "1 of 7 exercises, 6 of 21 checks\n" in said, said[-2000:]
    figures = json.loads((tmp_path / "ada.json").read_text())
    assert states(figures)["model.apply_rope"] == "solved" and figures["weeks"] == [2]
    assert states(figures)["model.count_parameters"] == "blank"
    assert "did you mean" in figures["notes"][-1]


@pytest.mark.parametrize("marks", ["weak2", "week22"])
def test_a_misspelled_week_is_an_error(marks):
    """Every test file was imported, and then nothing was run."""
    with pytest.raises(pytest.UsageError, match=f"-m {marks}: there are week1 to week10"):
        configure(impl=["week2.py"], m=marks)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such timer")
def test_an_endless_loop_is_a_failure():
    """Without a limit, the lecturer's time-out ended the whole run, and there was no report."""
    with pytest.raises(pytest.fail.Exception, match="an endless loop"), conftest.time_limit(0.05):
        while True:
            pass


def test_the_file_says_what_self_has():
    """The name of a block's second norm, ffn_norm, was found only beside the solution."""
    last = "    #     self.ffn_norm = RMSNorm(config.dim, config.norm_eps)\n"
    assert f"{last}\n    def forward" in exercises.week_file(2, "")


def configure(**options) -> None:
    """pytest's configuration with these options."""
    options = {"-m": options.pop("m"), **{f"--{name}": value for name, value in options.items()}}
    config = SimpleNamespace(getoption=options.get, addinivalue_line=lambda *_: None)
    conftest.pytest_configure(config)


def test_a_file_that_does_not_import_still_gets_a_report(tmp_path):
    """A grader who reads one report for everybody must find one."""
    (tmp_path / "bob.py").write_text("def f(:\n")
    with pytest.raises(pytest.UsageError):
        configure(impl=[str(tmp_path / "bob.py")], m="week2", report=str(tmp_path / "bob.json"))
    figures = json.loads((tmp_path / "bob.json").read_text())
    assert "SyntaxError" in figures["error"] and figures["solved"] == 0


def test_a_students_file_is_never_overwritten(tmp_path, capsys):
    exercises.main(exercises.ExercisesConfig(out=str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"week{w}.py" for w in WEEKS)
    (tmp_path / "week2.py").write_text("my work")
    (tmp_path / "week3.py").unlink()
    capsys.readouterr()
    for solutions in (False, True):
        exercises.main(exercises.ExercisesConfig(out=str(tmp_path), solutions=solutions))
    assert "kept in" in capsys.readouterr().out
    assert (tmp_path / "week2.py").read_text() == "my work"
    assert "raise NotImplementedError" in (tmp_path / "week3.py").read_text()
    with pytest.raises(UserError, match="weeks 1 to 10"):
        exercises.ExercisesConfig(week=11)


def test_the_table_of_weeks_names_tests_that_exist():
    for week in WEEKS:
        for exercise in WEEKS[week].exercises:
            for test in exercise.tests():
                file, _, name = test.partition("::")
                text = (ROOT / "tests" / file).read_text(encoding="utf-8")
                assert f"\ndef {name}(" in text, f"{exercise.name}: no {test}"
            assert len(exercise.hints) == 3


# -- planted bugs: that the checks of the week find each is held by test_mutants.py ----------------

@pytest.mark.parametrize("week", WEEKS)
def test_every_week_has_bugs_to_find(week, tmp_path, capsys):
    n = len(bugs.bugs_of(week))
    assert n >= 4
    found = set()
    for seed in range(n):
        cfg = bugs.BugsConfig(week, seed, out=str(tmp_path))
        text = (tmp_path / bugs.main(cfg)["path"]).read_text(encoding="utf-8")
        solution = exercises.week_file(week, "", exercises.names(week), bugs.HEADER)
        differ = set(text.splitlines()[6:]) ^ set(solution.splitlines()[6:])
        assert differ, "there is no bug in it"
        compile(text, "bug", "exec")
        found.add(text[200:])
        what = bugs.main(bugs.BugsConfig(week, seed, reveal=True))["what"]
        assert what not in text and what in capsys.readouterr().out
    assert len(found) == n, "two seeds give the same bug"
    (tmp_path / f"bug{week}_0.py").write_text("my notes")
    bugs.main(bugs.BugsConfig(week, 0, out=str(tmp_path)))
    assert (tmp_path / f"bug{week}_0.py").read_text() == "my notes"


# -- plots ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What train_sft.py and train_vlm.py leave behind, with the micro model in every place."""
    run = tmp_path_factory.mktemp("run")
    net, tokenizer, meta = checkpoint.load(MICRO)
    for name in ("base", "vicuna"):
        for p in net.parameters():
            p.data += 0.01 * torch.randn_like(p)
        checkpoint.save(run / name, net, dict(step=1, template=meta["template"]), tokenizer)
        lines = [json.dumps(dict(step=step, loss=3 / (step + 1))) for step in range(60)]
        (run / name / "metrics.jsonl").write_text("\n".join(lines))
    right = dict.fromkeys(("base", "Alpaca", "Vicuna", "no scene"), 0.5)
    table = dict(table=dict(scenes=right, pairs=right, later=right))
    (run / "table.json").write_text(json.dumps(table))
    eyes = small_minigpt4()
    encoder = save_encoder(run / "vision", eyes, data.Tokenizer(tokenizer))
    settings = dict(vision=str(encoder), vision_crc=checkpoint.fingerprint(encoder),
                    llama=str(MICRO), llama_crc=checkpoint.fingerprint(MICRO))
    projection = {name: w for name, w in eyes.state_dict().items() if "llama_proj" in name}
    meta = dict(step=1, template="vicuna_v1.1", settings=settings)
    checkpoint.save(run / "minigpt4", eyes, meta, tokenizer, weights=projection)
    return run


def test_tokens_on_an_axis():
    """A part of a character was drawn as a replacement character, one like the other."""
    tokenizer = data.Tokenizer(checkpoint.load(MICRO)[1])
    texts = plots.texts_of(tokenizer, tokenizer.encode("🙂\n", continues=True))
    assert texts == ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "↵"]


def test_every_plot_is_drawn(run_folder, tmp_path):
    pytest.importorskip("matplotlib")
    done = plots.main(plots.PlotsConfig("all", str(run_folder), str(tmp_path)))
    assert done["written"] == plots.ALL
    for name in plots.ALL:
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert min(pixels.shape) > 200 and pixels.std() > 10, f"{name} is empty"


def test_what_a_plot_lacks_is_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    nowhere = dict(run=str(tmp_path / "nowhere"), out=str(tmp_path))
    monkeypatch.setattr(plots, "ALL", ["masks", "losses"])
    with pytest.raises(UserError, match="nowhere has no metrics.jsonl"):
        plots.main(plots.PlotsConfig("losses", **nowhere))
    assert plots.main(plots.PlotsConfig("all", **nowhere))["written"] == ["masks"]
    assert "left out losses: " in capsys.readouterr().out
    with pytest.raises(UserError, match="choose from all, masks"):
        plots.PlotsConfig("maks")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plots.main(plots.PlotsConfig("all", **nowhere))
