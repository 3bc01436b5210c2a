"""The pixel diffusion transformer of the documentation: it learns, resumes, is the same over ranks, and samples."""

import io
import json
import re
import socket
import sys
import types

import numpy as np
import pytest
from strategies import EMULATED, SIMULATED

import llsa_np as llsa

if SIMULATED or EMULATED:
    pytest.skip("PyTorch is tested without a simulator", allow_module_level=True)

import emoji
import flow
import images
import model
import quality
import records
import report
import safetensors.torch
import sample
import several_gpus
import torch
import torch.multiprocessing as mp
import train
import training
import weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = ["--side", "8", "--batch", "4", "--block-size", "4", "--topk", "2", "--samples", "4", "--device", "cpu"]
ALONE = training.Ranks(0, 0, 1, None, torch.device("cpu"))


@pytest.fixture
def one_picture(tmp_path):
    """A folder with the same picture to train on and held out."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.add.outer(np.arange(8) * 20, np.arange(8) * 10)[..., None] + np.array([0, 30, 5])
    pixels = np.maximum(pixels, pixels[:, ::-1])  # its own mirror image
    for i in range(2):
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return ["--images", str(folder)]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("attention", ["llsa", "full"])
def test_one_image_is_learnt(attention, one_picture, tmp_path):
    out = tmp_path / "run"
    train.main([*SMALL, *one_picture, "--attention", attention, "--steps", "100", "--every", "100", "--out", str(out)])
    losses = [row["loss"] for row in metrics(out)]
    assert np.mean(losses[-20:]) < np.mean(losses[:5]) / 4
    assert metrics(out)[-1]["psnr_0.5"] > 18
    with Image.open(out / "samples-000100.png") as grid:
        assert min(grid.size) >= 256


def test_a_run_that_was_stopped_goes_on_to_the_same_losses(one_picture, tmp_path, monkeypatch):
    """Killed after a checkpoint, while the next was written and a line of metrics half so."""
    purged, writer = [], train.SummaryWriter

    def board_of(out, purge_step):
        purged.append(purge_step)
        return writer(out, purge_step=purge_step)

    monkeypatch.setattr(train, "SummaryWriter", board_of)
    options = [*SMALL, *one_picture, "--every", "3", "--seed", "5"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.main([*options, "--steps", "7", "--out", str(whole)])
    train.main([*options, "--steps", "3", "--out", str(broken)])
    (broken / "checkpoint.part").write_bytes(b"half")
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 9}\n{"step": 5, "lo')
    train.main([*options, "--steps", "7", "--out", str(broken)])
    assert metrics(broken) == metrics(whole)
    assert (broken / "samples-000007.png").read_bytes() == (whole / "samples-000007.png").read_bytes()
    states = [torch.load(out / "checkpoint.pt") for out in (broken, whole)]
    assert states[0]["recent_loss"] == states[1]["recent_loss"]
    assert purged == [1, 1, 4]
    board = EventAccumulator(str(whole)).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, 8))
    for name, value, was in (("topk", 3, 2), ("side", 4, 8), ("seed", 6, 5), ("batch", 2, 4)):
        with pytest.raises(ValueError, match=f"is of another run, whose {name} is {was} .here {value}.; give the same"):
            train.main([*options, f"--{name}", str(value), "--steps", "9", "--out", str(broken)])
    for cut in ((whole / "checkpoint.pt").read_bytes()[:1000], b"", b"hello world"):
        (broken / "checkpoint.pt").write_bytes(cut)
        with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read"):
            train.main([*options, "--steps", "9", "--out", str(broken)])
    torch.save({"model": 1}, broken / "checkpoint.pt")
    with pytest.raises(ValueError, match="is no checkpoint of train"):
        train.main([*options, "--steps", "9", "--out", str(broken)])


def test_a_run_that_is_killed_as_it_saves_misses_no_step(one_picture, tmp_path, monkeypatch):
    """Before a checkpoint, or after one."""
    options = [*SMALL, *one_picture, "--every", "2", "--steps", "3", "--samples", "0", "--out", str(tmp_path)]
    save, is_written = training.Training.save, iter([False, True])

    def killed(run):
        if next(is_written):
            save(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Training, "save", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train.main(options)
    monkeypatch.setattr(training.Training, "save", save)
    train.main(options)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]
    assert "psnr_0.5" in metrics(tmp_path)[1]


def test_where_there_is_a_checkpoint_there_are_weights(one_picture, tmp_path, monkeypatch):
    """Of a run that is killed between the two, at its last step, the same command makes them."""
    options = [*SMALL, *one_picture, "--steps", "2", "--samples", "0", "--out", str(tmp_path)]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(options)
    train.main(options)
    assert weights.settings_of(tmp_path)["side"] == 8


def test_the_average_forgets_what_a_run_began_with(one_picture, tmp_path):
    """At first it is of few steps, and at last of as many as --ema says."""
    args = train.parsed([*SMALL, *one_picture, "--ema", "0.999", "--out", str(tmp_path)])
    run = training.Training(args, ALONE)
    (was, *_), (now, *_) = (list(x.parameters()) for x in (run.average, run.model))
    now.data.fill_(1)
    was.data.fill_(0)
    for run.step in range(30):
        run.follow()
    assert was.flatten()[0] > 0.999
    run.step = 10**6
    was.data.fill_(0)
    run.follow()
    assert was.flatten()[0].item() == pytest.approx(0.001, rel=1e-3)


def test_every_seed_is_judged_by_the_same(tmp_path):
    for i in range(30):
        Image.new("RGB", (8, 8), (8 * i, 100, 50)).save(tmp_path / f"{i}.png")

    def judged(seed, held_out=training.JUDGED_BY):
        args = train.parsed([*SMALL, "--images", str(tmp_path), "--seed", str(seed), "--out", str(tmp_path)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "JUDGED_BY", held_out)
            return training.Training(args, ALONE).evaluate()  # of a model whose velocity is 0 at first

    assert judged(0) == judged(1) != judged(0, held_out=3)


def test_weights_are_there_whenever_a_run_is_killed(tmp_path, monkeypatch):
    def weights_of(value, tensors):
        return {f"{i}": torch.full((100,), float(value)) for i in range(tensors)}

    monkeypatch.setattr(weights, "MOST_BYTES", 2000)
    weights.write(tmp_path, weights_of(1, 9), weights_of(1, 9), {}, 1)
    files = set(tmp_path.glob("weights-*.safetensors"))
    assert len(files) > 2

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights.Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            weights.write(tmp_path, weights_of(2, 2), weights_of(2, 2), {}, 2)
    assert set(tmp_path.glob("weights-*.safetensors")) == files
    with pytest.raises(ValueError, match=r"of steps 2, 2, 1.*; 2 of one step belong together"):
        weights.read(tmp_path)
    weights.write(tmp_path, weights_of(3, 2), weights_of(3, 2), {}, 3)
    model, _ = weights.read(tmp_path)
    assert {name: x[0].item() for name, x in model.items()} == {"0": 3, "1": 3}
    first, *others = sorted(tmp_path.glob("weights-*.safetensors"))
    others[0].rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"has 1 weights-.* 2 of one step belong together"):
        weights.read(tmp_path)
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not whole"):
        weights.read(tmp_path)


def test_a_run_goes_on_at_another_rate(one_picture, tmp_path):
    """As the error of one that diverges says."""
    options = [*SMALL, *one_picture, "--steps", "2", "--samples", "0", "--out", str(tmp_path)]
    train.main([*options, "--rate", "0.01"])
    args = train.parsed([*options, "--rate", "0.001"])
    run = training.Training(args, ALONE)
    assert [group["lr"] for group in run.optimiser.param_groups] == [0.001]


def test_losses_are_read_together(one_picture, tmp_path, monkeypatch):
    """At every tenth step and where a checkpoint is, none twice."""
    read, plain = [], training.Training.losses

    def spied(run):
        read.append(run.step)
        return plain(run)

    monkeypatch.setattr(training.Training, "losses", spied)
    train.main([*SMALL, *one_picture, "--steps", "23", "--every", "15", "--samples", "0", "--out", str(tmp_path)])
    assert read == [10, 15, 20, 23]
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 24))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "--batch: is 0, and is to be 1 or more"),
        (["--seed", "-1"], "--seed: is -1, and is to be 0"),
        (["--seed", str(2**63)], "and less than 2**63"),
        (["--rate", "nan"], "--rate: is nan, and is to be more than 0"),
        (["--rate", "inf"], "--rate: is inf, and is to be more than 0 and finite"),
        (["--ema", "1"], "--ema: is 1, and is to be 0 or more and less than 1"),
        (["--attention", "full", "--sequence-ranks", "2"], "use --attention llsa or --sequence-ranks 1"),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.parsed([*arguments, "--out", str(tmp_path)])
    assert words in capsys.readouterr().err


def test_checkpoints_are_five_or_more(tmp_path):
    every = {steps: train.parsed(["--steps", str(steps), "--out", str(tmp_path)]).every for steps in (3, 300, 20_000)}
    assert every == {3: 1, 300: 60, 20_000: 1000}


def test_a_device_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device is cuda, and PyTorch finds no CUDA device"):
        train.main(["--device", "cuda", "--out", str(tmp_path)])


def on_rank(rank, main, ranks, port, arguments):
    torch.set_num_threads(1)
    of = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in of.items():
            patch.setenv(name, str(value))
        main(arguments)


def spawn_two(main, arguments):
    """A command as two processes of torchrun's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_rank, (main, 2, port, arguments), 2)


