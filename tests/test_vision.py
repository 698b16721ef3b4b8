"""Tests of vision.py: the same numbers as transformers' BLIP-2, and the odd pictures that people
have.

    pytest tests/test_vision.py
    PYTHONPATH=. python tests/test_vision.py     # writes golden_vision.json (needs transformers)
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model
import vision
from test_model import close, hf_layout, hf_name
from tools.config import UserError

GOLDEN = Path(__file__).parent / "golden_vision.json"
VIT = dict(image_size=16, patch_size=4, dim=32, n_layers=4, n_heads=4, hidden_dim=48,
           penultimate=True)
QFORMER = dict(vision_dim=32, dim=24, n_layers=3, n_heads=4, hidden_dim=40, n_queries=5)
LLAMA = dict(dim=32, n_layers=2, n_heads=4, vocab_size=60, hidden_dim=48, max_seq_len=64)
SLOT = 59  # transformers marks image slots with a token of the vocabulary, we with -1

# The weights that write into the rows that a norm sees. With these factors the rows are nearly
# constant, so that a wrong eps shows.
QUIET = {r"^(patch_embed|cls_|pos_)|^blocks.*(attn\.proj|fc2)": 1e-3,
         r"^(query_tokens|norm)|^layers.*(dense|fc2|norm)": 1e-6}


def fill(m, quiet: bool, formula: bool) -> None:
    """Weights far from the initial ones, with which half of a network does nothing and a test could
    not fail. By formula, they are the same in every version of torch."""
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(m.named_parameters())):
            n = torch.arange(p.numel(), dtype=torch.float64).view(p.shape)
            wave = 1.4 * torch.sin(0.37 * n * n + i) if formula else torch.randn(p.shape)
            is_gain = name.endswith("weight") and ("norm" in name or "ln_" in name)
            p.copy_(0.25 * wave + is_gain)
            for pattern, scale in QUIET.items():
                if quiet and re.search(pattern, name):
                    p.mul_(scale)


def whole(quiet: bool = False, formula: bool = False) -> vision.MiniGPT4:
    m = vision.MiniGPT4(model.LLaMA(model.LLaMAConfig(**LLAMA)),
                        vision.ViT(vision.ViTConfig(**VIT)),
                        vision.QFormer(vision.QFormerConfig(**QFORMER)))
    for part in m.children():
        fill(part, quiet, formula)
    return m.eval()


def text_with_slots(rows: int, length: int, *starts: int) -> torch.Tensor:
    """Random tokens (rows, length) with the five slots of a picture at each start."""
    tokens = torch.randint(3, 50, (rows, length))
    for start in starts:
        tokens[:, start:start + 5] = -1
    return tokens


# -- the same numbers as another implementation ---------------------------------------------------

def rename(name: str, table: dict[str, str]) -> str:
    for pattern, replacement in table.items():
        name = re.sub(pattern, replacement, name)
    return name


HF_VISION = {  # our key (EVA's) -> transformers'
    "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding", "blocks": "encoder.layers",
    "norm": "layer_norm", "attn.proj": "self_attn.projection", "attn.qkv": "self_attn.qkv"}
HF_QFORMER = {
    "^norm": "layernorm", "layers": "encoder.layer",
    r"(layer\.\d+)\.norm": r"\1.output_query.LayerNorm",
    "mlp.fc1": "intermediate_query.dense", "mlp.fc2": "output_query.dense",
    "self_attention": "attention", "cross_attention": "crossattention",
    r"attention\.(query|key|value)": r"attention.attention.\1",
    r"attention\.dense": "attention.output.dense",
    r"attention\.norm": "attention.output.LayerNorm"}


def hf_weights(m) -> dict:
    """Ours, by transformers' names and in its layout: the ViT holds ln_vision, and a bias for k
    that must be 0."""
    weights = {}
    for name, w in m.state_dict().items():
        part, _, name = name.partition(".")
        if part == "llama_proj":
            weights[f"language_projection.{name}"] = w
        elif part == "llama":
            weights[f"language_model.{hf_name(name)}"] = hf_layout(name, w, 8)
        elif name == "query_tokens":
            weights[name] = w
        elif name.startswith("ln_vision"):
            weights[name.replace("ln_vision", "vision_model.post_layernorm")] = w
        elif part == "qformer":
            weights[f"qformer.{rename(name, HF_QFORMER)}"] = w
        elif not name.endswith("_bias"):
            weights[f"vision_model.{rename(name, HF_VISION)}"] = w
    for i, block in enumerate(m.vit.blocks):
        bias = (block.attn.q_bias, torch.zeros_like(block.attn.q_bias), block.attn.v_bias)
        weights[f"vision_model.encoder.layers.{i}.self_attn.qkv.bias"] = torch.cat(bias)
    return weights


def hf_twin(m):
    """The same network, built by transformers from the same weights."""
    transformers = pytest.importorskip("transformers")
    twin = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                           num_attention_heads=4, image_size=16, patch_size=4, layer_norm_eps=1e-6),
        qformer_config=dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
                            intermediate_size=40, encoder_hidden_size=32, layer_norm_eps=1e-12,
                            vocab_size=60),
        text_config=transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=60,
            num_attention_heads=4, rms_norm_eps=1e-6, max_position_embeddings=64),
        num_query_tokens=5, image_token_index=SLOT)).eval()
    twin.load_state_dict(hf_weights(m))
    twin.vision_model.post_layernorm.eps = 1e-5  # BLIP-2's own; transformers gives it the ViT's
    return twin


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_attention_by_hand_is_the_fused_one(dtype, error):
    """Also between 4 queries and 65 patches. In bfloat16 a CPU takes it by hand, because torch's
    fused backward pass took most of a training step."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, dtype=dtype) for n in (4, 65, 65))
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    everywhere = torch.ones(1, dtype=torch.bool)
    by_hand = model.attention_textbook(q, k, v, everywhere)
    assert (by_hand - fused).abs().max() < error
    rows = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    assert (vision.attend(*rows, n_heads=3) - fused.transpose(1, 2).flatten(2)).abs().max() < error


