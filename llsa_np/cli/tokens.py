"""What `llsa explain` attends over: the pixels of a photograph, or a user's own q, k and v from a file."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # so that NumPy, and safetensors with it, knows bfloat16 by name
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

import llsa_np as llsa
from llsa_np.checks import FLOATS

Floats = NDArray[np.floating[Any]]
WHO = "explain"


@dataclass(frozen=True)
class Tokens:
    """q (batch, heads, M, D), k and v (batch, kv_heads, N, ..), and where their tokens lie in a picture."""

    q: Floats
    k: Floats
    v: Floats
    source: str
    """Where they come from, in words."""
    heads: tuple[str, ...]
    """A name for every query head."""
    grid: tuple[int, int] | None
    """Height and width of the picture whose cells the keys are, None if they are none."""
    place: NDArray[np.int64] | None
    """For every cell in row-major order the key that stands there."""
    photo: Floats | None
    """(H, W, 3) in 0..1: what to draw over."""
    note: str = ""
    """What else there is to know about them, in words."""

    @property
    def queries_on_grid(self) -> bool:
        """Whether query t stands where key t stands."""
        return self.place is not None and self.q.shape[2] == self.k.shape[2]


GAIN = 10.0
"""Logit of a pixel that looks the same and stands in the same place; far from that, logits are about 0."""


class Sight(NamedTuple):
    """How a head of the photograph compares two pixels: by patches that look alike and by places that are near."""

    name: str
    patch: int
    """Side of the patch that is compared."""
    tolerance: float
    """How far two patches may differ, in standard deviations of the picture, before attention falls off."""
    reach: float
    """How far apart two pixels may lie, in sides of the picture, before attention falls off."""


SIGHTS = (
    Sight("colour", patch=1, tolerance=0.4, reach=1.0),
    Sight("texture", patch=3, tolerance=0.5, reach=0.5),
    Sight("place", patch=1, tolerance=1.0, reach=0.1),
    Sight("shape", patch=7, tolerance=0.6, reach=1.0),
)


def read_photo(path: str | None, shape: tuple[int, int]) -> tuple[Floats, str]:
    """A picture as (H, W, 3) in 0..1, upright, its centre cut to the shape's proportions and scaled, and its source.

    path None: a photograph that ships with scikit-image.
    """
    height, width = shape
    if path is None:
        import skimage.data

        image = Image.fromarray(skimage.data.astronaut())
        source = "Eileen Collins, astronaut; photograph by NASA, public domain, from scikit-image"
    else:
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file).convert("RGBA")
        except (UnidentifiedImageError, Image.DecompressionBombError) as refused:
            raise ValueError(f"{WHO}: {path} is not a picture that can be read: {refused}. Use a PNG or JPEG") from None
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image).convert("RGB")
        source = str(path)
    fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.float32) / 255, source


def photograph_tokens(path: str | None, size: int, heads: int, dim: int, seed: int) -> Tokens:
    """size x size pixels in Z-order as tokens."""
    photo, source = read_photo(path, (size, size))
    order, inverse = llsa.zorder(size, size)
    random = np.random.default_rng(seed)
    sights = [SIGHTS[head % len(SIGHTS)] for head in range(heads)]
    looks = [_looks(photo, sight, dim, random) for sight in sights]
    values = [_values(photo, dim, random) for _ in sights]

    def tokens(of_heads: list[Floats]) -> Floats:
        return np.stack([head[order] for head in of_heads])[None].astype(np.float32)

    return Tokens(
        q=tokens(looks),
        k=tokens(looks),
        v=tokens(values),
        source=source,
        heads=tuple(sight.name if heads <= len(SIGHTS) else f"{i} {sight.name}" for i, sight in enumerate(sights)),
        grid=(size, size),
        place=inverse,
        photo=photo,
        note="Queries and keys compare patches of "
        + ", ".join(f"{sight.patch} x {sight.patch} ({sight.name})" for sight in dict.fromkeys(sights))
        + " pixels, and where they are, through a fixed random projection.",
    )


def _looks(photo: Floats, sight: Sight, dim: int, random: np.random.Generator) -> Floats:
    """(pixels, dim), q and k alike: <q, k> / sqrt(dim) is about GAIN exp(-|difference of patch and place|**2 / 2).

    So a pixel looks at what is like it, and a block's mean tells how much of the block is like the query.
    """
    height, width, _ = photo.shape
    patches = _patches(photo, sight.patch)
    places = np.indices((height, width)).reshape(2, -1).T / max(height, width)
    features = np.hstack([patches / (sight.tolerance * np.sqrt(patches.shape[1])), places / sight.reach])
    angles = features @ random.standard_normal((features.shape[1], dim // 2))
    looks: Floats = np.hstack([np.cos(angles), np.sin(angles)]) * (GAIN * np.sqrt(dim) / (dim // 2)) ** 0.5
    return looks


def _values(photo: Floats, dim: int, random: np.random.Generator) -> Floats:
    patches = _patches(photo, 3)
    values: Floats = patches @ random.standard_normal((patches.shape[1], dim)) / np.sqrt(patches.shape[1])
    return values


def _patches(photo: Floats, side: int) -> Floats:
    """(pixels, side * side * 3): what surrounds each pixel, colours with mean 0 and deviation 1."""
    standard = (photo - photo.mean(axis=(0, 1))) / (photo.std(axis=(0, 1)) + 1e-6)
    padded = np.pad(standard.astype(np.float64), ((side // 2, side // 2), (side // 2, side // 2), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(0, 1))
    return windows.reshape(photo.shape[0] * photo.shape[1], -1)


def file_tokens(path: str, *, layout: str, grid: tuple[int, int] | None, tokens_in: str, picture: str | None) -> Tokens:
    """q, k and v of a .npz or .safetensors file; with a grid in row-major order, brought into Z-order."""
    given = _read_arrays(path)
    arrays = {name: _four_axes(path, name, array, layout) for name, array in given.items()}
    _check_numbers(path, given)
    _check_sizes(path, {name: array.shape for name, array in given.items()}, arrays)
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    place = photo = None
    if grid is not None:
        height, width = grid
        if height * width != k.shape[2]:
            raise ValueError(
                f"{WHO}: --grid {height} {width} has {height * width} cells and k of {path} {k.shape[2]} tokens; "
                "both must be equal. Give the size of the picture whose cells the keys are, or leave --grid out"
            )
        order, place = llsa.zorder(height, width)
        if tokens_in == "rows":
            q, k, v = (x[:, :, order] if x.shape[2] == order.size else x for x in (q, k, v))
        photo = (
            _principal_colours(v)[place].reshape(height, width, 3) if picture is None else read_photo(picture, grid)[0]
        )
    return Tokens(
        q=q,
        k=k,
        v=v,
        source=str(path),
        heads=tuple(str(head) for head in range(q.shape[1])),
        grid=grid,
        place=place,
        photo=photo,
    )


def _read_arrays(path: str) -> dict[str, Floats]:
    """q, k and v, and nothing else, from a file."""
    suffix = Path(path).suffix
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{WHO}: --qkv is {path}; allowed are files named .npz or .safetensors that hold q, k and v")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{WHO}: --qkv is {path}, and there is no such file")
    try:
        if suffix == ".npz":
            if not zipfile.is_zipfile(path):  # np.load would take it for a file of another kind
                raise zipfile.BadZipFile("it is not one that numpy.savez wrote")
            with np.load(path, allow_pickle=False) as file:
                _check_names(path, file.files)
                return {name: _read_array(path, file, name) for name in "qkv"}
        with safe_open(path, framework="np") as file:
            _check_names(path, file.keys())
            return {name: file.get_tensor(name) for name in "qkv"}
    except (zipfile.BadZipFile, zlib.error, EOFError, SafetensorError) as broken:
        raise ValueError(f"{WHO}: {path} is not a {suffix} file that can be read: {broken}") from None


def _read_array(path: str, file: Any, name: str) -> Floats:
    try:
        array: Floats = file[name]
    except ValueError as refused:  # Python objects, or a header that is broken
        raise ValueError(
            f"{WHO}: {name} in {path} is not an array of numbers that can be read ({refused}). Save q, k and v with "
            "numpy.savez as arrays of one floating point dtype"
        ) from None
    return array


def _check_names(path: str, names: list[str]) -> None:
    missing = [name for name in "qkv" if name not in names]
    if missing:
        raise ValueError(
            f"{WHO}: {path} holds {', '.join(sorted(names)[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}; "
            f"missing: {', '.join(missing)}. Save the three arrays under the names q, k and v"
        )


def _check_numbers(path: str, arrays: dict[str, Floats]) -> None:
    """That the file's arrays hold finite numbers of one dtype that attention takes."""
    for name, array in arrays.items():
        if array.dtype.kind == "V" and array.dtype.name.startswith("void"):
            raise ValueError(
                f"{WHO}: {name} in {path} has no dtype that NumPy knows; .npz does not keep bfloat16. Use .safetensors"
            )
        if array.dtype.name not in FLOATS:
            raise TypeError(
                f"{WHO}: {name} in {path} has dtype {array.dtype}; allowed are {', '.join(FLOATS)}. Convert it first"
            )
        if array.dtype != arrays["q"].dtype:
            raise TypeError(
                f"{WHO}: in {path} q has dtype {arrays['q'].dtype} and {name} {array.dtype}; they must be the same. "
                "Convert one of them"
            )
        if 0 in array.shape:
            raise ValueError(f"{WHO}: {name} in {path} has shape {array.shape}; every size is 1 or more")
        if not np.isfinite(array).all():
            raise ValueError(f"{WHO}: {name} in {path} holds NaN or infinity; allowed are finite numbers")


