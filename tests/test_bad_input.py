"""Bad input: one line that says what was found, expected and to do; exit code 2; nothing half-written."""

import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY, as_words, reference_sampler, refused, run_here, run_process, train_here

from latdiff3d import checkpoints, config

LATDIFF3D = Path(sys.executable).parent / "latdiff3d"
CASE, VAL_CASE = "phantom_0001", "phantom_0005"


# How a data set is broken


def part(data, name, case=CASE):
    return data / case / f"{case}_{name}.nii.gz"


def rewrite(path, change, affine=None):
    """Replace a file's voxels, and its affine if given."""
    image = nib.load(path)
    voxels = change(np.asarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(voxels, image.affine if affine is None else affine), path)


def with_value(value, name, case=CASE):
    def change(voxels):
        voxels = voxels.astype(np.float32 if isinstance(value, float) else voxels.dtype)
        voxels[8, 8, 8] = value
        return voxels

    return lambda data: rewrite(part(data, name, case), change)


def changed(name, change):
    return lambda data: rewrite(part(data, name), change)


def shifted(data):
    affine = nib.load(part(data, "seg")).affine.copy()
    affine[0, 3] += 5
    rewrite(part(data, "seg"), lambda voxels: voxels, affine)


def truncated(keep, name="t1"):
    def cut(data):
        whole = part(data, name).read_bytes()
        part(data, name).write_bytes(whole[: int(len(whole) * keep)])

    return cut


def emptied(data):
    shutil.rmtree(data)
    data.mkdir()


def without(*names, cases=(CASE,)):
    return lambda data: [part(data, name, case).unlink() for name in names for case in cases]


def listed(split, line):
    def append(data):
        with (data / f"{split}.list").open("a") as file:
            file.write(line + "\n")

    return append


def nothing(data):
    pass


