"""The codebook: where it starts, what moves it and what does not, and that ranks and resumed runs share one."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, as_words, run_here
from ignite.engine import Engine
from monai.networks.nets import VQVAE
from ranks import NUM_RANKS, on_two_ranks
from torch import distributed as dist

from latdiff3d import config, quantization
from latdiff3d.distributed import average_gradients
from latdiff3d.errors import InputError
from latdiff3d.handlers import read_metrics
from latdiff3d.quantization import CodebookUse, VectorQuantizer, VQAutoencoder


def row(*values):
    """Latents (1, 1, 1, 1, W) of one channel."""
    return torch.tensor(values).view(1, 1, 1, 1, -1)


def book(codes, size, **options):
    """A quantiser of one-channel codes that were each chosen `size` times a step so far."""
    quantizer = VectorQuantizer(len(codes), 1, **options)
    with torch.no_grad():
        quantizer.codes.copy_(torch.tensor(codes)[:, None])
        quantizer.cluster_size.fill_(size)
        quantizer.cluster_sum.copy_(quantizer.codes * size)
        quantizer.num_updates.fill_(1)
    return quantizer


def state(quantizer):
    return copy.deepcopy(quantizer.state_dict())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def autoencoder(**options):
    torch.manual_seed(0)
    shape = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "channels": (4, 4), "num_res_channels": (4, 4)}
    levels = {"downsample_parameters": (2, 4, 1, 1), "upsample_parameters": (2, 4, 1, 1, 0), "num_res_layers": 1}
    return VQAutoencoder(**shape, **levels, **{"n_embed": 8, "embed_dim": 2, **options})


def images(count=2, seed=0):
    return torch.rand((count, 1, 8, 8, 8), generator=torch.Generator().manual_seed(seed))


# Quantising


def test_latents_become_their_nearest_code_and_gradients_pass_straight_through():
    quantizer = book([0.0, 10.0], 2.0).eval()
    latents = row(1.0, 9.0, -3.0, 5.5).requires_grad_()
    quantised, _ = quantizer(latents)
    assert torch.equal(quantised, row(0.0, 10.0, 0.0, 10.0))
    slope = row(1.0, -2.0, 0.5, 7.0)
    (quantised * slope).sum().backward()
    assert torch.equal(latents.grad, slope)


def test_numbers_look_up_what_latents_become_and_are_counted():
    torch.manual_seed(0)
    quantizer, latents = VectorQuantizer(6, 3), torch.randn(2, 3, 2, 3, 4)
    indices = quantizer.indices(latents)
    assert indices.shape == (2, 1, 2, 3, 4) and indices.dtype == torch.long
    distances = (latents[:, None] - quantizer.codes.view(1, 6, 3, 1, 1, 1)).norm(dim=2)
    assert torch.equal(indices[:, 0], distances.argmin(dim=1))
    assert torch.equal(quantizer.nearest(latents), quantizer.lookup(indices))
    assert torch.equal(quantizer.counts(latents), torch.stack([(indices == code).sum() for code in range(6)]))


def test_a_second_code_stands_for_what_the_first_leaves():
    quantizer = book([0.0, 10.0, 1.0, -1.0], 2.0, depth=2).eval()
    latents = row(11.5, 9.0, 0.8, -0.2)
    indices = quantizer.indices(latents)  # (B, depth, D, H, W)
    assert indices.flatten(2).tolist() == [[[1, 1, 2, 0], [2, 3, 0, 0]]]
    quantised, terms = quantizer(latents)
    assert torch.equal(quantised, row(11.0, 9.0, 1.0, 0.0))
    after_one, after_two = (1.5**2 + 1 + 0.2**2 + 0.2**2) / 4, (0.5**2 + 0 + 0.2**2 + 0.2**2) / 4
    assert terms["commitment"].item() == pytest.approx((after_one + after_two) / 2)
    assert quantizer.counts(latents).tolist() == [3, 2, 2, 1]


def test_many_latents_are_compared_in_parts_with_the_same_result(monkeypatch):
    torch.manual_seed(0)
    quantizer, latents = VectorQuantizer(6, 3), torch.randn(2, 3, 4, 4, 4)
    whole = quantizer.indices(latents)
    monkeypatch.setattr(quantization, "CHUNK", 7)
    assert torch.equal(quantizer.indices(latents), whole)


def test_distances_are_float32_under_autocast():
    quantizer = book([100.0, 100.125], 1.0).eval()  # one number in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer.indices(row(100.0, 100.125)).flatten().tolist() == [0, 1]
        quantised, terms = quantizer(row(100.0, 100.125).bfloat16())
    assert quantised.dtype == terms["commitment"].dtype == torch.float32


# What moves the codes


def test_codes_follow_moving_averages_as_worked_out_by_hand():
    quantizer = book([0.0, 10.0], 2.0, decay=0.5)
    _, terms = quantizer(row(1.0, 2.0, 9.0))
    assert terms.keys() == {"commitment"} and terms["commitment"] == 2  # (1 + 4 + 1) / 3
    assert torch.equal(quantizer.cluster_size, torch.tensor([2.0, 1.5]))  # half of 2 and 2, half of 2 and 1
    assert torch.equal(quantizer.cluster_sum, torch.tensor([[1.5], [14.5]]))  # half of 0 and 3, half of 20 and 9
    assert torch.allclose(quantizer.codes, torch.tensor([[0.75], [29 / 3]]), rtol=2e-5)
    assert not list(quantizer.parameters())


def test_each_code_of_a_sum_follows_what_it_stood_for():
    quantizer = book([0.0, 10.0, 1.0], 2.0, decay=0.5, depth=2)
    quantizer(row(12.0))  # 10 stands for 12, then 1 for the 2 that are left
    assert torch.allclose(quantizer.cluster_size, torch.tensor([1.0, 1.5, 1.5]))
    assert torch.allclose(quantizer.codes.flatten(), torch.tensor([0.0, (20 + 12) / 3, (2 + 2) / 3]), atol=1e-3)


def test_a_sums_gradient_pulls_every_code_in_it():
    quantizer = book([0.0, 10.0, 1.0], 2.0, codebook="gradient", depth=2)
    _, terms = quantizer(row(12.0))
    terms["codebook"].backward()  # ((10 − 12)² + (10 + 1 − 12)²) / 2
    assert torch.allclose(quantizer.codes.grad.flatten(), torch.tensor([0.0, -2.0 - 1.0, -1.0]))


def test_codes_follow_the_gradient_as_worked_out_by_hand():
    quantizer, latents = book([0.0, 10.0], 2.0, codebook="gradient"), row(1.0, 2.0, 9.0).requires_grad_()
    _, terms = quantizer(latents)
    assert terms.keys() == {"commitment", "codebook"} and terms["commitment"] == terms["codebook"] == 2
    terms["codebook"].backward()
    assert torch.allclose(quantizer.codes.grad, torch.tensor([[-2.0], [2 / 3]]))  # 2/3 · Σ (code − latent)
    assert latents.grad is None
    quantizer.codes.grad = None
    terms["commitment"].backward()
    assert torch.allclose(latents.grad, row(2 / 3, 4 / 3, -2 / 3)) and quantizer.codes.grad is None
    assert quantizer.codes.tolist() == [[0.0], [10.0]]  # the optimiser moves them, nobody else


def test_the_norm_of_a_code_that_nobody_chooses_stays_bounded():
    quantizer = book([0.0, 10.0], 1.0, decay=0.9, restart_below=0.0)
    for _ in range(300):
        quantizer(row(*[0.1] * 8))
    assert quantizer.cluster_size[1] < 1e-9
    assert quantizer.codes.abs().max() <= 10


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_only_a_training_step_moves_the_book(codebook):
    quantizer = VectorQuantizer(4, 2, codebook)
    latents = torch.randn(1, 2, 2, 2, 2)

    def without_gradients():
        with torch.no_grad():
            quantizer(latents)

    uses = [without_gradients, lambda: quantizer.eval()(latents)]
    uses += [lambda use=use: use(latents) for use in (quantizer.indices, quantizer.nearest, quantizer.counts)]
    before = state(quantizer)
    for use in uses:
        quantizer.train()
        use()
        assert same(before, quantizer.state_dict())
    quantizer.train()(latents)
    assert quantizer.num_updates == 1 and not same(before, quantizer.state_dict())


# Where the codes start


def test_codes_start_at_latents_of_the_first_step():
    torch.manual_seed(0)
    quantizer, latents = VectorQuantizer(8, 2, restart_below=0), 50 + torch.randn(1, 2, 2, 2, 2)
    quantised, terms = quantizer(latents)
    assert torch.equal(quantised, latents) and terms["commitment"] == 0  # as many latents as codes: each is one
    assert torch.allclose(quantizer.cluster_size, torch.ones(8))
    before = quantizer.codes.clone()
    quantizer(latents + 1)
    assert torch.allclose(quantizer.codes, before, rtol=0.01)  # once only


def test_codes_for_what_is_left_start_at_what_is_left():
    latents = torch.randn((1, 2, 8, 8, 8), generator=torch.Generator().manual_seed(0))

    def error(depth):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(64, 2, depth=depth)
        return (quantizer(latents)[0] - latents).square().mean()

    assert error(2) < 0.25 * error(1)  # 32 × 32 sums for 64 codes: a sixteenth as much in two dimensions


def test_codes_start_apart_when_there_are_fewer_latents():
    torch.manual_seed(0)
    quantizer, latents = VectorQuantizer(12, 2, decay=0.999999), 50 + torch.randn(1, 2, 1, 2, 2)
    quantizer(latents)
    assert len(quantizer.codes.unique(dim=0)) == 12
    distances = torch.cdist(quantizer.codes, latents.flatten(2)[0].T).min(dim=1).values
    assert (distances < 0.1).all()


def test_the_seed_decides_where_codes_start():
    latents = torch.randn(1, 2, 4, 4, 4)

    def started(seed):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(4, 2)
        torch.manual_seed(seed)
        quantizer(latents)
        return quantizer.codes

    assert torch.equal(started(1), started(1)) and not torch.equal(started(1), started(2))


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_codes_out_of_use_start_anew_so_that_nearly_all_are_used(codebook):
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn((32, 2), generator=generator)

    def batch(num_clusters):
        chosen = torch.randint(num_clusters, (512,), generator=generator)
        return (centres[chosen] + 0.1 * torch.randn((512, 2), generator=generator)).T.reshape(1, 2, 8, 8, 8)

    def in_use(restart_below):
        torch.manual_seed(0)
        quantizer = VectorQuantizer(32, 2, codebook, decay=0.9, restart_below=restart_below)
        for step in range(200):
            quantizer(batch(1 if step == 0 else 32))  # all codes start within one cluster of 32
        return (quantizer.counts(batch(32)) > 0).float().mean()

    assert in_use(0.0) < 0.7
    assert in_use(0.1) > 0.9


# One book in a resumed run and on all ranks


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_a_resumed_book_goes_on_bit_for_bit(codebook, depth, monkeypatch):
    monkeypatch.setattr(quantization, "RESTART_EVERY", 4)
    latents = [torch.randn(1, 2, 3, 3, 3) * k for k in range(1, 7)]
    straight = VectorQuantizer(16, 2, codebook, decay=0.3, depth=depth)
    for step in latents[:3]:
        straight(step)
    resumed = VectorQuantizer(16, 2, codebook, decay=0.3, depth=depth)
    resumed.load_state_dict(state(straight))
    for quantizer in (straight, resumed):
        torch.manual_seed(7)
        for step in latents[3:]:
            quantizer(step)
    assert same(straight.state_dict(), resumed.state_dict()) and resumed.num_updates == 6


KINDS = [("ema", 1), ("gradient", 1), ("ema", 2), ("gradient", 2)]  # codebook and depth


def steps(rank, num_ranks, codebook, depth):
    """Train for a few steps on this rank's share of each batch, and return the book and the last gradients."""
    network = autoencoder(n_embed=24, codebook=codebook, depth=depth, decay=0.5)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    torch.manual_seed(7 + 100 * rank)  # rank 0 draws for all
    for step in range(5):
        image = images(4, seed=step).chunk(num_ranks)[rank]
        reconstruction, terms = network(image)
        optimizer.zero_grad()
        ((reconstruction - image).abs().mean() + sum(terms.values())).backward()
        average_gradients(network.parameters())
        optimizer.step()
    return state(network.quantizer), torch.cat([p.grad.flatten() for p in network.parameters()])


