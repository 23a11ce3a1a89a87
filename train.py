"""Train a tokenizer from YAML: a thin door to ``training/cli.py``.

python train.py fit --config configs/quickstart.yaml                        # this machine
torchrun --nproc-per-node 8 train.py fit --config configs/....yaml           # one node, 8 GPUs
srun python train.py fit --config configs/....yaml --trainer.num_nodes 4     # SLURM, one task per GPU
"""

from vistok.training.cli import main

if __name__ == "__main__":
    main()
