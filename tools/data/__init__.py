"""Training data of SFT and RL: .jsonl or .parquet with `messages`, or with `prompt` and `label`, as slime reads them.

`rows`       the rows of a file, one at a time, each with its line
`schema`     what a row must be
`chat`       chat template, token ids and loss mask
`check`      a whole file: the first bad line, lengths, what pandas makes of the labels
`schedule`   rollouts and optimizer steps that follow from a number of samples
`cache`      the result of a check, kept until file, tokenizer or options change
`convert`    public formats into these
`writer`     output that appears whole or not at all
"""

from tools.data.errors import DataError

__all__ = ["DataError"]
