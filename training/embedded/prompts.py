"""Which rows of the data a rollout gets: slime's order, so that a rollout id means the same samples on both engines.

RolloutDataSource and Dataset (slime/ray/rollout_data_source.py and slime/utils/data.py at 8359c9a): an epoch is the
file in the order of random.seed(rollout_seed + epoch), a draw that reaches its end goes on with the next epoch.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.embedded.errors import TrainingError

Row = dict[str, Any]


@dataclass
class Position:
    """How far the data has been drawn, under slime's names; sample_* count for the whole run."""

    sample_offset: int = 0
    epoch_id: int = 0
    sample_group_index: int = 0
    sample_index: int = 0


class PromptSource:
    """Rows in slime's order. seed: --rollout-seed. samples: --n-samples-per-prompt."""

    def __init__(self, rows: Sequence[Row], *, shuffle: bool, seed: int, samples: int = 1) -> None:
        self.rows, self.shuffle, self.seed, self.samples = rows, shuffle, seed, samples
        self.position = Position()
        self._order = self._epoch(0)

    def take(self, count: int) -> list[Row]:
        """The next `count` rows, across the end of an epoch if need be; fewer if two epochs do not hold as many."""
        at = self.position
        chosen = self._order[at.sample_offset : at.sample_offset + count]
        missing = count - len(chosen)
        at.sample_offset += len(chosen)
        if missing:
            at.epoch_id += 1
            self._order = self._epoch(at.epoch_id)
            chosen = chosen + self._order[:missing]
            at.sample_offset = missing
        at.sample_group_index += len(chosen)
        at.sample_index += len(chosen) * self.samples
        return [self.rows[index] for index in chosen]

    def save(self, root: Path, rollout_id: int) -> None:
        """Write the position after a rollout, where and as slime does."""
        path = _path(root, rollout_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        torch.save({**vars(self.position), "metadata": {}}, partial)
        os.replace(partial, path)

    def load(self, root: Path, rollout_id: int) -> None:
        """Go on after a rollout. slime starts at the first sample again, silently, if the file is missing; this raises
        TrainingError.
        """
        path = _path(root, rollout_id)
        if not path.is_file():
            raise TrainingError(f"{path}: expected the data position of rollout {rollout_id}, found no such file")
        try:
            state = torch.load(path, weights_only=True)
            self.position = Position(**{name: int(state[name]) for name in vars(Position())})
        except Exception as error:  # whatever a damaged file makes the reader raise
            reason = (str(error).splitlines() or ["?"])[0]
            raise TrainingError(f"{path}: does not read as the data position of a rollout: {reason}") from error
        self._order = self._epoch(self.position.epoch_id)

    def _epoch(self, epoch: int) -> list[int]:
        order = list(range(len(self.rows)))
        if self.shuffle:
            random.Random(self.seed + epoch).shuffle(order)
        return order


def _path(root: Path, rollout_id: int) -> Path:
    return root / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"
