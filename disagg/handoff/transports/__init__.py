"""Transports: one file per library that moves a link's bytes. Each implements `disagg/handoff/transport.py`.

A file here may import its library inside functions.
"""