# name, how to break the data, settings, what the line says
DATA_SETS = [
    ("a missing folder", shutil.rmtree, {}, r"data does not exist; expected a data set's folder"),
    ("an empty folder", emptied, {}, r"data is empty; none of the known layouts was found\. Looked for brats: "),
    (
        "a folder of something else",
        lambda data: (emptied(data), (data / "notes.txt").write_text("hello")),
        {},
        r"data holds notes\.txt; none of the known layouts was found",
    ),
    (
        "a file for a folder",
        lambda data: (shutil.rmtree(data), data.write_text("hello")),
        {},
        r"data is a file, but no \.json datalist",
    ),
    ("a case without its mask", without("seg"), {}, rf"{CASE} lacks {CASE}_seg\.nii\.gz: .* Add what is missing"),
    ("a case without a modality", without("t1ce"), {}, rf"{CASE} lacks {CASE}_t1ce\.nii\.gz"),
    (
        "several bad cases",
        without("seg", cases=(CASE, VAL_CASE)),
        {},
        r"lacks .*\(and 1 more; `latdiff3d doctor DIR` lists them all\)",
    ),
    (
        "a mask of another shape",
        changed("seg", lambda voxels: voxels[:-1]),
        {},
        rf"{CASE}_seg\.nii\.gz \(15×16×16\) and {CASE}/{CASE}_flair\.nii\.gz \(16×16×16\) have different shapes; "
        r"expected one grid\. Resample one onto the other",
    ),
    ("a modality of another shape", changed("t2", lambda voxels: voxels[:, :-2]), {}, r"_t2\.nii\.gz \(16×14×16\) and"),
    ("a mask that lies elsewhere", shifted, {}, r"_seg\.nii\.gz lies off .*_flair\.nii\.gz: .* a corner 5 mm apart"),
    (
        "an unknown label",
        with_value(7, "seg"),
        {},
        rf"{CASE}_seg\.nii\.gz has labels \{{7\}}; this configuration knows \{{0, 1, 2, 4\}}\. Map or drop it",
    ),
    (
        "a label that is left out",
        nothing,
        {"labels": [0, 1, 2]},
        r"_seg\.nii\.gz has labels \{4\}; .* knows \{0, 1, 2\}",
    ),
    (
        "a label that is no integer",
        with_value(1.5, "seg"),
        {},
        r"_seg\.nii\.gz has 1 voxels whose labels are no integers",
    ),
    (
        "a mask with NaN",
        with_value(float("nan"), "seg"),
        {},
        r"_seg\.nii\.gz has 1 voxels whose labels are no integers",
    ),
    (
        "a NaN voxel",
        with_value(float("nan"), "t1"),
        {},
        rf"{CASE}_t1\.nii\.gz has 1 NaN of 4096 voxels; expected finite",
    ),
    ("an infinite voxel", with_value(float("inf"), "t1"), {}, r"_t1\.nii\.gz has 1 infinite of 4096 voxels"),
    (
        "a NaN voxel in a validation case",
        with_value(float("nan"), "flair", VAL_CASE),
        {},
        rf"{VAL_CASE}_flair\.nii\.gz has 1 NaN",
    ),
    (
        "an all-zero volume",
        changed("t2", np.zeros_like),
        {},
        rf"{CASE}_t2\.nii\.gz is 0 in every voxel; expected an image",
    ),
    ("a constant volume", changed("t2", lambda v: np.full_like(v, 3)), {}, r"_t2\.nii\.gz is 3 in every voxel"),
    ("a truncated volume", truncated(0.5), {}, rf"{CASE}_t1\.nii\.gz is truncated or damaged: .* copy it again"),
    ("a truncated mask", truncated(0.7, "seg"), {}, rf"{CASE}_seg\.nii\.gz is truncated or damaged"),
    ("a header cut short", truncated(0.01), {}, rf"{CASE}_t1\.nii\.gz is truncated or damaged"),
    ("a file of no bytes", truncated(0), {}, rf"{CASE}_t1\.nii\.gz is truncated or damaged"),
    (
        "a file that is no gzip",
        lambda data: part(data, "t1").write_text("<html>404 not found</html>"),
        {},
        rf"{CASE}_t1\.nii\.gz is truncated or damaged",
    ),
    (
        "a 4D image",
        changed("t1", lambda voxels: np.stack([voxels] * 3, axis=-1)),
        {},
        r"_t1\.nii\.gz is 4D \(16×16×16×3\): axis 3 holds 3 volumes; expected one 3D volume\. Split it",
    ),
    (
        "a 4D mask",
        changed("seg", lambda voxels: np.stack([voxels] * 2, axis=-1)),
        {},
        r"_seg\.nii\.gz is 4D \(16×16×16×2\): axis 3 holds 2 volumes; expected one 3D volume",
    ),
    ("a 2D image", changed("t1", lambda voxels: voxels[:, :, 8]), {}, r"_t1\.nii\.gz is 2D \(16×16\); expected a 3D"),
    (
        "a listed case that is not there",
        listed("train", "phantom_01"),
        {},
        r"train\.list, line 5 names phantom_01, .*nearest",
    ),
    ("a case in two splits", listed("val", CASE), {}, rf"{CASE} is in train\.list and in .*val\.list; .* one split"),
]

