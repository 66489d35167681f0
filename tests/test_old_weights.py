"""Old state dicts: told apart by their names, loaded with the same outputs, and refused where they do not fit."""

import math

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets import VQVAE, AutoencoderKL, DiffusionModelUNet
from torch.nn import functional as F

from latdiff3d.architecture import settings_of
from latdiff3d.errors import InputError
from latdiff3d.networks import TrilinearAutoencoderKL
from latdiff3d.old_weights import DENOISER, GENERATIVE, KL, MAISI, MONAI, VQ, load, recognised
from latdiff3d.quantization import VQAutoencoder

KL_NETWORK = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 3, "channels": (8, 16),
    "num_res_blocks": 1, "attention_levels": (False, True), "norm_num_groups": 4,
}  # fmt: skip
U_NET = {
    "spatial_dims": 3, "in_channels": 3, "out_channels": 3, "channels": (8, 16), "num_res_blocks": 1,
    "attention_levels": (False, True), "norm_num_groups": 4, "num_head_channels": 8,
}  # fmt: skip


def randomised(network):
    """Return `network` with weights that are nowhere 0 or 1, so that a layer left out shows."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return network.eval()


def as_generative(network):
    """Return the state dict that monai-generative 0.2.3 would have, with projections that it never applies."""
    old = {}
    for key, value in network.state_dict().items():
        if ".attn.out_proj." in key:
            key, value = key.replace(".attn.out_proj.", ".proj_attn."), torch.randn_like(value)
        key = key.replace(".attn.to_", ".to_").replace(".postconv.", ".conv.").replace(".out_proj.", ".to_out.0.")
        old[key] = value
    return old


def old_attention(state, block, x, num_heads, num_groups, eps=1e-6):
    """monai-generative's attention over a grid, from its weights: softmax(q kᵀ / √d) v of the normed x, added to x."""

    def heads(name):
        flat = F.linear(normed, state[f"{block}.{name}.weight"], state[f"{block}.{name}.bias"])
        return flat.view(batch, -1, num_heads, channels // num_heads).transpose(1, 2)  # (B, heads, cells, d)

    batch, channels = x.shape[:2]
    normed = F.group_norm(x, num_groups, state[f"{block}.norm.weight"], state[f"{block}.norm.bias"], eps)
    normed = normed.flatten(2).transpose(1, 2)  # (B, cells, C)
    query, key, value = heads("to_q"), heads("to_k"), heads("to_v")
    weights = (query @ key.transpose(2, 3) / math.sqrt(channels // num_heads)).softmax(dim=-1)
    attended = (weights @ value).transpose(1, 2).reshape(batch, -1, channels)  # (B, cells, C)
    return x + attended.transpose(1, 2).reshape(x.shape)


# Told apart


def maisi(**changes):
    named = {**KL_NETWORK, **changes}
    named["num_channels"] = named.pop("channels")
    named |= {"with_encoder_nonlocal_attn": True, "with_decoder_nonlocal_attn": True}  # as MONAI's are by default
    return AutoencoderKlMaisi(**{**named, "num_res_blocks": (1, 1)}, num_splits=1, save_mem=False)


def book():
    return VQVAE(
        3, 1, 1, channels=(8, 8), num_res_layers=2, num_res_channels=(8, 4), num_embeddings=16, embedding_dim=3,
        downsample_parameters=((1, 3, 1, 1), (2, 4, 1, 1)), upsample_parameters=((2, 4, 1, 1, 0), (1, 3, 1, 1, 0)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "format", "kind"),
    [
        (lambda: as_generative(AutoencoderKL(**KL_NETWORK)), GENERATIVE, KL),
        (lambda: AutoencoderKL(**KL_NETWORK).state_dict(), MONAI, KL),
        (lambda: maisi().state_dict(), MAISI, KL),
        (lambda: book().state_dict(), MONAI, VQ),
        (lambda: as_generative(DiffusionModelUNet(**U_NET)), GENERATIVE, DENOISER),
        (lambda: DiffusionModelUNet(**U_NET).state_dict(), MONAI, DENOISER),
    ],
)
def test_format_and_kind_are_told_by_names(state, format, kind):
    old = recognised({f"module.{key}": value for key, value in state().items()}, "old.pt")
    assert (old.format, old.kind) == (format, kind)


def test_without_attention_the_upsampling_tells_the_format():
    plain = {**KL_NETWORK, "attention_levels": (False, False)}
    plain |= {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
    network = AutoencoderKL(**plain)
    assert recognised(as_generative(network), "old.pt").format == GENERATIVE
    assert recognised(network.state_dict(), "new.pt").format == MONAI


def test_other_weights_are_refused_by_their_first_keys():
    with pytest.raises(InputError, match=r"^x\.pt begins with 0\.weight, 0\.bias \(2 keys\); expected a state dict of"):
        recognised(torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict(), "x.pt")


# Same outputs


@torch.no_grad()
def test_old_attention_is_that_without_the_projection():
    network = randomised(AutoencoderKL(**KL_NETWORK))
    state = as_generative(network)
    load(network, recognised(state, "old.pt"), "old.pt")
    block = "encoder.blocks.4"
    x = torch.randn(2, 16, 3, 4, 2)
    torch.testing.assert_close(network.encoder.blocks[4](x), old_attention(state, block, x, 1, 4), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_u_nets_old_attention_has_its_heads_and_no_projection():
    network = randomised(DiffusionModelUNet(**U_NET))
    state = as_generative(network)
    load(network, recognised(state, "old.pt"), "old.pt")
    x = torch.randn(2, 16, 3, 4, 2)
    found = network.middle_block.attention(x)
    torch.testing.assert_close(found, old_attention(state, "middle_block.attention", x, 2, 4), rtol=0, atol=1e-5)
    assert (found - old_attention(state, "middle_block.attention", x, 1, 4)).abs().max() > 1e-2


@torch.no_grad()
def test_monais_own_loader_applies_the_projection_and_ours_does_not():
    """The trap: at its defaults it gives other outputs, silently."""
    network, x = randomised(AutoencoderKL(**KL_NETWORK)), torch.randn(2, 16, 3, 4, 2)
    state = as_generative(network)
    network.load_old_state_dict(dict(state))
    assert (network.encoder.blocks[4](x) - old_attention(state, "encoder.blocks.4", x, 1, 4)).abs().max() > 0.1


@torch.no_grad()
def test_cross_attention_keeps_its_projection():
    network = randomised(DiffusionModelUNet(**U_NET, with_conditioning=True, cross_attention_dim=5))
    x, context, t = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 2, 5), torch.tensor([7])
    expected = network(x, t, context)
    fresh = DiffusionModelUNet(**U_NET, with_conditioning=True, cross_attention_dim=5).eval()
    load(fresh, recognised(as_generative(network), "old.pt"), "old.pt")
    torch.testing.assert_close(fresh(x, t, context), expected, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("flags", [{"include_fc": False}, {"use_combined_linear": True}, {}], ids=str)
def test_monais_own_flags_of_attention_fit_one_network(flags):
    original = randomised(AutoencoderKL(**KL_NETWORK, **flags))
    network = AutoencoderKL(**KL_NETWORK).eval()
    load(network, recognised(original.state_dict(), "new.pt"), "new.pt")
    image = torch.rand(1, 1, 8, 8, 8)
    mean, std = original.encode(image)
    torch.testing.assert_close(network.encode(image), (mean, std), rtol=0, atol=1e-5)
    torch.testing.assert_close(network.decode(mean), original.decode(mean), rtol=0, atol=1e-5)


@torch.no_grad()
def test_maisis_autoencoder_upsamples_trilinearly_and_its_norms_round_alike():
    original, image = randomised(maisi()), torch.rand(1, 1, 8, 8, 8)
    old = recognised(original.state_dict(), "maisi.pt")
    mean, std = original.encode(image)
    network = TrilinearAutoencoderKL(**KL_NETWORK)
    assert settings_of(old)["autoencoder_def"]["_target_"] == "latdiff3d.networks.TrilinearAutoencoderKL"
    load(network.eval(), old, "maisi.pt")
    torch.testing.assert_close(network.encode(image), (mean, std), rtol=0, atol=1e-6)
    torch.testing.assert_close(network.decode(mean), original.decode(mean), rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_vqvaes_book_is_ours():
    original, image = randomised(book()), torch.rand(1, 1, 8, 8, 8)
    original.quantizer.quantizer.embedding.weight.data.normal_()
    network = VQAutoencoder(
        3, 1, 1, channels=(8, 8), num_res_layers=2, num_res_channels=(8, 4), n_embed=16, embed_dim=3,
        downsample_parameters=((1, 3, 1, 1), (2, 4, 1, 1)), upsample_parameters=((2, 4, 1, 1, 0), (1, 3, 1, 1, 0)),
    )  # fmt: skip
    load(network.eval(), recognised(original.state_dict(), "vq.pt"), "vq.pt")
    torch.testing.assert_close(network(image)[0], original(image)[0], rtol=0, atol=1e-5)
    assert network.quantizer.num_updates == 1  # so that training does not draw the codes anew


# What weights tell


@pytest.mark.parametrize(
    ("middle", "levels", "numbers"),
    [
        ((True, True), (False, True), (1, 2)),
        ((False, False), (True, True), (2, 1)),
        ((True, False), (False, False), (1, 1)),
        ((False, True), (False, True), (2, 2)),
    ],
)
def test_an_autoencoders_architecture_is_told_by_its_weights(middle, levels, numbers):
    arguments = {**KL_NETWORK, "attention_levels": levels, "num_res_blocks": numbers}
    arguments |= {"with_encoder_nonlocal_attn": middle[0], "with_decoder_nonlocal_attn": middle[1]}
    told = settings_of(recognised(as_generative(AutoencoderKL(**arguments)), "old.pt"))
    assert told["latent_channels"] == 3 and told["modalities"] == ["image"] and told["wavelet_levels"] == 0
    found = {key.removeprefix("autoencoder_def::"): value for key, value in told.items()}
    assert found["channels"] == [8, 16] and found["attention_levels"] == list(levels)
    assert found["num_res_blocks"] == (numbers[0] if len(set(numbers)) == 1 else list(numbers))
    assert (found["with_encoder_nonlocal_attn"], found["with_decoder_nonlocal_attn"]) == middle


def test_a_vqvaes_architecture_is_told_by_its_weights():
    told = settings_of(recognised(book().state_dict(), "vq.pt"))["autoencoder_def"]
    assert (told["n_embed"], told["channels"], told["num_res_channels"]) == (16, [8, 8], [8, 4])
    assert told["num_res_layers"] == 2 and told["downsample_parameters"] == [[1, 3, 1, 1], [2, 4, 1, 1]]
    assert told["upsample_parameters"] == [[2, 4, 1, 1, 0], [1, 3, 1, 1, 0]]


def test_a_u_nets_architecture_is_told_by_its_weights():
    told = settings_of(recognised(as_generative(DiffusionModelUNet(**U_NET)), "old.pt"))
    assert told["denoiser_def::channels"] == [8, 16] and told["denoiser_def::num_res_blocks"] == 1
    assert told["denoiser_def::attention_levels"] == [False, True] and told["conditioning"] == "none"
    conditional = DiffusionModelUNet(**{**U_NET, "in_channels": 5})
    assert "conditioning" not in settings_of(recognised(conditional.state_dict(), "new.pt"))


# What is refused


def test_a_wrong_match_names_what_is_missing_too_many_and_misshapen():
    old = recognised(as_generative(AutoencoderKL(**KL_NETWORK)), "old.pt")
    fewer = AutoencoderKL(**{**KL_NETWORK, "attention_levels": (False, False), "latent_channels": 4})
    with pytest.raises(InputError) as refused:
        load(fewer, old, "old.pt")
    line = str(refused.value)
    assert line.startswith(
        "old.pt, the AutoencoderKL of monai-generative, does not fit the configured AutoencoderKL: it"
    )
    assert "lacks " in line and "also has encoder.blocks." in line and "has another shape of " in line
    assert "\n" not in line and len(line) < 700


def test_maisis_u_net_is_refused_for_its_further_inputs():
    state = DiffusionModelUNet(**U_NET).state_dict() | {"spacing_layer.0.weight": torch.zeros(8, 3)}
    with pytest.raises(
        InputError, match=r"the DiffusionModelUNet of MAISI, .* also has spacing_layer\.0\.weight \(1\)"
    ):
        load(DiffusionModelUNet(**U_NET), recognised(state, "maisi.pt"), "maisi.pt")


@torch.no_grad()
@pytest.mark.parametrize("kind", [KL, DENOISER])
def test_monai_generatives_own_networks_give_the_same(kind):
    """Where monai-generative 0.2.3 is at hand, which is not installed: its networks, not their names alone."""
    nets = pytest.importorskip("generative.networks.nets")
    arguments = dict(KL_NETWORK if kind == KL else U_NET)
    arguments["num_channels"] = arguments.pop("channels")
    original = randomised(getattr(nets, kind)(**arguments))
    network = (AutoencoderKL(**KL_NETWORK) if kind == KL else DiffusionModelUNet(**U_NET)).eval()
    load(network, recognised(original.state_dict(), "old.pt"), "old.pt")
    if kind == KL:
        mean = original.encode(torch.rand(1, 1, 8, 8, 8))[0]
        torch.testing.assert_close(network.decode(mean), original.decode(mean), rtol=0, atol=1e-5)
    else:
        x, t = torch.randn(1, 3, 8, 8, 8), torch.tensor([3])
        torch.testing.assert_close(network(x, t), original(x, t), rtol=0, atol=1e-5)