def steps_on_a_rank():
    quantization.RESTART_EVERY = 2
    return [steps(dist.get_rank(), NUM_RANKS, *kind) for kind in KINDS]


def test_two_ranks_keep_the_book_and_have_the_gradients_of_one_with_their_joint_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "RESTART_EVERY", 2)
    ranks = on_two_ranks(steps_on_a_rank, tmp_path)
    for kind, (one, one_gradients), (other, other_gradients) in zip(KINDS, *ranks, strict=True):
        joint, joint_gradients = steps(0, 1, *kind)
        assert same(one, other) and torch.equal(one_gradients, other_gradients)
        for name, there in joint.items():
            assert torch.allclose(one[name], there, rtol=1e-5, atol=1e-6), (*kind, name)
        assert (one_gradients - joint_gradients).norm() < 1e-4 * joint_gradients.norm()
    assert joint["num_updates"] == 5


# The autoencoder


def test_stage_2_gets_latents_before_quantisation_and_decoding_quantises_them():
    network, image = autoencoder().eval(), images()
    latents, std = network.encode(image)
    assert torch.equal(latents, network.encoder(image)) and latents.shape == (2, 2, 2, 2, 2)
    assert torch.equal(std, torch.zeros_like(latents))
    codes = network.quantizer.nearest(latents)
    assert not torch.allclose(codes, latents)
    assert torch.equal(network.decode(latents), network.decoder(codes))
    assert torch.equal(network.decode_quantized(codes), network.decode(latents))
    assert torch.equal(network.encode_stage_2_inputs(image), latents)
    assert torch.equal(network.decode_stage_2_outputs(latents), network.decode(latents))
    # MONAI's own hands stage 2 the codes.
    theirs = VQVAE.encode_stage_2_inputs(SimpleNamespace(encode=network.encoder, quantize=network.quantize), image)
    assert torch.equal(theirs, codes)