@pytest.mark.parametrize("shared", [1, 2], ids=["data", "sequence"])
def test_two_ranks_are_one_process(shared, one_picture, tmp_path):
    """Of which one may go on with what the other began."""
    options = [*SMALL, *one_picture, "--steps", "4", "--every", "2", "--rate", "0.01"]
    train.main([*options, "--out", str(tmp_path / "one")])
    train.main([*options, "--steps", "2", "--out", str(tmp_path / "two")])
    spawn_two(train.main, [*options, "--sequence-ranks", str(shared), "--out", str(tmp_path / "two")])
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    pictures = [np.asarray(Image.open(tmp_path / name / "samples-000004.png"), int) for name in ("one", "two")]
    assert abs(pictures[0] - pictures[1]).max() <= 2


def test_steps_on_one_and_on_several(one_picture, tmp_path):
    """A row of each, of the same losses, whichever was run again."""
    # A batch of one picture, of which two processes could not have one each.
    options = [*SMALL, *one_picture, "--batch", "1", "--steps", "2", "--rate", "0.01", "--out", str(tmp_path)]
    several_gpus.main(options)
    spawn_two(several_gpus.main, options)
    several_gpus.main([*options, "--rate", "0.02"])
    several_gpus.main(options)
    two, other, one = json.loads((tmp_path / "pixel-dit-several-cpu.json").read_text())["rows"]
    assert (one["sequence_ranks"], two["sequence_ranks"], two["side"], other["rate"]) == (1, 2, 8, 0.02)
    assert len(one["losses"]) == several_gpus.WARM_UP + 2
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert one["step_ms"] > 0
    with pytest.raises(SystemExit):
        several_gpus.main([*options, "--sequence-ranks", "2"])


