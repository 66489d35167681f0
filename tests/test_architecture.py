"""The house's floors: imports go down only, nothing in the default path needs torchvision."""

import ast
from pathlib import Path

import pytest

import latdiff3d

ROOT = Path(latdiff3d.__file__).parent
# From the roof to the ground; a module imports from lower floors only.
FLOORS = [
    {"cli"},
    {"edit_command"},
    {"demo", "inference", "export", "bundle_checks", "sharing", "edit_folders", "evaluation"} | {"sampling_command"},
    {"model_card", "bundle_metadata", "bundle_files", "sampling_jobs", "evidence", "usefulness"},
    {"sample_folders"},
    {"preflight", "importing", "realism", "memorisation", "real_volumes", "model_cases"},
    {"synthesis", "runs", "reconstruction", "compvis_configs", "features", "copy_search"},
    {"checkpointing", "compvis_diffusion", "editing"},
    {"segmentation", "quality", "synthesizer", "planning", "compvis_autoencoder"},
    {"training", "latents", "latent_cache", "image_cache", "quality_page", "previews"}
    | {"simulated_memory", "conversion", "codec_fidelity", "diversity"},
    {"handlers", "config", "lesion_contrast", "tally", "quality_pictures", "latent_entries", "latent_windows"}
    | {"mask_fidelity", "interruption", "tracking", "plots", "planted_copies"},
    {"bootstrap", "frechet_distance"},
    {"plain_figures"},
    {"dice", "fidelity", "spectrum", "kernel_distance", "linear_codes", "latent_moments", "verdict"}
    | {"fingerprints", "guidance", "pictures", "tensor_networks", "blending", "surface_distance"},
    {"codec", "conditioning", "condition_encoder", "covariate_embedding", "objectives", "samplers", "losses"}
    | {"perceptual", "wavelets", "figures"},
    {"settings", "architecture"},
    {"bundle_trial"},
    {"covariates", "networks", "quantization", "recompute", "memory", "spectral_loss", "noise_schedules"}
    | {"coarse_masks", "updates", "training_masks", "training_intensities", "old_weights"},
    {"volumes"},
    {"intensities"},
    {"transforms", "doctor", "pretrained", "tiling", "stored_scans"},
    {"skipping", "provenance"},
    {"checks", "norms", "batches", "loading", "crop_windows"},
    {"readers"},
    {"datalist"},
    {"layouts", "phantoms"},
    {"dicom_masks"},
    {"devices", "distributed", "compilation", "checkpoints", "cpu_convolutions", "evaluation_files"},
    {"errors", "exported", "bundle_modules", "bundle_probe"}
    | {"membrane", "scan_noise", "html_page", "whole_files"}
    | {"nearest", "winograd"},
]
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}
MODULES = sorted(path for path in ROOT.glob("*.py") if path.stem != "__init__")
PROGRAMS = [ROOT.parent / "main.py", ROOT.parent / "inference" / "sample.py"]


def imported(path):
    """Every dotted name that a file imports, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def rooms_imported(path):
    names = [name.split(".")[1:] for name in imported(path) if name.split(".")[0] == "latdiff3d"]
    return {name[0] for name in names if name and name[0] in FLOOR_OF}


def test_every_module_has_a_floor_and_every_floor_its_modules():
    assert {path.stem for path in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_down_only(path):
    upwards = {room for room in rooms_imported(path) if FLOOR_OF[room] <= FLOOR_OF.get(path.stem, len(FLOORS))}
    assert not upwards


@pytest.mark.parametrize("path", [*MODULES, *PROGRAMS], ids=lambda path: path.stem)
def test_nothing_needs_torchvision(path):
    assert not [name for name in imported(path) if name.split(".")[0] in ("torchvision", "lpips", "generative")]


@pytest.mark.parametrize("path", [*MODULES, ROOT / "__init__.py", *PROGRAMS], ids=lambda path: path.stem)
def test_a_module_opens_with_one_sentence(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    first = docstring.split("\n\n")[0]
    assert first[0].isupper() and first.endswith((".", "!")), first


def test_no_room_without_a_better_name():
    assert not {path.stem for path in MODULES} & {"utils", "helpers", "misc", "common"}
