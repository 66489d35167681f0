"""The reference system's training command, a thin door to latdiff3d.

    python main.py --base configs/autoencoder.yaml -t --name first dataset_dir=DIR
    python main.py --base configs/diffusion.yaml -t --name second dataset_dir=DIR first_stage=runs/first
    torchrun --nproc_per_node 2 main.py --base configs/autoencoder.yaml -t --gpus 0,1 dataset_dir=DIR
"""

import argparse

from latdiff3d.cli import door


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="Train a stage of latdiff3d.")
    parser.add_argument("-b", "--base", nargs="+", default=[], help="overlay YAML files, later ones win")
    parser.add_argument("-t", "--train", action="store_true", help="train; required, as there is nothing else to do")
    parser.add_argument("-n", "--name", help="of the run's folder")
    parser.add_argument("--gpus", help="GPUs, one a process, such as 0,1 (default: the first ones, or the CPU)")
    parser.add_argument("-r", "--resume", help="a run or a checkpoint to go on from")
    parser.add_argument("-s", "--seed", type=int)
    parser.add_argument("-l", "--logdir", help="holds the runs' folders")
    parser.add_argument("settings", nargs="*", default=[], help="key=value")
    arguments = parser.parse_intermixed_args()
    if not arguments.train:
        parser.error("nothing to do; give -t to train")
    # `--base a.yaml key=value` reads the setting as one more file.
    arguments.settings += [word for word in arguments.base if "=" in word]
    arguments.base = [word for word in arguments.base if "=" not in word]
    return arguments


def main() -> None:
    """Train as the command line says."""
    given = parse_arguments()
    named = {"name": given.name, "gpus": given.gpus, "seed": given.seed, "logdir": given.logdir}
    from latdiff3d import runs

    runs.start(given.base, given.settings, named, resume=given.resume)


if __name__ == "__main__":
    door(main)
