"""Tests of train_vlm.py, and of a chat about pictures. The language model is the committed micro one.

    pytest tests/test_vlm.py
"""

import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import data
import model
import sample
import teacher
import toy
import train_sft
import train_vlm
import vision
from conftest import ROOT
from test_teacher import fake  # noqa: F401  the fixture

MICRO = ROOT / "tests" / "micro"
VIT = dict(image_size=16, patch_size=8, dim=32, n_layers=1, n_heads=2, hidden_dim=32)
QFORMER = dict(vision_dim=32, dim=32, n_layers=1, n_heads=2, hidden_dim=32, n_queries=3)
MACHINE = train_sft.Machine("cpu", torch.float32, "a test", 1e9)


@pytest.fixture(scope="module")
def speech():
    return open_job(train_vlm.VLMConfig(init=str(MICRO)))


def open_job(cfg) -> train_vlm.Job:
    return train_vlm.open_job(cfg, MACHINE)


def eyes(speech) -> vision.MiniGPT4:
    """The micro language model with small random eyes: always the same ones."""
    torch.manual_seed(7)
    vit, qformer = vision.ViT(vision.ViTConfig(**VIT)), vision.QFormer(vision.QFormerConfig(**QFORMER))
    for p in [*vit.parameters(), *qformer.parameters()]:
        torch.nn.init.normal_(p, std=0.3)
    return vision.MiniGPT4(model.load(MICRO)[0], vit, qformer).eval()


@pytest.fixture
def encoder(tmp_path, speech):
    """A folder as stage 0 leaves it behind."""
    net = eyes(speech)
    sight = train_vlm.Sight(train_vlm.SightConfig(net.vit.config, net.qformer.config, ["nothing", "a"]))
    sight.vit, sight.qformer = net.vit, net.qformer
    meta = dict(step=1, template="vicuna_v1.1", settings={})
    return model.save(tmp_path / "vision", sight, meta, speech.tokenizer.path).parent


@pytest.fixture
def album(tmp_path):
    """Six toy pictures with short captions."""
    scenes = [toy.pick_scene(random.Random(i)) for i in range(6)]
    toy.write_album(tmp_path / "album", [toy.draw(s, random.Random(0), 16) for s in scenes],
                    [toy.caption(s) for s in scenes])
    return tmp_path / "album"


def settings(tmp_path, **more) -> train_vlm.VLMConfig:
    return train_vlm.VLMConfig(**{**dict(init=str(MICRO), vision=str(tmp_path / "vision"), out=str(tmp_path), steps=3,
                                         batch_size=2, learning_rate=1e-2), **more})


# -- albums --------------------------------------------------------------------------------------------------

def annotate(folder: Path, annotations, name: str = "filter_cap.json") -> Counter:
    (folder / name).write_text(json.dumps(annotations))
    report = Counter()
    return train_vlm.load_album(folder, report), +report


def test_what_is_wrong_with_an_album_is_counted(album, capsys):
    found, report = annotate(album, [
        dict(image_id=1, caption="one"), dict(image_id="2", caption="two ### </s> <ImageHere> <Img>\x07!"),
        dict(image_id="99", caption="not there"), dict(image_id="3", caption="  "), dict(image_id="4", caption="..."),
        dict(image_id="5"), dict(caption="nameless"), "no record", dict(image_id="5.png", caption="five")])
    assert [(c.path.name, c.caption.split()) for c in found] == [
        ("1.png", ["one"]), ("2.png", ["two", "!"]), ("5.png", ["five"])]
    assert report == {"left out: no such picture": 3, "left out: no caption": 3, "mended: a caption with control text": 1}
    assert "3 pictures are missing, such as 99" in capsys.readouterr().out


@pytest.mark.parametrize("annotations, name", [
    (dict(annotations=[dict(image_id="0", caption="zero")]), "filter_cap.json"),
    ([dict(image_id="0", caption="zero")], "filter_cap.json"), ({"0.png": "zero"}, "captions.json"),
    ([dict(file_name="image/0.png", caption="zero")], "captions.json"),
    ([dict(image="0.png", caption="zero")], "captions.json")])
