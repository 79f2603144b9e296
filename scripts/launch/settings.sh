# Settings of the launch scripts: DeepSeek-V3 on 4 prefill and 9 decode nodes of 8 H100s, as in SGLang's report. Sourced.
# The sizes are those of `scripts/plan v3 --gpus 104 --gpu h100 --prompt 2000 --output 100` for these numbers of ranks.
# No deployment of this size has run. Every variable that is set before stays as it is.
# shellcheck shell=bash disable=SC2034  # node and ssh use them

: "${CODE:=$PWD}"            # the repository, at the same path on every node, with its .venv (scripts/setup)
: "${MODEL:=/models/DeepSeek-V3}" # the model's folder, or the hub's ORG/NAME, on every node
: "${SECRET:=$CODE/secret}"  # file of the deployment's secret, on every node; docs/usage.md says how to make one
: "${HTTP:=0.0.0.0:8000}"    # where the router serves OpenAI's API; --api-key-file is wise beside it
: "${ROUTER_PORT:=7000}"     # where the router listens for the jobs, on the first prefill node
: "${MASTER_PORT:=29500}"    # where the ranks of a job meet, on the job's first node (MASTER_ADDR, by --master-addr)
: "${GPUS_PER_NODE:=8}"
: "${PREFILL_NODES:=4}" "${DECODE_NODES:=9}"
export PREFILL_NODES DECODE_NODES

COMMON=(--model "$MODEL" --secret-file "$SECRET" --max-model-len 2100)
PREFILL=(--max-batch 18 --max-tokens-per-step 16384)
# 256 experts on 72 ranks need 32 more: (256 + 32) % 72 = 0.
DECODE=(--redundant-experts 32 --max-batch 248 --max-tokens-per-step 1024)

# What a drain may take (DRAIN_S in disagg/interrupt.py) and a little more. Torchrun passes SIGTERM to its ranks, and
# kills them after this many seconds (30 if unset).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-630}"
# One thread per rank, so that the host threads of 8 ranks do not wait for each other. Torchrun sets the same, and warns.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# The variables below are passed on if they are set. The right values depend on the cluster, so none is set here.
#   NCCL_SOCKET_IFNAME   interface of NCCL's first connections, e.g. eth0. Unset: run.py takes the one towards rank 0.
#   GLOO_SOCKET_IFNAME   the same for the CPU's collectives: the agreement before each step
#   NCCL_IB_HCA          the InfiniBand or RoCE adapters that NCCL uses, e.g. mlx5_0,mlx5_1; a GPU should have one nearby
#   NCCL_IB_GID_INDEX    RoCE only: which GID, usually 3 (RoCE v2 over IPv4); `show_gids` lists them
#   NCCL_DEBUG           WARN or INFO: INFO shows which adapters NCCL has chosen
#   NVSHMEM_HCA_LIST     the adapters of NVSHMEM, which DeepEP uses, e.g. mlx5_0:1,mlx5_1:1
#   NVSHMEM_IB_GID_INDEX, NVSHMEM_QP_DEPTH  as NCCL_IB_GID_INDEX; the depth is raised by run.py where a step needs it.
#                        DeepEP serves a job on one node only today. Over several nodes NCCL does, and reads none of these.
#   HF_HOME, HF_TOKEN    if MODEL is a hub id: the cache's folder, and the token
PASSED=(NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_IB_HCA NCCL_IB_GID_INDEX NCCL_DEBUG NVSHMEM_HCA_LIST
  NVSHMEM_IB_GID_INDEX NVSHMEM_QP_DEPTH HF_HOME HF_TOKEN TORCH_ELASTIC_SHUTDOWN_TIMEOUT OMP_NUM_THREADS)
