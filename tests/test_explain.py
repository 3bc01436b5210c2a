"""`llsa`: the main command on small pictures and on files of activations, and what it says about mistakes."""

from __future__ import annotations

import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import llsa_np as llsa
from llsa_np.cli import COMMANDS, main
from llsa_np.cli.dense import numpy_dense
from llsa_np.cli.descent import dense, descend, received
from llsa_np.cli.faithfulness import measure, popularity, tokens_attended
from llsa_np.cli.tokens import SIGHTS, photograph_tokens
from llsa_np.cli.words import count, digits
from llsa_np.options import check_attend_options

FEW = ("--sweep", "4", "--queries", "8")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def explain(*options) -> int:
    return main(["explain", *map(str, options)])


def arrays(m=256, n=256, heads=2, kv_heads=2, batch=1, dim=16, value_dim=8, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    shapes = {"q": (batch, heads, m, dim), "k": (batch, kv_heads, n, dim), "v": (batch, kv_heads, n, value_dim)}
    return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def check_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 400
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 10, f"{path} is blank"
    assert (pixels[2, 2] == 255).all()


def test_photograph(tmp_path, capsys):
    out = tmp_path / "new" / "pictures"
    assert explain("--size", 48, "--sweep", 4, 8, "--out", out) == 0
    page = capsys.readouterr().out
    for fact in ("2,304 tokens", "48 x 48", "numpy", "public domain", "backward", "dense forward", "Busiest block"):
        assert fact in page
    for sight in SIGHTS:
        assert sight.name in page
    names = sorted(path.name for path in out.iterdir())
    assert names == ["overview.png", "query-1.png", "query-2.png", "query-3.png"]
    for path in out.iterdir():
        check_picture(path)
        assert path.name in page


@pytest.mark.parametrize(
    "options",
    [
        ("--size", 33, "--levels", 2, "--topk", 3, 2),
        ("--size", 20, "--block-size", 5, "--levels", 5, "--heads", 5, "--dim", 10),
        ("--size", 16, "--levels", 1, "--topk", 100, "--at", 0, 0, "--at", 15, 15),
        ("--size", 8, "--heads", 1, "--sweep"),
        ("--size", 24, "--scale", 0.3, "--enrich", 1, "--no-reweight"),
        ("--size", 24, "--levels", 2, "--enrich"),
        ("--size", 24, "--levels", 2, "--enrich", 2, 1),
    ],
)
def test_options(tmp_path, capsys, options):
    assert explain(*options, *(() if "--sweep" in options else FEW), "--out", tmp_path) == 0
    assert ("Which K and L?" in capsys.readouterr().out) == ("--sweep" not in options)
    for path in tmp_path.iterdir():
        check_picture(path)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "RGB"])
def test_pictures_of_every_mode(tmp_path, mode):
    path = tmp_path / f"picture.{'jpg' if mode == 'CMYK' else 'png'}"
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50), np.uint8)
    image = Image.fromarray(pixels.astype(np.uint16) * 256) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    image.save(path)
    tokens = photograph_tokens(str(path), 16, 2, 8, 0)
    assert tokens.q.shape == tokens.k.shape == tokens.v.shape == (1, 2, 256, 8)
    assert tokens.photo.shape == (16, 16, 3)
    assert 0 <= tokens.photo.min() < tokens.photo.max() <= 1


def test_picture_is_turned_upright_and_cut_to_its_centre(tmp_path):
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, 15:45, 0] = 255  # the centre is red
    pixels[:10, :, 1] = 255  # the upper third is green: once turned, the right third
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    photo = photograph_tokens(str(tmp_path / "turned.png"), 30, 1, 8, 0).photo
    assert photo[2:-2, :, 0].min() > 0.9
    assert photo[:, 22:, 1].min() > 0.9
    assert photo[:, :18, 1].max() < 0.1


