"""No option is silently ignored: each option of each script acts, or is refused by name.

A script runs in each way to call it (a mode): as the mode says, and then with one option at a time
set to another value. What it does is recorded: the batches that reach the network, the weights, the
files, the printed lines. Tiny networks are trained for a few steps. A run ends at the first event
that is not in the mode's record: its option acts. Otherwise it must end with a UserError that names
the option or its value.

To add an option, add another value for it to the table of its script; or a tuple of values, of
which one must act or be refused.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_origin

import pytest
import torch

import data
import judge
import model
import sample
import train_sft
import train_vlm
import vision
from conftest import ROOT, our_modules
from course import bugs, exercises, plots
from recipes import evol_instruct, identity, koala, openassistant, self_instruct, sharegpt
from tools import (
    bench,
    checkpoint,
    config,
    convert,
    estimate,
    evaluate,
    machine,
    quantize,
    show,
    teacher,
    web,
)
from toy import claims, exam, instruct, pictures, probe, world

MICRO = ROOT / "tests" / "micro"


class Script(NamedTuple):
    config: type
    main: Callable
    modes: dict[str, dict]  # options; with copy=[...], files that are put into HERE; torchrun=True
    others: dict  # for each option another value, or several in a tuple
    spies: Callable | None = None  # what to note of a run
    prints: bool = True  # note also what it prints, returns and writes


SCRIPTS: dict[str, Script] = {}


# -- recording a run ------------------------------------------------------------------------------

class Differs(BaseException):  # so that no `except Exception` swallows it
    pass


class Record:
    """The events of a run as text. Raises Differs after the first one that is not in `expected`."""

    def __init__(self, patch: pytest.MonkeyPatch, here: Path, expected: list | None):
        self.patch, self.here, self.expected = patch, here, expected
        self.events: list[str] = []

    def note(self, *event) -> None:
        at = len(self.events)
        self.events.append(repr(event).replace(str(self.here), "HERE"))
        if self.expected is not None and self.expected[at:at + 1] != self.events[at:]:
            raise Differs

    def spy(self, owner, name: str, event: Callable = lambda *given: given,
            instead: Callable | None = None) -> None:
        """Notes each call of owner.name as event(*arguments), and makes it, or another one."""
        call = instead or getattr(owner, name)

        def noted(*args, **options):
            self.note(name, event(*args, **options))
            return call(*args, **options)

        self.patch.setattr(owner, name, noted)


def digest(*parts) -> str:
    """Identifies tensors, and anything that prints the same when it is the same."""
    key = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().float().cpu().numpy().tobytes()
        key.update(repr(part).encode())
    return key.hexdigest()[:12]


# what torchrun sets for a single process
TORCHRUN = dict(TORCHELASTIC_RUN_ID="test", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1",
                MASTER_ADDR="localhost", MASTER_PORT="0")


def run(script: Script, options: dict, files: Path, expected: list | None = None,
        again: bool = False) -> list | str:
    """The events of a run in a new folder, or of a second run there, up to the first one that is
    not expected; or the message of a UserError."""
    here, options = Path(tempfile.mkdtemp(dir=files.parent)), dict(options)
    for name in options.pop("copy", ()):
        shutil.copytree(files / name, here / name)
    for name, value in options.items():
        if isinstance(value, str):
            options[name] = value.replace("FILES", str(files)).replace("HERE", str(here))
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        if options.pop("torchrun", False):
            for name, value in TORCHRUN.items():
                patch.setenv(name, value)
        try:
            if again:
                run_once(script, options, here, None)
            return run_once(script, options, here, expected)
        except config.UserError as error:
            return str(error)


def run_once(script: Script, options: dict, here: Path, expected: list | None) -> list:
    printed = io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed),
          contextlib.suppress(Differs)):
        record = Record(patch, here, expected)
        if script.spies:
            script.spies(record)
        result = script.main(script.config(**options))
        if script.prints:
            files = sorted(path for path in here.rglob("*") if path.is_file())
            written = [(path, digest(path.read_bytes())) for path in files]
            record.note(printed.getvalue(), result, written)
    return record.events


# -- files that the scripts read; FILES and HERE in the tables are two folders --------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    files, rng = tmp_path_factory.mktemp("options") / "files", random.Random(0)
    files.mkdir()
    write_lines(files, "chats.jsonl", [json.dumps(world.conversation(rng)) for _ in range(48)])
    write_lines(files, "text.txt", [world.document(rng) for _ in range(40)])
    quiz = [dict(question=f"{name} lives in", choices=world.TOWNS, answer=i % 8)
            for i, name in enumerate(world.PEOPLE[:12])]
    write_lines(files, "quiz.jsonl", [json.dumps(record) for record in quiz])
    for name in ("album", "other_album"):
        scenes = [world.pick_scene(rng) for _ in range(8)]
        drawn = [pictures.draw(scene, rng, 16) for scene in scenes]
        pictures.write_album(files / name, drawn, [world.caption(scene) for scene in scenes])
    write_checkpoints(files)
    write_files_for_judges(files)
    write_files_for_recipes(files)
    return files


def write_lines(files: Path, name: str, lines: list[str]) -> None:
    """Half of the lines in a file, and half of them in other_NAME."""
    (files / name).write_text("\n".join(lines[0::2]), encoding="utf-8")
    (files / f"other_{name}").write_text("\n".join(lines[1::2]), encoding="utf-8")


TINY = dict(dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_seq_len=512)
VIT = dict(image_size=16, patch_size=8, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
QFORMER = dict(vision_dim=16, dim=16, n_layers=1, n_heads=2, hidden_dim=16, n_queries=10)


def write_checkpoints(files: Path) -> None:
    """Language models, encoders, and what stage 1 leaves."""
    def save(name: str, net, template: str = "plain") -> None:
        meta = dict(step=1, template=template, settings={}, finished=True)
        checkpoint.save(files / name, net, meta, MICRO / "tokenizer.model")

    torch.manual_seed(0)
    for name, width in (("base", 16), ("wide", 32)):  # only wide matrices can be quantized
        sizes = model.LLaMAConfig(**{**TINY, "dim": width, "hidden_dim": width}, vocab_size=512)
        save(name, model.LLaMA(sizes), "vicuna_v1.1")
        save(f"other_{name}", model.LLaMA(sizes))
    for name in ("vision", "other_vision"):
        sizes = vision.ViTConfig(**VIT), vision.QFormerConfig(**QFORMER), ["nothing"]
        save(name, train_vlm.VisionPretrainer(train_vlm.PretrainerConfig(*sizes)))
    stage_1 = dict(PHOTOS, stage="1", vision="FILES/vision")
    run(SCRIPTS["train_vlm"], dict(stage_1, out="FILES"), files)
    # the photos' recipe begins with a projection of zeros: it would see nothing
    run(SCRIPTS["train_vlm"], dict(stage_1, out="FILES/published", recipe="published"), files)
    lines = (files / "text.txt").read_text(encoding="utf-8").splitlines()
    data.train_tokenizer(lines, 600, files / "large.model")


def write_files_for_judges(files: Path) -> None:
    """Prompts, and two folders with a finished run, each with its questions and answers."""
    text = (ROOT / "assets" / "prompts.jsonl").read_text(encoding="utf-8")
    (files / "prompts.jsonl").write_text(text.replace("[Question]", "[The Question]"),
                                         encoding="utf-8")
    for name, swap in (("judged", True), ("other_judged", False)):
        run(SCRIPTS["judge"], dict(players="noisy,oracle", out=f"FILES/{name}", swap=swap), files)
    text = (files / "judged" / "question.jsonl").read_text(encoding="utf-8")
    (files / "question.jsonl").write_text(text.replace("generic", "math"), encoding="utf-8")


def write_files_for_recipes(files: Path) -> None:
    """What Koala, OpenAssistant and Self-Instruct read."""
    pair = dict(chosen="\n\nHuman: Why?\n\nAssistant: Good.",
                rejected="\n\nHuman: Why?\n\nAssistant: Bad.")
    write_lines(files, "hh.jsonl", [json.dumps(pair)])
    write_lines(files, "trees.jsonl", [json.dumps(tree(i)) for i in range(12)])
    tasks = "Name three primary colors of light", "Explain how rain is formed in clouds"
    texts = [f"1. Instruction: {task}\n1. Input:\n1. Output: Yes." for task in tasks]
    completions = [dict(choices=[dict(text=text)]) for text in texts]
    write_lines(files, "completions.jsonl", [json.dumps(c) for c in completions])
    write_lines(files, "seeds.jsonl", [json.dumps(task) for task in instruct.seed_tasks(0)])
    prompts = {name: text + " Go." for name, text in evol_instruct.PROMPTS.items()}
    (files / "evol.json").write_text(json.dumps(prompts), encoding="utf-8")


def tree(i: int) -> dict:
    """An OpenAssistant tree: a question with two ranked replies."""
    replies = [dict(message_id=f"{i}{name}", role="assistant", text=f"{name} {i}", rank=rank)
               for rank, name in enumerate(("first", "second"))]
    root = dict(message_id=f"{i}", role="prompter", text=f"question {i}", replies=replies)
    return dict(message_tree_id=f"{i}", tree_state="ready_for_export", prompt=root)


# -- train_sft.py and train_vlm.py: they train for a few steps ------------------------------------

def about_step(net, parts, machine):
    """The weights show what the optimizer and the schedule did in the steps before."""
    llama = train_sft.language_model(net)
    fused = [block.attention.fused for block in getattr(llama, "layers", [])]
    weights = [p.to_local() if hasattr(p, "to_local") else p for p in net.parameters()]
    batch = [None if t is None else (t.shape, digest(t)) for part in parts for t in part]
    return batch, llama.checkpointing, fused, digest(*weights), machine.dtype


def about_save(folder, net, meta, path, *_, **__):
    return folder, meta["step"], meta["template"], digest(path.read_bytes())


def train_briefly(net, rows, cfg, *args, train=train_sft.train):
    return train(net, rows, dataclasses.replace(cfg, steps=min(cfg.steps, 4)), *args)


def copy_tokenizer(lines, vocab_size, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(MICRO / "tokenizer.model", path)
    return data.Tokenizer(path)


def spy_on_training(record: Record) -> None:
    def choose_cpu(device, dtype, patience=30.0, choose_machine=machine.choose_machine):
        return choose_machine("cpu", dtype, patience)

    spy = record.spy
    record.patch.setattr(machine, "measure_peak", lambda *_: 1e9)
    record.patch.setattr(checkpoint, "flush_to_disk", lambda path: None)
    for module in (train_sft, train_vlm):
        spy(module, "choose_machine", lambda device, dtype, *_: (device, dtype), choose_cpu)
    spy(torch.distributed, "init_process_group", lambda *_, timeout, **__: timeout)
    spy(train_sft, "train", lambda net, rows, cfg, *_: cfg.steps, train_briefly)
    spy(train_sft, "loss_backward", about_step)
    spy(torch.nn.Module, "compile", lambda net: type(net).__name__, lambda *_: None)
    spy(torch, "set_num_threads", instead=lambda *_: None)
    spy(data, "train_tokenizer", lambda lines, *rest: (digest(list(lines)), rest), copy_tokenizer)
    spy(checkpoint, "save", about_save)


TOY_SIZES = dict(documents=40, instructions=30, conversations=30, base=4, alpaca=4, vicuna=4,
                 equal=2, questions=3)


def spy_on_sft(record: Record) -> None:
    spy_on_training(record)
    patch = record.patch.setattr
    record.patch.setitem(model.PRESETS, "toy", TINY)
    record.patch.setitem(model.PRESETS, "small", dict(TINY, dim=32))
    patch(train_sft, "TOY", TOY_SIZES)
    patch(train_sft, "FAST", dict(TOY_SIZES, documents=35, questions=2))
    record.spy(exam, "run_toy_exam", lambda models, tokenizer, files, *rest: rest, lambda *_: {})
    for name in ("print_watched_question", "watcher"):  # they take a quarter of the time
        patch(exam, name, lambda *_: None)


CHATS = "FILES/chats.jsonl"
SFT_MODE = dict(out="HERE", batch_size=4)
SCRIPTS["train_sft"] = Script(train_sft.SFTConfig, train_sft.main, {
    "toy chain": SFT_MODE,
    "text": dict(SFT_MODE, data="FILES/text.txt", seq_len=64),
    "conversations with a base": dict(SFT_MODE, data=CHATS, copy=["base"]),
    "conversations alone": dict(SFT_MODE, data=CHATS),
    "torchrun": dict(SFT_MODE, data=CHATS, init="FILES/base", torchrun=True),
}, dict(
    stage=("pretrain", "sft"),  # "all" does what one of them does
    data=("FILES/other_text.txt", "FILES/other_chats.jsonl"),
    epochs=60.0,  # a small file gets 200 steps at least
    optimizer=("adamw", "muon"),  # "auto" is one of them
    resume="never",
    out="HERE/elsewhere", init="FILES/other_base", tokenizer="FILES/other_base", template="koala",
    preset="small", vocab_size=500, seq_len=200, batch_size=2, micro_batch=1, steps=5,
    learning_rate=0.5, warmup=0.9, min_lr=0.7, weight_decay=0.6, beta2=0.5, clip=1e-3, lora_rank=2,
    checkpointing=True, compile=True, fused=False, dtype="bfloat16", device="cuda", seed=7,
    save_minutes=1e-9, fast=True, full=True, patience=2.0, threads=2,
), spy_on_sft, prints=False)


TOY_PICTURES = dict(alt=6, curate=4, questions=2)


def spy_on_vlm(record: Record) -> None:
    """The encoder and the projection are trained as above; generation is replaced, and each
    description counts as true."""
    def press_enter(prompt):
        record.note("asked the user")
        return ""

    def about_questions(net, vlm, questions, features, *limit):
        shown = None if features is None else digest(features)
        return questions, shown, vlm.template, limit, digest(vlm.llama.output.weight)

    def ask(net, vlm, questions, features, *limit):
        text = "There is a small red ring at center, a star, a moon, a cross, a square, a circle."
        return [text] * len(questions), [True] * len(questions)

    spy_on_training(record)
    patch = record.patch.setattr
    for steps, recipe in enumerate(train_vlm.RECIPES.values(), 4):
        for stage in recipe:
            short = {**recipe[stage], "steps": steps, "batch_size": 2}
            record.patch.setitem(recipe, stage, short)
    for name in ("toy", "photos"):
        record.patch.setitem(vision.PRESETS, name, (VIT, QFORMER))
    patch(exam, "TOY", TOY_PICTURES)
    patch(exam, "FAST", dict(TOY_PICTURES, alt=5))
    patch(exam, "exact", lambda scene, description: True)
    record.spy(train_vlm, "caption_repairer", instead=lambda *given: list)
    record.spy(train_vlm, "ask", about_questions, ask)
    patch("builtins.input", press_enter)


VLM_MODE = dict(out="HERE", init="FILES/base")
PHOTOS = dict(VLM_MODE, images="FILES/album")
SCRIPTS["train_vlm"] = Script(train_vlm.VLMConfig, train_vlm.main, {
    "toy pictures": VLM_MODE,
    "photos": PHOTOS,
    "toy stage 0": dict(VLM_MODE, stage="0"),
    "toy stage 1": dict(VLM_MODE, stage="1"),
    "toy curation": dict(VLM_MODE, stage="curate"),
    "toy stage 2": dict(VLM_MODE, stage="2"),
    "photos stage 0": dict(PHOTOS, stage="0"),
    "photos stage 1": dict(PHOTOS, stage="1"),
    "photos stage 2": dict(PHOTOS, stage="2", vision="FILES/vision", copy=["align"]),
    "torchrun": dict(PHOTOS, stage="1", vision="FILES/vision", torchrun=True),
}, dict(
    stage=("2", "curate"), images="FILES/other_album",
    recipe=("toy", "photos", "published"),  # "auto" is one of them
    resume="never",
    init="FILES/other_base", vision="FILES/other_vision", out="HERE/elsewhere",
    teacher="gpt@http://localhost/v1", review=True, steps=9, batch_size=1, learning_rate=0.5,
    micro_batch=1, checkpointing=True, dtype="bfloat16", device="cuda", seed=7, save_minutes=1e-9,
    fast=True, full=True, threads=2,
), spy_on_vlm, prints=False)


# -- sample.py ------------------------------------------------------------------------------------

def spy_on_sample(record: Record) -> None:
    def about_picture(net, *args, images=None, **options):
        return None if images is None else digest(images)

    def served(chat, host, port):
        about = {**web.Service(chat).model, "created": 0}
        return about, chat.cfg.seed, host, port

    record.spy(vision, "load", lambda *args, **options: (args, options))
    record.spy(model.LLaMA, "generate", about_picture)
    record.spy(web, "serve", served, instead=lambda *_: None)
    record.spy(torch, "set_num_threads", instead=lambda *_: None)
    record.patch.setattr("sys.stdin", io.StringIO("What is this?\n/retry\n"))
    record.patch.setattr(sample.time, "perf_counter", lambda: 0.0)  # it prints tokens per second


SAMPLE_MODE = dict(ckpt=str(MICRO), max_new_tokens=8)
SCRIPTS["sample"] = Script(sample.SampleConfig, sample.main, {
    "greedy": dict(SAMPLE_MODE, prompt="Hi"),
    "sampling": dict(SAMPLE_MODE, prompt="Hi", temperature=2.0),
    "chat": SAMPLE_MODE,
    "web": dict(SAMPLE_MODE, web=True),
    "about a picture": dict(SAMPLE_MODE, ckpt="FILES/published/align", prompt="Hi",
                            image="FILES/album/image/0.png"),
}, dict(
    ckpt="FILES/other_base", image="FILES/album/image/1.png",
    prompt="Who are you?", template="koala", max_new_tokens=6, temperature=1.0, top_k=3, top_p=0.6,
    repetition_penalty=1.9, seed=7, device="cuda", dtype="float32", quantize="q8",
    threads=2, web=(True, False), host="0.0.0.0", port=8001,
), spy_on_sample)


# -- scripts that print and write: they run as they are -------------------------------------------

SCRIPTS["show"] = Script(show.ShowConfig, show.show, {
    "tokens": dict(file=CHATS, tokenizer="FILES/base"),
    "losses": dict(file=CHATS, ckpt="FILES/base"),
    "page": dict(file=CHATS, tokenizer="FILES/base", html="HERE/page.html"),
}, dict(file="FILES/other_chats.jsonl", tokenizer="FILES/large.model", template="koala",
        ckpt="FILES/other_base", html="HERE/other.html", count=3, seed=7))
SCRIPTS["stats"] = Script(show.StatsConfig, show.stats, {
    "stats": dict(file=CHATS, tokenizer="FILES/base"),
}, dict(file="FILES/other_chats.jsonl", tokenizer="FILES/large.model", template="koala"))
SCRIPTS["world"] = Script(world.WorldConfig, world.main, {
    "texts": {}, "questions": dict(split="names"), "facts": dict(facts="HERE/facts.jsonl"),
}, dict(split="pairs", count=3, seed=7, facts="HERE/other.jsonl"))
SCRIPTS["pictures"] = Script(pictures.PicturesConfig, pictures.main, {
    "album": dict(out="HERE/album", count=3, size=16),
}, dict(out="HERE/other", split="more", count=4, size=24, seed=7))
SCRIPTS["check"] = Script(convert.CheckConfig, convert.check, {
    "check": dict(ckpt=str(MICRO), data=CHATS),
}, dict(ckpt="FILES/other_base", data="FILES/other_chats.jsonl"))
SCRIPTS["gguf"] = Script(quantize.GGUFConfig, quantize.main, {
    "write": dict(ckpt="FILES/wide", out="HERE/wide.gguf"),
}, dict(ckpt="FILES/other_wide", out="HERE/a.gguf", type="q8"))


SCRIPTS["estimate"] = Script(estimate.EstimateConfig, estimate.main, {
    "sizes": {}, "training": dict(preset="7B", gpus=8),
}, dict(preset="13B", vocab_size=500, gpus=4, gpu="H200", seq=512, batch=3, tokens=1e6, mfu=0.3,
        price=9.0))


def spy_on_evaluate(record: Record) -> None:
    record.spy(vision, "load", lambda *args, **options: (args, options))
    record.spy(evaluate, "scores", lambda net, item, rows: (item.normalize, rows))


SCRIPTS["evaluate"] = Script(evaluate.EvaluateConfig, evaluate.main, {
    "quiz": dict(file="FILES/quiz.jsonl", ckpt="FILES/wide"),
}, dict(file="FILES/other_quiz.jsonl", ckpt="FILES/other_wide", shots=2, normalize="answer",
        device="cuda", dtype="bfloat16", quantize="q8"), spy_on_evaluate)


def spy_on_exam(record: Record) -> None:
    record.patch.setattr(machine, "measure_peak", lambda *_: 1e9)
    record.patch.setattr(exam, "ALL_ROWS", exam.SHORT_ROWS)
    record.spy(vision, "load", lambda *args, **options: (args, options))
    record.spy(probe, "probe", instead=lambda out, n: {})


SCRIPTS["exam"] = Script(exam.ExamConfig, exam.main, {
    "exam": dict(ckpts=str(MICRO), questions=1), "probe": dict(probe=True),
}, dict(ckpts="FILES/base", probe=(True, False), out="HERE/other", questions=2), spy_on_exam)


def spy_on_instruct(record: Record) -> None:
    record.patch.setattr(machine, "measure_peak", lambda *_: 1e9)
    record.spy(train_sft, "fine_tune", lambda cfg, *rest: (cfg, rest), lambda *_: None)
    record.spy(instruct, "right_answers", lambda net, tokenizer, *rest: rest, lambda *_: 0.5)


SCRIPTS["instruct"] = Script(instruct.InstructConfig, instruct.main, {
    "chain": dict(base="FILES/base", out="HERE/instruct", count=20, records=40, rounds=2),
    "seeds": dict(seeds="HERE/seeds.jsonl"),
}, dict(seeds="HERE/other.jsonl", base="FILES/other_base", out="HERE/other", count=10, records=30,
        rounds=1, steps=3, questions=5, seed=7), spy_on_instruct)


def spy_on_claims(record: Record) -> None:
    """A claim that asks its lab for nothing, and has its results at once."""
    def measure(lab, results):
        record.note(lab.out, lab.run, lab.seed, lab.fast, lab.sizes)
        results.add("a", right=0.5, questions=10)
        results.add("b", right=0.4, questions=10)

    record.patch.setattr(machine, "measure_peak", lambda *_: 1e9)
    for name in ("lora", "judge"):
        about = claims.CLAIMS[name]._replace(
            measure=measure, columns=dict(right="right, %"),
            comparisons=[claims.Comparison("a", "b")])
        record.patch.setitem(claims.CLAIMS, name, about)


SCRIPTS["claims"] = Script(claims.ClaimsConfig, claims.main, {
    "list": {}, "claim": dict(name="lora", run="FILES", out="HERE/claims"),
}, dict(name="judge", seeds=2, fast=True, run="HERE", out="HERE/other"), spy_on_claims)


# -- tools/bench.py: nothing is timed -------------------------------------------------------------

def spy_on_bench(record: Record) -> None:
    spy, patch = record.spy, record.patch.setattr

    def about_batch(net, optimizer, batch, here):
        return [None if t is None else (t.shape, digest(t)) for t in batch]

    spy(bench, "choose_machine")
    spy(bench, "make_network", instead=lambda *_: (None, None))
    spy(bench, "train_step", about_batch, lambda *_: 1.0)
    patch(machine, "measure_peak", lambda *_: 1e9)
    patch(bench, "measure_alone", bench.measure)
    patch(bench, "mean_loss", lambda *_: 1.0)
    patch(bench, "reset_peak", lambda device: None)
    patch(bench, "peak_memory", lambda device: 0)


BENCH_MODE = dict(rows=4, steps=2, seq_len=128, vocab_size=900, dim=64, n_layers=1)
BENCH_OTHERS = dict(
    dim=128, n_layers=2, vocab_size=950, seq_len=100, rows=3, steps=3,
    data="FILES/other_chats.jsonl", checkpointing=True, compile=True, dtype="bfloat16",
    device="cuda")
for main, mode in ((bench.ladder, dict(BENCH_MODE, data=CHATS)),
                   (bench.peer, dict(BENCH_MODE, data=CHATS)), (bench.step, BENCH_MODE)):
    SCRIPTS[main.__name__] = Script(bench.BenchConfig, main, {"bench": mode}, BENCH_OTHERS,
                                    spy_on_bench, prints=False)
SCRIPTS["quality"] = Script(bench.QualityConfig, bench.quality, {
    "toy": dict(ckpt="FILES/wide", questions=3),
    "data": dict(ckpt="FILES/wide", data="FILES/text.txt"),
}, dict(ckpt="FILES/other_wide", data="FILES/other_text.txt", questions=2))


def spy_on_speed(record: Record) -> None:
    small = dict(dim=64, n_heads=2, n_kv_heads=1, hidden_dim=64, norm_eps=1e-5)
    record.patch.setattr(bench, "SHAPE", small)
    record.patch.setattr(bench, "transformers_stream", lambda *_: iter([None]))
    record.spy(bench, "save_random_weights", lambda scratch, n_layers: n_layers)
    record.spy(bench.convert, "load", lambda folder, *rest, **options: (
        "random" if "tmp" in folder.name else folder.name, rest, options))
    record.spy(bench, "race", list, lambda racers: dict.fromkeys(racers, 1.0))


SCRIPTS["speed"] = Script(bench.SpeedConfig, bench.speed, {
    "checkpoint": dict(ckpt="FILES/wide"),
    "random": dict(n_layers=1),
}, dict(ckpt="FILES/other_wide", n_layers=2), spy_on_speed, prints=False)


# -- teachers and the judge: replies come from a stand-in -----------------------------------------

def spy_on_teachers(record: Record, reply: str = "9 8") -> None:
    class StandIn:
        """Instead of a server or a checkpoint."""
        why = ""

        def __init__(self, spec, *settings):
            self.name = f"{spec.split('@')[0].split('/')[-1]} {settings}"
            record.note("teacher", spec, settings)

        def __call__(self, conversations, keep=None):
            record.note("asked", digest(conversations))
            replies = [teacher.Reply(reply, True) for _ in conversations]
            for i, given in enumerate(replies):
                if keep:
                    keep(i, given)
            return replies

    record.patch.setattr(teacher, "Server", StandIn)
    record.patch.setattr(teacher, "Checkpoint", StandIn)
    record.patch.setattr("builtins.input", lambda prompt: "1")


ANSWERS = "FILES/judged/answer/answer_noisy.jsonl,FILES/judged/answer/answer_oracle.jsonl"
SCRIPTS["judge"] = Script(judge.JudgeConfig, judge.main, {
    "toy": dict(out="HERE/judge", players="noisy,oracle"),
    "models": dict(out="HERE/judge", players=f"gpt@http://localhost/v1,{ANSWERS}",
                   judge="FILES/base", questions="FILES/judged/question.jsonl"),
}, dict(
    questions="FILES/question.jsonl", players="FILES/other_base,noisy,oracle", judge="first",
    swap=False, prompts="FILES/prompts.jsonl", out="HERE/other", temperature=0.3,
    max_new_tokens=9, quantize="q8", seed=7,
), spy_on_teachers)
RUNS = ["judged", "other_judged"]
SCRIPTS["rate"] = Script(judge.RateConfig, judge.rate, {
    "rate": dict(a="noisy", b="oracle", out="HERE/judged", copy=RUNS),
}, dict(a="oracle", b="noisy", out="HERE/other_judged", rater="anna"), spy_on_teachers)
SCRIPTS["report"] = Script(judge.ReportConfig, judge.report_files, {
    "report": dict(folder="HERE/judged", copy=RUNS),
}, dict(folder="HERE/other_judged"))


# -- recipes --------------------------------------------------------------------------------------

SCRIPTS["clean"] = Script(sharegpt.CleanConfig, sharegpt.clean_file, {
    "clean": dict(file=CHATS, out="HERE/clean.json"),
}, dict(file="FILES/other_chats.jsonl", out="HERE/other.json", blocked="circle", language="de"))
SCRIPTS["split"] = Script(sharegpt.SplitConfig, sharegpt.split_file, {
    "split": dict(file=CHATS, out="HERE/split.json", seq_len=256, tokenizer="FILES/base"),
}, dict(file="FILES/other_chats.jsonl", out="HERE/other.json", seq_len=200,
        tokenizer="FILES/large.model", template="koala"))
SCRIPTS["koala"] = Script(koala.Config, koala.main, {
    "mix": dict(files=f"{CHATS}:2,FILES/hh.jsonl", out="HERE/mix.json"),
}, dict(files=f"{CHATS}:3", out="HERE/other.json", rejected=True, seed=7))
SCRIPTS["openassistant"] = Script(openassistant.Config, openassistant.main, {
    "trees": dict(file="FILES/trees.jsonl", out="HERE/oasst.json", valid=0.5),
}, dict(file="FILES/other_trees.jsonl", out="HERE/other.json", pick="best", valid=0.25))
LIST = "Say what you see.\n4. Input:\n4. Output: Nothing."
SERVER = "gpt@http://localhost/v1"
SCRIPTS["self_instruct"] = Script(self_instruct.Config, self_instruct.main, {
    "parse": dict(file="FILES/completions.jsonl", out="HERE/alpaca.json"),
    "oracle": dict(seeds="FILES/seeds.jsonl", teacher="oracle", count=9, out="HERE/alpaca.json"),
    "server": dict(seeds="FILES/seeds.jsonl", teacher=SERVER, out="HERE/alpaca.json"),
}, dict(file="FILES/other_completions.jsonl", seeds="FILES/other_seeds.jsonl", count=1,
        teacher="FILES/base", out="HERE/other.json", temperature=0.3, max_new_tokens=9, seed=7),
    lambda record: spy_on_teachers(record, LIST))
SCRIPTS["evol_instruct"] = Script(evol_instruct.Config, evol_instruct.main, {
    "oracle": dict(file="FILES/seeds.jsonl", teacher="oracle", rounds=2, out="HERE/evol.json"),
    "server": dict(file="FILES/seeds.jsonl", teacher=SERVER, rounds=2, out="HERE/evol.json"),
}, dict(file="FILES/other_seeds.jsonl", teacher="FILES/base", rounds=1, out="HERE/other.json",
        prompts="FILES/evol.json", temperature=0.3, max_new_tokens=9, seed=7), spy_on_teachers)
SCRIPTS["identity"] = Script(identity.Config, identity.main, {
    "make": dict(out="HERE/identity.json"),
}, dict(name="Eva", maker="a school", out="HERE/other.json"))


# -- the course -----------------------------------------------------------------------------------

SCRIPTS["exercises"] = Script(exercises.ExercisesConfig, exercises.main, {
    "blank": dict(out="mine", week=2),
}, dict(out="other", week=3, solutions=True))
SCRIPTS["bugs"] = Script(bugs.BugsConfig, bugs.main, {
    "bug": dict(out="mine"),
}, dict(week=3, seed=1, reveal=True, out="other"))
SCRIPTS["plots"] = Script(plots.PlotsConfig, plots.main, {
    "of a model": dict(name="chips", run="FILES/base", out="HERE/plots"),
}, dict(name="rope", run="FILES/other_base", out="HERE/other"))


# -- the tests ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, mode", [(n, mode) for n, s in SCRIPTS.items() for mode in s.modes])
def test_no_option_is_ignored(name, mode, files):
    script = SCRIPTS[name]
    given, ignored = script.modes[mode], []
    plain = run(script, given, files)
    assert isinstance(plain, list), f"the mode itself is refused: {plain}"
    assert run(script, given, files, plain) == plain, "any option would seem to act"
    for option, others in script.others.items():
        others = others if isinstance(others, tuple) else (others,)
        again = option == "resume"  # there must be something to resume
        expected = run(script, given, files, again=True) if again else plain
        ends = [run(script, {**given, option: other}, files, expected, again) for other in others]
        if all(is_ignored(option, other, end, expected) for other, end in zip(others, ends)):
            messages = [end for end in ends if isinstance(end, str)]
            ignored.append((option, others, messages))
    assert not ignored


def is_ignored(option: str, value, end: list | str, expected: list) -> bool:
    """Whether a run ended as without this option, or by a message that does not name it."""
    if isinstance(end, list):
        return end == expected
    words = [f"--{option}", "model cannot see"]  # which is clear without the name of --image
    if isinstance(value, str):
        words.append(Path(value).name)
    return not any(word in end for word in words)


def command_lines() -> dict[str, type]:
    """The dataclasses that stand in the last lines of our files, where scripts start."""
    found, modules = {}, our_modules()
    for name, module in modules.items():
        code = Path(module.__file__).read_text(encoding="utf-8")
        last_lines = code.partition('\nif __name__ == "__main__":')[2]
        names = dict(vars(module))
        for imported in re.findall(r"from (\S+) import", last_lines):
            names.update(vars(modules[imported]))
        for word in re.findall(r"\w+", last_lines):
            if dataclasses.is_dataclass(names.get(word)):
                found[f"{name}.{word}"] = names[word]
    return found


@pytest.mark.parametrize("name, cls", command_lines().items())
def test_every_option_is_explained_and_in_the_table(name, cls):
    """The comment beside a field is its --help. Of a type like `int | None`, parse_value could not
    make a value. An option that nobody added here would not be tested."""
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    comments = config.comments(cls)
    for option, kind in fields.items():
        assert comments.get(option, "").strip(), f"no comment beside {option}"
        assert kind in (bool, int, float, str) or get_origin(kind) is Literal, option
    scripts = [script for script in SCRIPTS.values() if script.config is cls]
    assert scripts, f"{name} is not in SCRIPTS"
    for script in scripts:
        assert script.others.keys() == fields.keys()
