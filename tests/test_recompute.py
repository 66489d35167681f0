"""Activation checkpointing per block: the same gradients, names and types, computed twice."""

import copy
import pickle

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import VQVAE, AutoencoderKL, DiffusionModelUNet, PatchDiscriminator
from monai.networks.nets.autoencoderkl import AEKLResBlock
from ranks import NUM_RANKS, on_two_ranks
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from latdiff3d import config
from latdiff3d.errors import InputError
from latdiff3d.networks import downsampling, last_layer, narrow_posterior, placed
from latdiff3d.recompute import BLOCKS, ENCODERS, per_block
from latdiff3d.simulated_memory import simulate

RECOMPUTED = BLOCKS | ENCODERS

SIZE = (8, 8, 8)
CPU = torch.device("cpu")


def autoencoder(**changes):
    arguments = {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 2,
        "channels": (4, 8),
        "num_res_blocks": 1,
        "norm_num_groups": 2,
        "attention_levels": (False, True),
        "with_encoder_nonlocal_attn": True,
        "with_decoder_nonlocal_attn": False,
    }
    return AutoencoderKL(**arguments | changes)


NO_ATTENTION = {"with_encoder_nonlocal_attn": False, "attention_levels": (False, False)}


def vqvae(dropout=0.0):
    downs, ups = ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2
    return VQVAE(
        3, 1, 1, (4, 8), 1, (4, 8), downs, ups, num_embeddings=8, embedding_dim=4, dropout=dropout, ddp_sync=False
    )


def unet(**changes):
    arguments = {
        "spatial_dims": 3,
        "in_channels": 4,  # 2 of the latents, 2 of the condition behind them
        "out_channels": 2,
        "channels": (4, 8),
        "num_res_blocks": 1,
        "norm_num_groups": 2,
        "attention_levels": (False, True),
        "num_head_channels": 4,
    }
    return DiffusionModelUNet(**arguments | changes)


class Stem(nn.Module):
    """A module that holds an autoencoder, as a wavelet stem does."""

    def __init__(self):
        super().__init__()
        self.network = autoencoder()

    def forward(self, image):
        return self.network(2 * image)


def image():
    return torch.rand(2, 1, *SIZE)


def latents():
    return torch.randn(2, 4, *SIZE), torch.tensor([3, 700])


# name → how to build it, and what it is given
NETWORKS = {
    "AutoencoderKL": (autoencoder, lambda: (image(),)),
    "AutoencoderKL without attention": (lambda: autoencoder(**NO_ATTENTION), lambda: (image(),)),
    "two residual blocks": (lambda: autoencoder(num_res_blocks=2), lambda: (image(),)),
    "transposed": (lambda: autoencoder(use_convtranspose=True), lambda: (image(),)),
    "held": (Stem, lambda: (image(),)),
    "VQVAE": (vqvae, lambda: (image(),)),
    "VQVAE with dropout": (lambda: vqvae(dropout=0.5), lambda: (image(),)),
    "U-Net": (unet, latents),
    "U-Net of one level": (lambda: unet(channels=(4,), attention_levels=(True,)), latents),
    "U-Net with flash attention": (lambda: unet(use_flash_attention=True), latents),
    "U-Net that resamples in its residual blocks": (lambda: unet(resblock_updown=True), latents),
    "U-Net with a context": (
        lambda: unet(with_conditioning=True, cross_attention_dim=3, dropout_cattn=0.5),
        lambda: (*latents(), torch.randn(2, 5, 3)),
    ),
}
named = pytest.mark.parametrize("name", list(NETWORKS))


def pair(name, seed=0):
    """Return a network, the same one recomputed, and their input; no weight is 0, as MONAI's last layers are."""
    torch.manual_seed(seed)
    build, inputs = NETWORKS[name]
    plain = build().train()
    for parameter in plain.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return plain, per_block(copy.deepcopy(plain)), inputs()


def run(network, inputs, seed=1):
    """Return the network's first output; the posterior's noise and the dropout depend on `seed`."""
    torch.manual_seed(seed)
    outputs = network(*inputs)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def gradients(network):
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}


def assert_equal_gradients(found, expected, tolerance=1e-5):
    assert list(found) == list(expected)
    # Of some biases the gradient is 0 but for rounding: of attention's keys, which softmax does not see.
    floor = 1e-4 * max(gradient.norm() for gradient in expected.values())
    assert floor > 0
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * max(gradient.norm(), floor), name


def count_calls(network, kinds=(nn.GroupNorm, nn.ReLU)):
    """Return a dict that counts, from now on, how often each module of `network` of these kinds runs to its end."""
    calls = {}

    def counted(name):
        def hook(*_):
            calls[name] = calls.get(name, 0) + 1

        return hook

    for name, module in network.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(counted(name))
    return calls


# The same network


