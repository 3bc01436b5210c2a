"""Files of what was measured on one card: pixel-dit-<what>-<card>.json."""

import json
import re
from pathlib import Path
from typing import Any

import torch


class Record:
    """Rows of a measurement, in a folder; those that are there already stay."""

    def __init__(self, folder: Path, what: str, device: torch.device) -> None:
        self.card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.path = folder / f"pixel-dit-{what}-{re.sub('[^a-z0-9]+', '-', self.card.lower())}.json"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """As they are in the file now."""
        rows: list[dict[str, Any]] = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        return rows

    def holds(self, settings: dict[str, Any]) -> bool:
        """Whether there is a row of these settings."""
        return any(settings.items() <= row.items() for row in self.rows)

    def add(self, settings: dict[str, Any], found: dict[str, Any]) -> None:
        """A row, in the place of one of the same settings. The file is whole, whenever the process is killed."""
        rows = [row for row in self.rows if not settings.items() <= row.items()] + [settings | found]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps({"card": self.card, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
        part.replace(self.path)
        print(json.dumps(rows[-1]), flush=True)