# name, stage, settings, what the line says
SETTINGS = [
    ("an unknown key", "autoencoder", {"max_epoch": 3}, r"unknown key max_epoch; did you mean max_epochs\?"),
    (
        "an unknown nested key",
        "autoencoder",
        {"loss__disc_strat": 3},
        r"unknown key loss::disc_strat; did you mean loss::disc_start\?",
    ),
    (
        "a number in place of a component",
        "autoencoder",
        {"loss": 3},
        r"the command line sets loss to 3; expected a mapping, or one of its settings, such as loss::reconstruction\.",
    ),
    (
        "a number in place of components",
        "autoencoder",
        {"preprocessing": 3},
        r"sets preprocessing to 3; expected a list of components, or a change to one, such as preprocessing::0",
    ),
    (
        "a key of the other stage",
        "diffusion",
        {"loss__disc_start": 3},
        r"the command line sets the unknown key loss",
    ),
    (
        "a crop that the autoencoder cannot halve",
        "autoencoder",
        {"crop_to": [17, 16, 16]},
        r"crop_to \[17, 16, 16\] is not divisible by 2 \(the autoencoder's 2\); the nearest that is: \[18, 16, 16\]",
    ),
    (
        "a crop that both together cannot halve",
        "diffusion",
        {"crop_to": [18, 16, 16]},
        r"crop_to \[18, 16, 16\] is not divisible by 4 \(the autoencoder's 2 × the U-Net's 2\); the nearest that is: "
        r"\[20, 16, 16\]",
    ),
    (
        "a crop of two sizes",
        "autoencoder",
        {"crop_to": [16, 16]},
        r"crop_to is \[16, 16\]; expected three whole numbers",
    ),
    ("a crop that is one number", "autoencoder", {"crop_to": 16}, r"crop_to is 16; expected three whole numbers"),
    ("a crop in words", "autoencoder", {"crop_to": "big"}, r"crop_to is .*; expected three whole numbers"),
    ("an unknown precision", "autoencoder", {"precision": "int8"}, r"precision is 'int8'; expected 'bf16', 'fp16' or"),
    (
        "an unknown conditioning",
        "diffusion",
        {"conditioning": "cat"},
        r"conditioning is 'cat'; expected 'concat', 'scalar', 'encoder' or 'none'",
    ),
    (
        "an unknown mask mode",
        "autoencoder",
        {"mask_mode": "both"},
        r"mask mode 'both' is unknown; expected fine or coarse",
    ),
    (
        "an encoder that nothing asks",
        "diffusion",
        {"condition_encoder_def__channels": 16},
        r"condition_encoder_def::channels is set, and with conditioning 'concat' nothing uses it; set "
        r"conditioning=encoder, or leave condition_encoder_def::channels out\.",
    ),
    ("an unknown layout", "autoencoder", {"layout": "bids"}, r"layout 'bids' is unknown; expected auto, brats"),
    ("an unknown reduction", "autoencoder", {"loss__kl_reduction": "avg"}, r"kl_reduction is 'avg'"),
    (
        "a start in words",
        "autoencoder",
        {"loss__disc_start": "soon"},
        r"disc_start is 'soon'; expected a whole number of updates from 0 on, such as 100\.",
    ),
    (
        "a weight in words",
        "autoencoder",
        {"loss__kl_weight": "small"},
        r"kl_weight is 'small'; expected a number from 0 on, such as 0\.1\.",
    ),
    ("percentiles the wrong way round", "autoencoder", {"intensity_percentiles": [99, 1]}, r"no percentiles"),
    ("a GPU that is not there", "autoencoder", {"gpus": "7,"}, r"gpus is '7,', but \d+ GPUs are visible"),
    ("a modality that no case has", "autoencoder", {"modalities": ["pet"]}, r"lacks phantom_0000_pet\.nii\.gz"),
    ("no modalities", "autoencoder", {"modalities": []}, r"modalities is \[\]; expected a list of names, each once"),
    (
        "a modality that is no list",
        "autoencoder",
        {"modalities": "t1"},
        r"modalities is 't1'; expected a list of names",
    ),
    (
        "labels without the background",
        "autoencoder",
        {"labels": [1, 2, 4]},
        r"labels is \[1, 2, 4\]; expected a list of whole numbers, each once, that begins with the background's 0",
    ),
    (
        "a modality twice",
        "autoencoder",
        {"modalities": ["t1", "t1"]},
        r"modalities is \['t1', 't1'\]; expected a list of names, each once, such as",
    ),
    (
        "a label twice",
        "autoencoder",
        {"labels": [0, 1, 1]},
        r"labels is \[0, 1, 1\]; expected a list of whole numbers, each once, that begins with the background's 0",
    ),
    ("labels that are no list", "autoencoder", {"labels": 4}, r"labels is 4; expected a list of whole numbers"),
    ("a spacing that is one number", "autoencoder", {"spacing": 2}, r"spacing is 2; expected three sizes in mm"),
    ("a spacing of 0", "autoencoder", {"spacing": [1, 1, 0]}, r"spacing is \[1, 1, 0\]; expected three sizes in mm"),
    (
        "one percentile",
        "autoencoder",
        {"intensity_percentiles": 99},
        r"intensity_percentiles is 99; expected two percentiles",
    ),
    ("a batch of none", "autoencoder", {"batch_size": 0}, r"batch_size is 0; expected a whole number from 1 on"),
    ("half an epoch", "diffusion", {"max_epochs": 0.5}, r"max_epochs is 0\.5; expected a whole number from 1 on"),
    ("no epochs", "autoencoder", {"max_epochs": 0}, r"max_epochs is 0; expected a whole number from 1 on"),
    (
        "epochs in words",
        "autoencoder",
        {"max_epochs": "many"},
        r"max_epochs is 'many'; expected a whole number from 1 on",
    ),
    ("no interval", "autoencoder", {"val_interval": 0}, r"val_interval is 0; expected a whole number from 1 on"),
    (
        "a validation after the end",
        "autoencoder",
        {"val_interval": 3},
        r"val_interval 3 is above max_epochs 2; expected a validation before the end",
    ),
    ("a fourth axis", "diffusion", {"flips": [3]}, r"flips is \[3\]; expected a list of axes, each of 0, 1 and 2"),
    ("no way to encode", "diffusion", {"encode": "no"}, r"encode is 'no'; expected cached or on_the_fly"),
    ("fewer than no workers", "autoencoder", {"num_workers": -1}, r"num_workers is -1; expected a whole number from 0"),
    ("a seed below 0", "autoencoder", {"seed": -1}, r"seed is -1; expected a whole number from 0 on"),
    ("a seed in words", "diffusion", {"seed": "lucky"}, r"seed is 'lucky'; expected a whole number from 0 on"),
    ("a learning rate of 0", "autoencoder", {"learning_rate": 0}, r"learning_rate is 0; expected a number above 0"),
    ("a learning rate in words", "diffusion", {"learning_rate": "slow"}, r"learning_rate is 'slow'; expected a number"),
    ("a first stage that is a number", "diffusion", {"first_stage": 3}, r"first_stage is 3; expected a checkpoint or"),
    ("an unknown precision of stage 2", "diffusion", {"precision": 16}, r"precision is 16; expected 'bf16', 'fp16' or"),
    (
        "channels that the groups do not divide",
        "autoencoder",
        {"autoencoder_def__channels": [6]},
        r"AutoencoderKL refuses its settings: .*norm_num_groups",
    ),
    (
        "channels of the U-Net that the groups do not divide",
        "diffusion",
        {"denoiser_def__channels": [8, 6]},
        r"DiffusionModelUNet refuses its settings: .*norm_num_groups",
    ),
    (
        "a crop too small for the discriminator",
        "autoencoder",
        {"crop_to": [4, 4, 4]},
        r"crop_to \[4, 4, 4\] is too small for the discriminator \(.*\); use a larger crop, or fewer layers",
    ),
    (
        "a folder of splits that is not there",
        "autoencoder",
        {"split_dir": "/nowhere"},
        r"/nowhere does not exist; expected the folder of train\.list and val\.list",
    ),
]