def _four_axes(path: str, name: str, array: Floats, layout: str) -> Floats:
    """As (batch, heads, tokens, dim): without a batch or heads axis, one of size 1 is added."""
    if not 2 <= array.ndim <= 4:
        raise ValueError(
            f"{WHO}: {name} in {path} has shape {array.shape}; allowed are (batch, heads, tokens, dim), "
            "(heads, tokens, dim) and (tokens, dim), with heads after tokens for --layout bnhd"
        )
    if array.ndim == 2:
        array = array[:, None] if layout == "bnhd" else array[None]
    if array.ndim == 3:
        array = array[None]
    return array.swapaxes(1, 2) if layout == "bnhd" else array


def _check_sizes(path: str, shapes: dict[str, tuple[int, ...]], arrays: dict[str, Floats]) -> None:
    """That (batch, heads, tokens, dim) fit together. Attention checks it too, but of arrays with axes added and moved:
    here the message has the shapes of the file."""
    for what, axis, one, other in (
        ("batch sizes", 0, "q", "k"),
        ("batch sizes", 0, "k", "v"),
        ("heads", 1, "k", "v"),
        ("tokens", 2, "k", "v"),
        ("head dims", 3, "q", "k"),
    ):
        sizes = arrays[one].shape[axis], arrays[other].shape[axis]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{WHO}: in {path} {one} has shape {shapes[one]} and {other} {shapes[other]}; their {what} are "
                f"{sizes[0]} and {sizes[1]} and must be equal. Is --layout right?"
            )
    heads, kv_heads = arrays["q"].shape[1], arrays["k"].shape[1]
    if heads % kv_heads:
        raise ValueError(
            f"{WHO}: in {path} q has shape {shapes['q']} and k {shapes['k']}; q's {heads} heads must be a multiple of "
            f"k's {kv_heads}. Is --layout right?"
        )


def _principal_colours(v: Floats) -> Floats:
    """(N, 3) in 0..1: the three strongest directions of the first head's values, as red, green and blue."""
    values = v[0, 0].astype(np.float64)
    values = values - values.mean(axis=0)
    _, directions = np.linalg.eigh(values.T @ values)
    colours = np.zeros((len(values), 3))
    strongest = values @ directions[:, :-4:-1]
    colours[:, : strongest.shape[1]] = strongest
    low, high = np.percentile(colours, (1, 99), axis=0)
    shown: Floats = np.clip((colours - low) / np.maximum(high - low, 1e-12), 0, 1)
    return shown
