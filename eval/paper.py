"""The published results of the recipe (arXiv:2509.22536; the README of the models has the same numbers), in percent."""

from __future__ import annotations

# Name here -> name in the tables, in their order.
BENCHMARKS = {"aime25": "AIME 25", "aime24": "AIME 24", "gpqa": "GPQA", "livecodebenchv5": "LiveCodeBench v5"}


def _row(*values: float) -> dict[str, float]:
    return dict(zip(BENCHMARKS, values, strict=True))


PAPER = {
    "7B": {
        "Deepseek-Distill-Qwen-7B": _row(43.00, 49.00, 48.20, 37.60),
        "Qwen2.5-7B-base (w. InfiAlign)": _row(33.75, 43.02, 48.11, 39.48),
        "InfiR2-7B-Instruct-FP8": _row(40.62, 55.73, 45.33, 40.31),
    },
    "1.5B": {
        "Deepseek-Distill-Qwen-1.5B": _row(21.35, 26.87, 32.26, 18.50),
        "Qwen2.5-1.5B-base (w. InfiAlign)": _row(14.58, 10.52, 28.98, 12.99),
        "InfiR2-1.5B-Instruct-FP8": _row(18.45, 17.39, 29.48, 17.10),
    },
}
