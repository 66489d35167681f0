"""Run by `latdiff3d verify` in a bundle's folder, with the bundle's own modules: properties, and exports compared.

    python -c "$(cat bundle_probe.py)" properties '[{"workflow_type": "train", "config_file": [...], ...}]'
    python -c "$(cat bundle_probe.py)" outputs network_def configs/metadata.json models/model.pt model.ts model.onnx

It imports nothing of latdiff3d: what it runs is the bundle's.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser, create_workflow

TOLERANCE = 1e-3  # of the largest output, between PyTorch's and an export's: other kernels, fp32
TIME = 500.0  # of the denoiser's probe


def properties(flows: str) -> None:
    """Print what MONAI's `check_properties` misses in each workflow, given as `create_workflow`'s arguments in JSON."""
    missing: list[Any] = []
    for arguments in json.loads(flows):
        found = create_workflow(**arguments).check_properties()
        missing += [f"{arguments['config_file']}: {name}" for name in found or []]
    print("; ".join(missing))
    sys.exit(bool(missing))


@torch.no_grad()
def outputs(net_id: str, meta_file: str, weights: str, *exports: str) -> None:
    """Print how far a network's exports are from itself on one random image, in parts of its largest output."""
    parser = ConfigParser()
    parser.read_config("configs/inference.json")
    parser.read_meta(meta_file)
    network: Any = parser.get_parsed_content(net_id).eval()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    said = parser["_meta_::network_data_format::inputs::image"]
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, said["num_channels"], *said["spatial_shape"], generator=generator)
    if hasattr(network, "num_channels"):  # a denoiser's, behind which its time stands
        image[:, network.num_channels] = TIME
    expected = network(image)
    differences = [_difference(_run(file, image), expected) for file in exports]
    print(", ".join(f"{file.rpartition('.')[2]} {value:.1e}" for file, value in zip(exports, differences, strict=True)))
    sys.exit(not all(value < TOLERANCE for value in differences))


def _run(file: str, image: torch.Tensor) -> torch.Tensor:
    if file.endswith(".ts"):
        return torch.jit.load(file)(image)
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    [output] = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    return torch.from_numpy(output)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def main(words: Sequence[str]) -> None:
    """Run the probe that the first word names."""
    properties(words[1]) if words[0] == "properties" else outputs(*words[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
