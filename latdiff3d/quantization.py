"""The VQ autoencoder: a volume becomes latents, and decoding begins by replacing each by one or a few learnt codes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from ignite.metrics import Metric
from monai.networks.nets import VQVAE
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from latdiff3d.distributed import num_ranks, sum_over_ranks
from latdiff3d.errors import InputError

SMOOTHING = 1e-5  # of the cluster sizes, so that none is 0; van den Oord et al.'s code has the same
RESTART_EVERY = 20  # steps between two looks for codes out of use
JITTER = 0.01  # of the latents' standard deviation, between codes drawn from the same latent
CHUNK = 2**14  # latents compared with the book at a time: 32 MB of distances to 512 codes
# VQVAE's own arguments that concern the quantiser it is given here in place of its own.
REPLACED = ("num_embeddings", "embedding_dim", "embedding_init", "commitment_cost", "epsilon", "ddp_sync")

Terms = dict[str, torch.Tensor]


class VectorQuantizer(nn.Module):
    """Replaces each latent by the nearest code of a learnt book (van den Oord et al. 2017, arXiv:1711.00937).

    With a `depth` above 1 by a sum of as many codes of the one book, each the nearest to what the ones before it leave
    (Lee et al. 2022, Sec. 3.1, arXiv:2203.01941): the bits a latent may hold grow with the depth, the book does not.

    The first training step draws the codes from its own latents. Then they follow the latents that choose them, and
    codes that hardly any latent chooses start anew at latents of the present step (Dhariwal et al. 2020,
    arXiv:2005.00341). Sums and draws are over all ranks: the book is that of one process with all their batches. It
    moves in a forward pass in `train()` with gradients on, and never else; its whole state is in the state dict.

    Args:
        n_embed: number of codes.
        embed_dim: channels of a latent.
        codebook: what the codes follow: "ema", moving averages (App. A.1), or "gradient", that of the codebook term.
        decay: of the moving averages, per step.
        restart_below: a code chosen less often than this share of the mean starts anew; 0: none does.
        depth: number of codes for a latent.

    Raises:
        InputError: for another `codebook`, or a number out of range.
    """

    def __init__(
        self,
        n_embed: int,
        embed_dim: int,
        codebook: str = "ema",
        decay: float = 0.99,
        restart_below: float = 0.1,
        depth: int = 1,
    ) -> None:
        super().__init__()
        if codebook not in ("ema", "gradient"):
            raise InputError(f"codebook is {codebook!r}; expected 'ema' or 'gradient'.")
        if n_embed < 1 or embed_dim < 1:
            raise InputError(f"n_embed is {n_embed} and embed_dim {embed_dim}; expected whole numbers from 1 on.")
        if not (0 <= decay < 1 and 0 <= restart_below < 1):
            raise InputError(f"decay is {decay} and restart_below {restart_below}; expected both in [0, 1).")
        if not 1 <= depth <= n_embed:
            raise InputError(f"depth is {depth}; expected a whole number from 1 to n_embed, {n_embed}.")
        self.n_embed, self.embed_dim, self.codebook, self.depth = n_embed, embed_dim, codebook, depth
        self.decay, self.restart_below = decay, restart_below
        self.codes: torch.Tensor
        self.cluster_size: torch.Tensor
        self.cluster_sum: torch.Tensor
        self.num_updates: torch.Tensor
        codes = torch.randn(n_embed, embed_dim)
        if codebook == "gradient":
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
        # Moving averages of how many latents of a step, over all ranks, choose each code, and of their sum.
        self.register_buffer("cluster_size", torch.ones(n_embed))
        self.register_buffer("cluster_sum", codes.clone())
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))  # 0: the codes have met no latents

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, Terms]:
        """Return quantised latents, through which gradients pass as if nothing had happened, and the loss terms.

        Args:
            latents: (B, embed_dim, D, H, W).

        Returns:
            float32 of the same shape; and the squared distance to the sums of the first 1, …, `depth` codes, its mean,
            as "commitment", which draws latents to their codes, and, if these follow the gradient, as "codebook", which
            draws codes to their latents.

        Raises:
            InputError: for another number of channels.
        """
        self._check(latents)
        latents = latents.float()
        moves = self.training and torch.is_grad_enabled()
        if moves and self.num_updates == 0:
            self._start(_vectors(latents))
        indices = self.indices(latents)  # (B, depth, D, H, W)
        sums = self._sums(indices)  # (B, depth, embed_dim, D, H, W)
        wanted = latents[:, None].expand_as(sums)
        terms = {"commitment": F.mse_loss(wanted, sums.detach())}
        if self.codebook == "gradient":
            terms["codebook"] = F.mse_loss(sums, wanted.detach())
        if moves:
            rests = wanted - F.pad(sums[:, :-1], (0, 0) * 4 + (1, 0))  # what each code was the nearest to
            self._update(_vectors(rests.flatten(0, 1)), indices.flatten())
        # Not latents + (codes − latents), which is a rounding away from the codes that sampling decodes.
        return sums[:, -1].detach() + (latents - latents.detach()), terms

    @torch.no_grad()
    def indices(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the numbers (B, depth, D, H, W) of the codes that stand for `latents` (B, embed_dim, D, H, W)."""
        self._check(latents)
        rests, numbers = _vectors(latents.float()), []
        for _ in range(self.depth):
            numbers.append(_nearest(rests, self.codes))
            rests = rests - self.codes[numbers[-1]]
        grid = [number.view(len(latents), *latents.shape[2:]) for number in numbers]
        return torch.stack(grid, dim=1)

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the sums (B, embed_dim, D, H, W) of the codes numbered `indices` (B, depth, D, H, W)."""
        return self._sums(indices)[:, -1]

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what codes make of `latents` (B, embed_dim, D, H, W); moves nothing, and passes no gradient back."""
        return self.lookup(self.indices(latents))

    def counts(self, latents: torch.Tensor) -> torch.Tensor:
        """Return how often each code is chosen for `latents` (B, embed_dim, D, H, W), (n_embed,)."""
        return torch.bincount(self.indices(latents).flatten(), minlength=self.n_embed)

    def _sums(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the sums of the first 1, …, `depth` codes of each latent, (B, depth, embed_dim, D, H, W)."""
        return rearrange(F.embedding(indices, self.codes).cumsum(dim=1), "b n d h w c -> b n c d h w")

    def _check(self, latents: torch.Tensor) -> None:
        if latents.shape[1] != self.embed_dim:
            raise InputError(f"the latents have {latents.shape[1]} channels, the codes {self.embed_dim}; use the same.")

    @torch.no_grad()
    def _start(self, latents: torch.Tensor) -> None:
        """Draw the codes from latents (N, embed_dim); at a depth, a share of them from what those before it leave."""
        num_latents = sum_over_ranks(torch.tensor(float(len(latents)), device=latents.device))
        self.cluster_size.fill_(num_latents * self.depth / self.n_embed)
        for share in torch.arange(self.n_embed, device=latents.device).chunk(self.depth):
            self._place(torch.isin(torch.arange(self.n_embed, device=latents.device), share), latents)
            codes = self.codes[share]
            latents = latents - codes[_nearest(latents, codes)]

    @torch.no_grad()
    def _update(self, latents: torch.Tensor, indices: torch.Tensor) -> None:
        chosen = torch.zeros(self.n_embed, 1 + self.embed_dim, device=latents.device)
        chosen = sum_over_ranks(chosen.index_add_(0, indices, F.pad(latents, (1, 0), value=1.0)))  # counts, sums
        self.cluster_size.lerp_(chosen[:, 0], 1 - self.decay)
        self.cluster_sum.lerp_(chosen[:, 1:], 1 - self.decay)
        if self.codebook == "ema":
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + SMOOTHING) / (total + self.n_embed * SMOOTHING) * total
            self.codes.copy_(self.cluster_sum / smoothed[:, None])
        self.num_updates += 1
        if self.num_updates % RESTART_EVERY == 0:
            dead = self.cluster_size < self.restart_below * self.cluster_size.mean()
            if dead.any():
                self._place(dead, latents)

    def _place(self, which: torch.Tensor, latents: torch.Tensor) -> None:
        """Put the codes `which` (n_embed,) on latents drawn from all ranks', as if chosen as often as the mean."""
        drawn = _drawn(latents, int(which.sum()))
        size = self.cluster_size.mean()
        self.codes[which], self.cluster_size[which], self.cluster_sum[which] = drawn, size, drawn * size


class VQAutoencoder(VQVAE):
    """MONAI's VQVAE with our quantiser and CompVis' meaning of its latents.

    `encode` gives the latents before quantisation, which stage 2 diffuses, and `decode` quantises first; MONAI's
    `encode_stage_2_inputs` quantises already.

    Args:
        args, network: VQVAE's arguments, those of its quantiser excepted.
        n_embed, embed_dim, codebook, decay, restart_below, depth: see VectorQuantizer.

    Raises:
        InputError: see VectorQuantizer; an argument of MONAI's quantiser.
    """

    quantizer: VectorQuantizer  # type: ignore[assignment]

    def __init__(
        self,
        *args: Any,
        n_embed: int = 512,
        embed_dim: int = 4,
        codebook: str = "ema",
        decay: float = 0.99,
        restart_below: float = 0.1,
        depth: int = 1,
        **network: Any,
    ) -> None:
        if idle := [name for name in REPLACED if name in network]:
            raise InputError(f"{idle} of MONAI's quantiser have no effect; use n_embed, embed_dim, codebook and decay.")
        super().__init__(*args, num_embeddings=n_embed, embedding_dim=embed_dim, **network)  # type: ignore[misc]
        self.latent_channels = embed_dim  # AutoencoderKL's name
        self.quantizer = VectorQuantizer(n_embed, embed_dim, codebook, decay, restart_below, depth)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, Terms]:  # type: ignore[override]
        """Return the reconstruction (B, C, D, H, W) of `image` and the quantiser's loss terms."""
        quantised, terms = self.quantize(self.encode(image)[0])
        return self.decode_quantized(quantised), terms

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Return the latents (B, embed_dim, D/f, H/f, W/f) before quantisation, and their standard deviation, 0."""
        latents = super().encode(image)
        return latents, torch.zeros_like(latents)

    def quantize(self, latents: torch.Tensor) -> tuple[torch.Tensor, Terms]:  # type: ignore[override]
        """Return quantised latents and loss terms, and move the book in training; see VectorQuantizer.forward."""
        return self.quantizer(latents)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the image (B, C, D, H, W) of `latents` (B, embed_dim, D/f, H/f, W/f), quantised here."""
        return self.decode_quantized(self.quantizer.nearest(latents))

    def decode_quantized(self, quantised: torch.Tensor) -> torch.Tensor:
        """Return the image (B, C, D, H, W) of latents that are codes already."""
        return super().decode(quantised)

    def index_quantize(self, image: torch.Tensor) -> torch.Tensor:
        """Return the numbers of the codes of `image`, (B, D/f, H/f, W/f), or (B, depth, …) of several; MONAI's name."""
        indices = self.quantizer.indices(self.encode(image)[0])
        return indices[:, 0] if self.quantizer.depth == 1 else indices

    def decode_samples(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the image (B, C, D, H, W) of the codes that `index_quantize` numbers; MONAI's name."""
        return self.decode_quantized(self.quantizer.lookup(indices[:, None] if indices.ndim == 4 else indices))

    def encode_stage_2_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return the latents of `x` before quantisation; MONAI's name, CompVis' meaning."""
        return self.encode(x)[0]

    def decode_stage_2_outputs(self, z: torch.Tensor) -> torch.Tensor:
        """Return the image of latents, quantised here; MONAI's name."""
        return self.decode(z)


class CodebookUse(Metric):
    """Over all validation volumes and ranks, `codes_in_use`, a share of the book, and `perplexity`, of n_embed at most.

    Perplexity is the exponential of the entropy of the codes' frequencies: so many codes, used evenly, would tell as
    much. Fed with VectorQuantizer.counts, or with None by an autoencoder without a book, which has nothing to report.
    """

    required_output_keys = None

    def __init__(self, output_transform: Callable[[Any], Any] = lambda output: output) -> None:
        super().__init__(output_transform, metrics_result_mode="flatten")

    def reset(self) -> None:
        """Forget what was counted."""
        self.counts: torch.Tensor | None = None

    def update(self, output: torch.Tensor | None) -> None:
        """Add a batch's counts (n_embed,)."""
        if output is not None:
            self.counts = output if self.counts is None else self.counts + output

    def compute(self) -> dict[str, float]:
        """Return both figures, or nothing without a book."""
        if self.counts is None:
            return {}
        counts = sum_over_ranks(self.counts).double()
        entropy = torch.special.entr(counts / counts.sum()).sum()
        return {"codes_in_use": (counts > 0).double().mean().item(), "perplexity": entropy.exp().item()}


def _vectors(latents: torch.Tensor) -> torch.Tensor:
    return rearrange(latents, "b c d h w -> (b d h w) c")


@torch.no_grad()
def _nearest(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the number (N,) of the one of `codes` (K, C) nearest to each of `vectors` (N, C)."""
    with torch.autocast(vectors.device.type, enabled=False):
        norms = codes.square().sum(dim=1) / 2  # ‖z − c‖² / 2 without ‖z‖² / 2, the same for all codes
        return torch.cat([torch.addmm(norms, part, codes.T, alpha=-1).argmin(dim=1) for part in vectors.split(CHUNK)])


def _drawn(latents: torch.Tensor, num: int) -> torch.Tensor:
    """Return `num` of all ranks' `latents` (N, C), alike on all ranks: rank 0's choice, by the default generator.

    None is drawn twice while there are enough; further draws are moved a little.
    """
    rank, device = dist.get_rank() if num_ranks() > 1 else 0, latents.device
    sizes = torch.zeros(num_ranks(), dtype=torch.long, device=device)
    sizes[rank] = len(latents)
    sizes = sum_over_ranks(sizes)
    first, total = int(sizes[:rank].sum()), int(sizes.sum())
    order = torch.randperm(total).repeat(math.ceil(num / total))[:num]
    moved = JITTER * torch.randn(num, latents.shape[1])
    moved[:total] = 0
    order, moved = (sum_over_ranks((choice * (rank == 0)).to(device)) for choice in (order, moved))
    ours = (order >= first) & (order < first + len(latents))
    drawn = latents.new_zeros(num, latents.shape[1])
    drawn[ours] = latents[order[ours] - first]
    drawn = sum_over_ranks(drawn)
    return drawn + moved * drawn.std(dim=0, correction=0)
