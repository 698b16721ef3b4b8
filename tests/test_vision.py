"""Tests of vision.py: the same numbers as transformers' BLIP-2, and every odd picture a person may own.

    pytest tests/test_vision.py
    python tests/test_vision.py        # writes golden_vision.json anew (needs transformers)
"""

import itertools
import json
import random
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config  # noqa: E402
import model  # noqa: E402
import toy  # noqa: E402
import vision  # noqa: E402
from test_model import close, hf_layout, hf_name  # noqa: E402

GOLDEN = Path(__file__).parent / "golden_vision.json"
VIT = dict(image_size=16, patch_size=4, dim=32, n_layers=4, n_heads=4, hidden_dim=48, penultimate=True)
QFORMER = dict(vision_dim=32, dim=24, n_layers=3, n_heads=4, hidden_dim=40, n_queries=5)
LLAMA = dict(dim=32, n_layers=2, n_heads=4, vocab_size=60, hidden_dim=48, max_seq_len=64)
SLOT = 59  # transformers marks image slots with a piece of the vocabulary, we with -1

# What writes into the rows that a norm sees. Scaled like this the rows are nearly constant: a wrong eps is loud.
QUIET = {r"^(patch_embed|cls_|pos_)|^blocks.*(attn\.proj|fc2)": 1e-3,
         r"^(query_tokens|norm)|^layers.*(dense|fc2|norm)": 1e-6}


def fill(m, quiet: bool = False, formula: bool = False):
    """Weights far from their beginning, where half of a network does nothing and a test could not fail.

    By formula, every version of torch has the same (a chirp: the plain sin(n) gives matrices of rank two).
    """
    with torch.no_grad():
        for i, (name, p) in enumerate(sorted(m.named_parameters())):
            n = torch.arange(p.numel(), dtype=torch.float64).view(p.shape)
            wave = 1.4 * torch.sin(0.37 * n * n + i) if formula else torch.randn(p.shape)
            p.copy_(0.25 * wave + (name.endswith("weight") and ("norm" in name or "ln_" in name)))
            for pattern, scale in QUIET.items():
                if quiet and re.search(pattern, name):
                    p.mul_(scale)
    return m.eval()


def parts(quiet: bool = False, formula: bool = False):
    return (fill(vision.ViT(vision.ViTConfig(**VIT)), quiet, formula),
            fill(vision.QFormer(vision.QFormerConfig(**QFORMER)), quiet, formula))


def whole():
    vit, qformer = parts()
    return fill(vision.MiniGPT4(fill(model.LLaMA(model.LLaMAConfig(**LLAMA))), vit, qformer))


# -- the same numbers as another implementation --------------------------------------------------------------

def hf_vision_name(name: str) -> str:
    """Our key (EVA's) -> transformers'."""
    for ours, theirs in {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
                         "patch_embed.proj": "embeddings.patch_embedding", "blocks": "encoder.layers",
                         "norm": "layer_norm", "attn.proj": "self_attn.projection",
                         "attn.qkv": "self_attn.qkv"}.items():
        name = name.replace(ours, theirs)
    return name


def hf_qformer_name(name: str) -> str:
    for ours, theirs in {"layers": "encoder.layer", "mlp.fc1": "intermediate_query.dense",
                         "mlp.fc2": "output_query.dense"}.items():
        name = name.replace(ours, theirs)
    name = re.sub(r"(self|cross)_attention\.(query|key|value)", r"\1attention.attention.\2", name)
    name = re.sub(r"(self|cross)_attention\.dense", r"\1attention.output.dense", name)
    name = re.sub(r"(self|cross)_attention\.norm", r"\1attention.output.LayerNorm", name)
    name = re.sub(r"(layer\.\d+)\.norm", r"\1.output_query.LayerNorm", name)
    return re.sub(r"^norm", "layernorm", name.replace("selfattention", "attention"))


def hf_vision_weights(vit, qformer) -> dict:
    """For Blip2VisionModel, which holds ln_vision too, and a bias for k that must be 0."""
    weights = {hf_vision_name(n): w for n, w in vit.state_dict().items() if not n.endswith("_bias")}
    for i, block in enumerate(vit.blocks):
        bias = (block.attn.q_bias, torch.zeros_like(block.attn.q_bias), block.attn.v_bias)
        weights[f"encoder.layers.{i}.self_attn.qkv.bias"] = torch.cat(bias)
    return {**weights, **{f"post_layernorm.{k}": w for k, w in qformer.ln_vision.state_dict().items()}}


