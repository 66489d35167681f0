"""What the user types: builds a list of configuration files and settings, nothing more."""

import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from latdiff3d.errors import SOME_LEFT_OUT, InputError, InputExit, place_error, root_input_error

app = typer.Typer(
    help="Latent diffusion on 3D medical volumes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Stage(str, Enum):
    """What `latdiff3d train` trains."""

    autoencoder = "autoencoder"
    diffusion = "diffusion"
    segmenter = "segmenter"


@app.command()
def train(
    stage: Stage,
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, such as max_epochs=20")] = None,
    data: Annotated[str | None, typer.Option(help="the data set's folder")] = None,
    config: Annotated[list[Path] | None, typer.Option(help="overlay YAML; may be repeated, later ones win")] = None,
    name: Annotated[str | None, typer.Option(help="of the run's folder")] = None,
    logdir: Annotated[str | None, typer.Option("--logdir", "-l", help="holds the runs' folders")] = None,
    resume: Annotated[str | None, typer.Option("--resume", "-r", help="a run or a checkpoint to go on from")] = None,
    seed: Annotated[int | None, typer.Option("--seed", "-s")] = None,
    gpus: Annotated[str | None, typer.Option(help="number of one GPU; default: the first, or the CPU")] = None,
) -> None:
    """Train a stage. The same command goes on where it stopped."""
    named = {"dataset_dir": data, "name": name, "logdir": logdir, "seed": seed, "gpus": gpus}
    from latdiff3d import runs

    runs.start(config or [], settings or [], named, stage.value, resume)


@app.command()
def sample(
    model: Annotated[str, typer.Option("--model", "-r", help="checkpoint of stage 2, or its run's folder")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, such as guidance_interval=[0,0.8]")] = None,
    out: Annotated[Path, typer.Option(help="folder for the volumes")] = Path("samples"),
    mask: Annotated[Path | None, typer.Option(help="a mask, or a folder of them")] = None,
    data: Annotated[Path | None, typer.Option(help="a data set, for the masks of its --split")] = None,
    split: Annotated[str, typer.Option(help="train, val or test")] = "val",
    num_samples: Annotated[int, typer.Option("-n", help="volumes for each mask")] = 1,
    seed: Annotated[int, typer.Option(help="of the first volume's noise")] = 0,
    sampler: Annotated[str | None, typer.Option(help="ddim, ddpm, dpm_solver++, euler or heun")] = None,
    steps: Annotated[int | None, typer.Option(help="of the sampler; default: the configuration's")] = None,
    guidance: Annotated[float | None, typer.Option(help="how hard the mask pulls; default: the config's")] = None,
    covariate: Annotated[list[str] | None, typer.Option(help="name=value, such as age=60; may be repeated")] = None,
    label_map: Annotated[str | None, typer.Option(help="file's label:model's label, such as 1:2,3:0")] = None,
    grid: Annotated[str, typer.Option(help="mask: the mask file's own grid; crop: the model's")] = "mask",
    whole: Annotated[bool, typer.Option("--whole", help="volumes as large as their masks, by windows")] = False,
    memory: Annotated[str | None, typer.Option(help="GB that --whole keeps to; default: 6GB")] = None,
    gpus: Annotated[str | None, typer.Option(help="number of one GPU; default: the first, or the CPU")] = None,
    pictures: Annotated[bool, typer.Option(help="a PNG beside each case: three planes, the mask's outline")] = True,
    gif: Annotated[bool, typer.Option("--gif", help="and a GIF that goes through the slices")] = False,
    like: Annotated[str | None, typer.Option(help="a scan whose range to take, or training; default: 0 to 1")] = None,
    int16: Annotated[bool, typer.Option("--int16", help="store int16 with a slope: half of float32")] = False,
) -> None:
    """Make synthetic volumes that lie on masks; what is there is kept. Exit code 3: some masks could not be used."""
    from latdiff3d.sampling_command import sample as make_samples

    make_samples(
        model, out, mask=mask, data=data, split=split, num_samples=num_samples, seed=seed, steps=steps, grid=grid,
        gpus=gpus, guidance=guidance, sampler=sampler, settings=settings, covariates=covariate, picture=pictures,
        gif=gif, like=like, int16=int16, label_map=label_map, whole=whole, memory=memory,
    )  # fmt: skip


@app.command()
def edit(
    model: Annotated[str, typer.Option("--model", "-r", help="checkpoint of stage 2, or its run's folder")],
    image: Annotated[str, typer.Option(help="the scan: a file, files joined by commas, or a folder")],
    mask: Annotated[Path, typer.Option(help="labels on the scan's grid, with what is to be there drawn in")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, such as guidance_interval=[0,0.8]")] = None,
    region: Annotated[Path | None, typer.Option(help="above 0 where to edit; default: around the labels")] = None,
    out: Annotated[Path, typer.Option(help="folder for the volumes")] = Path("edited"),
    num_samples: Annotated[int, typer.Option("-n", help="edits, from one seed after another")] = 1,
    seed: Annotated[int, typer.Option(help="of the first edit's noise")] = 0,
    sampler: Annotated[str | None, typer.Option(help="ddim, ddpm, dpm_solver++, euler or heun")] = None,
    steps: Annotated[int | None, typer.Option(help="of the sampler; default: the configuration's")] = None,
    guidance: Annotated[float | None, typer.Option(help="how hard what is drawn pulls; 1: not; default: 2")] = None,
    covariate: Annotated[list[str] | None, typer.Option(help="name=value, such as age=60; may be repeated")] = None,
    label_map: Annotated[str | None, typer.Option(help="file's label:model's label, such as 1:2,3:0")] = None,
    noise: Annotated[bool, typer.Option(help="lay noise as strong as the scan's over what is made")] = True,
    gpus: Annotated[str | None, typer.Option(help="number of one GPU; default: the first, or the CPU")] = None,
    pictures: Annotated[bool, typer.Option(help="a PNG of each: the scan and the edit, the mask's outline")] = True,
    gif: Annotated[bool, typer.Option("--gif", help="and a GIF that goes through the slices")] = False,
) -> None:
    """Draw a lesion into a real scan: its region is made anew, every voxel outside stays as it is in the file."""
    from latdiff3d.edit_command import edit as make_edits

    make_edits(
        model, image, mask, region, out, num_samples=num_samples, seed=seed, steps=steps, gpus=gpus, guidance=guidance,
        sampler=sampler, settings=settings, covariates=covariate, label_map=label_map, noise=noise, picture=pictures,
        gif=gif,
    )  # fmt: skip


@app.command()
def reconstruct(
    model: Annotated[str, typer.Option("--model", "-r", help="checkpoint of either stage, or its run's folder")],
    image: Annotated[list[str], typer.Option(help="a scan: a file, files joined by commas, or a folder; repeatable")],
    out: Annotated[Path, typer.Option(help="folder for the volumes")] = Path("reconstructions"),
    memory: Annotated[str, typer.Option(help="GB the network may take; larger volumes: by tiles")] = "4GB",
    gpus: Annotated[str | None, typer.Option(help="number of one GPU; default: the first, or the CPU")] = None,
    pictures: Annotated[bool, typer.Option(help="a PNG of each: scan, reconstruction and error")] = True,
    int16: Annotated[bool, typer.Option("--int16", help="store int16 with a slope: half of float32")] = False,
) -> None:
    """Show what the autoencoder alone makes of scans, and where it errs."""
    from latdiff3d.memory import gigabytes
    from latdiff3d.reconstruction import Reconstructor, reconstruct_to_folder

    memory_gb = gigabytes(memory)
    made = reconstruct_to_folder(Reconstructor.load(model, gpus), image, out, memory_gb, pictures, int16)
    for case, figures in made:
        psnr = figures["PSNR"]["All"]
        said = "no difference" if psnr is None else f"PSNR {psnr:.2f} dB"
        print(f"{case}: {said}, SSIM {figures['SSIM']['All']:.4f}, in {out / case}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option("--model", "-r", help="checkpoint of stage 2, its run's folder, or a bundle's")],
    data: Annotated[Path, typer.Option(help="a data set with real volumes")],
    out: Annotated[Path, typer.Option(help="folder for all that is made and measured")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value of sampling, as for sample")] = None,
    split: Annotated[str, typer.Option(help="train, val or test")] = "val",
    segmenter: Annotated[
        str | None, typer.Option(help="run with purpose=evaluation; default: trained in --out")
    ] = None,
    weights: Annotated[
        list[str] | None, typer.Option(help="architecture=file of a published network; repeatable")
    ] = None,
    num_samples: Annotated[int, typer.Option("-n", help="volumes for each mask")] = 2,
    num_training: Annotated[int, typer.Option(help="training volumes to look at, at most")] = 200,
    seed: Annotated[int, typer.Option(help="of all that is drawn")] = 0,
    sampler: Annotated[str | None, typer.Option(help="ddim, ddpm, dpm_solver++, euler or heun")] = None,
    steps: Annotated[int | None, typer.Option(help="of the sampler; default: the configuration's")] = None,
    guidance: Annotated[float | None, typer.Option(help="how hard the mask pulls; default: the config's")] = None,
    config: Annotated[list[Path] | None, typer.Option(help="overlay YAML for a segmenter that is trained here")] = None,
    usefulness: Annotated[bool, typer.Option("--usefulness", help="train nine segmenters, on samples too")] = False,
    gpus: Annotated[str | None, typer.Option(help="number of one GPU; default: the first, or the CPU")] = None,
) -> None:
    """Measure a model: reconstruction, realism, diversity, mask fidelity, memorisation. What is there is kept.

    Exit code 3: some masks could not be used.
    """
    import latdiff3d
    from latdiff3d import evaluation, evaluation_files
    from latdiff3d.config import parse_settings

    loaded = latdiff3d.load(model, steps, gpus, guidance, sampler, parse_settings(settings or []))
    told = evaluation.evaluate(
        loaded, data, out, split, segmenter, weights or [], num_samples, num_training, seed, config or [], usefulness
    )
    files = evaluation_files
    print(f"{out / files.PAGE} shows it; {files.FIGURES} and {files.CARD} are beside it")
    if told["num_left_out"]:
        print(f"{told['num_left_out']} masks are left out; each is named above.", file=sys.stderr)
        raise SystemExit(SOME_LEFT_OUT)


@app.command()
def export(
    run: Annotated[str, typer.Option(help="a finished run of stage 2, or its checkpoint")],
    to: Annotated[Path, typer.Option(help="the bundle's folder, which is not there yet")],
    mask: Annotated[Path | None, typer.Option(help="a mask, for which the model card shows a sample")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="what latdiff3d evaluate wrote of it, for the card")] = None,
    splits: Annotated[bool, typer.Option("--splits", help="take the lists of cases along, which name them")] = False,
) -> None:
    """Write a run as a self-contained MONAI bundle."""
    from latdiff3d.export import export as write_bundle

    for sentence in write_bundle(run, to, mask, splits, evaluation):
        print(f"note: {sentence}")
    print(f"{to} is a MONAI bundle. Next: latdiff3d verify {to}")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="a MONAI bundle's folder")],
    schema: Annotated[Path | None, typer.Option(help="JSON schema of metadata.json; default: ours")] = None,
    runs: Annotated[bool, typer.Option(help="train, sample and evaluate too, on a few phantoms")] = True,
    processes: Annotated[int, typer.Option(min=1, help="above 1: those again on so many processes")] = 1,
    python: Annotated[str, typer.Option(help="interpreter that runs the bundle, as of an environment of its own")] = "",
) -> None:
    """Make the Model Zoo's checks of a bundle and ours. Exit code 1: one failed; 3: one could not be made."""
    from latdiff3d import bundle_checks

    outcomes = []
    checks = bundle_checks.verify(bundle, schema or bundle_checks.SCHEMA, runs, processes, python or sys.executable)
    for check in checks:
        print(f"{check.outcome:<8} {check.name}{': ' + check.said if check.said else ''}", flush=True)
        outcomes.append(check.outcome)
    if bundle_checks.FAILED in outcomes:
        raise SystemExit(1)
    if bundle_checks.NOT_MADE in outcomes:
        raise SystemExit(SOME_LEFT_OUT)


