"""Rows that the experts' products want. Without torch, because `model/footprint.py` and `scripts/plan` read it."""

ALIGNMENT = 128  # of an expert's room or group, in every GPU kernel
FEW_ROWS = 128  # rows of an expert's room, up to which reading the weights takes most of the time
