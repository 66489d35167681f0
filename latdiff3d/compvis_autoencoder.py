"""The autoencoder of a CompVis-style configuration in our terms: `ddconfig`, `embed_dim`, `n_embed` and `lossconfig`.

Keys are those of CompVis' latent-diffusion (Rombach et al. 2022, arXiv:2112.10752), defaults those of its classes.
"""

from collections.abc import Sequence
from typing import Any

from latdiff3d.conversion import Ledger
from latdiff3d.errors import InputError

KL, VQ = ("AutoencoderKL",), ("VQModel", "VQModelInterface")
KL_LOSSES, VQ_LOSSES = ("LPIPSWithDiscriminator",), ("VQLPIPSWithDiscriminator",)
NUM_GROUPS = 32  # of every group norm there
DISC_CHANNELS = 64  # of the discriminator's first layer, where the loss takes no disc_ndf
VQ_BETA = 0.25  # fixed in VQModel
DEFAULT_MODALITIES = 4  # as many as the bundle has
NOT_IMPORTED = "a checkpoint there holds other layers than MONAI's networks have; train stage 1 here"


def class_of(ledger: Ledger, key: str = "target") -> str:
    """Return the class that a `target` names, without its modules, "" for none."""
    return str(ledger.value(key) or "").rpartition(".")[2]


def convert_autoencoder(ledger: Ledger, is_trained: bool) -> int:
    """Account for the `target` and `params` of an autoencoder, its loss excepted, and return its downsampling.

    Args:
        ledger: of the part that holds both.
        is_trained: rather than the frozen first stage of a diffusion model.

    Raises:
        InputError: another class; a number that it cannot be built without is missing.
    """
    name = class_of(ledger)
    if name not in (*KL, *VQ):
        raise InputError(
            f"{ledger.prefix}target is {ledger.value('target')!r}; expected a class that ends in {', '.join(KL + VQ)}: "
            "no other autoencoder has a counterpart here."
        )
    params = ledger.part("params")
    dd = params.part("ddconfig")
    _image_channels(dd)
    channels = _channels(dd)
    latent_channels = params.whole("embed_dim")
    params.carry("embed_dim", ours={"latent_channels": latent_channels})
    dd.compare(
        "z_channels", latent_channels, "MONAI's latents have embed_dim channels everywhere",
        "MONAI's autoencoder has one number of latent channels, embed_dim, and no layer between the two",
    )  # fmt: skip
    ledger.add({"wavelet_levels": 0, "latent_noise": 0}, "MONAI's network alone, as there")
    if name in KL:
        ledger.same("target", "MONAI's AutoencoderKL is the bundle's")
        _kl_network(dd, channels)
    else:
        # A component of another class replaces the bundle's, so that all of it must be said.
        ledger.carry("target", ours={"autoencoder_def::_target_": "latdiff3d.quantization.VQAutoencoder"})
        _vq_network(params, dd, channels)
    _rest(params, dd, is_trained)
    return int(2 ** (len(channels) - 1))


def _image_channels(dd: Ledger) -> None:
    number = dd.whole("in_channels")
    if number == DEFAULT_MODALITIES:
        dd.same("in_channels", "the bundle has four modalities; set `modalities` if they are others")
    else:
        names = ["image"] if number == 1 else [f"channel_{n}" for n in range(number)]
        dd.carry("in_channels", ours={"modalities": names}, note="name yours, in order")
    dd.compare("out_ch", number, "what goes in comes out", "an autoencoder here gives as many channels as it is given")


def _channels(dd: Ledger) -> list[int]:
    first = dd.whole("ch")
    return [first * factor for factor in dd.wholes("ch_mult", [1, 2, 4, 8])]


def _kl_network(dd: Ledger, channels: Sequence[int]) -> None:
    dd.carry("ch", "ch_mult", ours={"autoencoder_def::channels": list(channels)})
    number = dd.whole("num_res_blocks")
    note = "of the decoder too, where CompVis has one more a level"
    dd.carry("num_res_blocks", ours={"autoencoder_def::num_res_blocks": number}, note=note)
    kind = dd.value("attn_type", "vanilla")
    _attention(dd, len(channels), kind != "none")
    ours = {f"autoencoder_def::with_{half}_nonlocal_attn": kind != "none" for half in ("encoder", "decoder")}
    note = "in the middle; MONAI's networks have no linear attention, so it is the full one"
    dd.carry("attn_type", ours=ours, note=note if kind == "linear" else "in the middle")
    dd.add({"autoencoder_def::norm_num_groups": NUM_GROUPS}, "every group norm there")
    dd.compare("double_z", True, "a posterior has a mean and a variance", "a KL autoencoder without a variance is none")
    dd.compare("dropout", 0.0, "MONAI's autoencoder has none", "MONAI's autoencoder has no dropout")