@app.command()
def pack(
    bundle: Annotated[Path, typer.Argument(help="an exported bundle's folder")],
    to: Annotated[Path, typer.Option(help="the .zip file")],
    weights_url: Annotated[str | None, typer.Option(help="leave weights out, to be had from here")] = None,
) -> None:
    """Write a bundle as a zip, as the Model Zoo takes it."""
    from latdiff3d import sharing

    left_out = sharing.pack(bundle, to, weights_url)
    print(f"{to} holds {bundle.resolve().name}" + (f"; put {', '.join(left_out)} at {weights_url}" if left_out else ""))


@app.command()
def push(
    bundle: Annotated[Path, typer.Argument(help="an exported bundle's folder")],
    repo: Annotated[str, typer.Option(help="user/name on the Hugging Face hub")],
    public: Annotated[bool, typer.Option("--public", help="let everybody see it")] = False,
) -> None:
    """Push a bundle to the Hugging Face hub, privately unless told otherwise."""
    from latdiff3d import sharing

    print(sharing.push(bundle, repo, not public))


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="a NIfTI file")]) -> None:
    """Tell whether a file is synthetic, and by what. Exit code 0: it is; 1: it has no mark of ours; 2: a mistake."""
    from latdiff3d import provenance

    found = provenance.inspect(file)
    print(found.report())
    if not found.is_synthetic:
        raise SystemExit(1)


