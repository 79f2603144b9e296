"""The launch scripts' commands are run.py's, with the plan's sizes; the manifest has the fields that its API has.

shellcheck 0.10.0 finds nothing in the scripts; it is not installed with the test tools.
"""

import os
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml

from disagg import interrupt
from run import parse_args
from scripts.bench.lib.shapes import SHAPES
from scripts.tools.plan.gpus import GPUS
from scripts.tools.plan.rank import Traffic, best_split
from tests.conftest import ROOT

LAUNCH = ROOT / "scripts" / "launch"
HOSTS = [f"n{i}" for i in range(1, 14)]
# Of kubernetes-sigs/lws, api/leaderworkerset/v1/leaderworkerset_types.go at 024af0845195: the fields of each object,
# those that it must have, and the values of those that are enumerations.
FIELDS = {
    "spec": {"replicas", "leaderWorkerTemplate", "rolloutStrategy", "startupPolicy", "networkConfig"},
    "leaderWorkerTemplate": {
        "leaderTemplate",
        "workerTemplate",
        "size",
        "restartPolicy",
        "subGroupPolicy",
        "volumeClaimTemplates",
        "persistentVolumeClaimRetentionPolicy",
    },
    "rolloutStrategy": {"type", "rollingUpdateConfiguration"},
    "rollingUpdateConfiguration": {"partition", "maxUnavailable", "maxSurge"},
}
REQUIRED = {"spec": {"leaderWorkerTemplate"}, "leaderWorkerTemplate": {"workerTemplate"}}
VALUES = {
    "restartPolicy": {"Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"},
    "startupPolicy": {"LeaderCreated", "LeaderReady"},
    "type": {"RollingUpdate"},
}