@pytest.fixture
def data(phantoms, tmp_path):
    """A copy of the tiny data set, to break."""
    return Path(shutil.copytree(phantoms, tmp_path / "data"))


@pytest.mark.parametrize(
    ("break_it", "settings", "words"), [row[1:] for row in DATA_SETS], ids=[row[0] for row in DATA_SETS]
)
def test_a_bad_data_set_is_told_in_one_line(data, tmp_path, break_it, settings, words):
    break_it(data)
    line = refused(train_here("autoencoder", data, tmp_path / "runs", "x", **settings))
    assert re.search(words, line), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("stage", "settings", "words"), [row[1:] for row in SETTINGS], ids=[row[0] for row in SETTINGS]
)
def test_a_bad_setting_is_told_in_one_line(tiny_runs, tmp_path, stage, settings, words):
    if stage == "diffusion":
        settings = {"first_stage": str(tiny_runs.autoencoder), **settings}
    line = refused(train_here(stage, tiny_runs.data, tmp_path / "runs", "x", **settings))
    assert re.search(words, line), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "settings", [{"cache_rate": 0}, {"cache_rate": 0, "num_workers": 1}], ids=["uncached", "workers"]
)
def test_voxels_that_are_not_cached_are_told_when_they_are_loaded(data, tmp_path, settings):
    with_value(float("nan"), "t1")(data)
    ended = train_here("autoencoder", data, tmp_path / "runs", "x", **settings)
    assert ended.code == 2 and "Traceback" not in ended.err, ended
    line = ended.err.strip().split("\n")[-1]  # below the progress bar, if that was drawn already
    assert re.fullmatch(rf"error: {CASE}/{CASE}_t1\.nii\.gz has 1 NaN of 4096 voxels; expected finite .*", line), line