def test_a_step_that_memory_does_not_do_for(one_picture, tmp_path, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training, "loss_of", too_large)
    several_gpus.main([*SMALL, *one_picture, "--steps", "2", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "pixel-dit-several-cpu.json").read_text())["rows"]
    assert (row["side"], row["step_ms"], row["mib"], row["losses"]) == (8, None, None, None)


def test_growing_from_a_smaller_side(one_picture, tmp_path):
    options = [*SMALL, *one_picture, "--steps", "2", "--every", "2"]
    train.main([*options, "--attention", "full", "--out", str(tmp_path / "small")])
    large = ["--seed", "1", "--side", "16", "--out", str(tmp_path / "large")]  # another seed makes other weights
    train.main([*options, *large, "--start", str(tmp_path / "small")])
    before, after = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("small", "large"))
    assert after["step"] == 2
    assert (after["model"]["enter.weight"] - before["model"]["enter.weight"]).abs().max() < 0.01


def test_growing_from_weights_that_were_moved(one_picture, tmp_path, monkeypatch):
    """In bfloat16, in files of a size that is not passed."""
    monkeypatch.setattr(weights, "MOST_BYTES", 60_000)
    options = [*SMALL, *one_picture, "--steps", "2", "--every", "2"]
    train.main([*options, "--out", str(tmp_path / "small")])
    files = list((tmp_path / "small").glob("weights-*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) <= 60_000
    (tmp_path / "small" / "checkpoint.pt").unlink()
    args = train.parsed([*options, "--start", str(tmp_path / "small"), "--out", str(tmp_path / "large")])
    grown = training.Training(args, ALONE)
    of_model, of_average = weights.read(tmp_path / "small")
    for name, x in grown.model.state_dict().items():
        assert torch.equal(x, of_model[name].to(x.dtype))
    for name, x in grown.average.state_dict().items():
        assert torch.equal(x, of_average[name].to(x.dtype))
    args.heads = 1
    with pytest.raises(ValueError, match="is of a model of other sizes than --preset tiny"):
        training.Training(args, ALONE)
    args.start = tmp_path
    with pytest.raises(FileNotFoundError, match="has no weights"):
        training.Training(args, ALONE)


def test_new_pictures_of_a_run(one_picture, tmp_path):
    """The same as its own but for the weights' last bits, of any number, side and noise."""
    out = tmp_path / "run"
    options = [*SMALL, *one_picture, "--attention", "full", "--rate", "0.01", "--ema", "0.9"]
    train.main([*options, "--steps", "30", "--every", "30", "--out", str(out)])

    def made(*options):
        sample.main([str(out), "--device", "cpu", "--out", str(tmp_path / "new.png"), *options])
        with Image.open(tmp_path / "new.png") as grid:
            return np.asarray(grid, int)

    with Image.open(out / "samples-000030.png") as grid:
        own = np.asarray(grid, int)
    same = made("--pictures", "4", "--batch", "3")
    assert abs(same - own).max() < 5
    assert abs(made("--pictures", "4", "--seed", "1") - own).max() > 50
    assert abs(made("--pictures", "4", "--steps", "2") - own).max() > 16
    larger = made("--pictures", "5", "--side", "16")
    assert larger.shape == (256, 384, 3)
    assert (larger[8:16] != larger[:8]).any(), "a pixel of side 16 is drawn 8 wide, one of side 8 twice that"
    with pytest.raises(FileNotFoundError, match="has no weights-"):
        sample.main([str(tmp_path), "--out", str(tmp_path / "new.png")])
    with pytest.raises(SystemExit):
        made("--out", "new.jpeg")
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "weights-00.safetensors")
    with pytest.raises(ValueError, match="does not say what model"):
        sample.main([str(tmp_path), "--out", str(tmp_path / "new.png")])


@pytest.mark.parametrize(("factor", "words"), [(1e3, "training diverges"), (np.nan, "loss is nan at step 2")])
def test_a_loss_that_diverges_stops(factor, words, one_picture, tmp_path, monkeypatch):
    factors = iter([1, *[factor] * 8])
    plain = training.loss_of
    monkeypatch.setattr(training, "loss_of", lambda *given: next(factors) * plain(*given))
    with pytest.raises(FloatingPointError, match=f"{words}.*nothing is saved yet"):
        train.main([*SMALL, *one_picture, "--steps", "9", "--every", "9", "--out", str(tmp_path / "run")])


def test_weights_that_are_ruined_are_not_saved(one_picture, tmp_path):
    """A loss is of the weights before its step; and who follows the advice goes on from what was good."""
    options = [*SMALL, *one_picture, "--samples", "0", "--every", "1", "--out", str(tmp_path)]
    train.main([*options, "--steps", "20"])
    for rate in ("0.3", "1e+30"):
        with pytest.raises(
            FloatingPointError, match=rf"after step 21.*lower --rate than {re.escape(rate)}; .*is of an ea"
        ):
            train.main([*options, "--steps", "22", "--rate", rate])
    train.main([*options, "--steps", "21", "--rate", "1e-3"])
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 22))


