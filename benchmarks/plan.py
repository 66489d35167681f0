"""Is `latdiff3d plan` right? Its figures for four configurations of each stage, beside what their steps really take.

    python benchmarks/plan.py [--short]

Measured as in benchmarks/memory.py, each in a fresh process: the highest memory during a step over that before the
networks were made. On a CPU that holds what libraries set up at their first use, some 0.07 GB, which the plan has under
Python and PyTorch; `step` is free of it: the highest over that between two steps, when weights and optimiser are there.
The last line is a JSON object; `worst_*_error` is the largest relative error. --short takes one of each stage.
"""

import argparse
import json
from typing import Any

import memory
from fresh_process import in_fresh_process
from memory import MB, OWN_MAPPING

HIPPOCAMPUS = "configs/hippocampus.yaml"
CONFIGURATIONS: dict[str, list[tuple[list[str], dict[str, Any]]]] = {
    "autoencoder": [
        ([], {}),
        ([], {"use_checkpoint": True, "batch_size": 2}),
        (["configs/autoencoder_vq.yaml"], {"crop_to": [64, 96, 64]}),
        (["configs/plain.yaml", "configs/sharp.yaml"], {}),
    ],
    "diffusion": [
        ([], {"crop_to": [96, 96, 96]}),
        ([], {"crop_to": [128, 128, 128], "batch_size": 2, "use_checkpoint": True}),
        ([HIPPOCAMPUS, "configs/hippocampus_diffusion.yaml", "configs/condition_encoder.yaml"], {}),
        ([HIPPOCAMPUS], {"batch_size": 2, "accumulate_grad_batches": 4}),
    ],
}


def main() -> None:
    """Plan and measure, and print."""
    arguments = argparse.ArgumentParser(description="What `latdiff3d plan` says beside what is measured.")
    arguments.add_argument("--short", action="store_true", help="one configuration of each stage")
    given = arguments.parse_args()
    import torch

    from latdiff3d.simulated_memory import simulate

    on_gpu = torch.cuda.is_available()
    rows = []
    print(f"{'':14}{'step MB: planned':>18}{'measured':>10}{'all MB: planned':>18}{'measured':>10}")
    for stage, configurations in CONFIGURATIONS.items():
        for overlays, settings in configurations[: 1 if given.short else None]:
            need = simulate(stage, overlays, settings, on_gpu)
            arm = {"stage": stage, "overlays": overlays, "settings": settings, "steps": 1}
            found = in_fresh_process(memory.__file__, arm, OWN_MAPPING)
            row = {
                "stage": stage,
                "overlays": overlays,
                "settings": settings,
                "step_mb": [round(need.step / MB), round(found["peak_mb"])],
                "all_mb": [round(need.total / MB), round(found["total_mb"])],
            }
            rows.append(row)
            (step, step_found), (total, total_found) = row["step_mb"], row["all_mb"]
            print(f"{stage:14}{step:18}{step_found:10}{total:18}{total_found:10}  {overlays} {settings}", flush=True)
    worst = {
        f"worst_{part}_error": round(max(abs(row[f"{part}_mb"][0] / row[f"{part}_mb"][1] - 1) for row in rows), 3)
        for part in ("step", "all")
    }
    print(json.dumps({**worst, "configurations": rows}))


if __name__ == "__main__":
    main()
