"""Command-line tools; `tools.checkpoint` is the library behind them."""