def test_a_first_step_that_is_easy_is_no_yardstick(one_picture, tmp_path, monkeypatch):
    args = train.parsed([*SMALL, *one_picture, "--out", str(tmp_path)])
    run = training.Training(args, ALONE)
    run.step, run.not_read = 40, [torch.tensor(x) for x in (0.03, *[0.9] * 39)]
    assert len(list(run.losses())) == 40


def test_kinds_of_attention_side_by_side(one_picture, tmp_path, capsys, monkeypatch):
    """Each trained, judged and sampled, and not again if it was."""
    options = [*SMALL, *one_picture, "--steps", "1", "--seeds", "1", "--out", str(tmp_path)]
    for _ in range(2):
        quality.main([*options, "--kinds", "full attention", "LLSA without enrichment"])
    file = tmp_path / "pixel-dit-quality-cpu.json"
    rows = json.loads(file.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["full attention", "LLSA without enrichment"]
    for row in rows:
        assert (row["step"], row["seed"], row["images"]) == (1, 0, one_picture[1])
        assert row["psnr_0.5"] == pytest.approx(10 * np.log10(4 / (0.25 * row["held_out_loss_0.5"])))
    names = {"000-full-attention-0.png", "001-llsa-without-enrichment-0.png"}
    assert {file.name for file in tmp_path.glob("*.png")} == names == {row["samples"] for row in rows}
    assert len(capsys.readouterr().out.splitlines()) == 2
    quality.main([*options, "--kinds", "full attention", "--topk", "3"])
    assert [row["topk"] for row in json.loads(file.read_text())["rows"]] == [2, 2, 3]
    for own in ("--seed=2", "--no-enrich", "--attention"):
        with pytest.raises(SystemExit):
            quality.main([*options, own, "full"])
        assert f"{own} is each run's own; give --seeds" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        quality.main([*options, "--see", "3"])
    assert "unrecognized arguments: --see" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        quality.main(options)
    assert "start it without torchrun" in capsys.readouterr().err


def test_rows_that_another_command_added_stay(tmp_path):
    one, two = (records.Record(tmp_path, "quality", torch.device("cpu")) for _ in range(2))
    for record, kind in ((one, "a"), (two, "b"), (one, "a")):
        record.add({"kind": kind}, {})
    assert [row["kind"] for row in one.rows] == ["b", "a"]
    assert two.holds({"kind": "a"})


def test_seeds_make_other_weights_and_the_average_is_judged(one_picture, tmp_path):
    options = [*SMALL, *one_picture, "--out", str(tmp_path)]
    one, same, other = (training.Training(train.parsed([*options, "--seed", seed]), ALONE) for seed in ("0", "0", "1"))
    assert torch.equal(one.model.enter.weight, same.model.enter.weight)
    assert not torch.equal(one.model.enter.weight, other.model.enter.weight)
    judged = one.evaluate()
    for layer in (one.model.enter, one.model.leave):
        torch.nn.init.normal_(layer.weight, std=0.1)
    assert one.evaluate() == judged
    torch.nn.init.normal_(one.model.leave.weight, std=100)
    with pytest.raises(FloatingPointError, match=r"held-out loss is .* after step 0"):  # though the average is not yet
        one.evaluate()
    torch.nn.init.normal_(one.model.leave.weight, std=0.1)
    one.average.load_state_dict(one.model.state_dict())
    assert one.evaluate() != judged


def test_gradients_are_clipped(one_picture, tmp_path, monkeypatch):
    plain = training.loss_of
    monkeypatch.setattr(training, "loss_of", lambda *given: 1e4 * plain(*given))
    run = training.Training(train.parsed([*SMALL, *one_picture, "--out", str(tmp_path)]), ALONE)
    run.train_step()
    squares = [x.grad.square().sum() for x in run.model.parameters() if x.grad is not None]
    assert torch.stack(squares).sum().sqrt() == pytest.approx(1, rel=1e-3)


def test_noise_is_scaled_wherever_it_is(one_picture, tmp_path, monkeypatch):
    """In training, in what is judged and in samples; at 8 pixels it would be 1."""
    seen = []

    def loss_of(velocity, x, noise, t, scale):
        seen.append(scale)
        return flow.loss_of(velocity, x, noise, t, scale)

    def sampled(velocity, noise, scale, steps=20):
        seen.append(scale)
        return noise

    for module in (training, sample):
        monkeypatch.setattr(module, "noise_scale", lambda side: side / 4)
        monkeypatch.setattr(module, "sampled", sampled)
    monkeypatch.setattr(training, "loss_of", loss_of)
    train.main([*SMALL, *one_picture, "--steps", "1", "--out", str(tmp_path / "run")])
    sample.main([str(tmp_path / "run"), "--device", "cpu", "--out", str(tmp_path / "new.png")])
    assert seen == [2] * (1 + training.HELD_OUT_BATCHES * (len(training.TIMES) + 1) + 1 + 1)


def test_what_is_compiled(one_picture, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(model.Block, "compile", lambda block: seen.append(block))
    run = training.Training(train.parsed([*SMALL, *one_picture, "--compile", "--out", str(tmp_path)]), ALONE)
    assert seen == list(run.model.blocks)


# --- the flow


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sampling_a_distribution_whose_field_is_known(scale):
    """Of pixels that are normal, each about its own mean: E[s eps - x_0 | x_t] is linear in x_t."""
    mean, spread = torch.tensor([-0.5, 0.0, 0.7]), 0.3

    def velocity(x, t):
        t = t[:, None, None]
        variance = (1 - t) ** 2 * spread**2 + t**2 * scale**2
        surprise = (x - (1 - t) * mean) / variance
        return t * scale**2 * surprise - (mean + (1 - t) * spread**2 * surprise)

    torch.manual_seed(0)
    noise = torch.randn(64, 256, 3)
    found = flow.sampled(velocity, noise, scale, steps=400)
    assert found.mean((0, 1)) == pytest.approx(mean, abs=0.02)
    assert found.std((0, 1)) == pytest.approx([spread] * 3, abs=0.02)
    x = mean + spread * torch.randn(64, 256, 3)
    t = torch.full((64,), 0.4)
    assert flow.loss_of(velocity, x, noise, t, scale) < flow.loss_of(
        lambda x, t: 0.9 * velocity(x, t), x, noise, t, scale
    )


def test_noise_and_the_velocity_that_leads_away_from_it():
    x, noise, t = torch.randn(2, 16, 3), torch.randn(2, 16, 3), torch.tensor([0.25, 0.75])
    assert [flow.noise_scale(side) for side in (32, 64, 128, 256)] == [1, 1, 2, 4]
    true = 2 * noise - x
    torch.testing.assert_close(flow.noised(x, noise, t, 2.0) - t[:, None, None] * true, x)
    assert flow.loss_of(lambda *_: true, x, noise, t, 2.0) == 0


# --- the model


@pytest.mark.parametrize("reorder", [True, False])
def test_tokens_and_pixels(reorder):
    config = model.Config(hidden=32, heads=2, reorder=reorder)
    grid = model.Grid(8, config, torch.device("cpu"))
    pictures = torch.randn(2, 3, 8, 8)
    assert torch.equal(grid.images(grid.tokens(pictures)), pictures)
    order = llsa.zorder(8, 8)[0] if reorder else np.arange(64)
    assert torch.equal(grid.tokens(pictures)[0, 5], pictures[0, :, order[5] // 8, order[5] % 8])


def test_rotation_tells_where_tokens_are_to_each_other():
    grid = model.Grid(8, model.Config(hidden=32, heads=2, reorder=False), torch.device("cpu"))
    q, k = (torch.randn(1, 1, 2, 16).expand(1, 64, 2, 16) for _ in range(2))
    products = torch.einsum("bihd,bjhd->hij", *(model.rotated(x, grid.rotation) for x in (q, k)))[0]
    products = products.unflatten(1, (8, 8)).unflatten(0, (8, 8))  # rows and columns of q, and of k
    torch.testing.assert_close(products[0, 0, 2, 3], products[4, 2, 6, 5])
    assert abs(products[0, 0, 2, 3] - products[0, 0, 3, 2]) > 1e-3
    finer = model.Grid(16, model.Config(hidden=32, heads=2, reorder=False), torch.device("cpu"))
    q, k = (x[:, :1].expand(1, 256, 2, 16) for x in (q, k))
    of_finer = torch.einsum("bihd,bjhd->hij", *(model.rotated(x, finer.rotation) for x in (q, k)))[0]
    torch.testing.assert_close(of_finer.unflatten(1, (16, 16))[0, 4, 6], products[0, 0, 2, 3])  # twice as many pixels


def test_attention_that_keeps_everything_is_full():
    q, k, v = (torch.randn(2, 64, 2, 16) for _ in range(3))
    full = model.attention_of(model.Config(attention="full"), None)(q, k, v)
    everything = model.Config(block_size=4, levels=1, topk=16, enrich=False)
    torch.testing.assert_close(model.attention_of(everything, None)(q, k, v), full)
    assert (model.attention_of(model.Config(block_size=4, levels=1, topk=1), None)(q, k, v) - full).abs().max() > 0.01


def test_ablations_reach_the_attention(monkeypatch):
    seen = []
    monkeypatch.setattr(llsa, "attention", lambda *_, **options: seen.append(options))
    config = model.Config(block_size=4, levels=2, topk=3, enrich=False, reweight=False)
    model.attention_of(config, None)(None, None, None)
    options = {"block_size": 4, "levels": 2, "topk": 3, "enrich": (), "reweight": False, "layout": "bnhd"}
    assert seen == [options]


def test_dense_attention_by_a_kernel_that_is_named(monkeypatch):
    """And none but it."""
    config, given = model.Config(attention="full"), [torch.randn(1, 16, 2, 8) for _ in range(3)]
    monkeypatch.setitem(report.DENSE, "plain", report.SDPBackend.MATH)
    plain = model.attention_of(config, None)(*given)
    torch.testing.assert_close(report.attention_by("plain", config)(*given), plain)
    with pytest.raises(RuntimeError, match="No viable backend"):
        report.attention_by("cuDNN", config)(*given)


def test_a_block():
    """Is the identity at first; later the time matters, and the length of queries and keys does not."""
    torch.manual_seed(0)
    config = model.Config(hidden=32, heads=2, layers=1, attention="full")
    block, grid = model.Block(config, model.attention_of(config, None)), model.Grid(4, config, torch.device("cpu"))
    x, time = torch.randn(2, 16, 32), torch.randn(2, 32)
    assert torch.equal(block(x, time, grid.rotation), x)
    torch.nn.init.normal_(block.modulation.weight)
    changed = block(x, time, grid.rotation)
    with torch.no_grad():
        block.qkv.weight[:64] *= 10
        block.qkv.bias[:64] *= 10
    torch.testing.assert_close(block(x, time, grid.rotation), changed, rtol=1e-3, atol=1e-3)
    whole = model.PixelDiT(config)
    for layer in (whole.leave, whole.modulation):
        torch.nn.init.normal_(layer.weight)
    tokens = torch.randn(1, 16, 3).expand(2, 16, 3)
    early, late = whole(tokens, torch.tensor([0.2, 0.8]), grid.rotation)
    assert (early - late).abs().max() > 0.1


# --- the pictures


def test_pictures_are_seen_in_a_mirror_and_in_parts_of_all_sizes():
    left = Image.new("RGB", (8, 8))
    left.paste("white", (0, 0, 4, 8))
    rng = np.random.default_rng(0)
    whole = images.Pictures([left], 8, crops=False)
    assert {whole.draw(rng)[0, 0, 0].item() for _ in range(20)} == {-1, 1}
    ramp = Image.fromarray(np.repeat(np.arange(0, 256, 2, np.uint8)[None, :, None], 128, 0).repeat(3, 2))
    spans = [(x.max() - x.min()).item() for x in (images.Pictures([ramp], 8, crops=True).draw(rng) for _ in range(40))]
    assert min(spans) < 0.6
    assert max(spans) > 1.4


def test_files_that_are_no_pictures_are_named(tmp_path):
    turned = Image.new("RGB", (2, 2), "white")
    turned.putpixel((0, 0), (0, 0, 0))
    turned.getexif()[0x0112] = 3  # upside down
    turned.save(tmp_path / "a.png", exif=turned.getexif())
    Image.new("RGB", (9, 9)).save(tmp_path / "b.png")
    (tmp_path / "folder.png").mkdir()
    kept, held = images.folder(tmp_path, 2)
    assert len(kept.sources) == len(held.sources) == 1
    assert held.sources[0].getpixel((1, 1)) == (0, 0, 0)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "c.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:900])
    with pytest.raises(ValueError, match=r"c\.png cannot be read as a picture"):
        images.folder(tmp_path, 4)
    (tmp_path / "c.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.png cannot be read as a picture"):
        images.folder(tmp_path, 5)


def test_pictures_of_a_font(tmp_path, monkeypatch):
    """On white, in the middle of a square; a font without pictures is refused."""
    glyph = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    glyph.putpixel((0, 0), (0, 0, 0, 0))
    data = io.BytesIO()
    glyph.save(data, "png")
    table = types.SimpleNamespace(strikeData=[{"smile": types.SimpleNamespace(imageData=data.getvalue())}])
    monkeypatch.setattr(emoji, "TTFont", lambda path: {"CBDT": table} if path.name == "whole.ttf" else {})
    monkeypatch.setattr(sys, "argv", ["emoji.py", "whole.ttf", str(tmp_path / "out"), "--side", "4"])
    emoji.main()
    (file,) = (tmp_path / "out").iterdir()
    pixels = np.array(images.on_white(file))
    white, red = [255, 255, 255], [255, 0, 0]
    assert pixels.tolist() == [[white] * 4, [white, red, red, red], [red] * 4, [white] * 4]
    monkeypatch.setattr(sys, "argv", ["emoji.py", "plain.ttf", str(tmp_path)])
    with pytest.raises(SystemExit, match="no table CBDT"):
        emoji.main()


def test_what_is_held_out_is_never_trained_on(tmp_path):
    for i in range(20):
        Image.new("RGBA", (9, 8), (10 * i, 0, 0, 255)).save(tmp_path / f"{i:02}.png")
    kept, held = images.folder(tmp_path, 8)
    reds = [{x.getpixel((4, 4))[0] for x in pictures.sources} for pictures in (kept, held)]
    assert reds == [{10 * i for i in range(20) if i % 10}, {0, 100}]
    with pytest.raises(ValueError, match="has 0 pictures"):
        images.folder(tmp_path / "none", 8)
    Image.new("I;16", (8, 8)).save(tmp_path / "20.png")
    with pytest.raises(ValueError, match="has pixels of 16 or 32 bits"):
        images.folder(tmp_path, 4)
    many = tmp_path / "many"
    many.mkdir()
    for i in range(250):
        Image.new("RGB", (1, 1), (i, 0, 0)).save(many / f"{i:03}.png")
    _, held = images.folder(many, 1)  # neighbours together
    assert {x.getpixel((0, 0))[0] for x in held.sources} == {i + j for i in range(0, 250, 20) for j in (0, 1)}
    kept, held = images.photographs(16)
    for left, right in zip(kept.sources, held.sources):
        assert right.width / (left.width + right.width) == pytest.approx(images.HELD_OUT, abs=0.01)
    drawn = kept.draw(np.random.default_rng(0))
    assert drawn.shape == (3, 16, 16)
    assert -1 <= drawn.min() < drawn.max() <= 1
