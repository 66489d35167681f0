"""The diffusion model of a CompVis-style configuration in our terms: `LatentDiffusion` and its `unet_config`.

Keys are those of CompVis' latent-diffusion (Rombach et al. 2022, arXiv:2112.10752), defaults those of its classes.
"""

from collections.abc import Sequence
from typing import Any

from latdiff3d.compvis_autoencoder import NOT_IMPORTED, NUM_GROUPS, class_of
from latdiff3d.conversion import Ledger
from latdiff3d.errors import InputError

UNCONDITIONAL = "__is_unconditional__"
MASK_WORDS = ("mask", "seg", "label_map")  # in the name of what a case's mask is called there
OBJECTIVES = {"eps": ("Epsilon", "epsilon"), "x0": ("Sample", "sample"), "v": ("VPrediction", "v_prediction")}
SCHEDULES = {"linear": "scaled_linear_beta", "sqrt_linear": "linear_beta"}  # linear in √β there, in β here
U_NETS = ("UNetModel",)


def convert_diffusion(params: Ledger, factor: int) -> None:
    """Account for LatentDiffusion's params, its first stage excepted.

    Args:
        params: of the model.
        factor: the first stage's downsampling.

    Raises:
        InputError: another U-Net; a number that it cannot be built without is missing.
    """
    latent_channels = params.whole("first_stage_config.params.embed_dim")
    params.compare(
        "channels", latent_channels, "the first stage's embed_dim",
        f"latents have the channels of the first stage's embed_dim, {latent_channels}",
    )  # fmt: skip
    _noise(params)
    unet, config = params.part("unet_config.params"), params.part("unet_config")
    if class_of(config) not in U_NETS:
        raise InputError(f"{config.prefix}target is {config.value('target')!r}; expected a class named {U_NETS[0]}.")
    config.same("target", "MONAI's DiffusionModelUNet is the bundle's")
    _unet(unet, latent_channels)
    _condition(params, unet.whole("in_channels") - latent_channels, latent_channels)
    _rest(params)
    _crop(params, factor)


def _crop(params: Ledger, factor: int) -> None:
    """Account for `image_size`, of the latents, beside a crop of the image that the data section may name."""
    if not params.has("image_size"):
        return
    crop = [factor * length for length in params.size("image_size")]
    known = params.overlay.get("crop_to")
    if known is None:
        params.carry("image_size", ours={"crop_to": crop}, note=f"latent cells of {factor} voxels")
    elif known.value == crop:
        params.same("image_size", f"crop_to over the first stage's downsampling, {factor}")
    else:
        params.leave("image_size", f"the data's crop_to, {known.value}, makes other latents; the crop counts")


def _noise(params: Ledger) -> None:
    timesteps = params.whole("timesteps", 1000)
    params.carry("timesteps", ours={"noise_schedule::num_train_timesteps": timesteps})
    kind = params.value("beta_schedule", "linear")
    if params.value("given_betas") is not None or str(kind) not in SCHEDULES:
        raise InputError(
            f"{params.prefix}beta_schedule is {kind!r}, given_betas {params.value('given_betas')!r:.40}; expected one "
            f"of {', '.join(SCHEDULES)}, and no given_betas: other noise has no counterpart here."
        )
    note = "the same betas by MONAI's name"
    params.carry("beta_schedule", ours={"noise_schedule::schedule": SCHEDULES[kind]}, note=note)
    params.same("given_betas", "betas follow from the schedule")
    params.same("cosine_s", f"of no effect there either: the schedule is {kind}")
    for key, name, default in (("linear_start", "beta_start", 1e-4), ("linear_end", "beta_end", 2e-2)):
        params.carry(key, ours={f"noise_schedule::{name}": params.number(key, default)})
    target = params.value("parameterization", "eps")
    if str(target) not in OBJECTIVES:
        raise InputError(f"{params.prefix}parameterization is {target!r}; expected one of {', '.join(OBJECTIVES)}.")
    objective, prediction_type = OBJECTIVES[target]
    ours = {"objective::_target_": f"latdiff3d.objectives.{objective}"}
    params.carry("parameterization", ours=ours | {"noise_schedule::prediction_type": prediction_type})


def _unet(unet: Ledger, latent_channels: int) -> None:
    first = unet.whole("model_channels")
    channels = [first * factor for factor in unet.wholes("channel_mult", [1, 2, 4, 8])]
    unet.carry("model_channels", "channel_mult", ours={"denoiser_def::channels": channels})
    number = unet.whole("num_res_blocks")
    unet.carry("num_res_blocks", ours={"denoiser_def::num_res_blocks": number})
    at = unet.wholes("attention_resolutions")
    levels = [2**level in at for level in range(len(channels))]
    note = "levels by their downsampling; the middle has attention in both"
    unet.carry("attention_resolutions", ours={"denoiser_def::attention_levels": levels}, note=note)
    unet.add({"denoiser_def::norm_num_groups": NUM_GROUPS}, "every group norm there")
    _heads(unet, channels)
    unet.compare(
        "out_channels", latent_channels, "the latents' channels", f"the latents have {latent_channels} channels"
    )
    unet.same("in_channels", "the latents' channels, and the condition's")
    unet.leave("image_size", "CompVis' U-Net stores it and never uses it")
    unet.carry("use_checkpoint", ours={"use_checkpoint": bool(unet.value("use_checkpoint", False))})
    if unet.value("use_fp16", False):
        unet.carry("use_fp16", ours={"precision": "fp16"}, note="by autocast")
    else:
        unet.same("use_fp16", "`precision` is the fastest that the device has")
    attention = "attention here is of the latents to themselves; masks are concatenated"
    unet.compare("use_spatial_transformer", False, "attention is of the latents to themselves", attention)
    for key in ("context_dim", "transformer_depth"):
        unet.leave(key, attention)
    all_axes = "in three dimensions; CompVis' own U-Net then leaves the first axis its length, ours halves all three"
    unet.compare("dims", 3, all_axes, "ours is of volumes")
    for key, wanted in (
        ("dropout", 0), ("conv_resample", True), ("num_classes", None), ("use_scale_shift_norm", False),
        ("resblock_updown", False), ("n_embed", None), ("use_new_attention_order", False),
    ):  # fmt: skip
        unet.compare(key, wanted, "so is ours", f"ours is as with {wanted}")
    unet.same("legacy", "it chooses between ways to count heads, which num_head_channels says outright")
    unet.leave_rest(f"no argument of {U_NETS[0]} that is known here")


