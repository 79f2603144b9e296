"""The planner: what a deployment needs, and how to start it, from config.json alone.

gpus.py         GPUs: memory, and ceilings from their data sheets
sizes.py        which numbers of ranks are legal, and what each needs
rank.py         the memory of one rank, by the engine's own arithmetic, and the largest batch
rates.py        throughput, modelled: the roofline, times the fraction that was measured
deployment.py   prefill and decode jobs for some GPUs and some traffic, and the commands that start them
report.py       the plan as text
__main__.py     the flags
"""
