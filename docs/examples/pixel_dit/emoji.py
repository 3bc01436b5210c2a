"""Writes the pictures of Noto Color Emoji into a folder, for `train.py --images`.

The font is SIL OFL, in Debian's package fonts-noto-color-emoji:

    apt-get download fonts-noto-color-emoji && dpkg-deb -x fonts-noto-color-emoji_*.deb font
    python docs/examples/pixel_dit/emoji.py font/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf emoji
"""

import argparse
import io
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import Image, ImageOps
from tqdm import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("font", type=Path, help="NotoColorEmoji.ttf, with the table CBDT")
    parser.add_argument("out", type=Path, help="the folder")
    parser.add_argument("--side", type=int, default=128, help="pixels a side (default: %(default)s)")
    args = parser.parse_args()
    font = TTFont(args.font)
    if "CBDT" not in font:
        raise SystemExit(f"emoji: {args.font} has no table CBDT; use the font of Debian's fonts-noto-color-emoji")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, glyph in tqdm(font["CBDT"].strikeData[0].items()):
        picture = Image.open(io.BytesIO(glyph.imageData)).convert("RGBA")
        paper = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        paper = ImageOps.pad(paper, (args.side, args.side), Image.Resampling.LANCZOS, color="white")
        paper.quantize(256).save(args.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
