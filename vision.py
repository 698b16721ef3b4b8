"""The vision side of MiniGPT-4: image files, a ViT, a Q-Former, and a linear projection into LLaMA.

References: [1] Zhu et al. 2023, MiniGPT-4 (arXiv 2304.10592); [2] Li et al. 2023, BLIP-2, for the
Q-Former (2301.12597); [3] Fang et al. 2022, EVA, for the ViT (2211.07636); [4] Dosovitskiy et al.
2020, An Image is Worth 16x16 Words (2010.11929).

Each module has the weights of one published checkpoint: `ViT` EVA's, under EVA's keys; `QFormer`
BLIP-2's (queries, `ln_vision`, BERT layers); `llama_proj` MiniGPT-4's. tools/convert.py reads them.

Letters in the shape comments: N images, P patches, Q queries, C dimension of the module at hand,
H heads, D head dimension; B, T as in model.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

import model
from tools import checkpoint
from tools.config import UserError, check_regular
from tools.machine import choose_device

# CLIP's mean and standard deviation per channel (RGB)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@dataclass
class ViTConfig:
    image_size: int = 48  # images are resized to a square of this side, ignoring aspect ratio
    patch_size: int = 12
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    hidden_dim: int = 256  # of the feed-forward layer
    penultimate: bool = False  # drop the last block: BLIP-2 uses the features before it
    norm_eps: float = 1e-6


@dataclass
class QFormerConfig:
    vision_dim: int = 128  # dimension of the ViT
    dim: int = 128
    n_layers: int = 2
    n_heads: int = 4
    hidden_dim: int = 256
    n_queries: int = 10  # query tokens, hence image vectors per image
    cross_every: int = 2  # cross-attention in every n-th layer, starting with layer 0
    norm_eps: float = 1e-12


PRESETS = {  # ViT, Q-Former
    "toy": (dict(), dict()),  # the defaults above
    "photos": (dict(image_size=32, patch_size=4, dim=192, n_heads=3, hidden_dim=384),
               dict(vision_dim=192, n_queries=4)),
    "minigpt4": (dict(image_size=224, patch_size=14, dim=1408, n_layers=40, n_heads=16,
                      hidden_dim=6144, penultimate=True),  # EVA's ViT-g/14
                 dict(vision_dim=1408, dim=768, n_layers=12, n_heads=12, hidden_dim=3072,
                      n_queries=32)),
}


# -- image files ----------------------------------------------------------------------------------

# All that are opened: Pillow knows forty more, and for PostScript it starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def open_image(path) -> Image.Image:
    """Opens an image file as 8-bit RGB: EXIF rotation applied, transparency composited on white,
    first frame of an animation. Raises UserError if it is missing, damaged, or not an image."""
    try:
        check_regular(path)
        with Image.open(path, formats=FORMATS) as image:
            return to_rgb(ImageOps.exif_transpose(image))  # decodes the pixels
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image in a usual format ({', '.join(FORMATS)}); save it "
                        "as JPEG or PNG") from None
    except Exception as error:  # Pillow's decoders raise almost anything
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read image {path}: {reason}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16- or 32-bit gray: convert("RGB") would clip it at 255
        gray = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(min=0)
        # a 32-bit file does not say which value is white: take its largest
        white = 65535 if image.mode.startswith("I;16") else max(1, gray.max())
        image = Image.fromarray((gray * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        # convert("RGB") alone would show the colors that transparency hides
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(image: Image.Image | np.ndarray, size: int) -> torch.Tensor:
    """An RGB image, or uint8 (height, width, 3) -> (3, size, size): resized with Pillow's bicubic
    filter, normalized with CLIP's statistics."""
    image = Image.fromarray(np.asarray(image)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - MEAN) / STD


def load_image(path, size: int = 224) -> torch.Tensor:
    """An image file, or uint8 (height, width, 3) -> (3, size, size), ready for the ViT. Raises
    UserError as open_image does."""
    image = path if isinstance(path, np.ndarray) else open_image(path)
    return preprocess(image, size)


# -- ViT ------------------------------------------------------------------------------------------

