"""Rooms of the masked layout. Without torch, because `model/footprint.py` reads it."""

FEW_ROWS = 128  # rows of an expert's room, up to which reading the weights takes most of the time