def shell(*command: str, **env: str) -> str:
    given = {name: value for name, value in os.environ.items() if not name.startswith(("NCCL", "TORCH", "OMP"))}
    done = subprocess.run(command, cwd=ROOT, env=given | env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def hosts(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("# prefill\n" + "\n".join(HOSTS[:4]) + "\n\n# decode\n" + "\n".join(HOSTS[4:]) + "\n")
    return str(path)


def job_of(command: str) -> tuple[str, dict[str, str], dict]:
    """Return a node's role, torchrun's flags, and run.py's as it parses them."""
    launcher, _, flags = command.partition(" run.py ")
    words = shlex.split(launcher)[1:]
    args = vars(parse_args(shlex.split(flags)))
    return args["role"], dict(zip(words[::2], words[1::2], strict=True)), args


def check_jobs(commands: list[str], router: str) -> None:
    """Every rank of both jobs is there once, they meet at their first nodes, and their sizes are the plan's."""
    jobs = [job_of(command) for command in commands]
    assert Counter(role for role, *_ in jobs) == {"prefill": 4, "decode": 9}
    for role, redundant in (("prefill", 0), ("decode", 32)):
        launched = [(launcher, args) for its_role, launcher, args in jobs if its_role == role]
        nodes = len(launched)
        assert [launcher["--node-rank"] for launcher, _ in launched] == [str(i) for i in range(nodes)]
        assert len({launcher["--master-addr"] for launcher, _ in launched}) == 1
        plan = best_split(SHAPES["v3"], GPUS["h100"], role, 8 * nodes, redundant, Traffic(2000, 100), 8)
        for launcher, args in launched:
            assert (launcher["--nnodes"], launcher["--nproc-per-node"]) == (str(nodes), "8")
            assert args["router"] == router and args["secret_file"]
            for name in ("attn_tp", "max_batch", "max_tokens_per_step", "max_model_len"):
                assert args[name] == getattr(plan, name), name
            assert args["redundant_experts"] == redundant == plan.redundant


@pytest.mark.parametrize("name", ["settings.sh", "node", "ssh", "slurm.sbatch"])
def test_bash_can_read_it(name: str) -> None:
    shell("bash", "-n", str(LAUNCH / name))


def test_ssh_starts_every_node_with_the_plans_sizes(hosts: str) -> None:
    said = shell(str(LAUNCH / "ssh"), "--dry-run", hosts, MODEL="/m o", NCCL_IB_HCA="mlx5_0,mlx5_1")
    where, commands = zip(*(line.split(": ", 1) for line in said.splitlines()), strict=True)
    assert list(where) == ["n1", *HOSTS]
    args = parse_args(shlex.split(commands[0].partition(" run.py ")[2]))
    assert (args.role, args.router, args.http, args.model) == ("router", "n1:7000", "0.0.0.0:8000", "/m o")
    check_jobs(list(commands[1:]), "n1:7000")
    masters = [job_of(command)[1]["--master-addr"] for command in commands[1:]]
    assert masters == ["n1"] * 4 + ["n5"] * 9
    only = shell(str(LAUNCH / "ssh"), "--dry-run", hosts, "decode", ROUTER_HOST="10.0.0.5")
    assert len(only.splitlines()) == 9 and "--router 10.0.0.5:7000" in only


def test_ssh_passes_the_settings_on(hosts: str, tmp_path: Path) -> None:
    """A double of ssh shows what would be run on a node. There, it is what --dry-run shows."""
    double = tmp_path / "ssh"
    double.write_text('#!/bin/sh\nshift 2\nprintf "%s\\n" "$1" "$2"\n')
    double.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    said = shell(str(LAUNCH / "ssh"), hosts, "prefill", PATH=path, NCCL_IB_HCA="mlx5_0,mlx5_1", MODEL="/m o")
    lines = said.splitlines()
    assert lines[::2] == HOSTS[:4]
    inner = lines[1].partition(" > ")[0]
    assert "NCCL_IB_HCA=mlx5_0" in inner and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=630" in inner
    command = shell("bash", "-c", inner.replace("nohup env", "env DRY_RUN=1"))
    dry = shell(str(LAUNCH / "ssh"), "--dry-run", hosts, "prefill", MODEL="/m o").splitlines()[0]
    assert command.strip() == dry.removeprefix("n1: ").strip()


def test_a_wrong_number_of_hosts_or_a_wrong_role_is_refused(hosts: str) -> None:
    for arguments, env, error in (
        ((hosts,), {"DECODE_NODES": "8"}, "13 hosts; prefill + decode = 4 + 8 are needed"),
        ((hosts, "prefil"), {}, "ROLE is 'prefil'"),
    ):
        command = [str(LAUNCH / "ssh"), "--dry-run", *arguments]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and error in done.stderr


def test_slurm_gives_every_node_its_part(tmp_path: Path) -> None:
    """With doubles of srun and scontrol: srun runs a task on each of 13 nodes, one after the other."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(HOSTS) + "\n")
    (tmp_path / "srun").write_text(
        "#!/bin/bash\nnodes=13\nwhile [[ $1 == --* ]]; do [[ $1 == --nodes=1 ]] && nodes=1; shift; done\n"
        'for ((i = 0; i < nodes; i++)); do SLURM_NODEID=$i DRY_RUN=1 "$@" || exit; done\n'
    )
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n[1-13]"}
    commands = shell("bash", str(LAUNCH / "slurm.sbatch"), **env).splitlines()
    routers = [command for command in commands if "--role router" in command]
    assert len(routers) == 1 and "--router n1:7000" in routers[0]
    check_jobs([command for command in commands if command not in routers], "n1:7000")
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert int(re.search(r"--nodes=(\d+)", text)[1]) == 13


def manifest() -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / "lws.yaml").read_text()))


def check_fields(name: str, found: dict) -> None:
    assert found.keys() <= FIELDS[name] and REQUIRED.get(name, set()) <= found.keys(), name
    for key, value in found.items():
        assert value in VALUES.get(key, {value} if not isinstance(value, dict | list) else [value]), (key, value)
        if key in FIELDS:
            check_fields(key, value)


def test_the_manifests_sets_have_the_fields_of_the_api() -> None:
    sets = [one for one in manifest() if one["kind"] == "LeaderWorkerSet"]
    assert [one["apiVersion"] for one in sets] == ["leaderworkerset.x-k8s.io/v1"] * 2
    for one in sets:
        check_fields("spec", one["spec"])
        update = one["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]
        assert update["maxUnavailable"] or update["maxSurge"], "the API refuses 0 and 0"


def test_the_manifests_pods_run_the_same_jobs() -> None:
    by_name = {(one["kind"], one["metadata"]["name"]): one for one in manifest()}
    commands = []
    for role in ("prefill", "decode"):
        template = by_name["LeaderWorkerSet", f"moesaic-{role}"]["spec"]["leaderWorkerTemplate"]
        pod = template["workerTemplate"]["spec"]
        (ranks,) = pod["containers"]
        assert pod["terminationGracePeriodSeconds"] > 630 and ranks["resources"]["limits"]["nvidia.com/gpu"] == 8
        assert {mount["name"] for mount in ranks["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        env = {variable["name"]: variable["value"] for variable in ranks["env"]} | {"DRY_RUN": "1", "CODE": str(ROOT)}
        for index in range(template["size"]):
            injected = {"LWS_WORKER_INDEX": str(index), "LWS_LEADER_ADDRESS": f"{role}-0.{role}"}
            commands.append(shell(*ranks["command"], **env, **injected).strip())
    check_jobs(commands, "moesaic-router:7000")
    service, router = by_name["Service", "moesaic-router"], by_name["Deployment", "moesaic-router"]["spec"]["template"]
    assert service["spec"]["selector"].items() <= router["metadata"]["labels"].items()
    (container,) = router["spec"]["containers"]
    said = shell(*container["command"], DRY_RUN="1", CODE=str(ROOT), SECRET="/secret/secret")
    args = parse_args(shlex.split(said.partition(" run.py ")[2]))
    ports = {port["port"] for port in service["spec"]["ports"]}
    assert {int(text.rpartition(":")[2]) for text in (args.router, args.http)} == ports


def test_a_drain_ends_before_torchrun_and_the_pods_do() -> None:
    text = (LAUNCH / "settings.sh").read_text()
    assert interrupt.DRAIN_S < int(re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", text)[1]) < 660
