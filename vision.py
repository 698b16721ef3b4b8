"""What MiniGPT-4 sees with: image files, a ViT, a Q-Former, and one linear layer into LLaMA.

    python vision.py                     # the published sizes, part by part
    python vision.py --image=photo.jpg   # what the model gets to see of a picture: seen.png

References: [1] Zhu et al. 2023, MiniGPT-4 (arXiv 2304.10592); [2] Li et al. 2023, BLIP-2: the Q-Former
(2301.12597); [3] Fang et al. 2022, EVA: the ViT (2211.07636); [4] Dosovitskiy et al. 2020, An Image is Worth
16x16 Words (2010.11929).

Each module is the home of one published file: `ViT` of EVA's, with its keys; `QFormer` of BLIP-2's (queries,
the layer norm between ViT and Q-Former, BERT layers); `llama_proj` of MiniGPT-4's. There is no dropout.

Letters in the shape comments: N images, P patches, Q queries, C width, H heads, D head width; B, T: LLaMA's.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.checkpoint import checkpoint

import model
from config import Problem, run

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # CLIP's, of red, green, blue
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@dataclass
class ViTConfig:
    image_size: int = 48  # pixels a side; pictures are squashed to this
    patch_size: int = 12
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    hidden_dim: int = 256  # of the feed-forward
    penultimate: bool = False  # leave the last layer out: BLIP-2 uses what stands before it
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise Problem(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if self.dim % self.n_heads:
            raise Problem(f"dim={self.dim} of the ViT must be a multiple of n_heads={self.n_heads}")


@dataclass
class QFormerConfig:
    vision_dim: int = 128  # width of the ViT
    dim: int = 128
    n_layers: int = 2
    n_heads: int = 4
    hidden_dim: int = 256
    n_queries: int = 10  # image vectors that LLaMA gets for a picture
    cross_every: int = 2  # layers 0, 2, 4, ... look at the picture
    norm_eps: float = 1e-12

    def __post_init__(self):
        if self.dim % self.n_heads:
            raise Problem(f"dim={self.dim} of the Q-Former must be a multiple of n_heads={self.n_heads}")


PRESETS = {
    "toy": (dict(), dict()),
    "photos": (dict(image_size=32, patch_size=4, dim=192, n_heads=3, hidden_dim=384),
               dict(vision_dim=192, n_queries=4)),
    "minigpt4": (dict(image_size=224, patch_size=14, dim=1408, n_layers=40, n_heads=16, hidden_dim=6144,
                      penultimate=True),  # EVA's ViT-g/14
                 dict(vision_dim=1408, dim=768, n_layers=12, n_heads=12, hidden_dim=3072, n_queries=32)),
}


# -- image files ---------------------------------------------------------------------------------------------

def open_image(path) -> Image.Image:
    """A picture file as 8-bit RGB: upright (EXIF), transparent parts white, first frame of an animation.

    Raises Problem, with the file's name, for what is missing, broken, too large or no picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns from 89 million pixels on, and refuses twice that
            with Image.open(path) as image:
                return to_rgb(ImageOps.exif_transpose(image))  # reads all pixels, up to where a file is cut
    except UnidentifiedImageError:
        raise Problem(f"{path} {not_a_picture(path)}") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS // 10 ** 6
        raise Problem(f"{path} has more than {limit} million pixels; make it smaller") from None
    except OSError as error:
        if error.errno is None:  # Pillow's own: the picture, not the disk
            raise Problem(f"{path} is damaged ({error})") from None
        hint = "; download it first" if "://" in str(path) else ""
        raise Problem(f"cannot open the picture {path}: {error.strerror}{hint}") from None
    except (ValueError, SyntaxError, LookupError, EOFError, TypeError, OverflowError) as error:  # damage
        raise Problem(f"{path} is damaged, or of a kind that Pillow cannot convert ({error})") from None