def test_layouts(album, annotations, name):
    (album / "filter_cap.json").unlink()
    found, report = annotate(album, annotations, name)
    assert [(c.path.name, c.caption) for c in found] == [("0.png", "zero")] and not report


def test_an_album_without_pictures(album, tmp_path):
    with pytest.raises(config.Problem, match="none of 1 annotations is usable .*no such picture: 1"):
        annotate(album, [dict(image_id="99", caption="not there")])
    with pytest.raises(config.Problem, match="no filter_cap.json or captions.json"):
        train_vlm.load_album(tmp_path, Counter())
    with pytest.raises(config.Problem, match="is no folder"):
        train_vlm.load_album(tmp_path / "none", Counter())


# -- what is learned of a picture and its caption ------------------------------------------------------------

def test_stage_1_sequence(speech):
    """<s>, the picture, a caption in lower case without punctuation, a newline: all of the text is learned."""
    e = train_vlm.alt_example("A Red  circle, and (maybe) more!", 3, speech.tokenizer)
    want = speech.tokenizer.encode("a red circle, and maybe more\n")
    assert e.tokens == [1, -1, -1, -1] + want and e.labels == [-100] * 4 + want
    assert speech.tokenizer.decode(e.tokens[-1:]) == "\n"
    long = train_vlm.alt_example("word " * 90, 3, speech.tokenizer)
    assert len(long.tokens) == 4 + 32
    behind = train_vlm.alt_example("A Red  circle, and (maybe) more!", 3, speech.tokenizer, "Be kind.")
    told = speech.tokenizer.encode("Be kind.")
    assert behind.tokens == [1, *told, -1, -1, -1, *want] and behind.labels == [-100] * (4 + len(told)) + want


def test_only_the_toy_leaves_the_published_sequence(tmp_path, encoder, album, speech, monkeypatch):
    """The toy stands behind the system prompt and starts from zero; the published recipe does neither."""
    for recipe, first in (("toy", speech.tokenizer.encode(data.get_template("vicuna_v1.1").system)), ("published", [-1])):
        seen = {}
        monkeypatch.setattr(train_vlm.train_sft, "run_stage", lambda sft, name, machine, rows, *rest, network, **options:
                            seen.update(rows=rows, weight=network.llama_proj.weight.clone()))
        job = open_job(train_vlm.replace(settings(tmp_path), recipe=recipe))
        train_vlm.project(job, "1", train_vlm.give_eyes(job, encoder)[0], {}, train_vlm.load_album(album, Counter()), "x")
        assert seen["rows"].tokens[0, 1:1 + len(first)].tolist() == first
        assert seen["weight"].any() == (recipe == "published")


def test_a_given_language_model_does_not_read_captions():
    """With an encoder of your own, the language model is taken as it is: nothing but the projection may learn."""
    given = train_vlm.VLMConfig(images="album", vision="eyes")
    assert train_vlm.recipe_of(given) == "toy" and train_vlm.recipe_of(train_vlm.replace(given, vision="")) == "photos"


def test_stage_2_keeps_the_end_when_it_cuts(speech):
    tokenizer = speech.tokenizer
    whole = train_vlm.described("a red circle " * 30, "Describe this image in detail.", 3, "vicuna_v1.1", tokenizer, 999)
    cut = train_vlm.described("a red circle " * 30, "Describe this image in detail.", 3, "vicuna_v1.1", tokenizer, 120)
    assert len(cut.tokens) == len(cut.labels) == 120 < len(whole.tokens)
    assert cut.tokens[:119] == whole.tokens[:119] and cut.tokens[-1] == cut.labels[-1] == tokenizer.eos
    learned = [t for t, label in zip(whole.tokens, whole.labels) if label != -100]
    assert learned == tokenizer.encode("a red circle " * 30) + [tokenizer.eos]
    v0 = train_vlm.described("a red circle " * 60, "Describe.", 3, "minigpt4", tokenizer, 90)
    end = tokenizer.encode("###", continuation=True)
    assert v0.tokens[-len(end):] == v0.labels[-len(end):] == end and len(v0.tokens) == 90