def test_tokens_are_in_z_order_and_do_not_change():
    tokens, again = (photograph_tokens(None, 16, 4, 16, 0) for _ in range(2))
    order, _ = llsa.zorder(16, 16)
    for name in "qkv":
        np.testing.assert_array_equal(getattr(tokens, name), getattr(again, name))
    assert (tokens.place[order] == np.arange(256)).all()
    assert not np.array_equal(tokens.q[0, 0], tokens.q[0, 1])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_files(tmp_path, capsys, suffix, dtype):
    path = tmp_path / f"activations{suffix}"
    given = arrays(m=70, n=150, heads=4, kv_heads=2, batch=2, dtype=dtype)
    (np.savez(path, **given) if suffix == ".npz" else save_file(given, path))
    status = explain("--qkv", path, *FEW, "--out", tmp_path / "out")
    told = capsys.readouterr()
    if suffix == ".npz" and dtype is ml_dtypes.bfloat16:
        assert status == 2
        assert ".npz does not keep bfloat16" in told.err
        return
    assert status == 0
    for fact in (
        "70 queries, 150 keys",
        "batch 2",
        "4 heads (2 of keys and values)",
        np.dtype(dtype).name,
        "--grid H W",
    ):
        assert fact in told.out
    check_picture(tmp_path / "out" / "overview.png")


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("queries", [240, 31])
def test_files_with_a_grid(tmp_path, capsys, layout, queries):
    given = arrays(m=queries, n=240, heads=2, kv_heads=1)
    if layout == "bnhd":
        given = {name: x.swapaxes(1, 2) for name, x in given.items()}
    np.savez(tmp_path / "qkv.npz", **given, unused=np.zeros(3))
    assert explain("--qkv", tmp_path / "qkv.npz", "--layout", layout, "--grid", 12, 20, *FEW, "--out", tmp_path) == 0
    assert "12 x 20 in Z-order" in capsys.readouterr().out
    for name in ("overview.png", "query-1.png", "query-3.png"):
        check_picture(tmp_path / name)


def test_a_file_gives_what_the_picture_gives(tmp_path, capsys):
    tokens = photograph_tokens(None, 24, 2, 8, 0)
    place = tokens.place
    rows = {name: np.ascontiguousarray(getattr(tokens, name)[:, :, place]) for name in "qkv"}
    save_file(rows, tmp_path / "rows.safetensors")
    save_file({name: getattr(tokens, name)[0] for name in "qkv"}, tmp_path / "zorder.safetensors")
    tables = []
    for options in (
        ("--size", 24, "--heads", 2, "--dim", 8),
        ("--qkv", tmp_path / "rows.safetensors", "--grid", 24, 24),
        ("--qkv", tmp_path / "zorder.safetensors", "--grid", 24, 24, "--tokens-in", "zorder"),
    ):
        assert explain(*options, *FEW, "--out", tmp_path / "out") == 0
        page = capsys.readouterr().out
        tables.append(page[page.index("Which K and L?") : page.index("Pictures")])
    assert tables[0] == tables[1] == tables[2]


