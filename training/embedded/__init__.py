"""The recipe on one small machine: the flags, data and checkpoints of Megatron-LM, from PyPI packages alone."""

import warnings

# megatron-core says this at every import; this engine needs neither.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
