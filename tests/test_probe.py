"""Tests of toy/probe.py: each rung must measure its own part, or we would fix the wrong one."""

import random
from types import SimpleNamespace

import pytest
import torch

import data
import model
import train_vlm
from toy import exam, pictures, probe, world


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The parts of a run that the probe needs: a random language model with a toy tokenizer."""
    folder = tmp_path_factory.mktemp("probe")
    sizes = dict(documents=800, instructions=300, conversations=500)
    tokenizer = exam.toy_tokenizer(world.write_files(folder, sizes, 0), 1024, folder / "toy.model")
    torch.manual_seed(0)
    llama = model.LLaMA(model.LLaMAConfig(dim=32, n_layers=1, n_heads=2, vocab_size=1024))
    return SimpleNamespace(llama=llama.eval(), tokenizer=tokenizer, template="vicuna_v1.1",
                           machine=SimpleNamespace(device="cpu"))


@pytest.fixture
def scenes():
    rng = random.Random(0)
    return [world.pick_scene(rng) for _ in range(4)]


def test_an_encoder_is_right_if_all_ten_symbols_are(scenes):
    rows = [[pictures.SYMBOLS.index(s) for s in pictures.scene_symbols(scene)] for scene in scenes]
    logits = torch.nn.functional.one_hot(torch.tensor(rows), len(pictures.SYMBOLS)).float()
    assert probe.symbols_right(logits, scenes) == 1
    logits[0, 3] = logits[0, 3].roll(1)
    assert probe.symbols_right(logits, scenes) == 0.75


def test_the_best_projection_is_found_where_there_is_one(run, monkeypatch):
    """Features that are a linear map of the right embeddings leave nothing; noise leaves all."""
    torch.manual_seed(1)
    mix = torch.randn(32, 40)
    monkeypatch.setattr(pictures, "draw", lambda scene, rng: scene)
    for noise, low, high in ((0, 0.0, 0.01), (1e4, 0.9, 1.0)):
        def encode(net, drawn, machine, noise=noise):
            exact = torch.stack(probe.embed_symbols(run, drawn)).detach() @ mix
            return exact + noise * torch.randn_like(exact)

        monkeypatch.setattr(train_vlm, "encode_images", encode)
        weights, residual = probe.ridge_projection(None, run)
        assert low <= residual <= high
    assert weights["weight"].shape == (32, 40) and weights["bias"].shape == (32,)


def test_exact_embeddings_are_read_as_the_words_themselves(run, scenes):
    """The rung of exact embeddings must equal that of the bare words in the picture's order: the
    language model cannot tell them apart."""
    (scene, *_), (exact, *_) = scenes, probe.embed_symbols(run, scenes)
    told = f"<Img> {' '.join(pictures.scene_symbols(scene))} </Img> What do you see?"
    ids = []
    for turn in (data.Turn("user", told), data.Turn("user", "What do you see?", slots=10)):
        prompt = data.render(data.Conversation([turn]), run.template, run.tokenizer).tokens
        ids.append(torch.tensor([prompt]))
    with torch.no_grad():
        assert torch.equal(run.llama(ids[0]), run.llama(ids[1], exact))


def test_each_row_is_asked_with_its_own_projection(run, scenes, monkeypatch):
    net = SimpleNamespace(llama_proj=torch.nn.Linear(4, 32, bias=False))
    features = torch.randn(4, 10, 4)
    monkeypatch.setattr(probe, "ask", lambda player, vlm, texts, images: (
        torch.stack([image[0] if player is net else image for image in images]),
        player is net and player.llama_proj.weight[0, 0].item()))
    projections = {name: dict(weight=torch.full((32, 4), value))
                   for name, value in (("stage 1", 1.0), ("stage 2", 2.0))}
    texts = ["What?"] * 4
    replies = probe.ask_about_pictures(net, run, projections, features, scenes, texts)
    assert replies["stage 1"][1] == 1 and replies["stage 2"][1] == 2
    assert torch.equal(replies["stage 1"][0], features)
    exact = torch.stack(probe.embed_symbols(run, scenes))
    assert torch.equal(replies["exact embeddings in the slots"][0], exact)


@pytest.mark.parametrize("tokens", probe.PROMPT_LENGTHS)
def test_a_far_question_is_far(run, tokens):
    """It once took conversations whose scene was told in the last turn."""
    rng = random.Random(0)
    for item in [probe.far_item(run, tokens, rng) for _ in range(10)]:
        turns = [data.Turn(role, text) for role, text in item.turns]
        prompt = data.render(data.Conversation(turns), run.template, run.tokenizer).tokens
        assert 0.9 * tokens < len(prompt) <= tokens
        assert item.told in item.turns[0][1]
        assert not any(item.told in text for _, text in item.turns[1:])
        assert item.question.kind in ("color", "shape", "size", "where")


def test_alt_text_is_true_if_a_remark_is():
    """Remarks leave objects out on purpose. Wrong ones, and lists of some objects, are not true."""
    scene = (world.Object("small", "red", "ring", "top"),
             world.Object("large", "blue", "moon", "left"))
    lists = world.caption(scene), world.caption(scene[::-1])
    for text in ("ring is red", "at left is a moon", *lists):
        assert probe.is_true(scene, text)
    for text in ("ring is blue", "a small red ring at top", ""):
        assert not probe.is_true(scene, text)