def mistakes():
    """Options, with {} for a folder, and what is said."""
    yield ("{}/none.png",), "none.png: No such file"
    yield ("{}",), "Is a directory"
    yield ("{}/text.png",), "is not a picture that can be read"
    yield ("--size", "4"), "--size is 4; allowed is an integer of 8 or more"
    yield ("--dim", "9"), "--dim is 9; allowed is an even number"
    yield ("--heads", "0"), "--heads is 0; allowed is an integer of 1 or more"
    yield ("--queries", "3"), "--queries is 3; allowed is an integer of 4 or more"
    yield ("--topk", "0"), "topk is 0"
    yield ("--sweep", "0"), "--sweep is 0; allowed is an integer of 1 or more"
    yield ("--scale", "0"), "explain: scale is 0.0"
    yield ("--scale", "nan"), "explain: scale is nan"
    yield ("--enrich", "9"), "explain: a level in enrich is 9"
    yield ("--layout", "bnhd"), "--layout says how a file's arrays are ordered"
    yield ("--tokens-in", "rows"), "--tokens-in says how a file's arrays are ordered"
    for option in ("--size", "--heads", "--dim"):
        yield ("--qkv", "{}/good.npz", option, "16"), f"{option} is for attention over a picture"
    yield ("--qkv", "{}/good.npz", "--at", "0", "0"), "--at is for keys that lie in a picture"
    yield ("--qkv", "{}/good.npz", "--tokens-in", "rows"), "--tokens-in is for keys that lie in a picture"
    yield ("{}/text.png", "--qkv", "{}/good.npz"), "IMAGE is for keys that lie in a picture"
    yield ("--topk", "8", "8", "8"), "topk has 3 entries"
    yield ("--levels", "0"), "levels is 0"
    yield ("--block-size", "1"), "block_size is 1"
    yield ("--at", "16", "0"), "--at is 16 0; allowed are 0..15 and 0..15"
    yield ("--grid", "4", "4"), "--grid says how --qkv's keys lie"
    yield ("--out", "{}/text.png"), "text.png: File exists"
    yield ("--qkv", "{}/none.npz"), "no such file"
    yield ("--qkv", "{}/text.png"), "allowed are files named .npz or .safetensors"
    yield ("--qkv", "{}/text.npz"), "is not a .npz file that can be read"
    yield ("--qkv", "{}/text.safetensors"), "is not a .safetensors file that can be read"
    yield ("--qkv", "{}/cut.npz"), "is not a .npz file that can be read"
    yield ("--qkv", "{}/other.npz"), "holds a, q; missing: k, v"
    yield ("--qkv", "{}/other.safetensors"), "holds a, q; missing: k, v"
    yield ("--qkv", "{}/flat.npz"), "flat.npz has shape (256,)"
    yield ("--qkv", "{}/objects.npz"), "objects.npz is not an array of numbers that can be read (Object arrays"
    yield ("--qkv", "{}/integers.npz"), "integers.npz has dtype int64"
    yield ("--qkv", "{}/mixed.npz"), "mixed.npz q has dtype float32 and k float64; they must be the same"
    yield ("--qkv", "{}/empty.npz"), "every size is 1 or more"
    yield ("--qkv", "{}/nan.npz"), "nan.npz holds NaN or infinity"
    yield ("--qkv", "{}/shapes.npz"), "k has shape (2, 256, 16) and v (2, 255, 8); their tokens are 256 and 255"
    yield ("--qkv", "{}/shapes.npz", "--layout", "bnhd"), "k has shape (2, 256, 16) and v (2, 255, 8); their heads are"
    yield ("--qkv", "{}/heads.npz"), "q has shape (3, 256, 16) and k (2, 256, 16); q's 3 heads must be a multiple"
    yield ("--qkv", "{}/good.npz", "--grid", "15", "16"), "--grid 15 16 has 240 cells and k"
    yield ("--qkv", "{}/good.npz", "--grid", "-16", "-16"), "--grid is -16 -16; allowed are two numbers of 1 or more"
    yield ("--qkv", "{}/good.npz", "--grid", "16", "16", "--at", "-1", "0"), "--at is -1 0"
    yield ("{}/text.png", "--qkv", "{}/good.npz", "--grid", "16", "16"), "is not a picture that can be read"


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of files of which most are broken in one way each."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("text.png", "text.npz", "text.safetensors"):
        (folder / name).write_text("neither a picture nor an array")
    good = arrays()
    np.savez(folder / "good.npz", **good)
    (folder / "cut.npz").write_bytes((folder / "good.npz").read_bytes()[:-40])
    np.savez(folder / "other.npz", q=good["q"], a=good["k"])
    save_file({"q": good["q"], "a": good["k"]}, folder / "other.safetensors")
    np.savez(folder / "flat.npz", **good | {"v": np.ones(256)})
    np.savez(folder / "objects.npz", **good | {"v": np.array([None, 1])}, allow_pickle=True)
    np.savez(folder / "integers.npz", **{name: np.ones((1, 2, 256, 8), np.int64) for name in "qkv"})
    np.savez(folder / "mixed.npz", **good | {"k": good["k"].astype(np.float64)})
    np.savez(folder / "empty.npz", **good | {"q": good["q"][:, :, :0]})
    np.savez(folder / "nan.npz", **good | {"k": good["k"] * np.nan})
    np.savez(folder / "shapes.npz", q=good["q"][0], k=good["k"][0], v=good["v"][0, :, :-1])
    np.savez(folder / "heads.npz", q=arrays(heads=3)["q"][0], k=good["k"][0], v=good["v"][0])
    return folder