@named
def test_gradients_and_output_are_those_of_the_plain_network(name):
    plain, recomputed, inputs = pair(name)
    outputs = [run(network, inputs) for network in (plain, recomputed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    assert_equal_gradients(gradients(recomputed), gradients(plain))
    for one, other in zip(plain.buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(one, other)  # a codebook moves once


@named
def test_names_and_state_dict_stay_so_that_weights_load_both_ways(name):
    plain, recomputed, _ = pair(name)
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in recomputed.named_parameters()]
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in recomputed.named_modules()]
    other, _, _ = pair(name, seed=2)
    recomputed.load_state_dict(other.state_dict(), strict=True)
    plain.load_state_dict(recomputed.state_dict(), strict=True)
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), other.parameters(), strict=True))


def test_what_looks_at_a_network_sees_the_same():
    torch.manual_seed(0)
    network = autoencoder()
    assert per_block(network) is network and per_block(unet()).num_res_blocks == unet().num_res_blocks
    assert type(network) is AutoencoderKL
    assert downsampling(network) == downsampling(per_block(unet())) == 2
    assert last_layer(network) is network.decoder.blocks[-1].conv.weight
    assert narrow_posterior(network, 0.05).encode(image())[1].allclose(torch.tensor(0.05))
    assert placed(network, torch.device("cpu"))(image())[0].shape == (2, 1, *SIZE)
    assert sum(isinstance(module, AEKLResBlock) for module in network.modules()) == 6


def test_a_recomputed_network_can_be_copied_pickled_and_asked_again():
    _, recomputed, inputs = pair("AutoencoderKL")
    for twin in (copy.deepcopy(recomputed), pickle.loads(pickle.dumps(recomputed)), per_block(recomputed)):
        assert {type(module) for module in twin.modules()} & set(RECOMPUTED.values())
        assert torch.equal(run(twin, inputs), run(recomputed, inputs))


# What is recomputed, and when


@named
def test_every_norm_or_activation_inside_a_block_runs_again_on_the_way_back(name):
    plain, recomputed, inputs = pair(name)
    calls = {"plain": count_calls(plain), "recomputed": count_calls(recomputed)}
    for network in (plain, recomputed):
        run(network, inputs).square().mean().backward()
    assert set(calls["plain"].values()) == {1}
    inside = {
        f"{block}.{inner}"
        for block, module in recomputed.named_modules()
        if type(module) in BLOCKS.values()
        for inner, _ in module.named_modules()
    }
    again = {module for module, number in calls["recomputed"].items() if number > 1}
    assert again == inside & set(calls["plain"]) and len(again) > 2


def test_no_convolution_runs_again_but_on_the_encoders_largest_grid():
    _, recomputed, inputs = pair("two residual blocks")
    calls = count_calls(recomputed, (nn.Conv3d,))
    run(recomputed, inputs).square().mean().backward()
    again = {name for name, number in calls.items() if number == 2}
    before_down = ["0.conv", *(f"{block}.conv{number}.conv" for block in (1, 2) for number in (1, 2))]
    assert again == {f"encoder.blocks.{name}" for name in before_down}
    assert set(calls.values()) == {1, 2}


def test_nothing_is_recomputed_where_no_gradient_is_wanted():
    _, recomputed, inputs = pair("AutoencoderKL")
    calls = count_calls(recomputed)
    with torch.no_grad():
        run(recomputed, inputs)
    assert set(calls.values()) == {1}


def test_gradients_at_the_last_layer_alone_recompute_nothing_and_leave_the_rest_possible():
    plain, recomputed, inputs = pair("AutoencoderKL")
    torch.manual_seed(3)
    discriminator = PatchDiscriminator(3, 4, 1, num_layers_d=1, norm="INSTANCE").requires_grad_(False)
    found = []
    for network in (plain, recomputed):
        calls = count_calls(network)
        reconstruction = run(network, inputs)
        layer = last_layer(network)
        losses = (reconstruction - inputs[0]).abs().mean(), -discriminator(reconstruction)[-1].mean()
        pulls = [torch.autograd.grad(loss, layer, retain_graph=True)[0] for loss in losses]
        assert set(calls.values()) == {1}
        (losses[0] + pulls[0].norm() / pulls[1].norm() * losses[1]).backward()
        found.append({**gradients(network), "first pull": pulls[0], "second pull": pulls[1]})
    assert max(calls.values()) > 1
    assert_equal_gradients(found[1], found[0])


def test_a_network_without_a_known_block_is_refused_and_left_alone_when_off():
    network = nn.Sequential(nn.Conv3d(1, 1, 3))
    assert per_block(network, enabled=False) is network
    with pytest.raises(InputError) as error:
        per_block(network)
    assert "Sequential has no block that can be recomputed; expected one of AEKLResBlock, " in str(error.value)
    assert str(error.value).endswith("Set use_checkpoint: false for it.")


