"""Parallel: how work and data are split over ranks, and what they send each other. Nothing here knows requests.

mesh.py                       the process groups, and the step's one agreement
launched.py                   what torchrun says about this process
interface.py                  this machine's address and interface towards another
dispatch.py, deepep.py        tokens to experts and back; dispatchers.py chooses between them
copies.py, deepep_sizes.py    how much they take at once, and which sizes DeepEP serves
rdma.py                       what DeepEP needs of a machine to reach others
overlap.py                    two micro-batches that take turns; overlap_rule.py: when
placement.py, eplb.py         where each expert is, and where it should be; load_counter.py counts tokens
chosen_experts.py             which experts the gates choose for each token

May import kernels/.
"""
