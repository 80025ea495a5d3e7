"""What a rollout hands to the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Batch:
    """The samples of one rollout; for RL the samples of a prompt lie together.

    tokens: prompt and response. masks: one 0 or 1 for each token of the response (which for a conversation starts with
    the first trained token). rewards: as the rule gave them. log_probs: of the engine that drew the responses; None
    for SFT.
    """

    tokens: list[list[int]] = field(default_factory=list)
    masks: list[list[int]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    log_probs: list[list[float]] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(tokens) for tokens in self.tokens]

    @property
    def responses(self) -> list[int]:
        """Tokens of each response."""
        return [len(mask) for mask in self.masks]

    def response(self, index: int) -> list[int]:
        """The tokens of a response."""
        tokens = self.tokens[index]
        return tokens[len(tokens) - len(self.masks[index]) :]

    def __len__(self) -> int:
        return len(self.tokens)