def hf_qformer_weights(qformer) -> dict:
    return {hf_qformer_name(n): w for n, w in qformer.state_dict().items()
            if not n.startswith(("ln_vision", "query_tokens"))}


def hf_configs() -> tuple:
    transformers = pytest.importorskip("transformers")
    vit = transformers.Blip2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4,
        layer_norm_eps=1e-6, attn_implementation="eager")
    qformer = transformers.Blip2QFormerConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, encoder_hidden_size=32,
        layer_norm_eps=1e-12, vocab_size=60, attn_implementation="eager")
    return vit, qformer


def hf_features(vit, qformer, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves by transformers: ln_vision(ViT), and the Q-Former's queries."""
    from transformers import Blip2QFormerModel, Blip2VisionModel
    configs = hf_configs()
    seeing = Blip2VisionModel(configs[0]).eval()
    seeing.load_state_dict(hf_vision_weights(vit, qformer))
    seeing.post_layernorm.eps = 1e-5  # BLIP-2's own; transformers gives it the ViT's
    asking = Blip2QFormerModel(configs[1]).eval()
    asking.load_state_dict(hf_qformer_weights(qformer))
    other_grid = pixels.shape[-2:] != (16, 16)
    seen = seeing(pixels, interpolate_pos_encoding=other_grid).last_hidden_state
    queries = qformer.query_tokens.expand(len(pixels), -1, -1)
    return seen, asking(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (20, 12)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("quiet", [False, True], ids=["", "near-constant rows"])
@torch.no_grad()
def test_equals_transformers(quiet, size):
    """ViT with ln_vision, and Q-Former; also on other grids than the position table's."""
    pytest.importorskip("transformers")
    (vit, qformer), pixels = parts(quiet), torch.randn(3, 3, *size)
    seen, asked = hf_features(vit, qformer, pixels)
    mine = vit(pixels)
    close(qformer.ln_vision(mine), seen, "the ViT (with ln_vision) differs from Blip2VisionModel", 2e-6)
    close(qformer(mine), asked, "the Q-Former differs from Blip2QFormerModel", 2e-6)


@pytest.mark.parametrize("images", [1, 2], ids=["one picture", "two pictures in a row"])
def test_equals_blip2_with_a_llama(images):
    """Pixels and text to logits, loss, and the gradient of the one layer that learns."""
    transformers = pytest.importorskip("transformers")
    m, (vit_config, qformer_config) = whole(), hf_configs()
    llama_config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=60,
                                            num_attention_heads=4, rms_norm_eps=1e-6, max_position_embeddings=64)
    twin = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(
        vision_config=vit_config.to_dict(), qformer_config=qformer_config.to_dict(),
        text_config=llama_config.to_dict(), num_query_tokens=5, image_token_index=SLOT)).eval()
    weights = {"query_tokens": m.qformer.query_tokens, "language_projection.weight": m.llama_proj.weight,
               "language_projection.bias": m.llama_proj.bias}
    weights |= {f"vision_model.{k}": w for k, w in hf_vision_weights(m.vit, m.qformer).items()}
    weights |= {f"qformer.{k}": w for k, w in hf_qformer_weights(m.qformer).items()}
    weights |= {f"language_model.{hf_name(k)}": hf_layout(k, w, 8) for k, w in m.llama.state_dict().items()}
    twin.load_state_dict(weights)
    twin.vision_model.post_layernorm.eps = 1e-5

    tokens = torch.randint(3, SLOT, (2, 20))
    tokens[:, 4:9] = -1
    if images == 2:
        tokens[:, 11:16] = -1
    pixels, labels = torch.randn(2 * images, 3, 16, 16), tokens.masked_fill(tokens == -1, -100)
    theirs = twin(input_ids=tokens.masked_fill(tokens == -1, SLOT), pixel_values=pixels, labels=labels,
                  attention_mask=torch.ones_like(tokens))
    close(m(tokens, pixels), theirs.logits, "logits differ from Blip2ForConditionalGeneration's", 1e-5)
    nll, count = m.nll(tokens, labels, pixels)
    close(nll / count, theirs.loss, "the loss differs", 1e-6)
    (nll / count).backward()
    theirs.loss.backward()
    close(m.llama_proj.weight.grad, twin.language_projection.weight.grad, "the projection's gradient differs", 1e-5)


