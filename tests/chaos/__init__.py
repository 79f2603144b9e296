"""Chaos: a deployment under load whose processes are killed and stopped, and whose connections are cut.

`python -m tests.chaos --seconds 600` runs it for long; `tests/test_chaos.py` runs a short one.

    load.py     clients that stream, and leave early now and then; what each of them got
    place.py    the deployment: jobs that can be killed, stopped, drained and replaced
    cut.py      ends TCP connections of other processes
    faults.py   what can happen to the deployment, in an order that a seed decides
    left.py     what processes leave behind
    aborts.py   requests aborted while their KV is on its way, over each transport
    run.py      faults under load, with the checks
    figures.py  what it found, as records; quick.py: the short limits of the tests
"""
