"""Disagg: serving requests over time, in one job or with prefill and decode apart.

The engine of one rank: config.py, request.py, history.py, scheduler.py, step.py, steps.py, buckets.py, sampler.py and
engine.py. budget.py and memory.py are for its memory, experts.py and rebalance.py for its experts. It imports none of
the folders below.

The roles: unified.py, prefill.py and decode.py implement role.py. loop.py and pipeline.py run them, connection.py
connects them to the router, reports.py tells it their statistics, and launch.py starts everything for run.py.

control/    messages between the router and the ranks
handoff/    KV pages from a prefill rank to a decode rank
front/      the front door: reads requests, handles text, writes answers, and has the router

May import kernels/, parallel/ and model/. Within this folder front/ and handoff/ do not import one another.
"""