def test_published_ids():
    """Stage 1 and stage 2 of the original, with LLaMA's tokenizer. NANOVICUNA_DATA names the folder it lies in."""
    path = Path(os.environ.get("NANOVICUNA_DATA", "no such folder")) / "llama_tokenizer.model"
    if not path.is_file():
        pytest.skip("NANOVICUNA_DATA names no folder with llama_tokenizer.model")
    tokenizer = data.Tokenizer(path)
    one = train_vlm.alt_example("A dog.", 32, tokenizer)
    assert one.tokens == [1] + [-1] * 32 + tokenizer.encode("a dog") + [13]
    two = train_vlm.described("A dog.", "Describe this image in detail.", 32, "minigpt4", tokenizer, 256)
    before = [1, 835, 29950, 7889, 29901, 529, 25518, 29958] + [-1] * 32 + [
        1533, 25518, 29958, 20355, 915, 445, 1967, 297, 9493, 29889, 835, 7900, 22137, 29901, 29871]
    assert len(before) == 55 and two.tokens == before + tokenizer.encode("A dog.") + [2277, 29937]
    assert two.labels == [-100] * 55 + two.tokens[55:]
    # the chat: a string, cut at the picture, each part encoded by itself; "###" is 2277 29937 here, and not 835
    system = ("Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it "
              "to you. Please answer my questions.###Human: <Img>")
    asked = "</Img> Describe this image in detail.###Assistant:"
    turns = [data.Turn("user", "Describe this image in detail.", slots=32), data.Turn("assistant", "A dog."),
             data.Turn("user", "What color is it?")]
    for n, text in ((1, asked), (3, asked + " A dog.###Human: What color is it?###Assistant:")):
        ids = data.render(data.Conversation(turns[:n]), data.CHAT["minigpt4"], tokenizer).tokens
        assert ids == [1] + tokenizer.encode(system) + [-1] * 32 + tokenizer.encode(text)
    assert tokenizer.encode(asked) == [1533, 25518, 29958, 20355, 915, 445, 1967, 297, 9493, 29889, 2277, 29937, 7900,
                                       22137, 29901]


def test_symbols_are_not_the_captions_order():
    """The last place first, and the words of an object in another order than the captions'; then nothing."""
    scene = (toy.Object("small", "red", "ring", "top"), toy.Object("large", "blue", "moon", "bottom"))
    said = train_vlm.scene_symbols(scene)
    assert said == ["moon", "bottom", "blue", "large", "end", "ring", "top", "red", "small", "end"]
    assert said == train_vlm.scene_symbols(scene[::-1]) and len(said) == vision.QFormerConfig().n_queries
    assert train_vlm.scene_symbols(scene[:1]) == said[5:] + ["nothing"] * 5
    assert set(said) | {"nothing"} < set(train_vlm.SYMBOLS)


def test_pictures_of_stage_0_depend_on_the_step_alone(album):
    scenes = train_vlm.Scenes(0, 16)
    a, b, other = scenes.batch(5, 2), train_vlm.Scenes(0, 16).batch(5, 2), scenes.batch(6, 2)
    assert torch.equal(a[3], b[3]) and torch.equal(a[1], b[1]) and not torch.equal(a[3], other[3])
    assert a[3].shape == (2, 3, 16, 16) and a[1].shape == (2, 11) and (a[1][:, 0] == -100).all()
    pictures = train_vlm.load_album(album, Counter())
    photos = [train_vlm.Photos(pictures, 2, 0, 16).batch(3, 4) for _ in range(2)]
    assert torch.equal(photos[0][3], photos[1][3]) and photos[0][1].shape == (4, 3)


