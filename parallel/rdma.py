"""What DeepEP needs of a machine to reach other machines: an RDMA device that may read and write a GPU's memory."""

import os
from pathlib import Path


def obstacles(root: Path = Path("/")) -> list[str]:
    """Return the rules by which DeepEP cannot leave this machine, a line each. `root`: where /sys, /proc and /dev are.

    NVSHMEM itself is no rule here: `deep_ep` is linked to it, and does not import without it. IBGDA (the GPU rings the
    device's doorbell) may need a parameter of the driver, or gdrcopy. Newer drivers need neither, so that shows only
    when NVSHMEM starts.
    """
    found = []
    states = [path.read_text() for path in root.glob("sys/class/infiniband/*/ports/*/state")]
    if not any("ACTIVE" in state for state in states):
        found.append(f"no RDMA port is active: /sys/class/infiniband has {len(states)} ports")
    if not any(root.glob("dev/infiniband/uverbs*")):
        found.append("no /dev/infiniband/uverbs*: a container must be given the RDMA devices")
    if not (_has_module(root, "nvidia_peermem") or _has_module(root, "nv_peer_mem") or _has_dmabuf(root)):
        found.append("no GPUDirect RDMA: it needs the module nvidia_peermem, or the driver's open modules (dmabuf)")
    if (ibgda := os.environ.get("NVSHMEM_IB_ENABLE_IBGDA", "1")) in ("0", "false"):
        found.append(f"NVSHMEM_IB_ENABLE_IBGDA={ibgda} forbids IBGDA, which DeepEP would turn on all the same")
    return found


def _has_module(root: Path, name: str) -> bool:
    return (root / "sys/module" / name).exists()


def _has_dmabuf(root: Path) -> bool:
    version = root / "proc/driver/nvidia/version"
    return version.exists() and "Open Kernel Module" in version.read_text()
