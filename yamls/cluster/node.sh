#!/usr/bin/env bash
# What every node of a job runs: the launcher, told which node this is. Slurm's script and SkyPilot's task set these five
# and call it; so can any other scheduler (docs/cluster.md).
#
#     NNODES=2 NODE_RANK=0 NPROC_PER_NODE=8 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 \
#         bash node.sh recipes/llava-1.5-7b.yaml recipes/scale/64xh100.yaml variables.data=s3://my-bucket
#
# LAUNCHER=composer (default) or torchrun; OPSIN_COMMAND=train (default) or eval.
set -euo pipefail

: "${NNODES:?how many nodes}" "${NODE_RANK:?which node this is, from 0}" "${NPROC_PER_NODE:?processes here, one a GPU}"
: "${MASTER_ADDR:?address of node 0}" "${MASTER_PORT:?a free port there}"
command=${OPSIN_COMMAND:-train}
nnodes=$NNODES node_rank=$NODE_RANK nproc=$NPROC_PER_NODE address=$MASTER_ADDR port=$MASTER_PORT
unset NODE_RANK WORLD_SIZE RANK BASE_RANK LOCAL_RANK LOCAL_WORLD_SIZE   # the launcher sets them for each process

case ${LAUNCHER:-composer} in
composer)
    exec composer --nproc "$nproc" --world_size $((nnodes * nproc)) --node_rank "$node_rank" \
        --master_addr "$address" --master_port "$port" --module_mode opsin.training.cli "$command" "$@"
    ;;
torchrun)
    exec torchrun --nnodes "$nnodes" --nproc-per-node "$nproc" --node-rank "$node_rank" \
        --master-addr "$address" --master-port "$port" -m opsin.training.cli "$command" "$@"
    ;;
*)
    echo "LAUNCHER=$LAUNCHER: use composer or torchrun" >&2
    exit 2
    ;;
esac
