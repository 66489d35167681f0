#!/bin/bash
# Trains on several machines under SLURM; edit the lines below, then, from the repository's root:
#
#     sbatch docs/slurm.sh main.py --base configs/autoencoder.yaml -t --name ae dataset_dir=DATA
#
# A job that SLURM stops, at its time limit or for another job, writes a checkpoint first. Submit as many as the training
# takes: they run one after the other, each goes on where the one before it stopped, and what is finished stays.
#SBATCH --job-name=latdiff3d
#SBATCH --dependency=singleton
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or a group that torchrun restarts, by --max-restarts, meets its old self
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:${RENDEZVOUS_PORT:-29500}" "$@"
