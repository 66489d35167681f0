"""The Model Zoo's checks of a bundle and ours, offline; what runs in the bundle runs on the modules it holds."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from monai.bundle import ConfigParser

from latdiff3d import bundle_files, bundle_probe, config, exported
from latdiff3d.bundle_files import SCHEMA
from latdiff3d.bundle_trial import write_trial_data
from latdiff3d.errors import InputError

OK, FAILED, NOT_MADE = "ok", "FAILED", "not made"
NETWORKS = {"diffusion": "network_def", "autoencoder": "reconstruction_def"}
INFERENCE = ["configs/common.yaml", "configs/inference.yaml"]
NO_WEIGHTS = "the bundle has no weights; export a run"
INSTALL = "pip install 'latdiff3d[export]'"
TORCHRUNS_REPORT = "torch/distributed/elastic/"  # is in its first line, and stands below what a rank has said
# Small, and only where it changes no more than how long a run takes.
TRIAL = {"max_epochs": 1, "val_interval": 1, "batch_size": 1, "num_workers": 0, "cache": "none"}


class Check(NamedTuple):
    """A check, how it ended, and what is to be said of it."""

    name: str
    outcome: str
    said: str = ""


class Flow(NamedTuple):
    """A workflow of the bundle: MONAI's kind of it, its program, its files, and settings."""

    kind: str
    program: str
    files: Sequence[str]
    settings: Mapping[str, object]


def verify(
    bundle: str | Path,
    schema: str | Path = SCHEMA,
    runs: bool = True,
    num_processes: int = 1,
    python: str | Path = sys.executable,
) -> Iterator[Check]:
    """Yield the checks of a bundle as they are made.

    Args:
        bundle: its folder.
        schema: a JSON schema for metadata, a file; MONAI's own where it is at hand.
        runs: train, sample and evaluate as well, on phantoms of a few cases.
        num_processes: above 1, all of that again on so many processes.
        python: the interpreter that runs what is in the bundle; such as that of an environment with its packages alone.

    Raises:
        InputError: no bundle there, no schema, or no such interpreter.
    """
    root = Path(bundle).resolve()
    if not (root / exported.METADATA).is_file():
        raise InputError(f"there is no {Path(bundle) / exported.METADATA}; expected a bundle's folder.")
    if not Path(schema).is_file():
        raise InputError(f"there is no schema {schema}; expected a JSON schema's file.")
    interpreter = shutil.which(python)
    if interpreter is None:
        raise InputError(f"there is no {python} that can be run; expected a Python interpreter.")
    for name, found in bundle_files.problems(root).items():
        yield Check(name, FAILED if found else OK, "; ".join(found[:3]) + (" …" if len(found) > 3 else ""))
    with tempfile.TemporaryDirectory(prefix="latdiff3d-verify-") as place:
        trial = _Trial(root, Path(place).resolve(), os.path.abspath(interpreter))
        yield from trial.metadata(Path(schema).resolve())
        yield from trial.networks()
        if runs:
            yield from trial.runs(sorted({1, num_processes}))
        else:
            yield Check("training, inference, evaluation", NOT_MADE, "asked to leave runs out")


