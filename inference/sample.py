"""The reference system's sampling command, a thin door to latdiff3d.

    python inference/sample.py -r runs/diffusion --batch_size 1 --mask case_seg.nii.gz --out samples
"""

import argparse
from pathlib import Path

from latdiff3d.cli import door
from latdiff3d.errors import InputError


def main() -> None:
    """Sample as the command line says."""
    parser = argparse.ArgumentParser(description="Make synthetic volumes with a trained model.")
    parser.add_argument("-r", "--resume", required=True, help="checkpoint of stage 2, or its run's folder")
    parser.add_argument("--batch_size", type=int, default=1, help="1: a volume never depends on its neighbours")
    parser.add_argument("--mask", type=Path, help="a mask, or a folder of them")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for the volumes")
    parser.add_argument("--n_samples", type=int, default=1, help="volumes for each mask")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of the sampler (default: the configuration's)")
    parser.add_argument("--sampler", help="ddim, ddpm, dpm_solver++, euler or heun (default: the configuration's)")
    parser.add_argument("--guidance", type=float, help="scale of the mask's pull (default: the configuration's)")
    parser.add_argument("--covariate", action="append", help="name=value, such as age=60; may be repeated")
    parser.add_argument("--label-map", help="file's label:model's label, such as 1:2,3:0")
    parser.add_argument("--whole", action="store_true", help="volumes as large as their masks, by windows")
    parser.add_argument("--memory", help="GB that --whole keeps to (default: 6GB)")
    parser.add_argument("--gpus", help="number of one GPU, such as 0, (default: the first, or the CPU)")
    parser.add_argument("--no-pictures", action="store_true", help="write no PNG beside each case")
    parser.add_argument("--gif", action="store_true", help="write a GIF that goes through the slices")
    parser.add_argument("--like", help="a scan whose range of intensities to take (default: 0 to 1)")
    parser.add_argument("--int16", action="store_true", help="store int16 with a slope: half of float32")
    given = parser.parse_args()
    if given.batch_size != 1:
        raise InputError(f"--batch_size is {given.batch_size}; volumes are made one by one: leave it out or give 1.")
    from latdiff3d.sampling_command import sample

    sample(
        given.resume, given.out, mask=given.mask, num_samples=given.n_samples, seed=given.seed, steps=given.steps,
        gpus=given.gpus, guidance=given.guidance, sampler=given.sampler, covariates=given.covariate,
        picture=not given.no_pictures, gif=given.gif, like=given.like, int16=given.int16, label_map=given.label_map,
        whole=given.whole, memory=given.memory,
    )  # fmt: skip


if __name__ == "__main__":
    door(main)