def picture() -> np.ndarray:
    """A picture by formula: smooth and sharp edges, colours in every corner, no side like another. (43, 67, 3)"""
    y, x = np.mgrid[:43, :67]
    sharp = ((x // 7 + y // 5) % 2)[..., None] * 90
    return (sharp + 80 + 80 * np.sin(np.stack([x / 9, y / 6 + x / 20, x * y / 300], -1))).round().astype(np.uint8)


def write_golden() -> None:
    """The truth is transformers', not ours."""
    from transformers import BlipImageProcessorPil
    golden = {"about": "weights: fill(formula=True), picture: picture(), in test_vision.py; values: transformers' "
                       "Blip2VisionModel, Blip2QFormerModel and BlipImageProcessorPil, in fp32"}
    pixels = BlipImageProcessorPil(size=dict(height=224, width=224))(picture(), return_tensors="pt")["pixel_values"][0]
    golden["picture: sum"] = round(pixels.double().sum().item(), 2)
    golden["picture[:, ::45, ::45]"] = [[[round(v, 5) for v in r] for r in c] for c in pixels[:, ::45, ::45].tolist()]
    for quiet in (False, True):
        vit, qformer = parts(quiet, formula=True)
        with torch.no_grad():
            outputs = hf_features(vit, qformer, golden_pixels(quiet))
        end = ", near-constant rows" * quiet
        for what, x in (("ViT[:, ::4, ::4]", outputs[0][:, ::4, ::4]), ("Q-Former[:, :, ::3]", outputs[1][:, :, ::3])):
            golden[what + end] = [[[float(f"{v:.7g}") for v in row] for row in rows] for rows in x.tolist()]
    GOLDEN.write_text(json.dumps(golden).replace(', "', ',\n "').replace("], [", "],\n  [") + "\n")


def golden_pixels(quiet: bool) -> torch.Tensor:
    """Once in the size that the position table is for, once in another."""
    shape = (2, 3, 16, 16) if quiet else (2, 3, 20, 12)
    n = torch.arange(np.prod(shape), dtype=torch.float64).view(shape)
    return torch.sin(0.11 * n * n).float()


@pytest.mark.parametrize("quiet", [False, True], ids=["", "near-constant rows"])
@torch.no_grad()
def test_equals_golden_values(quiet):
    """The same without transformers. If only this is red: class token? q, k, v? GELU? eps? which layers look?"""
    golden, end = json.loads(GOLDEN.read_text()), ", near-constant rows" * quiet
    vit, qformer = parts(quiet, formula=True)
    seen = vit(golden_pixels(quiet))
    want = torch.tensor(golden["ViT[:, ::4, ::4]" + end])
    close(qformer.ln_vision(seen)[:, ::4, ::4], want, "the ViT differs from the golden values", 4e-6)
    want = torch.tensor(golden["Q-Former[:, :, ::3]" + end])
    close(qformer(seen)[:, :, ::3], want, "the Q-Former differs from the golden values", 4e-6)


def test_preprocessing_equals_golden_values():
    """Squashed with Pillow's antialiased bicubic filter, then CLIP's normalisation; one grey level is 0.015."""
    golden = json.loads(GOLDEN.read_text())
    pixels = vision.preprocess(picture(), 224)
    want = torch.tensor(golden["picture[:, ::45, ::45]"])
    assert pixels.shape == (3, 224, 224) and pixels.dtype == torch.float32
    assert (pixels[:, ::45, ::45] - want).abs().max() < 0.016, "another filter, or another normalisation?"
    assert abs(pixels.double().sum().item() - golden["picture: sum"]) < 5


# -- shapes and modes ----------------------------------------------------------------------------------------

def test_published_sizes():
    """On the meta device: the real shapes without their memory."""
    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())
    vit, qformer = vision.PRESETS["minigpt4"]
    with torch.device("meta"):
        vit, qformer = vision.ViT(vision.ViTConfig(**vit)), vision.QFormer(vision.QFormerConfig(**qformer))
        m = vision.MiniGPT4(model.LLaMA(model.LLaMAConfig(**model.PRESETS["7B"])), vit, qformer)
        large = torch.nn.Linear(qformer.config.dim, model.PRESETS["13B"]["dim"])
        seen = vit(torch.empty(2, 3, 224, 224))
        assert seen.shape == (2, 257, 1408) and qformer(seen).shape == (2, 32, 768)
        assert m.encode(torch.empty(2, 3, 224, 224)).shape == (64, 4096)
    assert len(vit.blocks) == 39 and count(vit.blocks[0]) == 25_248_768
    assert count(vit) == 985_894_528
    assert [i for i, layer in enumerate(qformer.layers) if layer.cross_attention] == [0, 2, 4, 6, 8, 10]
    assert count(qformer.layers) + count(qformer.norm) == 105_137_664
    assert count(qformer.ln_vision) == 2_816 and qformer.query_tokens.numel() == 24_576
    assert count(m.llama_proj) == 3_149_824 and count(large) == 3_937_280
    learning = sum(p.numel() for p in m.parameters() if p.requires_grad)
    assert learning == 3_149_824 and count(m) == 985_894_528 + 105_165_056 + 3_149_824 + 6_738_415_616


def test_state_dict_has_the_published_keys():
    """EVA's file fills a ViT and MiniGPT-4's the projection without a table."""
    block = ["norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight",
             "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
             "mlp.fc2.bias"]
    eva = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    m = whole()
    assert set(m.vit.state_dict()) == {*eva, *(f"blocks.{i}.{name}" for i in range(3) for name in block)}
    assert {k for k in m.state_dict() if "proj" in k and "." not in k[:10]} == {"llama_proj.weight", "llama_proj.bias"}


def test_only_the_projection_learns():
    """Two optimizer steps: everything else keeps its bits, and the frozen vision parts stay in eval mode."""
    m = whole()
    before = {name: p.clone() for name, p in m.named_parameters()}
    m.train()
    assert m.training and m.llama_proj.training
    assert not any(x.training for part in (m.vit, m.qformer) for x in part.modules())
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.01)
    tokens = torch.randint(3, 50, (2, 12))
    tokens[:, 2:7] = -1
    for _ in range(2):
        nll, _ = m.nll(tokens, tokens.masked_fill(tokens == -1, -100), torch.randn(2, 3, 16, 16))
        nll.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in m.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"llama_proj.weight", "llama_proj.bias"}