def test_rare_words_first():
    pictures = [train_vlm.Captioned(Path("x"), f"a photo of a {w}") for w in ["dog"] * 5 + ["cat"] * 6 + ["emu"]]
    said, symbols = train_vlm.caption_symbols(pictures, 2)
    assert symbols == ["nothing", "a", "cat", "dog", "of", "photo"]
    assert said[0] == ["dog", "a"] and said[5] == ["cat", "a"] and said[-1] == ["a", "of"]


@pytest.mark.parametrize("size", [(32, 32), (1, 7), (50, 3)])
def test_crops_stay_inside(size):
    image, dice = Image.new("RGB", size, "red"), np.random.default_rng(0)
    for _ in range(200):
        part = train_vlm.cropped(image, dice)
        assert (np.asarray(part) == (255, 0, 0)).all() and min(part.size) > 0
        assert part.width * part.height >= 0.3 * image.width * image.height


# -- the stages ----------------------------------------------------------------------------------------------

def run_two_stages(cfg, pictures):
    job = open_job(cfg)
    net, beside = train_vlm.give_eyes(job, cfg.vision)
    found = train_vlm.load_album(pictures, Counter())
    train_vlm.project(job, "1", net, beside, found, "align")
    first = net.llama_proj.weight.clone()
    train_vlm.project(job, "2", net, beside, found, "minigpt4", str(Path(cfg.out) / "align"))
    return net, first


def test_only_the_projection_is_trained_and_saved(tmp_path, encoder, album, speech):
    cfg = settings(tmp_path)
    new = train_vlm.give_eyes(open_job(cfg), encoder)[0].state_dict()
    before = {name: w.clone() for name, w in new.items()}
    net, first = run_two_stages(cfg, album)
    assert {n for n, w in net.state_dict().items() if not torch.equal(w, before[n])} == {
        "llama_proj.weight", "llama_proj.bias"}
    assert not torch.equal(first, net.llama_proj.weight), "stage 2 changed nothing"
    for name in ("align", "minigpt4"):
        weights = model.read(model.find(tmp_path / name) / "model.pt")
        assert set(weights) == {"llama_proj.weight", "llama_proj.bias"}
    again, path, meta = vision.load(tmp_path / "minigpt4")
    assert all(torch.equal(w, net.state_dict()[n]) for n, w in again.state_dict().items())
    assert not again.training and meta["template"] == "vicuna_v1.1" and path.exists()


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, encoder, album, speech, monkeypatch):
    """The first step is saved; the run dies in the third; the same command ends where an undisturbed run ends."""
    cfg = settings(tmp_path, steps=5)
    whole = run_two_stages(replace_out(cfg, tmp_path / "a"), album)[0].llama_proj.weight

    class Killed(BaseException):
        pass

    batch = train_vlm.PictureRows.batch

    met = []

    def dies(rows, step, size):
        met.append(step)
        if met.count(2) == 2:  # in stage 2
            raise Killed
        return batch(rows, step, size)

    monkeypatch.setattr(train_vlm.PictureRows, "batch", dies)
    with pytest.raises(Killed):
        run_two_stages(replace_out(cfg, tmp_path / "b"), album)
    assert model.find(tmp_path / "b" / "minigpt4").name == "step-000001"
    monkeypatch.setattr(train_vlm.PictureRows, "batch", batch)
    again = run_two_stages(replace_out(cfg, tmp_path / "b"), album)[0]
    assert torch.equal(again.llama_proj.weight, whole)


def replace_out(cfg, out: Path):
    return train_vlm.replace(cfg, out=str(out))