@app.command()
def convert(
    config: Annotated[Path, typer.Argument(help="YAML in the format of CompVis' latent-diffusion")],
    out: Annotated[Path | None, typer.Option(help="the overlay; default: here, by the file's name")] = None,
    ranks: Annotated[int, typer.Option(help="processes that it was trained on", min=1)] = 1,
    scale_lr: Annotated[
        bool, typer.Option(help="the learning rate grew with batch and ranks, CompVis' default")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="replace an overlay that is there")] = False,
) -> None:
    """Turn a CompVis-style configuration into an overlay, and say of each of its keys where it went, or why not."""
    from latdiff3d import compvis_configs, conversion

    converted = compvis_configs.convert(config, ranks, scale_lr)
    overlay = out or Path(f"{config.stem}_overlay.yaml")
    conversion.write(overlay, converted.text(), force)
    print(converted.report(overlay))


@app.command(name="import")
def import_weights(
    weights: Annotated[
        Path, typer.Argument(help="a state dict of monai-generative 0.2.3, MONAI or MAISI's autoencoder")
    ],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, such as first_stage=autoencoder.pt")] = None,
    to: Annotated[Path, typer.Option(help="the checkpoint, a .pt file")] = Path("imported.pt"),
    config: Annotated[list[Path] | None, typer.Option(help="overlay YAML; what it sets is not guessed")] = None,
    data: Annotated[str | None, typer.Option(help="a data set, to measure latents over, or masks")] = None,
    scale_factor: Annotated[float | None, typer.Option(help="instead: that of its own diffusion model")] = None,
) -> None:
    """Make a checkpoint of weights that were trained elsewhere: an autoencoder, or a denoiser behind one."""
    from latdiff3d import importing
    from latdiff3d.config import parse_settings

    given = parse_settings(settings or []) | ({} if data is None else {"dataset_dir": data})
    print(importing.import_weights(weights, to, config or [], given, scale_factor).report())