@pytest.mark.parametrize("encode", ["on_the_fly", "cached"])
def test_stage_2_tells_uncached_voxels_too(data, tiny_runs, tmp_path, encode):
    with_value(float("nan"), "t1")(data)
    settings = {"first_stage": str(tiny_runs.autoencoder), "cache_rate": 0, "encode": encode}
    ended = train_here("diffusion", data, tmp_path / "runs", "x", **settings)
    assert ended.code == 2 and "Traceback" not in ended.err, ended
    line = ended.err.strip().split("\n")[-1]
    assert re.fullmatch(rf"error: {CASE}/{CASE}_t1\.nii\.gz has 1 NaN of 4096 voxels; expected finite .*", line), line


@pytest.mark.parametrize("in_the_way", ["runs", "runs/x"], ids=["logdir", "run_dir"])
def test_a_file_in_the_way_of_the_run_is_told(phantoms, tmp_path, in_the_way):
    (tmp_path / in_the_way).parent.mkdir(exist_ok=True)
    (tmp_path / in_the_way).write_text("a file")
    line = refused(train_here("autoencoder", phantoms, tmp_path / "runs", "x"))
    assert re.fullmatch(r"error: .*/runs/x: (Not a directory|File exists); expected a place that can be .*", line), line
    assert (tmp_path / in_the_way).read_text() == "a file"


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (without("seg"), rf"{CASE} lacks {CASE}_seg"),
        (with_value(7, "seg"), r"has labels \{7\}"),
        (with_value(float("nan"), "t1"), r"has 1 NaN"),
        (truncated(0.5), r"is truncated or damaged"),
    ],
)
def test_stage_2_tells_it_too(data, tiny_runs, tmp_path, break_it, words):
    break_it(data)
    ended = train_here("diffusion", data, tmp_path / "runs", "x", first_stage=str(tiny_runs.autoencoder))
    assert ended.code == 2 and "Traceback" not in ended.err, ended
    line = ended.err.strip().split("\n")[-1]  # below the encoding's progress bar
    assert line.startswith("error: ")
    assert re.search(words, line), line
    assert not (tmp_path / "runs" / "x").exists()


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_damaged_first_stage_is_told(tiny_runs, tmp_path, keep):
    whole = (tiny_runs.autoencoder / "checkpoints" / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(keep * len(whole))])
    line = refused(
        train_here("diffusion", tiny_runs.data, tmp_path / "runs", "x", first_stage=str(tmp_path / "cut.pt"))
    )
    assert "cut.pt is not a readable checkpoint" in line
    assert not (tmp_path / "runs").exists()


