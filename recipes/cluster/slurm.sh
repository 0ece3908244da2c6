#!/bin/bash
# Trains CoLA-M-7B on two nodes of eight GPUs, for as many time limits as it takes: sbatch recipes/cluster/slurm.sh
# Further flags go at the end: sbatch recipes/cluster/slurm.sh --trainer.max_steps 1000
#SBATCH --job-name=cola_m_7b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8       # one task for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600         # seconds before the limit: longer than two steps, a validation and a checkpoint take
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# 'last' begins the run, and goes on with it after each requeue. One task that dies ends all, which would wait for it.
srun --kill-on-bad-exit=1 python -m cola_lightning fit \
  --config configs/cola_m_7b.yaml \
  --config configs/strategy/fsdp2.yaml \
  --run_dir runs/cola_m_7b \
  --ckpt_path last \
  --trainer.num_nodes "$SLURM_NNODES" \
  --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  "$@"