def not_a_picture(path) -> str:
    """What a file is that Pillow does not know; the usual ones come from downloads that went wrong."""
    with open(path, "rb") as file:
        head = file.read(100).lstrip().lower()
    if not head:
        return "is empty"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not a picture; download the picture itself"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git-LFS pointer; fetch the picture itself with `git lfs pull`"
    return "is not a picture that Pillow can read; save it as JPEG or PNG"


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits of grey: Pillow clips at 255
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0).clip(min=0)
        white = 65535 if image.mode.startswith("I;16") else next(
            (w for w in (1, 255, 65535) if grey.max() <= w and (w > 1 or image.mode == "F")), grey.max())
        image = Image.fromarray((grey * (255 / white)).round().astype(np.uint8))
    bands = image.getbands()
    if "A" in bands or "a" in bands or "transparency" in image.info:  # convert("RGB") shows hidden colours
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(image: Union[Image.Image, np.ndarray], size: int) -> torch.Tensor:
    """RGB, or uint8 (H, W, 3), to (3, size, size): squashed by Pillow's bicubic filter, CLIP's scale."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - MEAN) / STD


def load_image(path, size: int = 224) -> torch.Tensor:
    """A picture file as (3, size, size), ready for the ViT. Errors as of open_image."""
    return preprocess(open_image(path), size)


# -- ViT -----------------------------------------------------------------------------------------------------

def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Everyone sees everyone: q (N, T, C), k and v (N, S, C) -> (N, T, C)."""
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (N, H, T or S, D)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def init_linear(linear: nn.Module, scale: float = 1.0) -> None:
    """0.02, as EVA and BERT, at the width 1408; narrower layers get more. Biases begin at 0."""
    nn.init.trunc_normal_(linear.weight, std=scale * 0.75 / math.sqrt(linear.weight[0].numel()))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class PatchEmbed(nn.Module):
    """[4] eq. 1: the picture in squares, each mapped to a vector. Row by row, from the top left."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, config.patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # (N, 3, h, w) -> (N, P, C)


class ViTAttention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))  # none for k: softmax would not notice
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (N, 1+P, C) each
        return self.proj(attend(q + self.q_bias.type_as(q), k, v + self.v_bias.type_as(v), self.n_heads))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.norm_eps)
        self.attn = ViTAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config.dim, config.hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """[3]: pixels (N, 3, h, w) -> (N, 1 + P, C), the class token first; no norm after the last block."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward pass
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        patches = (config.image_size // config.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, config.dim))
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.n_layers - config.penultimate))
        self.init_weights()

    def init_weights(self) -> None:
        """EVA's: trunc-normal, and what writes into the residual stream is scaled down with depth. But
        positions begin louder: beside pixels with a spread of 0.75, EVA's 0.02 goes unheard for long."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.3)
        init_linear(self.patch_embed.proj)
        for i, block in enumerate(self.blocks):
            for linear in (block.attn.qkv, block.mlp.fc1):
                init_linear(linear)
            for linear in (block.attn.proj, block.mlp.fc2):
                init_linear(linear, 1 / math.sqrt(2 * (i + 1)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        (height, width), side = pixels.shape[-2:], self.config.patch_size
        if height % side or width % side:
            raise Problem(f"a picture of {width} x {height} pixels cannot be cut into squares of {side}")
        x = self.patch_embed(pixels.to(self.patch_embed.proj.weight.dtype))  # (N, P, C)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1).type_as(x), x), dim=1)  # (N, 1+P, C)
        x = x + resize_positions(self.pos_embed, height // side, width // side).type_as(x)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def resize_positions(positions: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The table (1, 1 + old grid, C) for another grid: bicubic, in fp32; the class token's row is kept."""
    side = math.isqrt(positions.shape[1] - 1)
    if (rows, columns) == (side, side):
        return positions
    patches = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, C, side, side)
    patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], patches.flatten(2).transpose(1, 2).type_as(positions)), dim=1)


# -- Q-Former ------------------------------------------------------------------------------------------------

class QFormerAttention(nn.Module):
    """BERT's attention, the norm *after* the residual; keys and values from `source`, of width source_dim."""

    def __init__(self, config: QFormerConfig, source_dim: int):
        super().__init__()
        self.n_heads = config.n_heads
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(source_dim, config.dim)
        self.value = nn.Linear(source_dim, config.dim)
        self.dense = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        y = attend(self.query(x), self.key(source), self.value(source), self.n_heads)
        return self.norm(x + self.dense(y))