def test_an_overlay_that_is_not_there_or_holds_an_unknown_key_is_told(tiny_runs, tmp_path):
    (tmp_path / "mine.yaml").write_text("crop_too: [16, 16, 16]\n")
    words = ["train", "autoencoder", "--data", tiny_runs.data, "-l", tmp_path / "runs", "--config"]
    assert "cannot read the configuration nowhere.yaml" in refused(run_here(*words, "nowhere.yaml"))
    line = refused(run_here(*words, tmp_path / "mine.yaml"))
    assert "mine.yaml sets the unknown key crop_too; did you mean crop_to?" in line
    (tmp_path / "numbers.yaml").write_text("3: 4\n")
    line = refused(run_here(*words, tmp_path / "numbers.yaml"))
    assert "numbers.yaml has the key 3, a int; expected a setting's name, as in max_epochs: 20." in line
    assert not (tmp_path / "runs").exists()


# Sampling


def mask_file(change=None, affine=None):
    """Write a mask as `change` makes it of a good one."""

    def write(folder, good):
        shutil.copy(good, folder / "a_seg.nii.gz")
        if change:
            rewrite(folder / "a_seg.nii.gz", change, affine)
        return folder / "a_seg.nii.gz"

    return write


def with_label_7(voxels):
    voxels[8, 8, 8] = 7
    return voxels


def twins(folder, good):
    shutil.copy(good, folder / "a.nii.gz")
    nib.save(nib.load(good), folder / "a.nii")
    return folder


def half(folder, good):
    (folder / "a_seg.nii.gz").write_bytes(good.read_bytes()[:150])
    return folder / "a_seg.nii.gz"


def picture(folder, good):
    (folder / "a.png").write_bytes(b"\x89PNG")
    return folder / "a.png"


MASKS = [
    ("a mask that is not there", lambda folder, good: folder / "none.nii.gz", r"there is no mask at .*none\.nii\.gz"),
    (
        "a folder without masks",
        lambda folder, good: folder,
        r"there is no mask at .*; expected a \.nii\.gz, \.nii, .* or \.dcm file",
    ),
    ("an unknown label", mask_file(with_label_7), r"a_seg\.nii\.gz has labels \{7\}; this model knows \{0, 1, 2, 4\}"),
    (
        "a 4D mask",
        mask_file(lambda v: np.stack([v, v], axis=-1)),
        r"a_seg\.nii\.gz.* 2 (channels|volumes); expected one",
    ),
    ("a 2D mask", mask_file(lambda v: v[:, :, 8]), r"a_seg\.nii\.gz is 2D"),
    ("a mask with NaN", mask_file(lambda v: np.where(v == 1, np.nan, v).astype(np.float32)), r"labels are no integers"),
    ("a truncated mask", half, r"a_seg\.nii\.gz is truncated or damaged"),
    ("a picture", picture, r"a\.png is no volume that can be read; expected \.nii\.gz, \.nii"),
    ("two masks of one name", twins, r"2 masks have only 1 different names"),
]


@pytest.mark.parametrize(("make", "words"), [row[1:] for row in MASKS], ids=[row[0] for row in MASKS])
def test_a_bad_mask_is_told_in_one_line(tiny_runs, tmp_path, make, words):
    (tmp_path / "masks").mkdir()
    mask = make(tmp_path / "masks", part(tiny_runs.data, "seg"))
    ended = run_here("sample", "-r", tiny_runs.diffusion, "--mask", mask, "--out", tmp_path / "out")
    line = refused(ended)
    assert re.search(words, line), line
    assert not (tmp_path / "out").exists()


