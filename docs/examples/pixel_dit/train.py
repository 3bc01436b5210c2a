"""Trains a pixel diffusion transformer, on the CPU, on one GPU, or under torchrun on several, and samples from it.

    python docs/examples/pixel_dit/train.py --preset tiny --attention llsa --out runs/tiny

A run that was stopped goes on from its last checkpoint by the same command.
"""

import json
import sys
from pathlib import Path

from options import parsed
from ranks import ranks_of
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from training import Training

TOGETHER = 10
"""Steps whose losses are read at once."""


class Log:
    """Metrics, a line of JSON a step, and TensorBoard's; of a run that goes on, those past its checkpoint go."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "metrics.jsonl"
        before = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in before if line.endswith("\n") and json.loads(line)["step"] <= step]
        part = self.path.with_suffix(".part")
        part.write_text("".join(kept))
        part.replace(self.path)
        self.board = SummaryWriter(str(out), purge_step=step + 1)

    def add(self, step: int, **values: float) -> None:
        """One step's."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def main(arguments: list[str] | None = None) -> None:
    """Train, and write checkpoints, metrics and samples."""
    args = parsed(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    with ranks_of(args) as ranks:
        training = Training(args, ranks)
        log = Log(args.out, training.step) if ranks.rank == 0 else None
        bar = tqdm(total=args.steps, initial=training.step, disable=None if ranks.rank == 0 else True)
        while training.step < args.steps:
            training.train_step()
            bar.update()
            is_kept = training.step == args.steps or training.step % args.every == 0
            if not is_kept and training.step % TOGETHER:
                continue
            for step, loss in training.losses():
                values = {"loss": loss}
                if is_kept and step == training.step:
                    values |= training.evaluate()
                    training.sample()
                if log is not None:
                    log.add(step, **values)
            if is_kept:
                training.save()  # last: what was logged of steps after a checkpoint is logged again
            bar.set_postfix(loss=f"{training.recent_loss:.3f}")
        bar.close()
        if log is not None:
            print(f"{args.out}: {training.step:,} steps, loss {training.recent_loss:.3f} of late", file=sys.stderr)


if __name__ == "__main__":
    main()