class QFormerLayer(nn.Module):
    def __init__(self, config: QFormerConfig, layer: int):
        super().__init__()
        self.self_attention = QFormerAttention(config, config.dim)
        self.cross_attention = None
        if layer % config.cross_every == 0:
            self.cross_attention = QFormerAttention(config, config.vision_dim)
        self.mlp = MLP(config.dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = self.self_attention(x, x)  # the queries look at each other
        if self.cross_attention is not None:
            x = self.cross_attention(x, image)
        return self.norm(x + self.mlp(x))


class QFormer(nn.Module):
    """[2] section 3.1, without the text branch: ViT features (N, 1 + P, vision_dim) -> (N, Q, dim)."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.ln_vision = nn.LayerNorm(config.vision_dim, 1e-5)  # BLIP-2's, between the two: not the ViT's eps
        self.query_tokens = nn.Parameter(torch.zeros(1, config.n_queries, config.dim))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.layers = nn.ModuleList(QFormerLayer(config, i) for i in range(config.n_layers))
        nn.init.normal_(self.query_tokens, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        image = self.ln_vision(image.to(self.ln_vision.weight.dtype))
        x = self.norm(self.query_tokens).expand(len(image), -1, -1)  # (N, Q, C)
        for layer in self.layers:
            x = layer(x, image)
        return x


# -- MiniGPT-4 -----------------------------------------------------------------------------------------------

class MiniGPT4(nn.Module):
    """[1]: ViT, Q-Former and LLaMA frozen; `llama_proj`, one linear layer between them, is all that learns.

    `images` is pixels (N, 3, h, w), or their `features` (N, Q, C) when the frozen half was computed before. A
    picture fills Q image slots (token -1) of the text, in order; a row of the batch may hold any number.
    """

    def __init__(self, llama: model.LLaMA, vit: ViT, qformer: QFormer):
        super().__init__()
        if vit.config.dim != qformer.config.vision_dim:
            raise Problem(f"a ViT of width {vit.config.dim} and a Q-Former for {qformer.config.vision_dim}")
        self.vit, self.qformer, self.llama = vit, qformer, llama
        self.config, self.n_queries = llama.config, qformer.config.n_queries
        self.llama_proj = nn.Linear(qformer.config.dim, llama.config.dim)
        for part in (vit, qformer, llama):
            part.requires_grad_(False)

    def train(self, mode: bool = True):
        super().train(mode)
        self.vit.eval()
        self.qformer.eval()
        return self

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The frozen half: (N, 3, h, w) -> (N, Q, C of the Q-Former)."""
        return self.qformer(self.vit(pixels))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels or features of N pictures -> (N * Q, C of LLaMA), for as many image slots."""
        if images.dim() == 4:
            images = self.features(images)
        return self.llama_proj(images.to(self.llama_proj.weight.dtype)).flatten(0, 1)

    @torch.inference_mode()
    def look(self, path) -> torch.Tensor:
        """A picture file as (Q, C of LLaMA). Errors as of open_image."""
        weight = self.llama_proj.weight
        pixels = load_image(path, self.vit.config.image_size)
        return self.encode(pixels[None].to(weight.device, weight.dtype))

    def forward(self, tokens: torch.Tensor, images: Optional[torch.Tensor] = None, **options) -> torch.Tensor:
        """As of LLaMA: tokens (B, T) -> logits (B, T, V)."""
        return self.llama(tokens, self.encode(images) if images is not None else None, **options)

    def nll(self, tokens: torch.Tensor, labels: torch.Tensor, images: Optional[torch.Tensor] = None,
            segments: Optional[torch.Tensor] = None) -> tuple[torch.Tensor, torch.Tensor]:
        """As of LLaMA: sum of -log p over supervised tokens, and their count. A batch without pictures gives
        the projection a gradient of zeros: other processes may have pictures, and wait for it."""
        if images is None:
            images = self.llama_proj.weight.new_zeros(0, self.n_queries, self.llama_proj.in_features)
        return self.llama.nll(tokens, labels, self.encode(images), segments)

    def generate(self, prompts, max_new_tokens: int, images: Optional[torch.Tensor] = None,
                 **options) -> Iterator[list[int]]:
        """As of LLaMA; images in the order of the slots of all prompts."""
        with torch.inference_mode():
            vectors = self.encode(images) if images is not None else None
        return self.llama.generate(prompts, max_new_tokens, images=vectors, **options)


# -- checkpoints: what learned is in the file, what was frozen is named in meta.json -------------------------

def load_encoder(folder) -> tuple[ViT, QFormer, dict]:
    """ViT and Q-Former of a folder that stage 0 has written, and its meta.json; or of EVA's and BLIP-2's files."""
    step = model.find(folder)
    if not (step / "meta.json").exists():
        import convert
        return (*convert.load_encoder(step), {})
    meta = model.read_meta(step)
    if "vit" not in meta["config"]:
        raise Problem(f"{folder} holds no ViT and Q-Former; `python train_vlm.py --stage=0` trains some")
    network = nn.Module()
    network.vit = ViT(ViTConfig(**meta["config"]["vit"]))
    network.qformer = QFormer(QFormerConfig(**meta["config"]["qformer"]))
    weights = model.read(step / "model.pt")
    network.load_state_dict({name: w for name, w in weights.items() if not name.startswith("head.")})
    return network.vit.eval(), network.qformer.eval(), meta


def load(folder, device: str = "cpu", **options) -> tuple[Union[model.LLaMA, MiniGPT4], Path, dict]:
    """As model.load, also for a folder that stage 1 or 2 of train_vlm.py has written: then it has eyes."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    step = model.find(folder)
    made_with = model.read_meta(step).get("settings", {}) if (step / "meta.json").exists() else {}
    if "vision" not in made_with:
        return model.load(step, device=device, **options)
    parts = {}
    for part in ("llama", "vision"):
        path = Path(made_with[part])
        if not path.exists():  # the folder of runs was moved
            path = step.parent.parent / path.parent.name / path.name
        if not path.exists():
            raise Problem(f"{folder} needs its {part} part, {made_with[part]}, which is gone")
        if model.fingerprint(path) != made_with[f"{part}_crc"]:
            raise Problem(f"{path} was trained again since {folder} learned from it; train that again too")
        parts[part] = path
    vit, qformer, _ = load_encoder(parts["vision"])
    llama, _, _ = model.load(parts["llama"], device=device, **options)
    return model.load(step, network=MiniGPT4(llama, vit, qformer).to(device))


# -- python vision.py ----------------------------------------------------------------------------------------

@dataclass
class VisionConfig:
    image: str = ""  # a picture file: writes what the model sees of it as seen.png
    size: int = 224  # pixels a side


def main(cfg: VisionConfig) -> dict:
    if cfg.image:
        pixels = load_image(cfg.image, cfg.size)
        array = ((pixels * STD + MEAN) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save("seen.png")
        print(f"{cfg.image} as {cfg.size} x {cfg.size} pixels is in seen.png")
        return dict(shape=tuple(pixels.shape))
    figures = {}
    for name, (vit, qformer) in PRESETS.items():
        with torch.device("meta"):  # shapes only: no memory
            parts = {"ViT": ViT(ViTConfig(**vit)), "Q-Former": QFormer(QFormerConfig(**qformer))}
            for llama in ("7B", "13B") if name == "minigpt4" else ("toy",):
                width = parts["Q-Former"].config.dim, model.PRESETS[llama]["dim"]
                parts[f"projection to {llama}"] = nn.Linear(*width)
        print(name)
        for part, module in parts.items():
            figures[name, part] = sum(p.numel() for p in module.parameters())
            print(f"  {part:<18} {figures[name, part]:>13,} parameters   {getattr(module, 'config', module)}")
    return figures


if __name__ == "__main__":
    run(main, VisionConfig)