SAMPLING = [
    ("no mask", [], r"is conditioned on masks; give --mask FILE_OR_FOLDER, or --data FOLDER"),
    ("a mask and a data set", ["--mask", "{mask}", "--data", "{data}"], r"--mask and --data are both given"),
    ("another split", ["--data", "{data}", "--split", "all"], r"split is 'all'; expected train, val or test"),
    ("another grid", ["--mask", "{mask}", "--grid", "world"], r"grid is 'world'; expected mask or crop"),
    ("no steps", ["--mask", "{mask}", "--steps", "0"], r"steps is 0; expected 1 to 1000"),
    ("too many steps", ["--mask", "{mask}", "--steps", "1001"], r"steps is 1001; expected 1 to 1000"),
    ("a data set that is not there", ["--data", "/nowhere"], r"/nowhere does not exist"),
    (
        "a split without cases",
        ["--data", "{data}", "--split", "test"],
        r"data has no test case; choose another --split, or list some in test\.list",
    ),
    ("no volumes", ["--mask", "{mask}", "-n", "0"], r"0 volumes from seed 0; expected at least 1"),
    ("a seed below 0", ["--mask", "{mask}", "--seed", "-1"], r"seed -1; expected .* a seed of at least 0"),
    ("a GPU that is not there", ["--mask", "{mask}", "--gpus", "99"], r"gpus is '99', but \d+ GPUs are visible"),
]


@pytest.mark.parametrize(("options", "words"), [row[1:] for row in SAMPLING], ids=[row[0] for row in SAMPLING])
def test_bad_sampling_options_are_told_in_one_line(tiny_runs, tmp_path, options, words):
    mask = part(tiny_runs.data, "seg")
    options = [option.format(mask=mask, data=tiny_runs.data) for option in options]
    line = refused(run_here("sample", "-r", tiny_runs.diffusion, "--out", tmp_path / "out", *options))
    assert re.search(words, line), line
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_of_the_volumes_is_told(tiny_runs, tmp_path):
    (tmp_path / "out").write_text("a file")
    mask = part(tiny_runs.data, "seg")
    line = refused(run_here("sample", "-r", tiny_runs.diffusion, "--mask", mask, "--out", tmp_path / "out"))
    assert re.search(r"/out.*: (Not a directory|File exists)", line), line
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch_size", 2], r"--batch_size is 2; volumes are made one by one: leave it out or give 1"),
        (["--n_samples", 0], r"0 volumes from seed 0; expected at least 1"),
        (["--seed", -1], r"1 volumes from seed -1; expected at least 1, from a seed of at least 0"),
        (["--steps", 0], r"steps is 0; expected 1 to 1000"),
    ],
)
def test_the_reference_sampler_tells_bad_options_in_one_line(tiny_runs, tmp_path, options, words):
    mask = part(tiny_runs.data, "seg")
    ended = run_here(
        "-r", tiny_runs.diffusion, "--mask", mask, "--out", tmp_path / "out", *options, program=reference_sampler
    )
    line = refused(ended)
    assert re.search(words, line), line
    assert not (tmp_path / "out").exists()


def foreign(folder):
    import torch

    torch.save({"state_dict": {}}, folder / "foreign.pt")
    return folder / "foreign.pt"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (lambda runs, folder: folder / "nowhere", r"there is no checkpoint at .*nowhere; expected a \.pt file"),
        (lambda runs, folder: runs.autoencoder, r"of stage 'autoencoder'; expected one of stage 'diffusion'"),
        (lambda runs, folder: foreign(folder), r"foreign\.pt is not a latdiff3d checkpoint of format 1"),
        (lambda runs, folder: runs.diffusion / "config.yaml", r"config\.yaml is not a readable checkpoint"),
    ],
    ids=["none", "stage 1", "foreign", "no checkpoint"],
)
def test_what_is_no_model_is_told_in_one_line(tiny_runs, tmp_path, place, words):
    mask = part(tiny_runs.data, "seg")
    ended = run_here("sample", "-r", place(tiny_runs, tmp_path), "--mask", mask, "--out", tmp_path / "out")
    line = refused(ended)
    assert re.search(words, line), line
    assert not (tmp_path / "out").exists()


