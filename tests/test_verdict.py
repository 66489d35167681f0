"""Which codecs are poor, and what is said of them."""

import pytest

from latdiff3d import verdict


def figures(psnr=21.3, pca=20.7, ratio=0.9, channels=((0.0, 1.0, 0.2),), codebook=None):
    names = ("mean", "std", "excess_kurtosis")
    return {
        "autoencoder": {"psnr_db": psnr, "spectrum_ratio": ratio},
        "block_pca": {"psnr_db": pca, "spectrum_ratio": 0.6},
        "gain_over_pca_db": psnr - pca,
        "latents": [dict(zip(names, channel, strict=True)) for channel in channels],
        "codebook": codebook,
    }


def test_a_good_codec_has_nothing_against_it():
    assert verdict.poor(figures()) == []
    assert verdict.poor(figures(codebook={"use": 0.5, "size": 512})) == []


@pytest.mark.parametrize("psnr", [20.7, 19.0])
def test_a_codec_no_better_than_the_linear_one_is_poor(psnr):
    [reason] = verdict.poor(figures(psnr=psnr))
    assert reason == f"PSNR {psnr:.2f} dB is not above block PCA's 20.70 dB"


@pytest.mark.parametrize(
    ("channel", "word"),
    [((0.0, 0.7, 0.0), "std 0.70"), ((0.0, 1.4, 0.0), "std 1.40"), ((0.0, 1.0, 40.0), "excess kurtosis 40.00"),
     ((0.0, 1.0, -1.9), "excess kurtosis -1.90")],
)  # fmt: skip
def test_a_latent_channel_far_from_a_unit_normal_is_named(channel, word):
    [reason] = verdict.poor(figures(channels=((0.1, 1.1, -0.5), channel)))
    assert reason.startswith(f"latent channel 1 has {word}, not ")


def test_a_constant_channel_is_poor_by_its_std_alone():
    [reason] = verdict.poor(figures(channels=((0.0, 0.0, None),)))
    assert "std 0.00" in reason


def test_half_of_the_codebook_must_be_in_use():
    [reason] = verdict.poor(figures(codebook={"use": 0.06, "size": 64}))
    assert reason == "6% of the codebook's 64 codes are in use, not 50%"


def test_blur_is_said_but_not_held_against_a_codec():
    assert verdict.poor(figures(ratio=0.4)) == []
    assert "0.40 of the real volumes' fine detail (blurred: not 0.7 to 1.3)" in verdict.summary(figures(ratio=0.4))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {},
            "PSNR 21.3 dB, 0.6 dB above the best linear code at the same rate; 0.90 of the real volumes' fine detail",
        ),
        (
            {"psnr": 19.2, "ratio": 1.5},
            "PSNR 19.2 dB, 1.5 dB below the best linear code at the same rate; 1.50 of the real volumes' fine detail "
            "(noisy: not 0.7 to 1.3)",
        ),
        ({"ratio": None}, "PSNR 21.3 dB, 0.6 dB above the best linear code at the same rate"),
    ],
)
def test_a_codec_is_summed_up_in_one_line(given, line):
    assert verdict.summary(figures(**given)) == line