@app.command()
def plan(
    settings: Annotated[list[str] | None, typer.Argument(help="key=value, such as batch_size=2")] = None,
    config: Annotated[list[Path] | None, typer.Option(help="overlay YAML, of either stage; may be repeated")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; default: the first GPU, or the CPU")] = None,
    memory: Annotated[str | None, typer.Option(help="GB of the device; needed for a GPU that is not here")] = None,
) -> None:
    """Say what both stages will take in memory, and what to change so that they fit. Exit code 1: they do not."""
    from latdiff3d import planning
    from latdiff3d.config import parse_settings
    from latdiff3d.memory import gigabytes

    on = planning.machine(device, None if memory is None else gigabytes(memory))
    found = list(planning.plans(config or [], parse_settings(settings or []), on))
    print(planning.report(found, on))
    if not all(each.fits for each in found if not each.changes):
        raise SystemExit(1)


@app.command()
def doctor(
    folder: Path,
    layout: Annotated[str, typer.Option(help="auto, brats, decathlon, json or folders")] = "auto",
    modalities: Annotated[str, typer.Option(help="of the BraTS layout, in order")] = "flair,t1,t1ce,t2",
    labels: Annotated[str | None, typer.Option(help="that masks may hold, such as 0,1,2,4; default: any")] = None,
) -> None:
    """Read a data set and print all that is wrong with it."""
    from latdiff3d.doctor import examine, print_report

    words = [] if labels is None else [word.strip() for word in labels.split(",")]
    if not all(word.isdigit() for word in words):
        raise InputError(f"labels is {labels!r}; expected whole numbers such as 0,1,2,4.")
    known = [int(word) for word in words] or None
    rows, problems = examine(folder, layout, modalities.split(","), known)
    print_report(rows, problems)
    if problems:
        raise SystemExit(2)


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="a data set of your own; default: phantoms")] = None,
    out: Annotated[Path, typer.Option(help="folder for all that is made")] = Path("demo"),
    config: Annotated[list[Path] | None, typer.Option(help="overlay YAML for both stages")] = None,
) -> None:
    """Train both stages, synthesise a volume for each held-out mask, and show the result."""
    from latdiff3d.demo import run_demo

    run_demo(data, out, config or [])


def door(program: Callable[[], Any]) -> None:
    """Run a program; a user's mistake becomes one line on standard error and exit code 2."""
    try:
        program()
    except InputExit as mistake:
        _refuse(str(mistake))
    except Exception as error:
        known = root_input_error(error) or place_error(error)
        if known is None:
            raise
        _refuse(str(known))


def _refuse(line: str) -> None:
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2) from None


def main() -> None:
    """Be the command `latdiff3d`."""
    door(app)