def test_parts_that_do_not_fit(tmp_path, encoder, album, speech):
    """Another language model than the projection was trained with, one of another size, one that is gone."""
    cfg = settings(tmp_path)
    job = open_job(cfg)
    net, beside = train_vlm.give_eyes(job, encoder)
    train_vlm.project(job, "1", net, beside, train_vlm.load_album(album, Counter()), "align")
    wide = model.LLaMA(model.LLaMAConfig(dim=96, n_layers=1, n_heads=2, vocab_size=64))
    other = vision.MiniGPT4(wide, net.vit, net.qformer)
    with pytest.raises(config.Problem, match=r"llama_proj.*\[64, 32\].*\[96, 32\]"):
        model.load(tmp_path / "align", network=other)
    with torch.no_grad():
        net.vit.cls_token += 1
    sight = train_vlm.Sight(train_vlm.SightConfig(net.vit.config, net.qformer.config, ["nothing", "a"]))
    model.save(encoder, sight, dict(step=1, template="", settings={}), speech.tokenizer.path)
    with pytest.raises(config.Problem, match="trained again"):
        vision.load(tmp_path / "align")
    encoder.rename(tmp_path / "gone")
    with pytest.raises(config.Problem, match="vision part.*is gone"):
        vision.load(tmp_path / "align")
    with pytest.raises(config.Problem, match="holds no ViT"):
        vision.load_encoder(MICRO)


def test_what_writes_files_is_for_one_process(tmp_path, monkeypatch):
    many = train_vlm.replace(MACHINE, world=2, sharded=True)
    monkeypatch.setattr(train_sft, "choose_machine", lambda cfg: many)
    for options in (dict(stage="curate", images="album"), dict(stage="1"), dict(images="album")):
        with pytest.raises(config.Problem, match="for one process"):
            train_vlm.main(settings(tmp_path, **options))


def test_vicuna_v0_speaks_as_minigpt4_did(tmp_path):
    shutil.copytree(MICRO, tmp_path / "v0")
    meta = json.loads((MICRO / "meta.json").read_text())
    (tmp_path / "v0" / "meta.json").write_text(json.dumps({**meta, "template": "vicuna_v0"}))
    assert open_job(train_vlm.VLMConfig(init=str(tmp_path / "v0"))).template == "minigpt4"


def test_the_whole_toy_chain(tmp_path, encoder, monkeypatch, capsys):
    """Two steps of each stage teach nothing, but every part meets every other one, down to the table."""
    monkeypatch.setattr(train_vlm, "TOY", dict(alt=6, curate=4, questions=2))
    monkeypatch.setattr(train_sft, "choose_machine", lambda cfg: MACHINE)
    figures = train_vlm.main(settings(tmp_path, full=True, steps=2))
    assert {key[:2] for key in figures if key[0] == "minimal"} == {("minimal", "captions"), ("minimal", "questions")}
    assert 0 <= figures["scenes", "questions", "in words"] <= 1 and (tmp_path / "seen.png").exists()
    assert json.loads((tmp_path / "curated" / "report.json").read_text())["asked"] == 4
    assert "minimal pairs, both right, questions" in capsys.readouterr().out


def test_the_whole_chain_on_photos(tmp_path, monkeypatch, capsys):
    """A folder of pictures, a small language model that reads the captions first, a table over those held out."""
    scenes = [toy.pick_scene(random.Random(i)) for i in range(40)]
    toy.write_album(tmp_path / "photos", [toy.draw(s, random.Random(0), 32) for s in scenes],
                    [f"a photo of a {s[0].shape}." for s in scenes])
    monkeypatch.setattr(train_sft, "choose_machine", lambda cfg: MACHINE)
    figures = train_vlm.main(settings(tmp_path, images=str(tmp_path / "photos"), vision="", steps=2))
    assert set(figures) == {"MiniGPT-4", "shuffled"} and "held-out pictures" in capsys.readouterr().out
    read = json.loads((tmp_path / "data" / "captions.json").read_text())
    for record in read:
        ask, answer = (turn["value"] for turn in record["conversations"])
        assert ask.startswith("<Img>") and answer.startswith("a photo of a ")
        assert "nothing" not in ask
    assert 30 <= len(read) < 40, "held-out captions were read"
    eyes_of = json.loads((model.find(tmp_path / "align") / "meta.json").read_text())
    assert str(tmp_path / "words") in json.dumps(eyes_of), "the linear layer belongs to the model that read the captions"


