"""Where a job over several machines puts its experts: each rank prints what it knows. `test_hosts.py` runs it.

torchrun ... -m tests.placed RECORDING
"""

import json
import sys
from dataclasses import replace

from disagg.experts import make_placement
from model.config import ModelConfig
from parallel.mesh import Mesh
from tests.conftest import ROOT

REDUNDANT = 8


def main() -> None:
    mesh, config = Mesh.create(device="cpu"), ModelConfig.from_pretrained(ROOT / "model" / "tiny")
    found = {}
    for groups in (config.n_group, 1):  # one group does not divide over machines
        placement = make_placement(replace(config, n_group=groups, topk_group=1), mesh, REDUNDANT, sys.argv[1])
        found[groups] = {"of_slot": placement.expert_of_slot.tolist(), "of_expert": placement.slot_of_expert.tolist()}
    print(json.dumps({"rank": mesh.rank, "machines": mesh.node_of_rank, "placed": found}))
    mesh.close()


if __name__ == "__main__":
    main()