def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Multi-head attention without a mask: q (N, T, C), k and v (N, S, C) -> (N, T, C)."""
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (N, H, ., D)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # torch 2.13's fused attention takes four times as long here, forward and backward
        everywhere = torch.ones(1, dtype=torch.bool)
        x = model.attention_textbook(q, k, v, everywhere)
    else:
        x = F.scaled_dot_product_attention(q, k, v)
    return x.transpose(1, 2).flatten(2)


def init_layer(layer: nn.Module, scale: float = 1.0) -> None:
    """std 0.75 / sqrt(fan-in), which is EVA's 0.02 at its width of 1408. Biases are zero."""
    fan_in = layer.weight[0].numel()
    nn.init.trunc_normal_(layer.weight, std=scale * 0.75 / math.sqrt(fan_in))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class PatchEmbed(nn.Module):
    """The patch projection of [4] eq. 1: square patches, row by row, each mapped to a vector."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        # kernel = stride = patch size: one linear map for every patch
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # (N, 3, h, w) -> (N, P, C)


class ViTAttention(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))  # no bias for k: softmax cancels it
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (N, 1+P, C) each
        q, v = q + self.q_bias.type_as(q), v + self.v_bias.type_as(v)
        return self.proj(attend(q, k, v, self.n_heads))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    """Pre-norm transformer block: x (N, 1 + P, C)."""

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
    """[3]: pixels (N, 3, h, w) -> (N, 1 + P, C), class token first. No final norm."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        assert config.image_size % config.patch_size == 0, "image_size must be n * patch_size"
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        n_patches = (config.image_size // config.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + n_patches, config.dim))
        n_blocks = config.n_layers - 1 if config.penultimate else config.n_layers
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(n_blocks))
        self.init_weights()

    def init_weights(self) -> None:
        """EVA's: layers that write into the residual stream are scaled by 1 / sqrt(2 * layer). One
        change: position embeddings have std 0.3, not 0.02. Patch embeddings have a std of about
        0.75, and a small model is slow to notice positions that are much smaller."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.3)
        init_layer(self.patch_embed.proj)
        for i, block in enumerate(self.blocks):
            init_layer(block.attn.qkv)
            init_layer(block.mlp.fc1)
            scale = 1 / math.sqrt(2 * (i + 1))
            init_layer(block.attn.proj, scale)
            init_layer(block.mlp.fc2, scale)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(pixels.to(self.patch_embed.proj.weight.dtype))  # (N, P, C)
        cls = self.cls_token.expand(len(x), -1, -1).type_as(x)
        x = torch.cat((cls, x), dim=1) + self.pos_embed.type_as(x)  # (N, 1+P, C)
        for block in self.blocks:
            x = block(x)
        return x


# -- Q-Former -------------------------------------------------------------------------------------

class QFormerAttention(nn.Module):
    """Post-norm attention, as in BERT. Keys and values come from `source`: x or the image."""

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
    """Queries x (N, Q, C) attend to each other and, in some layers, to the ViT's features."""

    def __init__(self, config: QFormerConfig, layer: int):
        super().__init__()
        self.self_attention = QFormerAttention(config, config.dim)
        self.cross_attention = None
        if layer % config.cross_every == 0:
            self.cross_attention = QFormerAttention(config, config.vision_dim)
        self.mlp = MLP(config.dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def forward(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        x = self.self_attention(x, x)
        if self.cross_attention is not None:
            x = self.cross_attention(x, features)
        return self.norm(x + self.mlp(x))


class QFormer(nn.Module):
    """[2] section 3.1, without text branch and dropout: (N, 1 + P, vision_dim) -> (N, Q, dim)."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        self.ln_vision = nn.LayerNorm(config.vision_dim, 1e-5)  # not norm_eps
        self.query_tokens = nn.Parameter(torch.zeros(1, config.n_queries, config.dim))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.layers = nn.ModuleList(QFormerLayer(config, i) for i in range(config.n_layers))
        nn.init.normal_(self.query_tokens, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                init_layer(module)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.ln_vision(features.to(self.ln_vision.weight.dtype))
        x = self.norm(self.query_tokens).expand(len(features), -1, -1)  # (N, Q, C)
        for layer in self.layers:
            x = layer(x, features)
        return x


# -- MiniGPT-4 ------------------------------------------------------------------------------------

class MiniGPT4(nn.Module):
    """[1]: ViT, Q-Former and LLaMA are frozen; only `llama_proj`, the projection from Q-Former to
    LLaMA, is trained.

    `images` are pixels (N, 3, h, w), or precomputed outputs of the Q-Former (N, Q, C). Each image
    fills Q image slots of the text, in order; a row may hold several images.
    """

    def __init__(self, llama: model.LLaMA, vit: ViT, qformer: QFormer):
        super().__init__()
        self.vit, self.qformer, self.llama = vit, qformer, llama
        self.config = llama.config
        self.n_queries = qformer.config.n_queries
        self.llama_proj = nn.Linear(qformer.config.dim, llama.config.dim)
        for part in (vit, qformer, llama):
            part.requires_grad_(False)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The frozen encoder: (N, 3, h, w) -> (N, Q, C of the Q-Former)."""
        return self.qformer(self.vit(pixels))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels or features of N images -> (N * Q, C of LLaMA), one vector for each slot."""
        if images.dim() == 4:
            images = self.features(images)
        return self.llama_proj(images.to(self.llama_proj.weight.dtype)).flatten(0, 1)

    @torch.inference_mode()
    def encode_image(self, path) -> torch.Tensor:
        """An image file -> (Q, C of LLaMA). Raises UserError as open_image does."""
        pixels = load_image(path, self.vit.config.image_size)
        return self.encode(pixels[None].to(self.llama_proj.weight.device))

    def forward(self, tokens: torch.Tensor, images: torch.Tensor | None = None,
                **options) -> torch.Tensor:
        """Like LLaMA.forward: tokens (B, T) -> logits (B, T, V)."""
        vectors = self.encode(images) if images is not None else None
        return self.llama(tokens, vectors, **options)

    def nll(self, tokens: torch.Tensor, labels: torch.Tensor, images: torch.Tensor | None = None,
            segments: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Like LLaMA.nll. Without images it projects an empty tensor, so that llama_proj still gets
        a (zero) gradient: FSDP needs one on every rank."""
        if images is None:
            width = self.llama_proj.in_features
            images = self.llama_proj.weight.new_zeros(0, self.n_queries, width)
        return self.llama.nll(tokens, labels, self.encode(images), segments)

    def generate(self, prompts, max_new_tokens: int, images: torch.Tensor | None = None,
                 **options) -> Iterator[list[int]]:
        """Like LLaMA.generate; images in the order of their slots across all prompts."""
        with torch.inference_mode():
            vectors = self.encode(images) if images is not None else None
        return self.llama.generate(prompts, max_new_tokens, images=vectors, **options)


# -- checkpoints: model.pt has the trained weights only, meta.json names the frozen parts ---------

def load_encoder(folder) -> tuple[ViT, QFormer]:
    """ViT and Q-Former from stage 0 of train_vlm.py, or from EVA's and BLIP-2's published files."""
    step = checkpoint.find(folder)
    if not (step / "meta.json").exists():
        from tools import convert
        return convert.load_encoder(step)
    config = checkpoint.read_meta(step)["config"]
    if "vit" not in config:
        raise UserError(f"{folder} has no ViT or Q-Former; train them with "
                        "`python train_vlm.py --stage=0`")
    encoder = nn.ModuleDict(dict(vit=ViT(ViTConfig(**config["vit"])),
                                 qformer=QFormer(QFormerConfig(**config["qformer"]))))
    weights = checkpoint.read(step / "model.pt")
    # stage 0's classification head is no longer needed
    encoder.load_state_dict({n: w for n, w in weights.items() if not n.startswith("head.")})
    return encoder["vit"].eval(), encoder["qformer"].eval()


def load(folder, device: str = "cpu", **options) -> tuple[nn.Module, Path, dict]:
    """Like checkpoint.load, but a folder written by stage 1 or 2 of train_vlm.py gives a MiniGPT4.
    The options dtype and quantize are for the language model."""
    device = choose_device(device)
    step = checkpoint.find(folder)
    meta = checkpoint.read_meta(step) if (step / "meta.json").exists() else {}
    settings = meta.get("settings", {})
    if "vision" not in settings:  # a language model
        return checkpoint.load(step, device=device, **options)
    vit, qformer = load_encoder(find_part(step, settings, "vision"))
    llama_folder = find_part(step, settings, "llama")
    llama, _, _ = checkpoint.load(llama_folder, device=device, **options)
    return checkpoint.load(step, network=MiniGPT4(llama, vit, qformer).to(device))


def find_part(step: Path, settings: dict, part: str) -> Path:
    """The checkpoint of a frozen part. Raises UserError if it is gone, or is another one now."""
    path = Path(settings[part])
    if not path.exists():  # out/ was moved, or this is another working directory
        path = step.parent.parent / path.parent.name / path.name
    if not path.exists():
        raise UserError(f"{step} was trained with {settings[part]}, which no longer exists")
    if checkpoint.fingerprint(path) != settings[f"{part}_crc"]:
        raise UserError(f"{path} has changed since {step} was trained with it; retrain {step}")
    return path