def one_rank(rank: int, port: int, folder: str) -> None:
    """Rank 1 has a batch of words only. Writes the gradient that it ends up with."""
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    net = eyes(None).train()
    tokens = torch.tensor([[1, -1, -1, -1, 40, 41, 42, 43], [1, 50, 51, 52, 53, 54, 55, 56]])[rank:rank + 1]
    pixels = torch.ones(1, 3, 16, 16) if rank == 0 else None
    machine = train_sft.Machine("cpu", torch.float32, "a test", 1e9, rank, 2, True)
    train_sft.shard(net, machine)
    train_sft.loss_backward(net, [(tokens, tokens.masked_fill(tokens == -1, -100), None, pixels)], machine)
    gradient = net.llama_proj.weight.grad.full_tensor()
    if rank == 0:
        torch.save(gradient, Path(folder) / "gradient.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform != "linux", reason="forkserver")
def test_a_rank_without_a_picture_does_not_hang(tmp_path):
    """And the gradient is that of both batches in one process."""
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=one_rank, args=(r, port, str(tmp_path))) for r in range(2)]
    for r in ranks:
        r.start()
    for r in ranks:
        r.join(120)
        assert r.exitcode == 0, "a process hangs or died"
    net = eyes(None).train()
    parts = [(torch.tensor([[1, -1, -1, -1, 40, 41, 42, 43]]), torch.ones(1, 3, 16, 16)),
             (torch.tensor([[1, 50, 51, 52, 53, 54, 55, 56]]), None)]
    train_sft.loss_backward(net, [(t, t.masked_fill(t == -1, -100), None, p) for t, p in parts], MACHINE)
    want = net.llama_proj.weight.grad
    assert want.abs().max() > 0
    assert torch.allclose(torch.load(tmp_path / "gradient.pt"), want, atol=1e-6 * float(want.abs().max()))


# -- curation ------------------------------------------------------------------------------------------------

def test_mending_is_blind_and_adds_nothing():
    assert toy.mend("photo of large red circle top and small blue st") == "There is a large red circle at top."
    assert toy.mend("large red circle top, large red circle top") == "There is a large red circle at top."
    assert toy.mend("red circle") == toy.mend("") == "INCOMPLETE"
    scene = toy.pick_scene(random.Random(3), "more")
    assert toy.found("objects", toy.mend(toy.caption(scene))) == set(scene)


def test_the_oracle_repairs_as_any_teacher(fake):  # noqa: F811
    texts = ["large red circle top", "red"]
    assert train_vlm.mender("oracle")(texts) == [toy.mend(text) for text in texts]
    assert train_vlm.mender(f"gpt@{fake.url}")(texts) == ["echo: " + text for text in texts]
    assert fake.requests[0][1]["messages"][0] == dict(role="system", content=train_vlm.REPAIR)


def test_curation_counts_what_happens(tmp_path, album, speech, monkeypatch):
    said = ["There is a small red ring at center.", "small red ring at center small red", "blue", "x" * 30,
            "small red ring at center. I'm sorry, I made a mistake. It is fine.", "small red ring at center"]
    asked = []

    def fake(net, job, questions, features, limit=64):
        asked.append(questions)
        if len(asked) == 1:
            return said, None
        return ["more"] * len(questions), None

    monkeypatch.setattr(train_vlm, "ask", fake)
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    answers = iter(["", "d", "a better text of mine", ""])
    pictures = train_vlm.load_album(album, Counter())

    def mend(texts):
        assert [("more" in t) for t in texts] == [False, False, True, False, False, False]
        return [texts[0], toy.mend(texts[1]), "INCOMPLETE", texts[3], texts[4], None]

    job = train_vlm.replace(speech, cfg=settings(tmp_path, review=True))
    material = train_vlm.Material([], pictures, mend, lambda i, text: "ring" in text, 3, print)
    train_vlm.curate(job, eyes(speech), material)
    out = tmp_path / "curated"
    report = json.loads((out / "report.json").read_text())
    assert report == {"asked": 6, "continued": 1, "kept as it was": 1, "dropped: by you": 1, "repaired and kept": 1,
                      "dropped: nothing could be saved": 2, "dropped: not true of the picture": 1}
    left = train_vlm.load_album(out, Counter())
    assert [c.caption for c in left] == [said[0], "a better text of mine"] and all(c.path.exists() for c in left)


