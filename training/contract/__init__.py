"""What the pinned command line parsers accept, and what their validation rejects (see contract.py)."""
