"""Parallel: who holds what, and who sends what. Nothing here knows layers or requests.

mesh.py                       the process groups, and the step's one agreement
dispatch.py, deepep.py        tokens to experts and back; dispatchers.py chooses between them
overlap.py                    two micro-batches in turns over one generator
placement.py, eplb.py         which expert is where, and where it should be; load_counter.py counts

May import kernels/.
"""
