"""Tables of README and docs, written from ``results/``."""