def _attention(dd: Ledger, num_levels: int, is_there: bool) -> None:
    """Account for `attn_resolutions`, sizes of the grid on the way down from `resolution`, as levels.

    Args:
        is_there: attention at all; `attn_type: none` puts nothing in its place, on levels too.
    """
    at, resolution = dd.value("attn_resolutions", []), dd.value("resolution")
    at = at if isinstance(at, list) else [at]
    if not is_there:
        note = "attn_type is none, which is of the levels too"
        dd.carry("attn_resolutions", ours={"autoencoder_def::attention_levels": [False] * num_levels}, note=note)
    elif at and not isinstance(resolution, int):
        dd.leave("attn_resolutions", f"which levels they are follows from one resolution, and it is {resolution}")
        dd.add({"autoencoder_def::attention_levels": [False] * num_levels}, "attn_resolutions is not carried")
    else:
        levels = [bool(at) and resolution // 2**level in at for level in range(num_levels)]
        dd.carry("attn_resolutions", ours={"autoencoder_def::attention_levels": levels}, note=f"of {resolution}")
    dd.same("resolution", "convolutions take any size; what is trained on is crop_to")


def _vq_network(params: Ledger, dd: Ledger, channels: Sequence[int]) -> None:
    halvings = len(channels) - 1
    own: dict[str, Any] = {
        "spatial_dims": 3, "in_channels": "@num_bands", "out_channels": "@num_bands", "embed_dim": "@latent_channels",
        "codebook": "gradient", "depth": 1,
    }  # fmt: skip
    params.add({f"autoencoder_def::{key}": value for key, value in own.items()}, "a VQ autoencoder's, as there")
    strides = {
        "autoencoder_def::channels": list(channels),
        "autoencoder_def::num_res_channels": list(channels),
        "autoencoder_def::downsample_parameters": [[1, 3, 1, 1]] + [[2, 4, 1, 1]] * halvings,
        "autoencoder_def::upsample_parameters": [[2, 4, 1, 1, 0]] * halvings + [[1, 3, 1, 1, 0]],
    }
    dd.carry("ch", "ch_mult", ours=strides)
    number = dd.whole("num_res_blocks")
    dd.carry("num_res_blocks", ours={"autoencoder_def::num_res_layers": number})
    codes = params.whole("n_embed")
    params.carry("n_embed", ours={"autoencoder_def::n_embed": codes}, note="one code a latent, by the codebook term")
    dd.compare("attn_resolutions", [], "MONAI's VQVAE has none", "MONAI's VQVAE has no attention")
    dd.compare("attn_type", "none", "MONAI's VQVAE has none", "MONAI's VQVAE has no attention")
    dd.same("resolution", "convolutions take any size; what is trained on is crop_to")
    dd.compare("double_z", False, "a code needs no variance", "a VQ autoencoder has no posterior")
    dd.carry("dropout", ours={"autoencoder_def::dropout": dd.number("dropout", 0.0)})
    params.compare("remap", None, "all codes keep their number", "codes keep their number")
    params.leave("sane_index_shape", "codes' numbers keep the volume's shape")
    params.compare("use_ema", False, "stage 1's weights are not averaged", "stage 1's weights are not averaged")
    params.compare("batch_resize_range", None, "batches have crop_to's size", "batches have crop_to's size")


def _rest(params: Ledger, dd: Ledger, is_trained: bool) -> None:
    recomputes = bool(params.value("use_checkpoint") or dd.value("use_checkpoint"))
    for part in (params, dd):
        if is_trained and part.has("use_checkpoint"):
            part.carry("use_checkpoint", ours={"use_checkpoint": recomputes})
        else:
            part.same("use_checkpoint", "a frozen first stage keeps nothing to go back through")
    dd.compare("resamp_with_conv", True, "a convolution", "MONAI's networks resample by convolutions")
    dd.compare("use_linear_attn", False, "MONAI's attention is none", "MONAI's networks have no linear attention")
    dd.compare("tanh_out", False, "an image's values are not squashed", "an image's values are not squashed here")
    dd.compare("give_pre_end", False, "the decoder is whole", "the decoder is whole here")
    params.compare("ckpt_path", None, "a fresh network", NOT_IMPORTED)
    params.compare("ignore_keys", [], "weights load whole or not at all", "weights load whole or not at all")
    params.compare("image_key", "image", "a case's image", "a case's volumes are its image, found by `layout`")
    params.compare("colorize_nlabels", None, "previews are slices in grey", "previews are slices in grey")
    params.leave("monitor", "the best epoch is that of the highest validation PSNR")


def convert_loss(ledger: Ledger, is_kl: bool, factor: int) -> None:
    """Account for `lossconfig`.

    Args:
        ledger: of the autoencoder's params.
        is_kl: rather than VQ.
        factor: the autoencoder's downsampling.
    """
    loss, params = ledger.part("lossconfig"), ledger.part("lossconfig.params")
    known = KL_LOSSES if is_kl else VQ_LOSSES
    if class_of(loss) not in known:
        loss.leave("target", f"only {known[0]} has a counterpart; the loss stays the bundle's")
        loss.leave_rest("it is an argument of that loss")
        return
    loss.same("target", "reconstruction, latents, perceptual and adversarial terms: the bundle's loss")
    _discriminator(params, ledger)
    weight = params.number("perceptual_weight", 1.0)
    if weight == 0:
        params.carry("perceptual_weight", ours={"loss::perceptual_weight": 0.0})
    else:
        why = "LPIPS looks at slices in RGB through a network that is downloaded; a segmenter's features serve instead:"
        params.leave("perceptual_weight", f"{why} segmenter=RUN loss.perceptual_weight={weight}")
    params.leave("pixelloss_weight", "CompVis' loss stores it and never uses it")
    if is_kl:
        _kl_terms(params, ledger, factor)
    else:
        _vq_terms(params)
    loss.leave_rest(f"{known[0]} has no such argument that is known here")


def _discriminator(params: Ledger, autoencoder: Ledger) -> None:
    start = int(params.number("disc_start")) + 1
    params.carry("disc_start", ours={"loss::disc_start": start}, note="updates count from 1 here, from 0 there")
    weight, factor = params.number("disc_weight", 1.0), params.number("disc_factor", 1.0)
    params.carry("disc_weight", "disc_factor", ours={"loss::disc_weight": weight * factor}, note="their product")
    layers = params.whole("disc_num_layers", 3)
    params.carry("disc_num_layers", ours={"discriminator_def::num_layers_d": layers})
    params.carry("disc_ndf", ours={"discriminator_def::channels": params.whole("disc_ndf", DISC_CHANNELS)})
    image_channels = autoencoder.value("ddconfig.in_channels")
    params.compare(
        "disc_in_channels", image_channels, "the image's channels",
        f"the discriminator sees the image, which has {image_channels} channels",
    )  # fmt: skip
    if params.value("disc_loss", "hinge") == "hinge":
        params.carry("disc_loss", ours={"loss::adversarial": "hinge"})
    else:
        params.leave("disc_loss", "there are hinge and least_squares here; the bundle's stays")
    params.compare("use_actnorm", False, "norms are those of instances", "the discriminator's norms are of instances")
    params.compare("disc_conditional", False, "it sees the image alone", "the discriminator sees the image alone")


def _kl_terms(params: Ledger, autoencoder: Ledger, factor: int) -> None:
    logvar = params.number("logvar_init", 0.0)
    note = "a constant: CompVis' optimiser does not hold it either"
    params.carry("logvar_init", ours={"loss::logvar_init": logvar}, note=note)
    weight = params.number("kl_weight", 1.0)
    share = autoencoder.whole("embed_dim") / (autoencoder.whole("ddconfig.in_channels") * factor**3)
    note = f"of means, not sums: × {share:.6g}, latent elements / image elements"
    params.carry("kl_weight", ours={"loss::kl_weight": weight * share, "loss::kl_reduction": "mean"}, note=note)
    params.add({"loss::reconstruction": "l1"}, "as there")


def _vq_terms(params: Ledger) -> None:
    weight = params.number("codebook_weight", 1.0)
    ours = {"loss::codebook_weight": weight * VQ_BETA, "loss::commitment_weight": 1 / VQ_BETA}
    note = f"CompVis lays its beta, {VQ_BETA}, on the codebook term and 1 on the commitment"
    params.carry("codebook_weight", ours=ours, note=note)
    pixel = params.value("pixel_loss", "l1")
    if pixel in ("l1", "l2"):
        params.carry("pixel_loss", ours={"loss::reconstruction": pixel})
    else:
        params.leave("pixel_loss", "there are l1 and l2 here")
    params.leave("perceptual_loss", "see perceptual_weight")
    params.leave("n_classes", "CompVis' loss stores it and never uses it")