def test_a_model_whose_weights_do_not_fit_its_configuration_is_told(tiny_runs, tmp_path):
    content = checkpoints.load(tiny_runs.diffusion / "checkpoints" / "best.pt")
    text = content["config"].replace("channels: [8, 8]", "channels: [8, 16]")
    assert text != content["config"]
    checkpoints.save(tmp_path / "x.pt", {**content, "config": text})
    line = refused(
        run_here("sample", "-r", tmp_path / "x.pt", "--mask", part(tiny_runs.data, "seg"), "--out", tmp_path / "o")
    )
    assert re.search(r"x\.pt does not fit this configuration: .* there, .* here", line), line


# Every door, in a process of its own


def test_the_doors_of_training_say_the_same_line(data, tmp_path):
    without("t1ce")(data)
    words = as_words(TINY["autoencoder"])
    settings = TINY["autoencoder"].items()
    files = [str(file) for file in config.bundle_files(config.DEFAULT_BUNDLE, "autoencoder")]
    runs = tmp_path / "runs"
    one = refused(
        run_process("main.py", "--base", "configs/autoencoder.yaml", "-t", "-l", runs, f"dataset_dir={data}", *words)
    )
    other = refused(run_process(LATDIFF3D, "train", "autoencoder", "--data", data, "-l", runs, *words))
    monai = run_process(
        "-m", "monai.bundle", "run", "training", "--bundle_root", config.DEFAULT_BUNDLE, "--config_file", files,
        "--dataset_dir", data, "--logdir", runs, *(word for key, value in settings for word in (f"--{key}", value)),
    )  # fmt: skip
    assert one == other and f"{CASE} lacks {CASE}_t1ce.nii.gz" in one
    # MONAI warns on stderr, before, that a configuration is code; InputExit then ends the process with its message.
    assert monai.code != 0 and "Traceback" not in monai.err
    assert monai.err.strip().split("\n")[-1] == one.removeprefix("error: ")
    assert not runs.exists()


def test_the_doors_of_sampling_say_the_same_line(tiny_runs, tmp_path):
    mask, out = part(tiny_runs.data, "seg"), tmp_path / "out"
    one = refused(run_process("inference/sample.py", "-r", tiny_runs.autoencoder, "--mask", mask, "--out", out))
    other = refused(run_process(LATDIFF3D, "sample", "-r", tiny_runs.autoencoder, "--mask", mask, "--out", out))
    assert one == other and "expected one of stage 'diffusion'" in one
    assert not out.exists()


# The doctor


def test_the_doctor_prints_all_that_is_wrong_at_once(data):
    without("seg")(data)
    with_value(7, "seg", "phantom_0002")(data)
    with_value(float("nan"), "t1", "phantom_0003")(data)
    ended = run_here("doctor", data, "--labels", "0,1,2,4")
    assert ended.code == 2
    for words in (
        f"{CASE} lacks {CASE}_seg.nii.gz",
        "phantom_0002_seg.nii.gz has labels {7}",
        "phantom_0003_t1.nii.gz has 1 NaN",
    ):
        assert words in ended.out
    assert "Traceback" not in ended.err


def test_the_doctor_finds_nothing_wrong_with_a_sound_data_set(phantoms):
    ended = run_here("doctor", phantoms)
    assert ended.code == 0, ended
    assert "6 case(s), no problem found." in ended.out


def test_the_doctor_tells_a_missing_folder():
    ended = run_here("doctor", "/nowhere")
    assert ended.code == 2
    assert "/nowhere does not exist" in ended.out + ended.err


def test_the_doctor_tells_labels_that_are_no_numbers(phantoms):
    assert re.search(r"labels.*'?0,x'?.*expected", refused(run_here("doctor", phantoms, "--labels", "0,x")))