class _Trial:
    """A bundle, a folder for what its checks write, and the interpreter that makes them."""

    def __init__(self, root: Path, place: Path, python: str) -> None:
        self.root = root
        self.place = place
        self.python = python
        self.has_weights = bundle_files.has_weights(root)
        overlay = f"configs/{config.OVERLAY}"
        self.overlay = [overlay] if (root / overlay).is_file() else []
        # A copy with its own modules runs on those, wherever latdiff3d is installed.
        modules = root if (root / "latdiff3d").is_dir() else config.REPOSITORY
        self.environment = {**os.environ, "PYTHONPATH": str(modules), "PYTHONDONTWRITEBYTECODE": "1"}

    def metadata(self, schema: Path) -> Iterator[Check]:
        """MONAI's verify_metadata, of each network's file, against a schema that is at hand."""
        for _, meta_file, _ in exported.WEIGHTS.values():
            name = f"verify_metadata {Path(meta_file).name}"
            yield self._monai(name, ["jsonschema"], "verify_metadata", meta_file=meta_file, filepath=schema)

    def networks(self) -> Iterator[Check]:
        """MONAI's verify_net_in_out, ckpt_export and onnx_export of each network, and their outputs compared."""
        joined = "configs/inference.json"  # of an exported bundle
        config_file = joined if (self.root / joined).is_file() else str([*INFERENCE, *self.overlay])
        for stage, net_id in NETWORKS.items():
            weights, meta_file, _ = exported.WEIGHTS[stage]
            net = {"net_id": net_id, "meta_file": meta_file, "config_file": config_file}
            yield self._monai(f"verify_net_in_out {net_id}", [], "verify_net_in_out", **net)
            if not self.has_weights:
                yield Check(f"exports of {net_id}", NOT_MADE, NO_WEIGHTS)
                continue
            exports = []
            for command, ending, needs in (
                ("ckpt_export", "ts", []),
                ("onnx_export", "onnx", ["onnx", "onnxscript", "onnxruntime"]),
            ):
                file = self.place / f"{stage}.{ending}"
                check = self._monai(
                    f"{command} {net_id}", needs, command, **net, ckpt_file=weights, filepath=file, use_trace=True
                )
                yield check
                exports += [str(file)] if check.outcome == OK else []
            if exports:
                yield self._probe(f"outputs of {net_id}", "outputs", net_id, meta_file, weights, *exports)

    def runs(self, nums_processes: Sequence[int]) -> Iterator[Check]:
        """On each number of processes: a run of each stage that goes on, volumes and the metrics; and check_properties.

        They are of a few phantoms. What a bundle without weights samples and measures are those of these runs.
        """
        data = write_trial_data(self.place / "data", self._settings(), max(nums_processes))
        for number in nums_processes:
            flows = self._flows(data, self.place / f"runs_{number}")
            for stage in NETWORKS:
                training = flows[f"training {stage}"]
                yield self._run(f"training {stage}", training, number)
                going_on = {**training.settings, "max_epochs": 2, "resume": self.place / f"runs_{number}" / stage}
                yield self._run(f"training {stage} goes on", training._replace(settings=going_on), number)
            for name, flow in flows.items():
                if flow.kind != "train":
                    yield self._run(name, flow, number)
        yield self._properties(list(flows.values()))

    def _flows(self, data: Path, logdir: Path) -> dict[str, Flow]:
        """Return the bundle's workflows by the names of their checks, their runs below `logdir`."""
        settings = self._settings()
        common: dict[str, object] = {
            **TRIAL,
            "dataset_dir": data,
            "split_dir": data,
            "layout": "brats",
            "logdir": logdir,
        }
        if settings["num_fine_cases"] is not None:
            common["num_fine_cases"] = 1
        first = {} if self.has_weights else {"first_stage": logdir / "autoencoder"}
        of_stage: dict[str, dict[str, object]] = {
            "autoencoder": {**common, "loss::perceptual_weight": 0, "segmenter": "", "quality_cases": 0},
            "diffusion": {**common, "sampling_steps": 4, **first},
        }
        mask = sorted(data.glob("*/*_seg.nii.gz"))[0] if settings["conditioning"] != "none" else ""
        sampling = {"mask": mask, "out": logdir / "samples", "num_samples": 2, "sampling::sampling_steps": 4}
        sampling |= {"model": "." if self.has_weights else logdir / "diffusion"}
        flows = {"inference": Flow("inference", "inference", INFERENCE, sampling)}
        for stage in NETWORKS:
            files = ["configs/common.yaml", f"configs/{config.STAGE_FILES[stage]}", *self.overlay]
            given = {**of_stage[stage], "name": stage}
            model = "." if self.has_weights else logdir / stage
            flows[f"training {stage}"] = Flow("train", "training", files, given)
            evaluation = [*files, "configs/evaluate.yaml"]
            flows[f"evaluate {stage}"] = Flow("evaluation", "evaluate", evaluation, {**given, "model": model})
        return flows

    def _settings(self) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config([str(self.root / file) for file in (exported.COMMON, *self.overlay)])
        return parser

    def _run(self, name: str, flow: Flow, num_processes: int) -> Check:
        given = {"bundle_root": ".", "config_file": list(flow.files), **flow.settings}
        start: list[str] = []
        if num_processes > 1:
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
            name += f", {num_processes} processes"
        return self._process(name, [*start, *_monai_words(f"run {flow.program}", given)])[0]

    def _monai(self, name: str, needs: Sequence[str], command: str, /, **arguments: object) -> Check:
        """Make a check by MONAI's command line, in the bundle's folder."""
        missing = [package for package in needs if not self._has(package)]
        if missing:
            return Check(name, NOT_MADE, f"{', '.join(missing)} is not installed: {INSTALL}")
        return self._process(name, _monai_words(command, arguments))[0]

    def _has(self, package: str) -> bool:
        if self.python == sys.executable:
            return find_spec(package) is not None
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
        return subprocess.run([self.python, "-c", look, package], check=False).returncode == 0

    def _probe(self, name: str, *words: str) -> Check:
        check, ended = self._process(name, ["-c", Path(bundle_probe.__file__).read_text(), *words])
        told = _last_line(ended.stdout)
        is_told = told and (check.outcome == FAILED or words[0] == "outputs")
        return check._replace(said=told) if is_told else check

    def _properties(self, flows: Sequence[Flow]) -> Check:
        arguments = [
            {"workflow_type": flow.kind, "config_file": list(flow.files), "bundle_root": "."}
            | {key: str(value) if isinstance(value, Path) else value for key, value in flow.settings.items()}
            for flow in flows
        ]
        return self._probe("check_properties", "properties", json.dumps(arguments))

    def _process(self, name: str, words: Sequence[str]) -> tuple[Check, subprocess.CompletedProcess[str]]:
        ended = subprocess.run(
            [self.python, *words], cwd=self.root, env=self.environment, capture_output=True, text=True, check=False
        )
        if ended.returncode == 0:
            return Check(name, OK), ended
        before, report, _ = ended.stderr.partition(TORCHRUNS_REPORT)
        by_a_rank = before.rpartition("\n")[0] if report else ""
        said = _last_line(by_a_rank or ended.stderr) or _last_line(ended.stdout) or f"exit code {ended.returncode}"
        return Check(name, FAILED, said), ended


def _monai_words(command: str, arguments: Mapping[str, object]) -> list[str]:
    given = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
    return ["-m", "monai.bundle", *command.split(), *given]


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
