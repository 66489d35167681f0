"""What a plain setting must be, told before anything is read or trained."""

from collections.abc import Callable, Mapping
from typing import Any

from latdiff3d.errors import InputError
from latdiff3d.noise_schedules import SPACINGS, TIME_DISTRIBUTIONS


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_numbers(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(isinstance(v, (int, float)) for v in value)


def _is_only_name(value: Any, names: list[Any]) -> bool:
    return isinstance(value, str) and names.count(value) == 1


def _is_only_label(value: Any, labels: list[Any]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and labels.count(value) == 1


# What a plain setting must be, for those whose mistakes would otherwise surface late, or never.
EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "batch_size": (_is_count, "a whole number from 1 on"),
    "accumulate_grad_batches": (_is_count, "a whole number of batches from 1 on"),
    "max_epochs": (_is_count, "a whole number from 1 on"),
    "val_interval": (_is_count, "a whole number from 1 on"),
    "encode": (lambda value: value in ("cached", "on_the_fly"), "cached or on_the_fly"),
    "encode_memory_gb": (
        lambda value: value is None or (isinstance(value, (int, float)) and value > 0),
        "GB above 0, or null for as much as it takes",
    ),
    "compile": (lambda value: isinstance(value, (bool, str)), "true, false or a backend's name, such as aot_eager"),
    "flips": (
        lambda value: isinstance(value, list) and all(_is_natural(v) and v < 3 and value.count(v) == 1 for v in value),
        "a list of axes, each of 0, 1 and 2 at most once, such as [0]",
    ),
    "checkpoint_every": (_is_natural, "a whole number of steps, or 0 for none"),
    "keep_checkpoints": (_is_count, "a whole number from 1 on"),
    "num_fine_cases": (lambda value: value is None or _is_count(value), "a whole number from 1 on, or null"),
    "skip_bad_cases": (lambda value: isinstance(value, bool), "true or false"),
    "num_workers": (lambda value: value == "auto" or _is_natural(value), "a whole number from 0 on, or auto"),
    "prefetch_factor": (lambda value: value is None or _is_count(value), "a whole number from 1 on, or null"),
    "cache": (lambda value: value in ("memory", "disk", "none"), "memory, disk or none"),
    "cache_rate": (
        lambda value: isinstance(value, (int, float)) and 0 <= value <= 1,
        "a share of the cases from 0 to 1",
    ),
    "quality_cases": (_is_natural, "a whole number from 0 on"),
    "sampling_steps": (_is_count, "a whole number from 1 on"),
    "time_distribution": (lambda value: value in TIME_DISTRIBUTIONS, f"one of {', '.join(TIME_DISTRIBUTIONS)}"),
    "min_snr_gamma": (
        lambda value: value is None or (isinstance(value, (int, float)) and value > 0),
        "a number above 0, such as 5, or null",
    ),
    "sampling_spacing": (
        lambda value: value is None or value in SPACINGS,
        f"one of {', '.join(SPACINGS)}, or null for the sampler's own",
    ),
    "sampling_eta": (lambda value: isinstance(value, (int, float)) and 0 <= value <= 1, "a number from 0 to 1"),
    "condition_dropout": (
        lambda value: isinstance(value, (int, float)) and 0 <= value < 1,
        "a probability from 0 to below 1, such as 0.1",
    ),
    "latent_channels": (_is_count, "a whole number from 1 on"),
    "initial_posterior_std": (lambda value: isinstance(value, (int, float)) and value > 0, "a number above 0"),
    "seed": (_is_natural, "a whole number from 0 on"),
    "learning_rate": (lambda value: isinstance(value, (int, float)) and value > 0, "a number above 0"),
    "mlflow": (lambda value: isinstance(value, str), "a server's URI or a folder, or '' for none"),
    "first_stage": (lambda value: isinstance(value, str), "a checkpoint or a run's folder"),
    "modalities": (
        lambda value: isinstance(value, list) and bool(value) and all(_is_only_name(v, value) for v in value),
        "a list of names, each once, such as [flair, t1, t1ce, t2]",
    ),
    "labels": (
        lambda value: isinstance(value, list) and value[:1] == [0] and all(_is_only_label(v, value) for v in value),
        "a list of whole numbers, each once, that begins with the background's 0, such as [0, 1, 2, 4]",
    ),
    "intensity_percentiles": (lambda value: _are_numbers(value, 2), "two percentiles, such as [0, 99.5]"),
    "spacing": (
        lambda value: value is None or (_are_numbers(value, 3) and min(value) > 0),
        "three sizes in mm, such as [1, 1, 1], or null",
    ),
}

# Settings of a part that is there only where another setting, the first here, has the value behind it.
USED_ONLY_WITH = {
    "condition_encoder_def": ("conditioning", "encoder"),
    "encoded_channels": ("conditioning", "encoder"),
}


def check_settings(resolved: Mapping[str, Any]) -> None:
    """Refuse a plain setting that is not what it must be, and validation that would never happen.

    Args:
        resolved: a stage's whole configuration, its expressions and references not evaluated.

    Raises:
        InputError: naming setting, value and what is expected.
    """
    for key, (is_fine, expected) in EXPECTED.items():
        value = resolved.get(key)
        if key in resolved and not is_expression(value) and not is_fine(value):
            raise InputError(f"{key} is {value!r}; expected {expected}.")
    interval, epochs = resolved.get("val_interval"), resolved.get("max_epochs")
    if isinstance(interval, int) and isinstance(epochs, int) and interval > epochs:
        raise InputError(f"val_interval {interval} is above max_epochs {epochs}; expected a validation before the end.")


def refuse_unused(resolved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a setting that was changed where another one, as it is, leaves it unused.

    Args:
        resolved: a stage's whole configuration, as for `check_settings`.
        own: the bundle's, without overlays and without what the command line set.

    Raises:
        InputError: naming the setting, and the other one with the value that it needs.
    """
    for key, (switch, needed) in USED_ONLY_WITH.items():
        value, found, usual = resolved.get(switch), resolved.get(key), own.get(key)
        if found == usual or value == needed or is_expression(value):
            continue
        if isinstance(found, dict) and isinstance(usual, dict):
            key += "::" + next(part for part in [*found, *usual] if found.get(part) != usual.get(part))
        raise InputError(
            f"{key} is set, and with {switch} {value!r} nothing uses it; set {switch}={needed}, or leave {key} out."
        )


def is_expression(value: Any) -> bool:
    """Say whether MONAI evaluates a setting, or looks it up, rather than take it as it is."""
    return isinstance(value, str) and value[:1] in ("$", "@", "%")