# -- what a description is worth -----------------------------------------------------------------------------

def test_faults_are_those_of_the_judge(speech):
    """Descriptions that are right, and the same of other scenes: the measures are judge.py's own."""
    e, weights = train_vlm.exam("scenes", 3), eyes(speech).llama_proj.state_dict()
    right, wrong = ([f"There is {toy.caption(s)}." for s in scenes] for scenes in (e.scenes, e.scenes[1:] + e.scenes[:1]))
    said = {("scenes", "stage 1"): (wrong, [True] * 3), ("scenes", "MiniGPT-4"): (right, [True] * 3)}
    figures = train_vlm.faults(speech, eyes(speech), e, said, weights, weights)
    assert [figures["faults", "is wrong", name] for name in ("stage 1", "MiniGPT-4")] == [1, 0]
    assert figures["faults", "things named that are not there", "stage 1"] > 0 == figures[
        "faults", "descriptions with such a thing", "MiniGPT-4"]


def test_minimal_pairs_differ_in_one_thing():
    e = train_vlm.exam("minimal", 6)
    for k in (0, 2, 4):
        (a, b), (seen_a, seen_b) = e.scenes[k:k + 2], (p.astype(int) for p in e.pictures[k:k + 2])
        assert sum(x != y for o, p in zip(a, b) for x, y in zip(o, p)) == 1
        assert 0 < (abs(seen_a - seen_b).max(-1) > 12).mean() < 0.15, "another ground"
        assert e.questions[k].text == e.questions[k + 1].text and e.questions[k].full != e.questions[k + 1].full


def test_exams_hold_out_what_they_say():
    for split in ("scenes", "pairs"):
        e = train_vlm.exam(split, 12)
        assert all(toy.where_belongs(s) == split for s in e.scenes)
        assert all(q.kind != "describe" and toy.grade(q, q.full) == 1 for q in e.questions)


# -- a chat about pictures -----------------------------------------------------------------------------------

@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{color}.png" for color in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (20, 10), path.stem).save(path)
    return [str(p) for p in paths]


def open_chat(speech, **options) -> sample.Chat:
    net = eyes(speech)
    with torch.no_grad():
        net.llama_proj.weight.mul_(20)
    return sample.Chat(net, speech.tokenizer, "vicuna_v1.1", sample.SampleConfig(max_new_tokens=8, **options))


def say(chat, text: str) -> str:
    return "".join(chat.answer(text))


def test_pictures_in_a_chat(speech, pictures, tmp_path):
    """Cached, the chat says what one without a cache says; a follow-up question does not read the picture again."""
    chat = open_chat(speech)
    chat.look(pictures[0])
    said = [say(chat, "What is it?"), say(chat, "And where?")]
    assert int(chat.speed.split(", ")[2].split()[0]) < 40, chat.speed
    chat.look(pictures[1])
    said.append(say(chat, "What is this?"))
    fresh = open_chat(speech)
    for i, (path, text) in enumerate(zip((pictures[0], None, pictures[1]), ("What is it?", "And where?", "What is this?"))):
        fresh.read = []  # nothing is taken from the cache
        if path:
            fresh.look(path)
        assert say(fresh, text) == said[i]
    chat.save(str(tmp_path / "chat.json"))
    loaded = open_chat(speech)
    loaded.load(str(tmp_path / "chat.json"))
    assert loaded.turns == chat.turns and loaded.prompt() == chat.prompt()
    assert torch.equal(torch.cat([p.vectors for p in loaded.pictures]), torch.cat([p.vectors for p in chat.pictures]))
    chat.turns[3] = data.Turn("assistant", "")  # stopped before the first word: that round is not saved
    chat.save(str(tmp_path / "chat.json"))
    loaded.load(str(tmp_path / "chat.json"))
    assert loaded.turns == chat.turns[:2] + chat.turns[4:] and len(loaded.pictures) == 2


