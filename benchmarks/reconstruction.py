"""How well does a trained autoencoder reconstruct, beside the best linear code at its rate and beside average pooling?

    python benchmarks/reconstruction.py --data DATA --run runs/autoencoder [--cases 5]

PSNR in dB, data range 1, on each validation volume's own voxels (padding left out), mean over the volumes. Block PCA
is fitted twice on the training cases: on whole volumes, edge blocks padded by edge replication (the strongest we
found), and on the padded crops that the network sees, as the network's own input. `spectrum_ratio` is the energy of
the reconstructions above half the Nyquist frequency over that of the real volumes, on their own voxels as well: below
0.7 is blurred. The last line is a JSON object.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import yaml
from monai.bundle import ConfigParser
from monai.transforms import Compose

from latdiff3d import checkpoints
from latdiff3d.cli import door
from latdiff3d.fidelity import own_voxels, psnr
from latdiff3d.linear_codes import BlockPCA, average_pooling
from latdiff3d.networks import downsampling
from latdiff3d.spectrum import high_frequency_energy


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description="PSNR of an autoencoder beside block PCA's and pooling's.")
    arguments.add_argument("--data", required=True, help="the data set's folder")
    arguments.add_argument("--run", required=True, help="stage 1's run or checkpoint")
    arguments.add_argument("--cases", type=int, help="look at so many training and validation cases only")
    given = arguments.parse_args()

    path = checkpoints.find(given.run)
    content = checkpoints.load(path, "autoencoder")
    parser = ConfigParser(yaml.safe_load(content["config"]))
    parser["dataset_dir"] = given.data
    parser["cache_rate"] = 0.0
    parser.parse(True)
    codec = parser.get_parsed_content("codec")
    checkpoints.load_weights(codec, content["objects"]["codec"], str(path))
    codec.eval()
    factor, num_latents = downsampling(codec.autoencoder), len(codec.latent_mean)
    splits = parser.get_parsed_content("splits")
    train, val = splits["train"][: given.cases], splits["val"][: given.cases]
    whole = Compose(parser.get_parsed_content("preprocessing"))
    padded = parser.get_parsed_content("validate::preprocessing")

    def volumes(cases: list[dict[str, Any]], transforms: Any) -> Iterator[np.ndarray]:
        return (np.asarray(transforms(case)["image"]) for case in cases)

    pca_whole = BlockPCA().fit(volumes(train, whole), num_latents, factor)
    pca_crops = BlockPCA().fit(volumes(train, padded), num_latents, factor)
    scores: dict[str, list[float]] = {
        name: [] for name in ("autoencoder_db", "pca_db", "pca_on_crops_db", "pooling_db")
    }
    energy, real_energy = 0.0, 0.0
    for case in val:
        crop = padded(case)
        image, valid = np.asarray(crop["image"]), np.asarray(crop["valid"])
        batch = crop["image"].as_tensor()[None].to(codec.latent_mean.device)
        reconstruction = codec.reconstruct(batch)[0].cpu().numpy().clip(0, 1)
        scores["autoencoder_db"].append(psnr(image, reconstruction, valid))
        energy += high_frequency_energy(reconstruction[own_voxels(valid)]).sum()
        real_energy += high_frequency_energy(image[own_voxels(valid)]).sum()
        scores["pca_on_crops_db"].append(psnr(image, pca_crops.reconstruct(image).clip(0, 1), valid))
        volume = np.asarray(whole(case)["image"])
        own = np.ones_like(volume[:1])
        scores["pca_db"].append(psnr(volume, pca_whole.reconstruct(volume).clip(0, 1), own))
        scores["pooling_db"].append(psnr(volume, average_pooling(volume, factor), own))
    means = {name: round(float(np.mean(values)), 2) for name, values in scores.items()}
    print(f"{path}: {len(train)} training and {len(val)} validation cases, {num_latents} numbers a {factor}³ block")
    for name, values in scores.items():
        print(f"{name:18} {np.mean(values):6.2f}  (from {min(values):.2f} to {max(values):.2f})")
    ratio = round(energy / real_energy, 3)
    print(f"{'spectrum_ratio':18} {ratio:6.3f}")
    gain = round(means["autoencoder_db"] - means["pca_db"], 2)
    print(json.dumps({**means, "gain_over_pca_db": gain, "spectrum_ratio": ratio}))


if __name__ == "__main__":
    door(main)