def _heads(unet: Ledger, channels: Sequence[int]) -> None:
    """Account for the heads: their number there, or their channels as in MONAI; −1 is none."""
    if unet.value("num_head_channels", -1) != -1:
        size = unet.whole("num_head_channels")
        unet.carry("num_head_channels", ours={"denoiser_def::num_head_channels": size})
        unet.leave("num_heads", "num_head_channels is given, which wins there too")
    elif unet.value("num_heads", -1) != -1:
        sizes = [width // unet.whole("num_heads") for width in channels]
        unet.carry("num_heads", ours={"denoiser_def::num_head_channels": sizes}, note="each level's channels / heads")
        unet.same("num_head_channels", "not set")
    else:
        raise InputError(f"{unet.prefix}num_heads and num_head_channels are both missing; expected one of them.")
    unet.leave("num_heads_upsample", "heads are alike on the way down and up")


def _condition(params: Ledger, num_channels: int, latent_channels: int) -> None:
    """Account for what the denoiser is told: an encoded or plain mask on the latent grid, or nothing."""
    stage, key = params.value("cond_stage_config"), params.value("cond_stage_key", "image")
    how = params.value("conditioning_key")
    if how is None and stage != UNCONDITIONAL:
        how = "concat" if params.value("concat_mode", True) else "crossattn"
    is_mask = any(word in str(key).lower() for word in MASK_WORDS)
    if stage == UNCONDITIONAL or how is None or not is_mask:
        _no_condition(params, stage == UNCONDITIONAL, key)
        return
    trained = bool(params.value("cond_stage_trainable", False))
    ours: dict[str, Any] = {"conditioning": "scalar" if num_channels == 1 else "concat"}
    note = f"{num_channels} channels beside {latent_channels} of latents"
    if how == "crossattn" or num_channels < 1:
        ours = {"conditioning": "concat"}
        note = "fractions of labels, for there is no cross-attention to a mask here"
    elif how == "hybrid":
        note += "; of the two parts, cross-attention has no place here"
    elif trained:
        ours = {"conditioning": "encoder", "encoded_channels": num_channels}
        note += " by an encoder that is trained with the denoiser"
    params.carry("conditioning_key", "cond_stage_key", "cond_stage_trainable", ours=ours, note=note)
    encoder = "ours is condition_encoder_def" if trained else "the mask is brought to the latent grid by its labels"
    params.part("cond_stage_config").leave_rest(encoder)
    params.leave("cond_stage_config", encoder)
    params.leave("cond_stage_forward", encoder)


def _no_condition(params: Ledger, says_so: bool, key: str) -> None:
    if says_so:
        params.carry("cond_stage_config", ours={"conditioning": "none"})
    else:
        params.add({"conditioning": "none"}, "no mask to condition on")
    why = "nothing to condition on" if says_so else f"{key} is no mask; numbers and classes of a case are `covariates`"
    for key in ("conditioning_key", "cond_stage_key", "cond_stage_trainable", "cond_stage_forward"):
        (params.same if says_so else params.leave)(key, why)
    if not says_so:
        params.part("cond_stage_config").leave_rest(why)
        params.leave("cond_stage_config", why)


def _rest(params: Ledger) -> None:
    params.compare("concat_mode", True, "masks are concatenated", "masks are concatenated, where there are any")
    params.compare("first_stage_key", "image", "a case's image", "a case's volumes are its image, found by `layout`")
    for key in ("scale_factor", "scale_by_std"):
        params.leave(key, "stage 1's codec measures mean and std of each latent channel and keeps them")
    params.compare("loss_type", "l2", "the squared error", "the loss is the squared error")
    for key, wanted in (("original_elbo_weight", 0), ("l_simple_weight", 1), ("learn_logvar", False)):
        params.compare(key, wanted, "one term: the squared error", "the loss is the squared error alone")
    params.compare("logvar_init", 0, "errors weigh alike", "errors weigh alike at every time, or by min_snr_gamma")
    params.same("clip_denoised", "LatentDiffusion sets it to false whatever the file says; latents are never clipped")
    params.leave("v_posterior", "samplers are chosen in sampling: sampler, sampling_eta")
    params.compare("use_ema", True, "samples are made by the averaged weights", "samples are made by averaged weights")
    params.compare("use_positional_encodings", False, "there are none", "there are none")
    params.compare("num_timesteps_cond", 1, "a condition has no noise", "conditions are given without noise")
    params.leave("log_every_t", "previews are samples, at each validation")
    params.leave("monitor", "the best epoch is that of the lowest validation loss")
    params.compare("ckpt_path", None, "a fresh network", NOT_IMPORTED)
    params.compare("ignore_keys", [], "weights load whole or not at all", "weights load whole or not at all")
    params.compare("load_only_unet", False, "weights load whole", "weights load whole or not at all")