@pytest.mark.parametrize("depth", [1, 3])
def test_what_is_trained_is_what_is_decoded_later(depth):
    network, image = autoencoder(depth=depth).eval(), images()
    assert torch.equal(network(image)[0], network.decode(network.encode(image)[0]))


@pytest.mark.parametrize(("depth", "shape"), [(1, (2, 2, 2, 2)), (3, (2, 3, 2, 2, 2))])
def test_monais_numbers_of_codes_work(depth, shape):
    network, image = autoencoder(depth=depth).eval(), images()
    indices = network.index_quantize(image)
    assert indices.shape == shape
    assert torch.equal(network.decode_samples(indices), network.decode(network.encode(image)[0]))


def test_encoding_and_decoding_leave_the_book_alone_even_in_training():
    network = autoencoder().train()
    network(images())
    before = state(network.quantizer)
    network.decode(network.encode(images())[0])
    network.decode_stage_2_outputs(network.encode_stage_2_inputs(images()))
    network.decode_samples(network.index_quantize(images()))
    assert same(before, network.quantizer.state_dict())
    network(images())
    assert not same(before, network.quantizer.state_dict())


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_it_learns_a_batch(codebook):
    network, image = autoencoder(n_embed=64, embed_dim=4, codebook=codebook), images(1)
    image = torch.nn.functional.interpolate(image[..., :2, :2, :2], scale_factor=4, mode="trilinear")
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        reconstruction, terms = network(image)
        loss = (reconstruction - image).abs().mean()
        optimizer.zero_grad()
        (loss + 0.25 * terms["commitment"] + terms.get("codebook", 0)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: VectorQuantizer(4, 2, codebook="kmeans"), "codebook is 'kmeans'; expected 'ema' or 'gradient'"),
        (lambda: VectorQuantizer(0, 2), "n_embed is 0 and embed_dim 2; expected whole numbers from 1 on"),
        (lambda: VectorQuantizer(4, 0), "n_embed is 4 and embed_dim 0"),
        (lambda: VectorQuantizer(4, 2, decay=1.0), r"decay is 1\.0 and restart_below 0\.1; expected both in \[0, 1\)"),
        (lambda: VectorQuantizer(4, 2, restart_below=-0.1), r"restart_below -0\.1"),
        (lambda: VectorQuantizer(4, 2, depth=0), "depth is 0; expected a whole number from 1 to n_embed, 4"),
        (lambda: VectorQuantizer(4, 2, depth=5), "depth is 5"),
        (lambda: VectorQuantizer(4, 2)(torch.zeros(1, 3, 2, 2, 2)), "the latents have 3 channels, the codes 2"),
        (lambda: VectorQuantizer(4, 2).indices(torch.zeros(1, 3, 2, 2, 2)), "the latents have 3 channels"),
        (lambda: autoencoder(commitment_cost=0.25), r"\['commitment_cost'\] of MONAI's quantiser have no effect"),
    ],
)
def test_what_cannot_be_is_told(build, words):
    with pytest.raises(InputError, match=words):
        build()


