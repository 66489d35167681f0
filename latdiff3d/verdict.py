"""Whether stage 1's codec is good enough for stage 2 to begin on, told from its figures alone; see quality.py."""

from collections.abc import Mapping
from typing import Any

# A reconstruction's energy above half the Nyquist frequency over the real volumes'. Below, it is blurred.
SPECTRUM_RANGE = (0.7, 1.3)
# Statistics of normalised latents over other cases than those they were normalised by.
STD_RANGE = (0.8, 1.25)
# A channel of two values alone has −2, a uniform one −1.2, a normal one 0. One that is silent but for a share p of its
# cells has 3/p − 3: 6 for a brain that fills a third of its volume, 27 where a tenth of the cells carry all there is.
# The demo's channels of fine detail, most of whose cells are air or plain tissue, have up to 16, and will do.
KURTOSIS_RANGE = (-1.5, 27.0)
CODEBOOK_USE_MIN = 0.5


def summary(figures: Mapping[str, Any]) -> str:
    """Return in one line how a codec did: against the best linear code, and in fine detail."""
    gain = figures["gain_over_pca_db"]
    ratio = figures["autoencoder"]["spectrum_ratio"]
    line = (
        f"PSNR {figures['autoencoder']['psnr_db']:.1f} dB, {abs(gain):.1f} dB {'above' if gain > 0 else 'below'} the "
        "best linear code at the same rate"
    )
    if ratio is None:
        return line
    low, high = SPECTRUM_RANGE
    judged = "" if within(ratio, SPECTRUM_RANGE) else f" ({'blurred' if ratio < low else 'noisy'}: not {low} to {high})"
    return f"{line}; {ratio:.2f} of the real volumes' fine detail{judged}"


def poor(figures: Mapping[str, Any]) -> list[str]:
    """Return what speaks against training stage 2 on a codec, one short reason each; nothing if it will do.

    Blur is not among it: a codec that beats the linear one and is blurred gives stage 2 good latents to learn.
    """
    reasons = []
    own, linear = figures["autoencoder"]["psnr_db"], figures["block_pca"]["psnr_db"]
    if not own > linear:
        reasons.append(f"PSNR {own:.2f} dB is not above block PCA's {linear:.2f} dB")
    for number, channel in enumerate(figures["latents"]):
        for name, allowed in (("std", STD_RANGE), ("excess_kurtosis", KURTOSIS_RANGE)):
            value = channel[name]
            if value is not None and not within(value, allowed):
                words = name.replace("_", " ")
                reasons.append(f"latent channel {number} has {words} {value:.2f}, not {allowed[0]:g} to {allowed[1]:g}")
    codebook = figures["codebook"]
    if codebook is not None and codebook["use"] < CODEBOOK_USE_MIN:
        reasons.append(
            f"{codebook['use']:.0%} of the codebook's {codebook['size']} codes are in use, not {CODEBOOK_USE_MIN:.0%}"
        )
    return reasons


def within(value: float, allowed: tuple[float, float]) -> bool:
    """Return whether a figure lies in its range, both ends included; NaN lies in none."""
    return allowed[0] <= value <= allowed[1]