def test_equals_blip2_with_a_llama():
    """Pixels and text to logits, loss, and the gradient of the one layer that is trained; with two
    pictures in each row."""
    m = whole()
    twin, tokens = hf_twin(m), text_with_slots(2, 20, 4, 11)
    pixels, labels = torch.randn(4, 3, 16, 16), tokens.masked_fill(tokens == -1, -100)
    theirs = twin(input_ids=tokens.masked_fill(tokens == -1, SLOT), pixel_values=pixels,
                  labels=labels, attention_mask=torch.ones_like(tokens))
    close(m(tokens, pixels), theirs.logits, "logits differ from Blip2ForConditionalGeneration's")
    nll, count = m.nll(tokens, labels, pixels)
    close(nll / count, theirs.loss, "the loss differs", 1e-6)
    (nll / count).backward()
    theirs.loss.backward()
    want = twin.language_projection.weight.grad
    close(m.llama_proj.weight.grad, want, "the projection's gradient differs")


def picture() -> np.ndarray:
    """A picture by formula, (43, 67, 3): smooth and sharp edges, no side like another."""
    y, x = np.mgrid[:43, :67]
    sharp = ((x // 7 + y // 5) % 2)[..., None] * 90
    smooth = np.sin(np.stack([x / 9, y / 6 + x / 20, x * y / 300], -1))
    return (sharp + 80 + 80 * smooth).round().astype(np.uint8)


def golden_pixels() -> torch.Tensor:
    n = torch.arange(2 * 3 * 16 * 16, dtype=torch.float64).view(2, 3, 16, 16)
    return torch.sin(0.11 * n * n).float()


def rounded(x: torch.Tensor, digits: str) -> list:
    return [[[float(f"{v:{digits}}") for v in row] for row in rows] for rows in x.tolist()]


def write_golden() -> None:
    """The values are transformers', not ours."""
    from transformers import BlipImageProcessorPil
    golden = {"about": "weights: fill(formula=True), picture: picture(), in test_vision.py; "
                       "values: transformers' Blip2VisionModel, Blip2QFormerModel and "
                       "BlipImageProcessorPil, in fp32"}
    processor = BlipImageProcessorPil(size=dict(height=224, width=224))
    pixels = processor(picture(), return_tensors="pt")["pixel_values"][0]
    golden["picture: sum"] = round(pixels.double().sum().item(), 2)
    golden["picture[:, ::45, ::45]"] = rounded(pixels[:, ::45, ::45], ".5f")
    for quiet in (False, True):
        m = whole(quiet, formula=True)
        twin, queries = hf_twin(m), m.qformer.query_tokens.expand(2, -1, -1)
        with torch.no_grad():
            image = twin.vision_model(golden_pixels()).last_hidden_state
            said = twin.qformer(query_embeds=queries, encoder_hidden_states=image)
        end = ", near-constant rows" if quiet else ""
        golden["ViT[:, ::4, ::4]" + end] = rounded(image[:, ::4, ::4], ".7g")
        golden["Q-Former[:, :, ::3]" + end] = rounded(said.last_hidden_state[:, :, ::3], ".7g")
    text = json.dumps(golden).replace(', "', ',\n "').replace("], [", "],\n  [")
    GOLDEN.write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize("quiet", [False, True], ids=["", "near-constant rows"])
@torch.no_grad()
def test_equals_golden_values(quiet):
    """transformers' values. If only this is red: class token? q, k, v? GELU? eps? which layers have
    cross-attention?"""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    end = ", near-constant rows" if quiet else ""
    m = whole(quiet, formula=True)
    image = m.vit(golden_pixels())
    want = torch.tensor(golden["ViT[:, ::4, ::4]" + end])
    got = m.qformer.ln_vision(image)[:, ::4, ::4]
    close(got, want, "the ViT differs from the golden values", 4e-6)
    want = torch.tensor(golden["Q-Former[:, :, ::3]" + end])
    close(m.qformer(image)[:, :, ::3], want, "the Q-Former differs from the golden values", 4e-6)


def test_preprocessing_equals_golden_values():
    """Squashed by Pillow's antialiased bicubic filter, then CLIP's normalization; one gray level is
    0.015."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    pixels = vision.preprocess(picture(), 224)
    want = torch.tensor(golden["picture[:, ::45, ::45]"])
    error = (pixels[:, ::45, ::45] - want).abs().max()
    assert error < 0.016, "another filter, or another normalization?"
    assert abs(pixels.double().sum().item() - golden["picture: sum"]) < 5


# -- the whole MiniGPT-4 --------------------------------------------------------------------------

def test_only_the_projection_learns():
    """Two optimizer steps: everything else keeps its bits."""
    m = whole()
    before = {name: p.clone() for name, p in m.named_parameters()}
    m.train()
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.01)
    tokens = text_with_slots(2, 12, 2)
    for _ in range(2):
        m.nll(tokens, tokens.clamp(min=0), torch.randn(2, 3, 16, 16))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in m.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"llama_proj.weight", "llama_proj.bias"}


def test_generate_about_pictures():
    """Two prompts of unequal length with a picture each give what each gives alone."""
    m, pixels = whole(), torch.randn(2, 3, 16, 16)
    prompts = [[1, 7, -1, -1, -1, -1, -1, 9], [1, -1, -1, -1, -1, -1]]

    def say(prompts, pixels) -> list[tuple]:
        return list(zip(*m.generate(prompts, 6, images=pixels, stop=-1)))

    both = say(prompts, pixels)
    assert both == say(prompts[:1], pixels[:1]) + say(prompts[1:], pixels[1:])
    assert say(prompts[:1], -pixels[:1]) != both[:1], "the picture makes no difference"


@torch.no_grad()
def test_files_pixels_and_features_give_the_same_vectors(tmp_path):
    """A chat reads files, the published recipe trains on pixels, the toy on cached features."""
    m, path = whole(), save(tmp_path, Image.fromarray(picture()))
    pixels = vision.preprocess(picture(), 16)[None]
    vectors = m.encode_image(path)
    assert torch.equal(vectors, m.encode(pixels))
    assert torch.equal(vectors, m.encode(m.features(pixels)))


# -- odd pictures ---------------------------------------------------------------------------------

def save(folder: Path, image: Image.Image, name: str = "picture.png", **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


def colors(path) -> np.ndarray:
    return np.asarray(vision.open_image(path))


def test_transparency_becomes_white(tmp_path):
    """convert("RGB") would show the color under a transparent pixel."""
    hidden = np.zeros((4, 4, 4), np.uint8)
    hidden[..., 0] = 255  # red
    hidden[2:, :, 3] = 255  # the lower half can be seen
    seen = colors(save(tmp_path, Image.fromarray(hidden)))
    assert (seen[:2] == 255).all() and (seen[2:] == (255, 0, 0)).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([250, 10, 20, 30, 200, 40])
    palette.putpixel((1, 0), 1)
    path = save(tmp_path, palette, transparency=0)
    assert colors(path).tolist() == [[[255, 255, 255], [30, 200, 40]]]


@pytest.mark.parametrize("values, kind, seen", [
    ([0, 25750, 65535], np.uint16, [0, 100, 255]),
    ([0, 25750, 65535], np.int32, [0, 100, 255]),
    ([-5.0, float("nan"), 0.2], np.float32, [0, 0, 51])])
def test_16_bits(tmp_path, values, kind, seen):
    """Deep gray, also in the 32 bits of scientific TIFF files. Pillow's own conversion clips at 255
    and would show nearly everything white."""
    image = Image.fromarray(np.array([values], kind))
    assert colors(save(tmp_path, image, "deep.tif"))[0, :, 0].tolist() == seen


def test_exif_rotation(tmp_path):
    """A camera held sideways stores the picture lying."""
    upright = np.arange(3 * 4 * 6, dtype=np.uint8).reshape(4, 6, 3) * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a turn to the right
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    assert colors(save(tmp_path, stored, exif=exif)).tolist() == upright.tolist()


@pytest.mark.parametrize("name, content, message", [
    ("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git-LFS"),
    ("none.jpg", None, "No such file")])
def test_no_picture_is_refused_by_name(tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        vision.load_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["EPS", "DDS", "ICO"])
def test_only_usual_formats_are_opened(tmp_path, kind):
    """Pillow starts Ghostscript for PostScript, whatever the file is called; a rare DDS file raised
    NotImplementedError."""
    path = tmp_path / "picture.jpg"
    Image.fromarray(picture()).save(path, kind)
    with pytest.raises(UserError, match="picture.jpg is not an image in a usual format"):
        vision.load_image(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_picture(tmp_path):
    """Opening it waited forever."""
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match="pipe.jpg is not a regular file"):
        vision.load_image(tmp_path / "pipe.jpg")


def test_any_exception_of_pillow_is_one_line(tmp_path, monkeypatch):
    """Its plugins raise struct.error, NotImplementedError and others."""
    path = save(tmp_path, Image.fromarray(picture()))
    for error in (NotImplementedError("odd"), IndexError("odd"), OverflowError("odd")):
        monkeypatch.setattr(vision, "to_rgb", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(UserError, match="cannot read image .*picture.png: odd"):
            vision.open_image(path)


def test_a_damaged_picture_is_refused_by_name(tmp_path):
    """Cut, or with other bytes in the middle."""
    good = save(tmp_path, Image.fromarray(picture())).read_bytes()
    for bad in (good[:2000], good[:2000] + b"damaged" + good[2007:]):
        (tmp_path / "bad.png").write_bytes(bad)
        with pytest.raises(UserError, match="cannot read image .*bad.png"):
            vision.load_image(tmp_path / "bad.png")


if __name__ == "__main__":
    write_golden()
