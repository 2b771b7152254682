#!/usr/bin/env bash
# A run on Slurm: one task a node, which starts one process a GPU. Give the files and keys of `opsin train`:
#
#     sbatch --nodes 8 --gpus-per-node 8 slurm.sh recipes/llava-1.5-7b.yaml recipes/scale/64xh100.yaml \
#         variables.data=s3://my-bucket run_root=/shared/runs
#
# A requeued job goes on where it was: run_root (or save_folder) must be the same place on all nodes.
#SBATCH --job-name=opsin
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=opsin-%j.log
set -euo pipefail

# Slurm runs a copy of this file; node.sh is beside the original, or where OPSIN_CLUSTER says.
here=${OPSIN_CLUSTER:-$(python -c 'import pathlib, opsin.yamls as y; print(pathlib.Path(y.__file__).parent / "cluster")')}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export NNODES=$SLURM_NNODES NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
# (since 22.05 srun does not take over --cpus-per-task; workers that read data would share one core)
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# One node's end ends all: the others would wait for it until dist_timeout.
exec srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$0" "$@"' "$here/node.sh" "$@"
