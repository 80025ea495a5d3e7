"""The order of the data against slime's own algorithm, and its position on disk."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.embedded.errors import TrainingError
from training.embedded.prompts import PromptSource


class Upstream:
    """Dataset.shuffle and RolloutDataSource.get_samples of slime 8359c9a, on numbers."""

    def __init__(self, size: int, shuffle: bool, seed: int) -> None:
        self.size, self.shuffle, self.seed, self.epoch, self.offset = size, shuffle, seed, 0, 0
        self.samples = self.shuffled()

    def shuffled(self) -> list[int]:
        permutation = list(range(self.size))
        if self.shuffle:
            state = random.getstate()  # upstream leaves the generator of the process where this puts it
            random.seed(self.seed + self.epoch)
            random.shuffle(permutation)
            random.setstate(state)
        return permutation

    def get(self, count: int) -> list[int]:
        if self.offset + count <= self.size:
            found = self.samples[self.offset : self.offset + count]
            self.offset += count
            return found
        found = self.samples[self.offset :]
        count -= len(found)
        self.epoch += 1
        self.samples = self.shuffled()
        found += self.samples[:count]
        self.offset = count
        return found


def rows(count: int) -> list[dict[str, int]]:
    return [{"n": number} for number in range(count)]


def numbers(taken: list[dict[str, int]]) -> list[int]:
    return [row["n"] for row in taken]


DRAWS = st.lists(st.integers(1, 15), min_size=1, max_size=20)


@given(st.integers(1, 20), st.booleans(), st.integers(0, 2**31 - 1), DRAWS)
def test_the_order_is_slimes(size, shuffle, seed, draws):
    ours, theirs = PromptSource(rows(size), shuffle=shuffle, seed=seed), Upstream(size, shuffle, seed)
    for count in draws:
        assert numbers(ours.take(count)) == theirs.get(count)
        assert (ours.position.epoch_id, ours.position.sample_offset) == (theirs.epoch, theirs.offset)


def test_an_epoch_by_hand():
    """random.seed(42); random.shuffle([0, 1, 2, 3, 4]), and the same with 43."""
    source = PromptSource(rows(5), shuffle=True, seed=42)
    assert numbers(source.take(5)) == [3, 1, 2, 4, 0]
    assert numbers(source.take(3)) == [1, 4, 3]
    assert source.position.epoch_id == 1  # an epoch begins when it is needed
    assert numbers(PromptSource(rows(5), shuffle=False, seed=42).take(7)) == [0, 1, 2, 3, 4, 0, 1]


def test_the_counts_of_the_whole_run():
    source = PromptSource(rows(5), shuffle=True, seed=1, samples=8)
    for _ in range(3):
        source.take(4)
    assert vars(source.position) == {
        "sample_offset": 2,
        "epoch_id": 2,
        "sample_group_index": 12,
        "sample_index": 96,
    }


def test_the_generator_of_the_process_is_left_alone():
    random.seed(5)
    expected = random.random()
    random.seed(5)
    PromptSource(rows(9), shuffle=True, seed=1).take(20)
    assert random.random() == expected


# ---------------------------------------------------------------- on disk


@given(st.integers(1, 12), st.booleans(), DRAWS, DRAWS)
def test_a_loaded_position_goes_on_as_if_nothing_had_happened(tmp_path_factory, size, shuffle, before, after):
    root = tmp_path_factory.mktemp("state")
    source = PromptSource(rows(size), shuffle=shuffle, seed=3, samples=2)
    for count in before:
        source.take(count)
    source.save(root, 7)
    resumed = PromptSource(rows(size), shuffle=shuffle, seed=3, samples=2)
    resumed.load(root, 7)
    assert resumed.position == source.position
    for count in after:
        assert numbers(resumed.take(count)) == numbers(source.take(count))


def test_slime_reads_the_file(tmp_path):
    """Its name, its keys, and nothing that torch.load(weights_only=True) refuses; nothing else is left behind."""
    source = PromptSource(rows(5), shuffle=True, seed=1, samples=4)
    source.take(3)
    source.save(tmp_path, 12)
    source.save(tmp_path, 12)  # as a run does that was killed before its tracker moved
    (path,) = (tmp_path / "rollout").iterdir()
    assert path.name == "global_dataset_state_dict_12.pt"
    assert torch.load(path, weights_only=True) == {
        "sample_offset": 3,
        "epoch_id": 0,
        "sample_group_index": 3,
        "sample_index": 12,
        "metadata": {},
    }


def load(root: Path) -> str:
    """What is said about a file that cannot be used: one line that names it."""
    source = PromptSource(rows(5), shuffle=True, seed=1)
    with pytest.raises(TrainingError) as error:
        source.load(root, 4)
    message = str(error.value)
    assert message.startswith(f"{root}/rollout/global_dataset_state_dict_4.pt: ") and "\n" not in message
    assert numbers(source.take(2)) == numbers(PromptSource(rows(5), shuffle=True, seed=1).take(2))
    return message


def test_a_missing_position(tmp_path):
    assert "expected the data position of rollout 4, found no such file" in load(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "other keys", "no number", "a pickle"])
def test_a_damaged_position(tmp_path, damage):
    PromptSource(rows(5), shuffle=True, seed=1).save(tmp_path, 4)
    path = tmp_path / "rollout" / "global_dataset_state_dict_4.pt"
    data = path.read_bytes()
    if damage == "other keys":
        torch.save({"sample_offset": 1}, path)
    elif damage == "no number":
        state = dict.fromkeys(("sample_offset", "epoch_id", "sample_group_index", "sample_index"), "many")
        torch.save(state, path)
    elif damage == "a pickle":
        torch.save({"sample_offset": Path("/")}, path)
    else:
        content = {"empty": b"", "cut": data[: len(data) // 2], "flipped": bytes(255 - b for b in data), "text": b"hi"}
        path.write_bytes(content[damage])
    assert "does not read as the data position of a rollout" in load(tmp_path)
