"""The instance head cut by rows: each rank holds some instances, and their part of every logit.

With l = z W^T + b over the rows of one rank, m their largest, S = sum exp(l - m), and t the targets
that a crop's row, its partner and smoothing give, ranks exchange m, log S and q = sum t (l - m) of
every crop, and no logit. A crop's loss is the sum over ranks of mass (lse - m) - q, where mass is
the sum of t: exact, whatever shifts the logits. A rank has the whole gradient of its own rows; the
features' is summed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastidmm.ranks import World, gathered, world

MANY = 4  # as many rows as a step has crops, from where a head is cut unless told otherwise


def worth_it(num_rows: int, num_crops: int) -> bool:
    """Whether to cut a head saves more than it costs, in bytes a rank and step.

    To sum a gradient moves some 8 a row and column of the head, to exchange features and their
    gradients 6 a crop and column; these cannot hide behind anything, so the gain must be clear.
    """
    return world().size > 1 and num_rows > MANY * num_crops


def rows_of_ranks(num_rows: int) -> tuple[int, ...]:
    """How many rows each rank holds."""
    small, larger = divmod(num_rows, world().size)
    return tuple(small + (rank < larger) for rank in range(world().size))


def cut(head: nn.Linear) -> tuple[int, ...]:
    """Leave a head the rows of this rank; the rows of each."""
    sizes = rows_of_ranks(head.out_features)
    own = slice(*world().own(sizes))
    head.weight = nn.Parameter(head.weight.detach()[own].clone())
    head.bias = nn.Parameter(head.bias.detach()[own].clone())
    return sizes


def sharded_loss(
    z: Tensor,
    head: nn.Linear,
    rows: Tensor,
    partner: Tensor,
    lam: Tensor,
    row_weight: Tensor,
    *,
    smoothing: float,
    shards: Sequence[int],
    crops: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """As `instance_loss`, of this rank's crops: their share of the loss, and hits (C,) bool.

    `shards` and `crops`: rows of the head and crops of each rank.
    """
    loss, hits = _Sharded.apply(
        z, head.weight, head.bias, (rows, partner, lam, row_weight), smoothing,
        tuple(shards), tuple(crops), world(),
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return loss, hits


class _Sharded(torch.autograd.Function):
    """`sharded_loss`; all ranks make both its passes, those without crops or rows, too."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        drawn: tuple[Tensor, ...],
        smoothing: float,
        shards: tuple[int, ...],
        crops: tuple[int, ...],
        here: World,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(torch.promote_types(z.dtype, weight.dtype), torch.float32)
        with torch.autocast(z.device.type, enabled=False):
            features = gathered(z.detach(), crops, here).to(wide)
            # Whole numbers of this size are exact in float64.
            told = gathered(torch.stack([each.double() for each in drawn], dim=1), crops, here)
            rows, partner = told[:, 0].long(), told[:, 1].long()
            lam, row_weight = told[:, 2].to(wide), told[:, 3].to(wide)
            shares = ((1 - smoothing) * lam, (1 - smoothing) * (1 - lam))
            firsts = [sum(shards[:rank]) for rank in range(here.size)]
            rest = smoothing / sum(shards)
            everywhere = [_Targets(rows - at, partner - at, *shares, rest) for at in firsts]
            targets = everywhere[here.rank]
            logits = features @ weight.to(wide).T + bias.to(wide)
            most, kept, own = _kept(logits, targets)
            # A fourth number beside the three: the own row's logit, for hits.
            every = gathered(torch.stack((most, *kept, own)), [4] * here.size, here)
            m, log_sum, q, own = every.view(here.size, 4, -1).unbind(1)  # (ranks, C) each
            lse = (m + log_sum).logsumexp(dim=0)
            masses = [t.mass(size) for t, size in zip(everywhere, shards, strict=True)]
            losses = (torch.stack(masses) * (lse - m) - q).sum(dim=0)
            mine = slice(*here.own(crops))
            hits = own.amax(dim=0) >= m.masked_fill(log_sum.isneginf(), -torch.inf).amax(dim=0)
        ctx.save_for_backward(features, weight, logits, lse, row_weight, *targets[:4])
        ctx.rest, ctx.kinds, ctx.crops, ctx.here = targets[4], (z.dtype, bias.dtype), crops, here
        ctx.mark_non_differentiable(hits)
        return (losses * row_weight)[mine].sum(), hits[mine]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        features, weight, logits, lse, row_weight, *targets = ctx.saved_tensors
        wide = features.dtype
        with torch.autocast(features.device.type, enabled=False):
            slope = (logits - lse[:, None]).exp_()
            row, partner, kept, pasted = targets
            _Targets(row, partner, kept, pasted, ctx.rest).take_from(slope)
            slope *= (row_weight * gradients[0].to(wide))[:, None]
            part = slope @ weight.to(wide)
            ctx.here.add_up([part])
            own = part[slice(*ctx.here.own(ctx.crops))].to(ctx.kinds[0])
            of_weight = (slope.T @ features).to(weight.dtype)
        return own, of_weight, slope.sum(dim=0).to(ctx.kinds[1]), None, None, None, None, None


class _Targets(NamedTuple):
    """What each crop should be given, seen from the rows of one rank."""

    row: Tensor  # (C,) int64, counted from the rank's first
    partner: Tensor
    kept: Tensor  # (C,): the share of the row
    pasted: Tensor  # of the partner
    rest: float  # of every row there is

    def mass(self, num: int) -> Tensor:
        """The sum over a rank's rows, `num` of them: (C,)."""
        found = torch.full_like(self.kept, self.rest * num)
        for at, share in ((self.row, self.kept), (self.partner, self.pasted)):
            found = found + torch.where((at >= 0) & (at < num), share, 0)
        return found

    def at(self, logits: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (C, 1) at the rank's own of some rows, and whether they are its own."""
        num = logits.shape[1]
        inside = (which >= 0) & (which < num)
        return which.clamp(0, max(num - 1, 0))[:, None], inside

    def take_from(self, slope: Tensor) -> None:
        """Take the targets from probabilities (C, rows), in place."""
        if not slope.shape[1]:
            return
        slope -= self.rest
        for which, share in ((self.row, self.kept), (self.partner, self.pasted)):
            place, inside = self.at(slope, which)
            slope.scatter_add_(1, place, torch.where(inside, -share, 0)[:, None])


def _kept(logits: Tensor, targets: _Targets) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """m, (log S, q), and the logit of the own row: (C,) each."""
    none = logits.new_zeros(len(logits))
    if not logits.shape[1]:
        return none, (none - torch.inf, none), none - torch.inf
    most = logits.amax(dim=1)
    shifted = logits - most[:, None]
    q = targets.rest * shifted.sum(dim=1)
    for which, share in ((targets.row, targets.kept), (targets.partner, targets.pasted)):
        place, inside = targets.at(logits, which)
        q = q + torch.where(inside, share * shifted.gather(1, place)[:, 0], 0)
    place, inside = targets.at(logits, targets.row)
    own = torch.where(inside, logits.gather(1, place)[:, 0], -torch.inf)
    return most, (shifted.exp().sum(dim=1).log(), q), own
