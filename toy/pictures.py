"""Scenes of the toy world as pictures.

    python -m toy.pictures --out=out/album --count=20   # pictures with captions, to look at
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from tools.config import run
from toy import world

RGB = {"red": (215, 40, 40), "green": (45, 150, 60), "blue": (50, 80, 220),
       "yellow": (245, 220, 50), "purple": (130, 45, 175), "orange": (245, 135, 25),
       "pink": (250, 160, 195), "white": (245, 245, 245), "brown": (140, 85, 40),
       "cyan": (70, 210, 220)}
# x, y as fractions of the image size
CENTERS = {"top": (0.5, 0.17), "left": (0.17, 0.5), "center": (0.5, 0.5), "right": (0.83, 0.5),
           "bottom": (0.5, 0.83)}
RADIUS = {"small": 0.12, "large": 0.165}
STAR_TIPS = np.array([[np.sin(2 * np.pi * k / 5), -np.cos(2 * np.pi * k / 5)] for k in range(5)])


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Approximate signed distance to a shape of radius about 1 around the origin, y pointing down.
    Negative inside."""
    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.95
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85
    if shape == "triangle":
        return np.maximum(y, 0.87 * abs(x) - 0.5 * y) - 0.55
    if shape == "diamond":
        return 0.8 * abs(x) + 0.6 * abs(y) - 0.64
    if shape == "star":  # inside at least four of five half-planes
        planes = np.tensordot(-STAR_TIPS, np.stack((x, y)), 1)
        return np.partition(planes, 3, axis=0)[3] - 0.36
    if shape == "cross":
        thin, long = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
        return np.maximum(thin - 0.3, long - 0.95)
    if shape == "ring":
        return abs(r - 0.75) - 0.22
    return np.maximum(r - 1, 0.8 - np.hypot(x - 0.55, y))  # moon


def draw(scene: world.Scene, rng: random.Random, size: int = 48) -> np.ndarray:
    """The scene as uint8 (size, size, 3), on a random background, with jitter, rotation and noise.
    """
    dice = np.random.default_rng(rng.getrandbits(64))
    at = np.arange(size, dtype=np.float32) + 0.5  # pixel centers
    tint = dice.uniform(15, 75) + dice.uniform(-12, 12, 3)
    slope = dice.uniform(-25, 25, 2)
    shade = slope[0] * (at / size - 0.5) + slope[1] * (at[:, None] / size - 0.5)
    picture = (shade[..., None] + tint).astype(np.float32)
    for o in scene:
        radius = size * RADIUS[o.size] * dice.uniform(0.93, 1.07)
        middle = size * (np.array(CENTERS[o.place]) + dice.uniform(-0.025, 0.025, 2))
        low = np.maximum(0, (middle - 1.4 * radius).astype(int))
        high = (middle + 1.4 * radius).astype(int) + 2
        columns, rows = slice(low[0], high[0]), slice(low[1], high[1])
        x, y = (at[columns] - middle[0]) / radius, (at[rows, None] - middle[1]) / radius
        turn = dice.uniform(-0.15, 0.15)
        turned_x = np.cos(turn) * x + np.sin(turn) * y
        turned_y = np.cos(turn) * y - np.sin(turn) * x
        outside = distance(o.shape, turned_x, turned_y)
        cover = np.clip(0.5 - outside * radius, 0, 1)[..., None]  # antialiased edges
        color = RGB[o.color] + dice.uniform(-12, 12, 3)
        picture[rows, columns] += cover * (color - picture[rows, columns])
    picture = picture * dice.uniform(0.92, 1.05)
    picture = picture + 4 * dice.standard_normal(picture.shape, np.float32)
    return picture.clip(0, 255).round().astype(np.uint8)


def write_album(folder, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    """MiniGPT-4's layout, but in PNG: image/ID.png, and filter_cap.json with the annotations."""
    folder = Path(folder)
    (folder / "image").mkdir(parents=True, exist_ok=True)
    annotations = []
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        Image.fromarray(picture).save(folder / "image" / f"{i}.png")
        annotations.append(dict(image_id=str(i), caption=caption))
    text = json.dumps(dict(annotations=annotations), indent=0)
    (folder / "filter_cap.json").write_text(text, encoding="utf-8")


def write_toy_album(folder: Path, n: int, seed: str, text: Callable) -> list[world.Scene]:
    """Draws n scenes, with text(scene, rng) as captions. Returns the scenes."""
    rng = random.Random(seed)
    scenes = [world.pick_scene(rng) for _ in range(n)]
    pictures = [draw(scene, rng) for scene in tqdm(scenes, f"drawing {folder}", leave=False)]
    write_album(folder, pictures, [text(scene, rng) for scene in scenes])
    return scenes


# -- what the vision encoder learns to say about a picture ----------------------------------------

SYMBOLS = [world.NOTHING, world.END, *world.SHAPES, *world.PLACES, *world.COLORS, *world.SIZES]


def scene_symbols(scene: world.Scene) -> list[str]:
    """What the encoder says about a picture of one or two objects: world.symbols in a fixed order
    that is not that of captions, so that the projection cannot pass a caption on."""
    objects = sorted(scene, key=lambda o: -world.PLACES.index(o.place))
    shape, place, color, size = 2, 3, 1, 0
    return world.symbols(objects, (shape, place, color, size))


def symbol_batches(seed: int, size: int) -> Callable:
    """pick(step, n) -> n pictures of `size` pixels and their symbols, new ones in every step."""
    def pick(step: int, n: int) -> tuple[list, list]:
        rng = random.Random(f"stage 0, {seed}, {step}")
        scenes = [world.pick_scene(rng) for _ in range(n)]
        return [draw(s, rng, size) for s in scenes], [scene_symbols(s) for s in scenes]
    return pick


# -- python -m toy.pictures -----------------------------------------------------------------------

@dataclass
class PicturesConfig:
    out: str = "out/album"  # folder to write to
    split: Literal["train", "scenes", "pairs", "more"] = "train"  # which scenes
    count: int = 20  # pictures
    size: int = 192  # pixels a side
    seed: int = 0  # which scenes


def main(cfg: PicturesConfig) -> dict:
    rng = random.Random(cfg.seed)
    scenes = [world.pick_scene(rng, cfg.split) for _ in range(cfg.count)]
    captions = [world.cap(world.caption(scene)) + "." for scene in scenes]
    write_album(cfg.out, [draw(scene, rng, cfg.size) for scene in scenes], captions)
    print(f"{cfg.count} pictures of the split {cfg.split} with captions: {cfg.out}")
    return dict(pictures=cfg.count)


if __name__ == "__main__":
    run(main, PicturesConfig)