def test_cached_features_change_nothing():
    m = whole()
    pixels, tokens = torch.randn(2, 3, 16, 16), torch.randint(3, 50, (2, 12))
    tokens[:, 2:7] = -1
    with torch.no_grad():
        assert torch.equal(m(tokens, m.features(pixels)), m(tokens, pixels))


def test_pictures_are_told_apart_and_stay_in_order():
    """A picture changes what is said after it, never what was said before; two pictures are not interchangeable."""
    m = whole()
    a, b = torch.randn(2, 1, 3, 16, 16)
    tokens = torch.randint(3, 50, (1, 16))
    tokens[:, 1:6] = tokens[:, 8:13] = -1
    with torch.no_grad():
        ab, ba, aa = (m(tokens, torch.cat(order)) for order in ((a, b), (b, a), (a, a)))
    assert not torch.allclose(ab[:, 13:], ba[:, 13:]) and not torch.allclose(ab[:, 1:6], ba[:, 1:6])
    close(ab[:, :8], aa[:, :8], "the second picture reaches the words before it")


@pytest.mark.parametrize("pictures, slots", [(1, 10), (2, 5), (0, 5), (1, 0)])
def test_count_of_pictures_and_slots(pictures, slots):
    tokens = torch.tensor([[1, *[-1] * slots, 5]])
    with pytest.raises(config.Problem, match=f"{slots} image slots.* {5 * pictures} image vectors"):
        whole()(tokens, torch.randn(pictures, 3, 16, 16) if pictures else None)


