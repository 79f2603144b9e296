"""Disagg: requests and roles over time.

The engine, one rank's: config.py, request.py, scheduler.py, step.py, steps.py, engine.py, memory.py, experts.py and
rebalance.py. It imports none of the folders below.

The roles: unified.py, prefill.py and decode.py, to the contract of role.py. loop.py and pipeline.py run them,
connection.py ties them to the router, and launch.py starts all of it for run.py.

control/    messages between the router and the ranks
handoff/    KV pages from a prefill rank to a decode rank
front/      the front door: requests in, text, answers out, and the router

May import kernels/, parallel/ and model/. Within this folder front/ and handoff/ do not import one another.
"""
