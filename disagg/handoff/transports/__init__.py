"""Transports: one file per library that moves a link's bytes, each to the contract of `disagg/handoff/transport.py`.

A file here may import its library inside functions.
"""