def test_generate_about_pictures():
    """Two prompts of unequal length with a picture each give what each gives alone."""
    m = whole()
    pixels, prompts = torch.randn(2, 3, 16, 16), [[1, 7, -1, -1, -1, -1, -1, 9], [1, -1, -1, -1, -1, -1]]
    both = [row for row in zip(*m.generate(prompts, 6, images=pixels, stop=()))]
    alone = [tuple(i for i, in m.generate([p], 6, images=x[None], stop=())) for p, x in zip(prompts, pixels)]
    assert both == alone
    other = tuple(i for i, in m.generate([prompts[0]], 6, images=-pixels[:1], stop=()))
    assert other != alone[0], "the picture makes no difference"


def test_checkpointing_changes_nothing():
    vit, pixels = parts()[0].train(), torch.randn(2, 3, 16, 16)
    gradients = []
    for vit.checkpointing in (False, True):
        vit.zero_grad()
        vit(pixels).square().sum().backward()
        gradients.append([p.grad.clone() for p in vit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("build, said", [
    (lambda: vision.ViTConfig(image_size=50), "multiple of patch_size"), (lambda: vision.ViTConfig(n_heads=3), "n_heads"),
    (lambda: vision.QFormerConfig(n_heads=5), "n_heads"),
    (lambda: parts()[0](torch.zeros(1, 3, 18, 16)), "16 x 18 pixels"),
    (lambda: vision.MiniGPT4(whole().llama, parts()[0], vision.QFormer(vision.QFormerConfig())), "width 32.*for 128")])
def test_impossible_sizes_are_refused(build, said):
    with pytest.raises(config.Problem, match=said):
        build()


# -- odd pictures --------------------------------------------------------------------------------------------

def save(folder: Path, image: Image.Image, name: str = "picture.png", **options) -> Path:
    image.save(folder / name, **options)
    return folder / name


def colors(path) -> np.ndarray:
    return np.asarray(vision.open_image(path))


def test_transparency_becomes_white(tmp_path):
    """convert("RGB") would show the colour under a transparent pixel."""
    hidden = np.zeros((4, 4, 4), np.uint8)
    hidden[..., 0] = 255  # red
    hidden[2:, :, 3] = 255  # the lower half can be seen
    for name in ("a.png", "a.webp"):
        options = dict(lossless=True, exact=True) if name.endswith("webp") else {}
        seen = colors(save(tmp_path, Image.fromarray(hidden), name, **options))
        assert (seen[:2] == 255).all() and (seen[2:] == (255, 0, 0)).all(), name
    half = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert abs(int(colors(save(tmp_path, half))[0, 0, 0]) - 127) <= 1
    grey = Image.new("LA", (2, 2), (0, 0))
    assert (colors(save(tmp_path, grey)) == 255).all()


def test_palette(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([250, 10, 20, 30, 200, 40])
    palette.putpixel((1, 0), 1)
    assert colors(save(tmp_path, palette)).tolist() == [[[250, 10, 20], [30, 200, 40]]]
    assert colors(save(tmp_path, palette, transparency=0)).tolist() == [[[255, 255, 255], [30, 200, 40]]]


@pytest.mark.parametrize("mode, value, seen", [("L", 77, 77), ("1", 1, 255), ("1", 0, 0)])
def test_grey(tmp_path, mode, value, seen):
    assert (colors(save(tmp_path, Image.new(mode, (3, 2), value))) == seen).all()


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bits(tmp_path, name):
    """Pillow's own conversion clips at 255 and would show nearly everything white."""
    deep = Image.fromarray(np.array([[0, 25750, 65535]], np.uint16))
    assert colors(save(tmp_path, deep, name))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("values, kind, seen", [
    ([0.0, 0.4, 1.0], np.float32, [0, 102, 255]), ([0.0, 100.0, 255.0], np.float32, [0, 100, 255]),
    ([0, 100, 255], np.int32, [0, 100, 255]), ([0, 25750, 65535], np.int32, [0, 100, 255]),
    ([-5.0, float("nan"), 0.2], np.float32, [0, 0, 51])])
def test_numbers_for_grey(tmp_path, values, kind, seen):
    """32 bits a pixel, as scientific TIFF files have them: the range says what is white."""
    image = Image.fromarray(np.array([values], kind))
    assert colors(save(tmp_path, image, "a.tif"))[0, :, 0].tolist() == seen


def test_cmyk(tmp_path):
    """No ink is white, all ink is black; JPEG rounds a little."""
    inks = Image.new("CMYK", (16, 8), (0, 0, 0, 0))
    inks.paste((0, 255, 255, 0), (8, 0, 16, 8))
    seen = colors(save(tmp_path, inks, "print.jpg", quality=100)).astype(int)
    assert seen[:, :8].min() > 250 and np.abs(seen[:, 8:] - (255, 0, 0)).max() < 6


@pytest.mark.parametrize("orientation, sides", [
    (1, "top left"), (2, "top right"), (3, "bottom right"), (4, "bottom left"),
    (5, "left top"), (6, "right top"), (7, "right bottom"), (8, "left bottom")])
def test_exif_rotation(tmp_path, orientation, sides):
    """A camera held sideways stores the picture lying. The sides: where the first row and column stored belong."""
    upright = np.arange(3 * 4 * 6, dtype=np.uint8).reshape(4, 6, 3) * 3
    stored = upright[::-1] if "bottom" in sides else upright
    stored = stored[:, ::-1] if "right" in sides else stored
    stored = stored.swapaxes(0, 1) if orientation > 4 else stored  # the first row stored is a column
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert (colors(path) == upright).all()


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_animation_shows_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    options = dict(lossless=True) if name.endswith("webp") else {}
    path = save(tmp_path, frames[0], name, save_all=True, append_images=frames[1:], **options)
    assert (colors(path) == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)], ids=str)
def test_any_shape_is_squashed(tmp_path, size):
    pixels = vision.load_image(save(tmp_path, Image.new("RGB", size, (255, 255, 255))))
    want = ((1 - vision.MEAN) / vision.STD).expand(3, 224, 224)
    assert torch.allclose(pixels, want)


def test_names_of_files(tmp_path):
    """A wrong ending, spaces, letters of other alphabets: the content decides."""
    for name in ("really a png.jpg", "фото ✓.png"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / name, format="png")
        assert vision.load_image(tmp_path / name, 8).shape == (3, 8, 8)
        assert vision.load_image(str(tmp_path / name), 8).shape == (3, 8, 8)


def huge_png(width: int, height: int) -> bytes:
    """Forty bytes that claim to be a large picture."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name, content, said", [
    ("empty.jpg", b"", "is empty"),
    ("page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
    ("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git-LFS pointer"),
    ("notes.jpg", b"just some words", "not a picture"),
    ("bomb.png", huge_png(60000, 60000), "more than 178 million pixels"),
    ("short.png", huge_png(10, 10), "is damaged")])
def test_no_picture_is_refused_by_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(config.Problem, match=f"{name}.*{said}"):
        vision.load_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.tif", "a.bmp"])
def test_a_truncated_or_damaged_picture(tmp_path, name):
    """Cut or altered at many places: a picture or a Problem with its name, nothing else."""
    good = save(tmp_path, Image.fromarray(picture()), name).read_bytes()
    refused = 0
    for at in range(0, len(good), max(1, len(good) // 60)):
        for bad in (good[:at], good[:at] + bytes([good[at] ^ 0xff]) + good[at + 1:]):
            (tmp_path / name).write_bytes(bad)
            try:
                vision.load_image(tmp_path / name, 8)
            except config.Problem as problem:
                assert name in str(problem)
                refused += 1
    assert refused > 20


def test_no_such_file(tmp_path):
    for where, said in ((tmp_path / "none.jpg", "No such file"), (tmp_path, "directory"),
                        ("https://example.org/cat.jpg", "download it first")):
        with pytest.raises(config.Problem, match=f"{where}.*{said}"):
            vision.load_image(where)
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    with pytest.raises(config.Problem, match="loop.jpg"):
        vision.load_image(tmp_path / "loop.jpg")


def test_a_large_photo_is_fine(tmp_path, monkeypatch, recwarn):
    """Between Pillow's warning and its refusal: no warning on the screen."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    assert vision.load_image(save(tmp_path, Image.new("RGB", (10, 10))), 8).shape == (3, 8, 8)
    assert not recwarn.list
    with pytest.raises(config.Problem, match="too large|more than"):
        vision.load_image(save(tmp_path, Image.new("RGB", (20, 20))), 8)


def test_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figures = vision.main(vision.VisionConfig())
    assert figures["minigpt4", "projection to 7B"] == 3_149_824 and "985,894,528" in capsys.readouterr().out
    vision.main(vision.VisionConfig(image=str(save(tmp_path, Image.fromarray(picture()))), size=32))
    want = np.asarray(Image.fromarray(picture()).resize((32, 32), Image.Resampling.BICUBIC))
    assert (np.asarray(Image.open("seen.png")) == want).all()


# -- toy pictures --------------------------------------------------------------------------------------------

def one(size: str, color: str, shape: str, place: str = "center") -> tuple:
    return (toy.Object(size, color, shape, place),)


@pytest.mark.parametrize("color", toy.COLORS)
def test_colors_are_told_apart(color):
    """The middle of every large square is nearer to its own colour than to any other."""
    for seed in range(20):
        seen = toy.draw(one("large", color, "square"), random.Random(seed), 64)[28:36, 28:36].mean((0, 1))
        assert min(toy.RGB, key=lambda c: np.abs(seen - toy.RGB[c]).sum()) == color


def test_shapes_places_and_sizes_are_told_apart():
    """Covered pixels: in the right corner, more when large, and no two shapes cover nearly the same."""
    covered = {}
    for shape in toy.SHAPES:
        pictures = [toy.draw(one("large", "white", shape), random.Random(seed), 96) for seed in range(30)]
        covered[shape] = np.mean([p.astype(int).sum(-1) > 450 for p in pictures], axis=0)
    for a, b in itertools.combinations(toy.SHAPES, 2):
        either = np.maximum(covered[a], covered[b]).sum()
        assert np.minimum(covered[a], covered[b]).sum() < 0.85 * either, f"{a} and {b} look alike"
    for place, (x, y) in toy.CENTERS.items():
        area = {}
        for size in toy.SIZES:
            rows, columns = np.nonzero(toy.draw(one(size, "white", "ring", place), random.Random(1), 96).min(-1) > 150)
            assert abs(rows.mean() / 96 - y) < 0.05 and abs(columns.mean() / 96 - x) < 0.05
            area[size] = len(rows)
        assert 1.5 < area["large"] / area["small"] < 5


def test_pictures_vary_and_repeat():
    scene = toy.pick_scene(random.Random(0))
    a, again, b = (toy.draw(scene, random.Random(seed)) for seed in (1, 1, 2))
    assert a.shape == (48, 48, 3) and a.dtype == np.uint8
    assert (a == again).all() and (a != b).mean() > 0.5


def test_alt_text_never_names_a_held_out_pair():
    """Not even where it is wrong about the picture; it has no end mark, and is wrong about some."""
    rng, wrong = random.Random(0), 0
    for _ in range(4000):
        scene = toy.pick_scene(rng)
        text = toy.alt_text(scene, rng)
        assert not any(f"{color} {shape}" in text for color, shape in toy.HELD_PAIRS), text
        assert not text.endswith(".")
        wrong += any(c not in {o.color for o in scene} for c in toy.COLORS if re.search(rf"\b{c}\b", text))
    assert 40 < wrong < 400


def test_album(tmp_path):
    """MiniGPT-4's own layout, and pictures that load back bit by bit."""
    toy.main(toy.ToyConfig(split="pairs", count=3, album=str(tmp_path / "album")))
    pictures = [toy.draw(toy.pick_scene(random.Random(i)), random.Random(i)) for i in range(2)]
    toy.write_album(tmp_path / "album", pictures, ["one", "two"])
    annotations = json.loads((tmp_path / "album" / "filter_cap.json").read_text())["annotations"]
    assert annotations == [dict(image_id="0", caption="one"), dict(image_id="1", caption="two")]
    for a, picture in zip(annotations, pictures):
        assert (colors(tmp_path / "album" / "image" / f"{a['image_id']}.png") == picture).all()


if __name__ == "__main__":
    write_golden()
