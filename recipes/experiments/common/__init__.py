"""Pieces that several experiments share: cells, progress, criteria and a toy model."""