def test_a_player_sees(speech, encoder, pictures, tmp_path):
    """A folder with eyes answers questions about picture files as the chat does; one without says that it cannot."""
    net = eyes(speech)
    torch.nn.init.normal_(net.llama_proj.weight)
    parts = dict(llama=model.find(MICRO), vision=model.find(encoder))
    settings = {name: str(path) for name, path in parts.items()}
    settings.update({f"{name}_crc": model.fingerprint(path) for name, path in parts.items()})
    weights = {f"llama_proj.{name}": w for name, w in net.llama_proj.state_dict().items()}
    model.save(tmp_path / "seeing", net, dict(step=1, template="vicuna_v1.1", settings=settings, finished=True),
               speech.tokenizer.path, weights=weights)
    asked = [data.Conversation([data.Turn("user", "What is it?")], extra=dict(image=path) if path else {})
             for path in (pictures[0], None, pictures[1])]
    replies = teacher.teacher(str(tmp_path / "seeing"), max_new_tokens=8)(asked)
    chat = sample.open_chat(sample.SampleConfig(ckpt=str(tmp_path / "seeing"), max_new_tokens=8))
    for path, reply in zip((pictures[0], None, pictures[1]), replies):
        chat.reset()
        if path:
            chat.look(path)
        assert say(chat, "What is it?").strip() == reply.text.strip()
    assert replies[0].text != replies[1].text
    with pytest.raises(config.Problem, match="cannot see"):
        teacher.teacher(str(MICRO), max_new_tokens=8)(asked)


def test_another_picture_in_the_same_place_is_looked_at(speech, pictures):
    """Its slots look alike in the ids: the cache must not be mistaken for it."""
    chat = open_chat(speech)
    chat.look(pictures[0])
    say(chat, "What is it?")
    red = chat.cache.k.clone()
    chat.undo()
    chat.look(pictures[1])
    say(chat, "What is it?")
    alone = open_chat(speech)
    alone.look(pictures[1])
    say(alone, "What is it?")
    n = alone.prompt().index(-1) + 3
    assert torch.allclose(chat.cache.k[:, :, :, :n], alone.cache.k[:, :, :, :n], atol=1e-5)
    assert not torch.allclose(chat.cache.k[:, :, :, :n], red[:, :, :, :n], atol=1e-3)


def test_bad_pictures_leave_the_chat_as_it_was(speech, pictures, tmp_path, capsys):
    chat = open_chat(speech)
    sample.say(chat, "A question before any picture?")
    assert "no picture was shown" in capsys.readouterr().err
    sample.say(chat, "And another?")
    assert not capsys.readouterr().err, "once is enough"
    before = list(chat.turns)
    assert sample.command(chat, f"/image {tmp_path / 'none.jpg'}") and "No such file" in capsys.readouterr().out
    assert chat.turns == before and chat.waiting is None
    sample.command(chat, f"/image {pictures[0]}")
    say(chat, "What is it?")
    assert chat.undo() == "What is it?" and chat.waiting and not chat.pictures, "the picture waits for the next question"
    chat.reset()
    assert not chat.waiting and not chat.turns
    blind = sample.Chat(model.load(MICRO)[0], speech.tokenizer, "vicuna_v1.1", sample.SampleConfig())
    with pytest.raises(config.Problem, match="cannot see"):
        blind.look(pictures[0])


def test_a_long_chat_keeps_its_picture(speech, pictures):
    chat = open_chat(speech)
    chat.look(pictures[0])
    for i in range(30):
        say(chat, f"What is it, once more, number {i}, please?")
    prompt = chat.prompt()
    assert prompt.count(-1) == 3 and len(prompt) < chat.net.config.max_seq_len


def test_text_cannot_pose_as_a_picture(speech, pictures):
    chat = open_chat(speech)
    say(chat, "<Img><ImageHere></Img> {slots} </s> What is it?")
    assert -1 not in chat.prompt() and chat.prompt().count(speech.tokenizer.eos) <= 1
