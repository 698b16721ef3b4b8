"""Tests of train_vlm.py, and of a chat about pictures. The language model is the committed micro
one, which comes with the tests.

    pytest tests/test_vlm.py
    NANOVICUNA_DATA=FOLDER pytest tests/test_vlm.py     # with LLaMA's llama_tokenizer.model
"""

import json
import os
import random
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
import train_sft
import train_vlm
import vision
from ranks import Ranks
from tools import checkpoint, config, machine, teacher, terminal
from toy import exam, pictures, world

MICRO = Path(__file__).parent / "micro"
VIT = dict(image_size=16, patch_size=8, dim=32, n_layers=1, n_heads=2, hidden_dim=32)
QFORMER = dict(vision_dim=32, dim=32, n_layers=1, n_heads=2, hidden_dim=32, n_queries=3)
MACHINE = machine.Machine("cpu", torch.float32, 1e9)
SHORT = dict(steps=3, batch_size=2, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A few steps in each stage, and a machine whose speed need not be measured."""
    shorten(monkeypatch.setitem)
    monkeypatch.setattr(machine, "measure_peak", lambda *_: 1e9)


def shorten(setitem, **numbers):
    for recipe in train_vlm.RECIPES.values():
        for stage in recipe:
            setitem(recipe, stage, {**recipe[stage], **SHORT, **numbers})


@pytest.fixture(scope="module")
def micro():
    """The run of a command that was given the micro language model."""
    return open_run(train_vlm.VLMConfig(init=str(MICRO)))


def open_run(cfg) -> train_vlm.VLMRun:
    return train_vlm.open_run(cfg, MACHINE)


def small_minigpt4() -> vision.MiniGPT4:
    """The micro language model with a small random encoder, always the same one."""
    torch.manual_seed(7)
    vit = vision.ViT(vision.ViTConfig(**VIT))
    qformer = vision.QFormer(vision.QFormerConfig(**QFORMER))
    for p in (*vit.parameters(), *qformer.parameters()):
        torch.nn.init.normal_(p, std=0.3)
    return vision.MiniGPT4(checkpoint.load(MICRO)[0], vit, qformer).eval()


def save_encoder(folder, net, tokenizer):
    """ViT and Q-Former of a MiniGPT-4 as stage 0 leaves them behind."""
    sizes = train_vlm.PretrainerConfig(net.vit.config, net.qformer.config, ["nothing", "a"])
    pretrainer = train_vlm.VisionPretrainer(sizes)
    pretrainer.vit, pretrainer.qformer = net.vit, net.qformer
    meta = dict(step=1, template="vicuna_v1.1", settings={})
    return checkpoint.save(folder, pretrainer, meta, tokenizer.path).parent


@pytest.fixture
def encoder(tmp_path, micro):
    return save_encoder(tmp_path / "vision", small_minigpt4(), micro.tokenizer)


def draw_album(folder: Path, n: int) -> Path:
    """Toy pictures with short captions."""
    scenes = [world.pick_scene(random.Random(i)) for i in range(n)]
    drawn = [pictures.draw(scene, random.Random(0), 16) for scene in scenes]
    pictures.write_album(folder, drawn, [world.caption(scene) for scene in scenes])
    return folder


@pytest.fixture
def album(tmp_path):
    return draw_album(tmp_path / "album", 7)


def settings(tmp_path, **options) -> train_vlm.VLMConfig:
    given = dict(init=str(MICRO), vision=str(tmp_path / "vision"), out=str(tmp_path), device="cpu",
                 dtype="float32")
    return train_vlm.VLMConfig(**{**given, **options})


# -- albums ---------------------------------------------------------------------------------------

def annotate(folder: Path, annotations, name: str = "filter_cap.json") -> list:
    (folder / name).write_text(json.dumps(annotations), encoding="utf-8")
    return train_vlm.load_album(folder)


def test_what_is_wrong_with_an_album_is_counted(album, capsys):
    """A picture that is missing or a caption that is empty must not end the training."""
    found = annotate(album, [
        dict(image_id=1, caption="one"), dict(image_id="99", caption="not there"),
        dict(image_id="3", caption=" ..."), dict(image_id="4", caption=None),
        dict(caption="nameless"), dict(image_id="5.png", caption="five")])
    assert [(c.path.name, c.caption) for c in found] == [("1.png", "one"), ("5.png", "five")]
    assert "2 without a picture, 2 without a caption" in capsys.readouterr().out
    with pytest.raises(config.UserError, match="none of 1"):
        annotate(album, [dict(image_id="99", caption="not there")])
    with pytest.raises(config.UserError, match="neither"):
        train_vlm.load_album(album / "image")


def test_layouts(album):
    """captions.json, and pictures in other folders; curation names them by whole paths, since its
    pictures stay where they are."""
    (album / "train").mkdir()
    picture = shutil.copy(album / "image" / "0.png", album / "train" / "7.png").resolve()
    for name in ("train/7.png", str(picture)):
        (found,) = annotate(album, [dict(image=name, caption="seven")])
        assert found.path.resolve() == picture
    (album / "filter_cap.json").unlink()
    (found,) = annotate(album, [dict(image="0.png", caption="zero")], "captions.json")
    assert found == (album / "image" / "0.png", "zero")


def test_one_unreadable_picture_does_not_end_the_training(album, capsys):
    """It did, hours later, with all other pictures intact. Now it is left out when the album is
    loaded, with all of its captions."""
    cut, page = album / "image" / "2.png", album / "image" / "3.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    page.write_text("<html>404</html>", encoding="utf-8")
    found = annotate(album, [dict(image_id=i, caption="one") for i in (1, 2, 2, 3, 4)])
    assert [c.path.name for c in found] == ["1.png", "4.png"]
    said = capsys.readouterr().out
    assert "2 unreadable pictures; cannot read image" in said and "2.png" in said
    assert "skipped annotations: 3 with an unreadable picture" in said


def test_cocos_captions(album):
    """Its annotations number the pictures, and its images name them. All were skipped."""
    (album / "train").mkdir()
    for i in (7, 8):
        shutil.copy(album / "image" / "0.png", album / "train" / f"00000000000{i}.png")
    images = [dict(id=i, file_name=f"00000000000{i}.png") for i in (7, 8)]
    told = [dict(image_id=i, id=100 + i, caption=f"number {i}") for i in (8, 7, 8)]
    images[1]["file_name"] = "train/" + images[1]["file_name"]
    shutil.move(album / "train" / "000000000007.png", album)
    found = annotate(album, dict(info={}, images=images, annotations=told), "filter_cap.json")
    assert [(c.path.name, c.caption) for c in found] == [
        ("000000000008.png", "number 8"), ("000000000007.png", "number 7"),
        ("000000000008.png", "number 8")]


@pytest.mark.parametrize("stored, told", [
    ("pics/1.png", "pics\\1.png"), ("pics/1.png", ".\\pics/1.png"),
    ("pics/cafe\u0301.png", "pics/caf\u00e9.png"), ("caf\u00e9.png", "cafe\u0301"),
    ("a\\b.png", "a\\b.png")])
def test_file_names_of_other_systems(album, stored, told):
    """Windows' backslashes; macOS takes \u00e9 apart. The picture was there and was not found."""
    (album / "pics").mkdir()
    shutil.copy(album / "image" / "0.png", album / stored)
    (found,) = annotate(album, [dict(image_id=None, image=told, caption="a")])
    assert found.path == album / stored


# -- what is learned of a picture and its caption -------------------------------------------------

def test_stage_1_sequence(micro):
    """<s>, the picture, a caption in lower case without punctuation, a newline. All of the text is
    supervised."""
    want = micro.tokenizer.encode("a red circle, and maybe more\n")
    e = train_vlm.alt_text_example("A Red  circle, and (maybe) more!", 3, micro.tokenizer)
    assert e.tokens == [1, -1, -1, -1, *want]
    assert e.labels == [-100] * 4 + want
    long = train_vlm.alt_text_example("word " * 90, 3, micro.tokenizer)
    assert len(long.tokens) == 4 + 32


@pytest.mark.parametrize("recipe", ["toy", "published"])
def test_only_the_toy_leaves_the_published_sequence(tmp_path, encoder, album, micro, monkeypatch,
                                                    recipe):
    """The toy's alt-text is the reply to a picture without a question, and its projection starts
    from zero; the published recipe does neither."""
    seen = []
    monkeypatch.setattr(train_sft, "run_stage", lambda *given, **options: seen.extend(given))
    vlm = open_run(settings(tmp_path, recipe=recipe))
    net, _ = train_vlm.build_minigpt4(vlm, encoder)
    train_vlm.train_projection(vlm, "1", net, {}, train_vlm.load_album(album), "align")
    tokens = [token for token in seen[3].tokens[0].tolist() if token != micro.tokenizer.eos]
    before = tokens[:tokens.index(-1)]
    after = tokens[len(tokens) - tokens[::-1].index(-1):]
    if recipe == "toy":
        template = data.get_template("vicuna_v1.1")
        assert micro.tokenizer.decode(before) == template.system + " USER: <Img>"
        assert micro.tokenizer.decode(after).startswith("</Img> ASSISTANT: ")
    else:
        assert before == [1]
    assert bool(net.llama_proj.weight.any()) == (recipe == "published")


def test_a_language_model_does_not_read_captions_if_an_encoder_is_given():
    """Then both are taken as they are, and only the projection may learn."""
    given = train_vlm.VLMConfig(images="album", vision="encoder")
    assert train_vlm.recipe_of(given) == "toy"
    assert train_vlm.recipe_of(replace(given, vision="")) == "photos"


def test_stage_2_keeps_the_end_when_it_cuts(micro):
    """A long description loses its last words, but the model must still learn to stop."""
    hashes = micro.tokenizer.encode("###", continues=True)
    for template, end in (("vicuna_v1.1", [micro.tokenizer.eos]), ("minigpt4", hashes)):
        whole, cut = (train_vlm.description_example("a red circle " * 30, "Describe this image.", 3,
                                                    template, micro.tokenizer, seq_len)
                      for seq_len in (999, 120))
        assert len(cut.tokens) == len(cut.labels) == 120 < len(whole.tokens)
        assert cut.tokens[:-len(end)] == whole.tokens[:120 - len(end)]
        assert cut.tokens[-len(end):] == cut.labels[-len(end):] == end


def test_published_ids():
    """Stage 1, stage 2 and the chat of the original, with LLaMA's tokenizer."""
    path = Path(os.environ.get("NANOVICUNA_DATA", "no such folder")) / "llama_tokenizer.model"
    if not path.is_file():
        pytest.skip("NANOVICUNA_DATA names no folder with llama_tokenizer.model")
    tokenizer = data.Tokenizer(path)
    encode = tokenizer.encode
    one = train_vlm.alt_text_example("A dog.", 32, tokenizer)
    assert one.tokens == [1] + [-1] * 32 + encode("a dog") + [13]
    two = train_vlm.description_example("A dog.", "Describe this image in detail.", 32, "minigpt4",
                                        tokenizer, 256)
    before = [1, 835, 29950, 7889, 29901, 529, 25518, 29958] + [-1] * 32
    before += [1533, 25518, 29958, 20355, 915, 445, 1967, 297, 9493, 29889, 835, 7900, 22137, 29901,
               29871]
    assert two.tokens == before + encode("A dog.") + [2277, 29937]
    assert two.labels == [-100] * 55 + two.tokens[55:]
    # The chat program cuts its text at the picture and encodes each part by itself; here "###" is
    # 2277 29937, and not 835.
    system = ("Give the following image: <Img>ImageContent</Img>. You will be able to see the "
              "image once I provide it to you. Please answer my questions.###Human: <Img>")
    asked = "</Img> Describe this image in detail.###Assistant:"
    chat = data.Conversation([data.Turn("user", "Describe this image in detail.", slots=32)])
    ids = data.render(chat, data.CHAT_TEMPLATES["minigpt4"], tokenizer).tokens
    assert ids == [1] + encode(system) + [-1] * 32 + encode(asked)


def test_photos_of_stage_0_depend_on_the_step_alone(album):
    """A run that resumes must see what it would have seen."""
    photos = train_vlm.load_album(album)
    words, symbols = train_vlm.caption_words(photos, 2)
    batches = []
    for step in (5, 5, 4):
        pick = train_vlm.photo_batches(photos, words, 0)
        batches.append(train_vlm.SymbolRows(pick, symbols, 16).batch(step, 2))
    (labels, _, _, pixels), again, other = batches
    assert pixels.shape == (2, 3, 16, 16) and labels.shape == (2, 3)
    assert torch.equal(pixels, again[3]) and torch.equal(labels, again[0])
    assert not torch.equal(pixels, other[3])


def test_rare_words_first():
    """The queries of stage 0 name the rarest words of a caption; words in fewer than five captions
    cannot be learned and are left out."""
    words = ["dog"] * 5 + ["cat"] * 6 + ["emu"]
    album = [train_vlm.Captioned(Path("x"), f"a photo of a {word}") for word in words]
    said, symbols = train_vlm.caption_words(album, 2)
    assert symbols == [train_vlm.NOTHING, "a", "cat", "dog", "of", "photo"]
    assert said[0] == ["dog", "a"] and said[5] == ["cat", "a"] and said[-1] == ["a", "of"]


def test_crops_stay_inside():
    """Outside, Pillow would fill in black."""
    image, rng = Image.new("RGB", (50, 3), "red"), np.random.default_rng(0)
    for _ in range(200):
        part = train_vlm.random_crop(image, rng)
        assert (np.asarray(part) == (255, 0, 0)).all() and min(part.size) > 0
        assert part.width * part.height >= 0.3 * image.width * image.height


# -- the stages -----------------------------------------------------------------------------------

def train_both_stages(cfg, album):
    """The network, and its projection after stage 1."""
    vlm = open_run(cfg)
    net, parts = train_vlm.build_minigpt4(vlm, Path(cfg.vision))
    photos = train_vlm.load_album(album)
    train_vlm.train_projection(vlm, "1", net, parts, photos, "align")
    first = net.llama_proj.weight.clone()
    align = str(Path(cfg.out) / "align")
    train_vlm.train_projection(vlm, "2", net, parts, photos, "minigpt4", align)
    return net, first


def test_a_killed_run_resumes_bit_for_bit(tmp_path, encoder, album, monkeypatch):
    """The first step of stage 2 is saved, and the run dies in the third; the same command ends
    where an undisturbed run ends."""
    shorten(monkeypatch.setitem, steps=5)
    whole, _ = train_both_stages(settings(tmp_path, out=str(tmp_path / "a")), album)
    batch, steps = train_vlm.PictureRows.batch, []

    def deadly_batch(rows, step, size):
        steps.append(step)
        if steps.count(2) == 2:  # in stage 2
            raise SystemExit
        return batch(rows, step, size)

    cfg = settings(tmp_path, out=str(tmp_path / "b"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_vlm.PictureRows, "batch", deadly_batch)
        train_both_stages(cfg, album)
    assert checkpoint.find(tmp_path / "b" / "minigpt4").name == "step-000001"
    again, _ = train_both_stages(cfg, album)
    assert torch.equal(again.llama_proj.weight, whole.llama_proj.weight)


def test_pictures_are_part_of_what_was_trained_on(tmp_path, encoder, album, monkeypatch, capsys):
    """With other pictures under the same names, a stage was "already trained". Where the album is
    does not matter."""
    shorten(monkeypatch.setitem)
    cfg = settings(tmp_path)
    train_both_stages(cfg, album)
    moved = album.rename(tmp_path / "moved")
    train_both_stages(cfg, moved)
    assert capsys.readouterr().out.count("already trained") == 2
    one, other = sorted(moved.glob("image/*"))[:2]
    two = other.read_bytes()
    other.write_bytes(one.read_bytes())
    one.write_bytes(two)
    with pytest.raises(config.UserError, match="align was trained with other settings: data was"):
        train_both_stages(cfg, moved)


def test_only_the_projection_is_saved(tmp_path, encoder, album, micro):
    """The frozen parts are found through meta.json: by path, or beside a run that was moved. An
    encoder that was trained again would give garbage."""
    out, moved = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(MICRO, out / "llama" / "step-000001")
    encoder.rename(out / "vision")
    net, first = train_both_stages(settings(out, init=str(out / "llama" / "step-000001")), album)
    assert not torch.equal(first, net.llama_proj.weight), "stage 2 changed nothing"
    out.rename(moved)
    weights = checkpoint.read(checkpoint.find(moved / "minigpt4") / "model.pt")
    assert set(weights) == {"llama_proj.weight", "llama_proj.bias"}
    again, _, meta = vision.load(moved / "minigpt4")
    assert all(torch.equal(w, net.state_dict()[n]) for n, w in again.state_dict().items())
    assert not again.training and meta["template"] == "vicuna_v1.1"
    # The rows of stage 1 have 60 tokens. A chat with such a window would forget after a sentence.
    assert meta["window"] == net.config.max_seq_len > 60
    with torch.no_grad():
        net.vit.cls_token += 1
    save_encoder(moved / "vision", net, micro.tokenizer)
    with pytest.raises(config.UserError, match="has changed since"):
        vision.load(moved / "minigpt4")
    shutil.rmtree(moved / "vision")
    with pytest.raises(config.UserError, match="no longer exists"):
        vision.load(moved / "minigpt4")
    with pytest.raises(config.UserError, match="has no ViT"):
        vision.load_encoder(MICRO)


def test_vicuna_v0_speaks_as_minigpt4_did(monkeypatch):
    llama, path, meta = checkpoint.load(MICRO)
    v0 = {**meta, "template": "vicuna_v0"}
    monkeypatch.setattr(checkpoint, "load", lambda folder: (llama, path, v0))
    assert open_run(train_vlm.VLMConfig(init=str(MICRO))).template == "minigpt4"


def test_stage_2_is_skipped_if_curation_kept_too_little(tmp_path, encoder, album, capsys):
    """Otherwise the run ends with an error after everything else was done."""
    vlm = open_run(settings(tmp_path))
    net, parts = train_vlm.build_minigpt4(vlm, encoder)
    photos = train_vlm.load_album(album)[:1]
    train_vlm.train_projection(vlm, "2", net, parts, photos, "minigpt4")
    assert "stage 2 is skipped: 1 descriptions" in capsys.readouterr().out
    assert not (tmp_path / "minigpt4").exists()


def test_the_whole_toy_chain(tmp_path, encoder, monkeypatch):
    """A few steps of each stage teach nothing, but every part meets every other one, down to the
    table."""
    monkeypatch.setattr(exam, "TOY", dict(alt=6, curate=4, questions=2))
    figures = train_vlm.main(settings(tmp_path, full=True))
    assert "minimal pairs, both right, questions" in figures["table"]
    players = {"MiniGPT-4", "in words", "no picture", "shuffled", "stage 1", "random enc."}
    assert all(set(row) == players for row in figures["table"].values())
    assert (tmp_path / "seen.png").exists()


def test_the_whole_chain_on_photos(tmp_path, monkeypatch):
    """A folder of pictures, a small language model that reads the captions first, a table over the
    held-out pictures; then stage 2 alone, on descriptions of one's own."""
    monkeypatch.setitem(vision.PRESETS, "photos", (VIT, QFORMER))
    photos = settings(tmp_path, images=str(draw_album(tmp_path / "photos", 40)), vision="")
    assert set(train_vlm.main(photos)) == {"MiniGPT-4", "shuffled"}
    read = json.loads((tmp_path / "data" / "captions.json").read_text(encoding="utf-8"))
    assert 30 <= len(read) < 40, "held-out captions were read"
    assert "nothing" not in json.dumps(read)
    again = replace(photos, stage="2", resume="never", learning_rate=1e-12)
    assert set(train_vlm.main(again)) == {"MiniGPT-4", "shuffled"}
    projections = []
    for name in ("align", "minigpt4"):
        step = checkpoint.find(tmp_path / name)
        used = Path(checkpoint.read_meta(step)["settings"]["llama"])
        assert used.parent == tmp_path / "words", "not the model that has read the captions"
        projections.append(checkpoint.read(step / "model.pt")["llama_proj.weight"])
    assert torch.allclose(*projections), "stage 2 did not begin where stage 1 ended"


# -- several processes ----------------------------------------------------------------------------

def test_a_batch_without_pictures_still_reaches_the_projection():
    """Under FSDP the ranks with pictures wait for its gradient. It is zero, not None."""
    net, tokens = small_minigpt4(), torch.randint(3, 50, (2, 12))
    loss, _ = net.nll(tokens, tokens)
    loss.backward()
    assert torch.equal(loss, net.llama.nll(tokens, tokens)[0])
    assert net.llama_proj.weight.grad is not None and not net.llama_proj.weight.grad.any()


def align(cfg):
    shorten(dict.__setitem__)
    train_vlm.main(cfg)


@pytest.mark.skipif(sys.platform == "win32", reason="needs gloo over fork")
def test_stage_1_under_torchrun_equals_one_process(tmp_path, encoder, album):
    cfg = settings(tmp_path, stage="1", images=str(album), recipe="published")
    ranks = Ranks(2, align, replace(cfg, out=str(tmp_path / "two")))
    align(replace(cfg, out=str(tmp_path / "one")))
    assert ranks.answers() == [None, None]
    one, two = (checkpoint.read(checkpoint.find(tmp_path / name / "align") / "model.pt")
                for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


# -- curation -------------------------------------------------------------------------------------

APOLOGY = "a ring. I'm sorry, I made a mistake. It is fine."
CURATED = {  # said -> repaired by the teacher; typed by the user, if asked; what becomes of it
    "a red ring": ("a red ring", "", "kept as it was"),
    "a ring, a ring": ("a red ring", "d", "dropped: by you"),
    "a red ring and": ("a red ring", "my own text", "repaired and kept"),
    APOLOGY: (APOLOGY, "", "repaired and kept"),
    "a ring": (None, None, "dropped: no answer from the teacher"),
    "ring ring": ("INCOMPLETE", None, "dropped: nothing could be saved"),
    "a blue star": ("a blue star", None, "dropped: does not match the picture")}


def test_curation(tmp_path, album, micro, monkeypatch):
    """What becomes of each description, and that a caption stays with its picture. The second time,
    only a request that failed is sent again, and nothing is left to be typed."""
    shown, heard = [], []

    def ask(net, vlm, questions, features, limit):
        shown.append(features)
        if questions[0] == data.IMAGE_REQUEST:
            return [*list(CURATED)[:-1], "a"], None
        assert [turn.text for turn in questions[0]] == [data.IMAGE_REQUEST, "a", "Continue"]
        return ["blue star"], None

    class Server:
        name = "gpt@server"

        def __call__(self, conversations, keep):
            for i, c in enumerate(conversations):
                assert c.system == train_vlm.REPAIR
                heard.append(c.turns[0].text)
                repaired, _, _ = CURATED[heard[-1]]
                if repaired:
                    keep(i, teacher.Reply(repaired, True))

    typed = iter([typed for _, typed, _ in CURATED.values() if typed is not None])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(teacher, "teacher", lambda spec, **options: Server())
    monkeypatch.setattr(train_vlm, "ask", ask)
    for _ in range(2):
        repair = train_vlm.caption_repairer("gpt@server", str(tmp_path))
        work = train_vlm.VLMData([], train_vlm.load_album(album), repair,
                                 lambda i, text: "ring" in text, 2, print)
        vlm = replace(micro, cfg=settings(tmp_path, review=True))
        train_vlm.curate(vlm, small_minigpt4(), work)
    assert torch.equal(shown[1], shown[0][6:]), "continued with another picture"
    assert heard == [*CURATED, "a ring"]
    report = json.loads((tmp_path / "curated" / "report.json").read_text(encoding="utf-8"))
    assert report == {"asked": 7, **Counter(verdict for _, _, verdict in CURATED.values())}
    kept = [(c.path.name, c.caption) for c in train_vlm.load_album(tmp_path / "curated")]
    assert kept == [("0.png", "a red ring"), ("2.png", "my own text"),
                    ("3.png", "a ring.  It is fine.")]


def curate(vlm, album, repair=list):
    work = train_vlm.VLMData([], train_vlm.load_album(album), repair, lambda *_: True, 0, print)
    train_vlm.curate(vlm, small_minigpt4(), work)


def test_a_review_goes_on_where_it_was_left(tmp_path, album, micro, monkeypatch):
    """Ctrl-D ended in a traceback. Every verdict is kept when it is typed."""
    asked = []

    def type_three(_):
        asked.append(1)
        if len(asked) == 4:
            raise EOFError
        return "a \udce9 ring"  # from a terminal that is not UTF-8

    monkeypatch.setattr("builtins.input", type_three)
    monkeypatch.setattr(train_vlm, "ask", lambda net, vlm, questions, *_: (
        [f"picture number {i}" for i in range(len(questions))], None))
    vlm = replace(micro, cfg=settings(tmp_path, review=True))
    with pytest.raises(config.Stopped, match="verdicts so far are kept"):
        curate(vlm, album)
    assert not (tmp_path / "curated" / "filter_cap.json").exists()
    curate(vlm, album)
    assert len(asked) == 4 + 4  # of seven pictures, three were not asked about again
    assert train_vlm.load_album(tmp_path / "curated")[0].caption == "a ? ring"


def test_a_teacher_given_later_is_asked(tmp_path, album, micro, monkeypatch):
    """The descriptions were taken as they had been written without it."""
    monkeypatch.setattr("builtins.input", lambda _: "")
    done = train_vlm.is_curated
    cfg = settings(tmp_path, images=str(album))
    taught = replace(cfg, teacher="gpt@http://me:secret@localhost:1")
    assert not done(cfg)
    curate(replace(micro, cfg=cfg), album)
    assert done(cfg) and not done(taught) and not done(replace(cfg, review=True))
    curate(replace(micro, cfg=taught), album)
    assert done(cfg) and done(taught) and not done(replace(cfg, teacher="another"))
    assert "secret" not in (tmp_path / "curated" / "filter_cap.json").read_text(encoding="utf-8")
    curate(replace(micro, cfg=replace(taught, review=True)), album)
    assert done(replace(taught, review=True)) and done(taught)


# -- a chat about pictures ------------------------------------------------------------------------

@pytest.fixture
def red_and_blue(tmp_path):
    for color in ("red", "blue"):
        Image.new("RGB", (20, 10), color).save(tmp_path / f"{color}.png")
    return str(tmp_path / "red.png"), str(tmp_path / "blue.png")


def open_chat(micro) -> sample.Chat:
    net = small_minigpt4()
    net.llama_proj.weight.data.mul_(20)
    return sample.Chat(net, micro.tokenizer, "vicuna_v1.1", sample.SampleConfig(max_new_tokens=8))


def say(chat, text: str, picture: str | None = None) -> str:
    if picture:
        chat.show_image(picture)
    return "".join(chat.answer(text))


def test_pictures_in_a_chat(micro, red_and_blue, tmp_path):
    """With the cache, the chat says what it says without; and a second question does not read the
    picture again. A saved chat brings its pictures back."""
    red, blue = red_and_blue
    rounds = [("What is it?", red), ("And where?", None), ("What is this?", blue)]
    chat, fresh = open_chat(micro), open_chat(micro)
    for text, picture in rounds:
        fresh.cached = []
        assert say(chat, text, picture) == say(fresh, text, picture)
        if not picture:
            assert int(chat.speed.split(", ")[2].split()[0]) < 40, "the picture was read again"
    file = str(tmp_path / "chat.json")
    chat.save(file)
    loaded = open_chat(micro)
    loaded.load(file)
    assert loaded.turns == chat.turns and loaded.prompt() == chat.prompt()
    one, two = (torch.cat([p.vectors for p in c.pictures]) for c in (chat, loaded))
    assert torch.equal(one, two)
    # An answer that was stopped before its first word: its round is not saved.
    chat.turns[3] = data.Turn("assistant", "")
    chat.save(file)
    loaded.load(file)
    assert loaded.turns == chat.turns[:2] + chat.turns[4:] and len(loaded.pictures) == 2


def test_a_file_with_other_images_changes_nothing(micro, red_and_blue, tmp_path):
    """Other programs write other things there. A round -1 was the last one, and two pictures of one
    round shifted those of the rounds after it. `null` means that there are none."""
    (red, blue), file = red_and_blue, tmp_path / "other.json"
    chat = open_chat(micro)
    say(chat, "What is it?", red)
    chat.show_image(blue)
    before = list(chat.turns), list(chat.pictures), chat.pending
    said = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    for images in ([red], red, 5, True, [[-1, red]], [[1, red]], [[0.0, red]], [["0", red]],
                   [[0, None]], [[0, 5]], [[0, "no.png"]], [[0, red, blue]], {"0": red}):
        file.write_text(json.dumps([dict(conversations=said, images=images)]), encoding="utf-8")
        with pytest.raises((config.UserError, OSError)):
            terminal.command(chat, f"/load {file}")
        assert (chat.turns, chat.pictures, chat.pending) == before, images
    for images, n in ((None, 0), ([], 0), ([[0, blue], [0, red]], 1)):
        file.write_text(json.dumps([dict(conversations=said, images=images)]), encoding="utf-8")
        chat.load(str(file))
        assert [turn.text for turn in chat.turns] == ["Who?", "Me."] and len(chat.pictures) == n
        say(chat, "And now?")


def test_another_picture_in_the_same_place_is_looked_at(micro, red_and_blue):
    """Their slots look alike in the token ids. The cache once took the new picture for the old."""
    red, blue = red_and_blue
    chat, alone = open_chat(micro), open_chat(micro)
    say(chat, "What is it?", red)
    assert chat.undo() == "What is it?" and not chat.pictures
    assert chat.pending.path == red, "the picture waits for the next question"
    assert say(chat, "What is it?", blue) == say(alone, "What is it?", blue)
    n = alone.prompt().index(data.IMAGE_SLOT) + 3
    assert torch.allclose(chat.cache.k[:, :, :, :n], alone.cache.k[:, :, :, :n], atol=1e-5)


def test_an_example_is_drawn(micro, capsys):
    """A model that sees gets the scene as a picture, and only the question in words."""
    chat = open_chat(micro)
    terminal.command(chat, "/example")
    *_, scene, question = capsys.readouterr().out.splitlines()
    assert len(world.objects_in(scene)) == 2 and not world.objects_in(question)
    picture = Path(chat.pending.path)
    with Image.open(picture) as image:
        assert image.size == (192, 192)
    say(chat, question.removeprefix("try: "))
    assert len(chat.pictures) == 1
    terminal.command(chat, "/why")  # a prompt with a picture
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(chat.reply_ids)
    picture.unlink()


def test_a_teacher_sees(encoder, album, red_and_blue, tmp_path):
    """A MiniGPT-4 as a teacher answers questions about picture files as the chat does."""
    train_both_stages(settings(tmp_path, recipe="published"), album)
    seeing, (red, blue) = str(tmp_path / "minigpt4"), red_and_blue
    asked = [data.Conversation([data.Turn("user", "What is it?")], extra=dict(image=path))
             for path in (red, None, blue)]
    replies = teacher.teacher(seeing, max_new_tokens=8)(asked)
    chat = sample.open_chat(sample.SampleConfig(ckpt=seeing, max_new_tokens=8, device="cpu"))
    for path, reply in zip((red, None, blue), replies):
        chat.reset()
        assert say(chat, "What is it?", path).strip() == reply.text.strip()
    assert replies[0].text != replies[1].text