@pytest.mark.parametrize(("options", "told"), list(mistakes()))
def test_mistakes(bad, tmp_path, capsys, options, told):
    options = [option.format(bad) for option in options]
    where = () if "--out" in options else ("--out", str(tmp_path / "out"))
    small = () if "--qkv" in options else ("--size", 16)
    assert explain(*small, *FEW, *options, *where) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert said.err.startswith("llsa: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_backend_that_cannot_run_here(tmp_path, capsys):
    lacking = [name for name, reasons in llsa.backends().items() if reasons]
    for name in lacking:
        assert explain("--size", 16, "--backend", name, "--out", tmp_path) == 2
        assert f"backend '{name}' cannot run here" in capsys.readouterr().err


def test_backends(capsys):
    assert main(["backends"]) == 0
    table = capsys.readouterr().out
    for name in llsa.backends():
        assert name in table
        for reason in llsa.backends()[name]:
            assert f"- {reason}\n" in table


def test_backends_on_a_bare_install():
    packages = ("matplotlib", "ml_dtypes", "PIL", "rich", "safetensors", "skimage", "tqdm")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages})); from llsa_np.cli import main\n"
        "sys.exit(main(['backends']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "numpy: runs here" in done.stdout
    assert done.stderr == ""


def test_help_imports_no_command():
    code = (
        "import sys\nfrom llsa_np.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as done: assert not done.code\n"
        "assert not {'matplotlib', 'rich', 'tqdm', 'skimage'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("package", ["rich", "tqdm", "matplotlib", "PIL", "safetensors"])
def test_a_missing_extra(tmp_path, package):
    code = (
        f"import sys; sys.modules[{package!r}] = None; from llsa_np.cli import main\n"
        f"sys.exit(main(['explain', '--size', '8', '--out', {str(tmp_path)!r}, '--sweep']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"needs the package {package}" in done.stderr
    assert "pip install 'llsa-np[explain]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_command_and_a_wrong_one(capsys):
    for arguments in ([], ["nonsense"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("m", "n", "levels", "attend"),
    [
        (300, 300, 2, {}),
        (70, 150, 1, {"scale": 1.5}),
        (17, 40, 3, {"reweight": False}),
        (300, 300, 3, {"enrich": (3, 1), "scale": 0.5}),
        (70, 150, 2, {"enrich": ()}),
    ],
)
def test_descent_is_attention(m, n, levels, attend):
    """The weights drawn, applied to the values of each level, give the output of `attention`."""
    given = arrays(m=m, n=n, heads=1, kv_heads=1, dtype=np.float64)
    q, k, v = given["q"], given["k"], given["v"]
    selection = llsa.select(q, k, block_size=4, levels=levels, topk=2)
    out, _ = llsa.attend(q, k, v, selection, **attend)
    options = check_attend_options(
        "test", **({"enrich": None, "reweight": True, "scale": None} | attend), precision="full", levels=levels, dim=16
    )
    values = [v, *llsa.pool(v, block_size=4, levels=levels)]
    for query in (0, m // 2, m - 1):
        steps = descend(query, q[0, 0], k[0, 0], [rows[0, 0] for rows in selection], selection.key_hierarchy, options)
        mine = sum(step.weights @ values[step.level][0, 0, step.candidates] for step in steps)
        np.testing.assert_allclose(mine, out[0, 0, query], rtol=1e-10, atol=1e-12)
        shares = received(steps, selection.key_hierarchy)
        np.testing.assert_allclose(shares.sum(), 1)
        np.testing.assert_allclose(shares @ v[0, 0], out[0, 0, query], rtol=1e-10, atol=1e-12)
        everything = dense(query, q[0, 0], k[0, 0], options.scale)
        np.testing.assert_allclose(everything @ k[0, 0], numpy_dense(q, k, k, options.scale)[0, 0, query])


def test_what_is_counted():
    given = arrays(m=100, n=150, heads=2, kv_heads=1)
    selection = llsa.select(given["q"], given["k"], block_size=4, levels=2, topk=3)
    keys = selection.key_hierarchy
    counts = popularity(selection)
    assert counts.shape == (1, 2, keys.lengths[1])
    assert counts.sum() == sum((selection[1] >= 0).ravel())
    expected = float(keys.lengths[2])
    for level in (1, 2):
        rows = selection[level].reshape(-1, 3)
        expected += np.mean([sum(len(keys.children(level, int(j))) for j in row if j >= 0) for row in rows])
    assert tokens_attended(selection) == pytest.approx(expected)
    expected -= keys.lengths[2]
    assert tokens_attended(selection, (1,)) == pytest.approx(expected)
    rows = selection[1].reshape(-1, 3)
    finest = np.mean([sum(len(keys.children(1, int(j))) for j in row if j >= 0) for row in rows])
    assert tokens_attended(selection, ()) == pytest.approx(finest)


def table_after(page, title):
    """The cells of the rows of the table under a title, as words."""
    lines = page[page.index(title) :].split("\n")
    rule = next(i for i, line in enumerate(lines) if "───" in line)
    end = next(i for i in range(rule, len(lines)) if not lines[i].strip())
    return [re.split(r" {2,}", line.strip()) for line in lines[rule + 1 : end]]


def test_both_tables_tell_the_same(tmp_path, capsys):
    assert explain("--size", 64, "--sweep", 8, "--queries", 40, "--out", tmp_path) == 0
    page = capsys.readouterr().out
    assert "on 40 sampled queries of each head" in page
    heads = table_after(page, "How faithful")
    row = next(row for row in table_after(page, "Which K and L?") if row[:2] == ["2", "8"])
    assert len(heads) == 4
    errors = [float(head[-3].split()[0]) for head in heads]
    mean, _, uncertainty, worst = row[4].split()
    assert float(mean) == pytest.approx(np.mean(errors), abs=0.001)
    assert float(worst.strip("()")) == max(errors)
    assert 0 < float(uncertainty) < float(mean)
    for column, of_heads in ((3, 1), (5, -2), (6, -1)):
        shares = [float(head[of_heads].strip("%")) for head in heads]
        assert float(row[column].split()[0].strip("%")) == pytest.approx(np.mean(shares), abs=0.1)


def test_options_reach_every_number():
    """Scale, levels and weights change what is measured, as they change `coverage`."""
    given = arrays(m=100, n=256)
    selection = llsa.select(given["q"], given["k"], block_size=4, levels=2, topk=2)
    attend = {"enrich": (1,), "reweight": False, "scale": 0.7}
    result = measure(**given, selection=selection, queries=100, seed=0, attend=attend)
    mass, error = llsa.coverage(given["q"], given["k"], selection, given["v"], **attend)
    np.testing.assert_allclose(result.mass, mass[0], rtol=1e-12)
    np.testing.assert_allclose(result.error, error[0], rtol=1e-12)
    assert result.uncertainty.tolist() == [0, 0], "nothing was sampled"


def test_uncertainty_covers_the_whole():
    """The error of a sample is about as far from the error of all queries as it says, and much less than it."""
    given = arrays(m=1024, n=1024, heads=8, kv_heads=8)
    selection = llsa.select(given["q"], given["k"])
    attend = {"enrich": None, "reweight": True, "scale": None}
    of_all, *samples = (
        measure(**given, selection=selection, queries=queries, seed=seed, attend=attend)
        for queries, seed in ((1024, 0), (64, 0), (64, 1))
    )
    assert not np.array_equal(samples[0].error, samples[1].error), "the seed is of the sample, too"
    for sample in samples:
        off = (sample.error - of_all.error) / sample.uncertainty
        assert 0.2 < np.sqrt((off**2).mean()) < 4
        assert sample.uncertainty.max() < 0.2 * of_all.error.min()


def test_one_of_each(tmp_path, capsys):
    np.savez(tmp_path / "one.npz", **arrays(m=1, n=1, heads=1, kv_heads=1))
    assert explain("--qkv", tmp_path / "one.npz", "--out", tmp_path) == 0
    page = capsys.readouterr().out
    for words in ("1 token, batch 1, 1 head,", "L = 1 coarse level\n", "on every query of each head"):
        assert words in page
    assert not re.search(r"\b1 (tokens|heads|queries|levels|blocks)\b", page)
    assert [count(1, "query", "queries"), count(4096, "query", "queries")] == ["1 query", "4,096 queries"]
    assert [digits(x) for x in (0, 0.01234, 1.5, 99.9, 12345)] == ["0", "0.0123", "1.50", "99.9", "12,345"]


def test_a_page_of_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert explain("--size", 32, "--levels", 3, *FEW, "--out", tmp_path) == 0
    page = capsys.readouterr().out
    assert "\nWhich K and L? Means over heads, worst head in brackets\n" in page
    assert all(len(row) == 8 for row in table_after(page, "How faithful")), "no cell is wrapped"


def test_batches_are_spoken_of(tmp_path, capsys):
    for batch in (1, 2):
        np.savez(tmp_path / "qkv.npz", **arrays(m=40, n=40, batch=batch))
        assert explain("--qkv", tmp_path / "qkv.npz", *FEW, "--out", tmp_path) == 0
        assert ("the pictures show its first entry" in capsys.readouterr().out) == (batch == 2)
