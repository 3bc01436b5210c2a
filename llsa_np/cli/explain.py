"""`llsa explain`: attention over a photograph's pixels or a user's own activations: what it does, costs and keeps."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

import llsa_np as llsa
from llsa_np.backends import NAMES
from llsa_np.cli.dense import time_dense
from llsa_np.cli.faithfulness import PARTS, measure, products, sweep
from llsa_np.cli.page import Findings, show
from llsa_np.cli.pictures import draw
from llsa_np.cli.tokens import WHO, Tokens, file_tokens, photograph_tokens
from llsa_np.options import check_attend_options, check_integer

Result = TypeVar("Result")

OF_PHOTOGRAPH = {"size": 256, "heads": 4, "dim": 64}
OF_FILE = {"layout": "bhnd", "tokens_in": "rows"}
"""Defaults of the options that go with one kind of input only. The parser knows them as None, so that one given in vain
is refused."""
DENSE_SCORES = 2**28
"""At most this many scores, over all heads, are computed to time dense attention, 32 queries at least."""
SAMPLED_SCORES = 2**28
"""At most this many scores, over all heads, are compared with dense attention, 16 queries at least: a few seconds."""
SUIT, HAIR, HELMET = (0.59, 0.27), (0.13, 0.48), (0.85, 0.86)
"""Where the queries that are drawn stand in the photograph."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `llsa explain`."""
    picture = parser.add_argument_group("attention over a picture")
    picture.add_argument(
        "image",
        nargs="?",
        metavar="IMAGE",
        help="a picture (default: one that ships with scikit-image); beside --qkv and --grid: what to draw over",
    )
    picture.add_argument(
        "--size", type=int, help=f"pixels on each side, size * size tokens (default: {OF_PHOTOGRAPH['size']})"
    )
    picture.add_argument("--heads", type=int, help=f"attention heads (default: {OF_PHOTOGRAPH['heads']})")
    picture.add_argument("--dim", type=int, help=f"head dim (default: {OF_PHOTOGRAPH['dim']})")

    file = parser.add_argument_group("attention over your activations")
    file.add_argument("--qkv", metavar="FILE", help="a .npz or .safetensors file with q, k and v (default: a picture)")
    file.add_argument(
        "--layout", choices=("bhnd", "bnhd"), help=f"order of the file's axes (default: {OF_FILE['layout']})"
    )
    file.add_argument(
        "--grid",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="the file's keys are the cells of a picture of this size (default: they are not)",
    )
    file.add_argument(
        "--tokens-in",
        choices=("rows", "zorder"),
        help="order of the file's tokens on the grid; rows are brought into Z-order first "
        f"(default: {OF_FILE['tokens_in']})",
    )

    options = parser.add_argument_group("options of the attention")
    options.add_argument(
        "--topk",
        type=int,
        nargs="+",
        default=[8],
        metavar="K",
        help="tokens kept: one number, or one for each level 1.. (default: 8)",
    )
    options.add_argument("--levels", type=int, metavar="L", help="coarse levels (default: by the number of tokens)")
    options.add_argument(
        "--block-size", type=int, default=16, metavar="B", help="tokens of a block (default: %(default)s)"
    )
    options.add_argument("--scale", type=float, help="of the logits (default: 1 / sqrt(head dim))")
    options.add_argument(
        "--enrich",
        type=int,
        nargs="*",
        metavar="LEVEL",
        help="the coarse levels that take part in attention, none if none is named (default: all)",
    )
    options.add_argument(
        "--no-reweight",
        action="store_true",
        help="a coarse token weighs one token (default: as many as it stands for)",
    )
    options.add_argument(
        "--backend", choices=("auto", *NAMES), default="auto", help="who computes (default: %(default)s)"
    )

    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--queries",
        type=int,
        default=256,
        help="how many queries of each head to compare with dense attention (default: %(default)s)",
    )
    shown.add_argument(
        "--sweep",
        type=int,
        nargs="*",
        default=[4, 8, 16, 32],
        metavar="K",
        help="the K to try with every L, no table if none is named (default: 4 8 16 32)",
    )
    shown.add_argument(
        "--at",
        type=int,
        nargs=2,
        action="append",
        metavar=("ROW", "COL"),
        help="draw this cell's attention; repeatable (default: three cells)",
    )
    shown.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the picture's projections, the output's gradient and the sampled queries (default: %(default)s)",
    )
    shown.add_argument(
        "--out", type=Path, default=Path("explain"), metavar="DIR", help="where pictures go (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Make or read the tokens, attend forward and backward, compare with dense attention, draw the pictures, print."""
    _check(args)
    tokens = _tokens(args)
    at = _cells(tokens, args)
    q, k, v = tokens.q, tokens.k, tokens.v
    topk = args.topk[0] if len(args.topk) == 1 else args.topk
    of_select = {"block_size": args.block_size, "levels": args.levels, "topk": topk, "backend": args.backend}
    of_attend: dict[str, Any] = {"enrich": args.enrich, "reweight": not args.no_reweight, "scale": args.scale}
    # Before anything is timed: it checks the options, and what it takes to start a backend is not the time of a step.
    selection: llsa.Selection = llsa.select(q, k, **of_select)
    options = check_attend_options(WHO, precision="full", levels=selection.levels, dim=q.shape[3], **of_attend)
    args.out.mkdir(parents=True, exist_ok=True)

    queries = _sampled(tokens, args.queries)
    of_measure: dict[str, Any] = {"queries": queries, "seed": args.seed, "attend": of_attend}
    topks = set(args.sweep)
    if topks and len(args.topk) == 1:
        topks.add(topk)
    most_levels = max(selection.levels, llsa.default_levels(k.shape[2], args.block_size))
    seconds: dict[str, float] = {}

    # No bar where nobody watches (disable=None), and none left behind: the page is what stays.
    with tqdm(desc="start", total=9 + most_levels * len(topks), disable=None, leave=False) as bar:

        def begin(name: str) -> None:
            bar.update()  # what came before is done
            bar.set_description(name)

        def timed(name: str, work: Callable[[], Result]) -> Result:
            begin(name)
            began = time.perf_counter()
            result = work()
            seconds[name] = time.perf_counter() - began
            return result

        pyramid = {"block_size": selection.block_size, "levels": selection.levels, "backend": args.backend}
        timed("pool", lambda: llsa.pool(k, **pyramid))
        timed("select", lambda: llsa.select(q, k, **of_select))
        out, lse = timed("attend", lambda: llsa.attend(q, k, v, selection, backend=args.backend, **of_attend))
        timed("forward", lambda: llsa.attention(q, k, v, **of_select, **of_attend))
        dout = np.random.default_rng(args.seed).standard_normal(out.shape).astype(out.dtype)
        timed(
            "backward",
            lambda: llsa.attend_backward(dout, q, k, v, out, lse, selection, backend=args.backend, **of_attend),
        )
        begin("dense attention")
        scores_of_a_query = q.shape[0] * q.shape[1] * k.shape[2]
        some = max(32, min(1024, DENSE_SCORES // scores_of_a_query))
        dense = time_dense(q, k, v, some, repeats=1, scale=args.scale)
        begin("faithfulness")
        result = measure(q, k, v, selection, **of_measure)
        scores = q.shape[0] * q.shape[1] * products(selection.query_hierarchy, selection.key_hierarchy, selection.topk)
        choices = sweep(
            q,
            k,
            v,
            block_size=args.block_size,
            topks=sorted(topks),
            most_levels=most_levels,
            backend=args.backend,
            known=selection,
            known_result=result,
            seconds_per_product=seconds["select"] / scores,
            step=begin,
            **of_measure,
        )
        begin("pictures")
        paths = draw(tokens, selection, options, at, args.out)

    show(
        Findings(
            tokens=tokens,
            selection=selection,
            options=options,
            backend="numpy" if args.backend == "auto" else args.backend,  # auto: host arrays go to numpy
            seconds=seconds,
            dense=dense,
            queries=queries,
            queries_wanted=args.queries,
            result=result,
            choices=choices,
            paths=paths,
        )
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    """That every option given has something to do here, and that its numbers are in range."""
    if args.qkv is None:
        _refuse(args, OF_FILE, "says how a file's arrays are ordered, and there is none. Give --qkv FILE too")
        if args.grid is not None:
            raise ValueError(f"{WHO}: --grid says how --qkv's keys lie in a picture; for an image, give --size instead")
    else:
        _refuse(args, OF_PHOTOGRAPH, f"is for attention over a picture; {args.qkv} has sizes of its own. Leave one out")
    if args.qkv is not None and args.grid is None:
        _refuse(
            args,
            ("tokens_in", "at", "image"),
            f"is for keys that lie in a picture, and nothing says how those of {args.qkv} do. Give --grid H W too",
        )
    if args.grid is not None and min(args.grid) < 1:
        raise ValueError(f"{WHO}: --grid is {args.grid[0]} {args.grid[1]}; allowed are two numbers of 1 or more")
    for name, least in (("size", 8), ("heads", 1), ("dim", 8), ("queries", PARTS), ("seed", 0)):
        if getattr(args, name) is not None:
            check_integer(WHO, f"--{name}", getattr(args, name), least, None)
    if args.dim is not None and args.dim % 2:
        raise ValueError(f"{WHO}: --dim is {args.dim}; allowed is an even number of 8 or more")
    for topk in args.sweep:
        check_integer(WHO, "--sweep", topk, 1, None)


def _refuse(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Any of these options that is given."""
    for name in names:
        if getattr(args, name) is not None:
            option = "IMAGE" if name == "image" else f"--{name.replace('_', '-')}"
            raise ValueError(f"{WHO}: {option} {why}")


def _tokens(args: argparse.Namespace) -> Tokens:
    """The tokens that the options ask for."""

    def given(names: dict[str, Any]) -> dict[str, Any]:
        return {
            name: default if getattr(args, name) is None else getattr(args, name) for name, default in names.items()
        }

    if args.qkv is None:
        return photograph_tokens(args.image, seed=args.seed, **given(OF_PHOTOGRAPH))
    grid = None if args.grid is None else (args.grid[0], args.grid[1])
    return file_tokens(args.qkv, grid=grid, picture=args.image, **given(OF_FILE))


def _sampled(tokens: Tokens, wanted: int) -> int:
    """How many queries to compare with dense attention: as many as wanted, fewer where that takes minutes."""
    batch, heads, query_tokens, _ = tokens.q.shape
    affordable = SAMPLED_SCORES // (batch * heads * tokens.k.shape[2])
    return int(min(wanted, query_tokens, max(16, affordable)))


def _cells(tokens: Tokens, args: argparse.Namespace) -> list[tuple[int, int]]:
    """Which cells' queries to draw."""
    if tokens.grid is None:
        return []
    height, width = tokens.grid
    for row, column in args.at or []:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"{WHO}: --at is {row} {column}; allowed are 0..{height - 1} and 0..{width - 1}")
    if args.at:
        return [(row, column) for row, column in args.at]
    places = (SUIT, HAIR, HELMET) if args.image is None and args.qkv is None else ((0.35, 0.35), (0.5, 0.6), (0.7, 0.4))
    return [(int(row * height), int(column * width)) for row, column in places]
