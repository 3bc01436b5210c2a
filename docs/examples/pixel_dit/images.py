"""Pictures to train on: scikit-image's photographs, or a folder of one's own; each with a part that is held out."""

import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
HELD_OUT = 0.3
"""The right part of each photograph, which is never trained on."""
LANCZOS = Image.Resampling.LANCZOS
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises at files that are broken, or too large to be meant."""


class Pictures:
    """Square pictures of one size, drawn at random: crops of sources of any size, or else sources of that side."""

    def __init__(self, sources: Sequence[Image.Image], side: int, crops: bool) -> None:
        self.sources, self.side, self.crops = list(sources), side, crops

    def draw(self, rng: np.random.Generator) -> Tensor:
        """One picture (3, side, side) of -1 .. 1, perhaps seen in a mirror."""
        picture = self.sources[rng.integers(len(self.sources))]
        if self.crops:
            most = min(picture.size)
            size = rng.uniform(min(self.side, most), most)  # pixels of the photograph; fewer than side are enlarged
            left, top = (rng.uniform(0, length - size) for length in picture.size)
            box = (left, top, left + size, top + size)
            picture = picture.resize((self.side, self.side), LANCZOS, box)
        if rng.integers(2):
            picture = ImageOps.mirror(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def photographs(side: int) -> tuple[Pictures, Pictures]:
    """Crops of scikit-image's colour photographs: to train on, and of the part that is held out."""
    import skimage.data

    whole = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    cuts = [round((1 - HELD_OUT) * x.width) for x in whole]
    left = [x.crop((0, 0, cut, x.height)) for x, cut in zip(whole, cuts)]
    right = [x.crop((cut, 0, x.width, x.height)) for x, cut in zip(whole, cuts)]
    return Pictures(left, side, crops=True), Pictures(right, side, crops=True)


@lru_cache(1)  # for runs one after the other in one process
def folder(path: Path, side: int) -> tuple[Pictures, Pictures]:
    """The pictures of a folder: to train on, and a tenth that is held out.

    A hundredth of them in a row, in the order of their names, is trained on or held out together: neighbours are often
    alike, as frames of a film or variants of a drawing are.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and not file.is_dir())
    if len(files) < 2:
        raise ValueError(f"train: --images {path} has {len(files)} pictures ({', '.join(ENDINGS)}); it needs 2 or more")
    with ThreadPoolExecutor() as threads:
        pictures = list(threads.map(lambda file: ImageOps.fit(on_white(file), (side, side), LANCZOS), files))
    run = max(1, len(files) // 100)
    held = [x for i, x in enumerate(pictures) if i // run % 10 == 0]
    kept = [x for i, x in enumerate(pictures) if i // run % 10]
    return Pictures(kept, side, crops=False), Pictures(held, side, crops=False)


def on_white(file: Path) -> Image.Image:
    """A picture as it is meant to be seen, on white where it is transparent."""
    try:
        with Image.open(file) as opened:
            turned = ImageOps.exif_transpose(opened)
    except UNREADABLE as error:
        raise ValueError(f"train: {file} cannot be read as a picture ({error}); mend or remove it") from error
    if turned.mode.startswith(("I", "F")):
        raise ValueError(
            f"train: {file} has pixels of 16 or 32 bits (Pillow's mode {turned.mode}); convert it to 8 bits a channel"
        )
    seen = turned.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def save_grid(images: Tensor, path: Path, least: int = 256) -> None:
    """Pictures (n, 3, side, side) of -1 .. 1 side by side in a PNG, enlarged until it has so many pixels a side."""
    across = int(np.ceil(len(images) ** 0.5))
    down = -(-len(images) // across)
    side = images.shape[-1]
    paper = Image.new("RGB", (across * side, down * side), "white")
    for i, x in enumerate(images.clamp(-1, 1)):
        pixels = ((x + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        paper.paste(Image.fromarray(pixels), (i % across * side, i // across * side))
    times = -(-least // min(paper.size))
    paper.resize((times * paper.width, times * paper.height), Image.Resampling.NEAREST).save(path)