# How much of the book is used


def test_use_and_perplexity_of_known_counts():
    use = CodebookUse()
    use.update(torch.tensor([2, 0, 0, 0]))
    use.update(torch.tensor([0, 2, 0, 0]))
    assert use.compute() == pytest.approx({"codes_in_use": 0.5, "perplexity": 2})
    use.reset()
    use.update(torch.tensor([5, 5, 5, 5]))
    assert use.compute() == pytest.approx({"codes_in_use": 1, "perplexity": 4})


@pytest.mark.parametrize(
    ("counts", "metrics"), [(torch.tensor([3, 3, 0]), {"codes_in_use": 2 / 3, "perplexity": 2}), (None, {})]
)
def test_use_goes_to_the_evaluators_metrics_and_is_silent_without_a_book(counts, metrics):
    evaluator = Engine(lambda engine, batch: {"code_counts": counts})
    CodebookUse(lambda output: output["code_counts"]).attach(evaluator, "codebook")
    assert evaluator.run([0, 1]).metrics == pytest.approx(metrics)


def test_both_stages_train_with_the_overlay_and_the_use_is_written_down(phantoms, tmp_path):
    def train(stage, **settings):
        tiny = {key: value for key, value in TINY[stage].items() if not key.startswith("autoencoder_def")}
        tiny |= {"crop_to": [16] * 3, "autoencoder_def::channels": [8, 8], "autoencoder_def::n_embed": 16, **settings}
        overlay = ["--config", config.CONFIG_FOLDER / "autoencoder_vq.yaml"]
        ended = run_here("train", stage, *overlay, "--data", phantoms, "-l", tmp_path, "--name", stage, *as_words(tiny))
        assert ended.code == 0, ended.err
        return read_metrics(tmp_path / stage / "metrics.csv")

    rows = train("autoencoder")
    assert all(0 < float(row["val_codes_in_use"]) <= 1 for row in rows)
    assert all(1 <= float(row["val_perplexity"]) <= 16 for row in rows)
    assert {"train_commitment", "train_weighted_commitment"} <= rows[0].keys() and "train_kl" not in rows[0]
    assert len(train("diffusion", first_stage=str(tmp_path / "autoencoder"))) == 2