def test_a_switch_that_is_neither_on_nor_off_is_refused():
    with pytest.raises(InputError, match="use_checkpoint is 'off'; expected true or false"):
        per_block(autoencoder(), "off")


def test_off_leaves_the_network_as_it_is():
    network = per_block(autoencoder(), enabled=False)
    assert not {type(module) for module in network.modules()} & set(RECOMPUTED.values())


@pytest.mark.parametrize(
    ("stage", "overlays", "edge"),
    [("autoencoder", [], 64), ("autoencoder", [config.CONFIG_FOLDER / "plain.yaml"], 64), ("diffusion", [], 128)],
    ids=["stage 1", "stage 1, plain", "stage 2"],
)
def test_a_step_of_the_bundles_networks_needs_at_most_60_percent_of_the_memory(stage, overlays, edge):
    # Of tensors alone: what a CPU's convolutions take beside them is its make's. `benchmarks/memory.py` measures it.
    settings = {"crop_to": [edge] * 3, "batch_size": 1, "precision": "fp32"}
    plain, recomputed = (
        simulate(stage, overlays, {**settings, "use_checkpoint": on}, on_gpu=True).step for on in (False, True)
    )
    assert recomputed <= 0.6 * plain


# In company


@pytest.mark.parametrize("name", ["AutoencoderKL", "VQVAE with dropout", "U-Net"])
def test_autocast_is_the_same_on_the_way_back(name):
    plain, recomputed, inputs = pair(name)
    exact = copy.deepcopy(plain)
    for network, is_bf16 in ((plain, True), (recomputed, True), (exact, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            output = run(network, inputs)
        output.float().square().mean().backward()
    # Where three gradients meet, they are added in another order: a difference of bfloat16's rounding, less than what
    # bfloat16 does to them anyway. Had it been computed again in float32, PyTorch would have refused to go back.
    again, once, in_fp32 = (
        torch.cat([gradient.flatten() for gradient in gradients(network).values()])
        for network in (recomputed, plain, exact)
    )
    assert (again - once).norm() < 0.5 * (once - in_fp32).norm()


@pytest.mark.parametrize("name", ["AutoencoderKL without attention", "U-Net of one level"])
def test_a_compiled_network_recomputes_and_has_the_same_gradients(name):
    from torch._dynamo.backends.common import aot_autograd  # seconds, which the processes below need not wait for

    plain, recomputed, inputs = pair(name)
    run(plain, inputs).square().mean().backward()
    norms = []

    def count_norms(graph, _):
        norms.append(sum("group_norm.default" in str(node.target) for node in graph.graph.nodes))
        return graph

    backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=count_norms)
    torch.compiler.reset()
    compiled = torch.compile(recomputed, backend=backend, fullgraph=True)
    run(compiled, inputs).square().mean().backward()
    assert_equal_gradients(gradients(recomputed), gradients(plain))
    assert norms and norms[0] > 0  # norms of the forward pass, in the backward pass


def rank_loss(network, inputs, rank):
    return run(network, [part[rank : rank + 1] for part in inputs], seed=10 + rank).square().mean()


def freeze_codebook(network):
    """Keep a codebook where it is: MONAI's would see both halves of the batch in turn, not at once."""
    if hasattr(network, "quantizer"):
        network.quantizer.eval()


IN_COMPANY = ["AutoencoderKL", "VQVAE", "U-Net"]


def ddp_gradients(name):
    _, recomputed, inputs = pair(name)
    freeze_codebook(recomputed)
    network = DistributedDataParallel(recomputed)
    for _ in range(2):  # the second step meets the buckets that DDP rebuilt after the first
        network.zero_grad()
        rank_loss(network, inputs, distributed.get_rank()).backward()
    return gradients(recomputed)


def all_ddp_gradients():
    return [ddp_gradients(name) for name in IN_COMPANY]


def test_two_ddp_processes_have_the_mean_of_their_gradients(tmp_path):
    ranks = on_two_ranks(all_ddp_gradients, tmp_path)
    for name, *averaged in zip(IN_COMPANY, *ranks, strict=True):
        plain, _, inputs = pair(name)
        freeze_codebook(plain)
        for rank in range(NUM_RANKS):
            (rank_loss(plain, inputs, rank) / NUM_RANKS).backward()
        for own in averaged:
            assert_equal_gradients(own, gradients(plain))


# In the bundle


@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("network", ["autoencoder", "denoiser"])
def test_the_bundles_knob_reaches_both_networks(network, use_checkpoint):
    parser = ConfigParser(config.merged(config.bundle_files(config.DEFAULT_BUNDLE, "diffusion")))
    parser["use_checkpoint"] = use_checkpoint
    types = {type(module) for module in parser.get_parsed_content(network).modules()}
    assert bool(types & set(RECOMPUTED.values())) is use_checkpoint
    assert bool(types & set(RECOMPUTED)) is not use_checkpoint
