"""BatchNorm by the statistics of a whole batch, however many ranks make it."""

import torch
from torch import Tensor, nn

from fastidmm.batch import Method
from fastidmm.errors import UsageError
from fastidmm.ranks import world
from fastidmm.shares import shares_of

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (C, D, ...) by the statistics of all ranks' crops; mean (D,), variance (D,), their number.

    In two passes, in float32 at least; a rank may have no crops.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, -1)
    rows = wide.flatten(0, -2)
    num = rows.new_full((1,), len(rows))
    *sums, num = world().sum(torch.cat((rows.sum(dim=0), num))).split([rows.shape[1], 1])
    mean = sums[0] / num
    centred = wide - mean
    variance = world().sum(centred.square().flatten(0, -2).sum(dim=0)) / num
    y = centred * (variance + eps).rsqrt()
    if weight is not None and bias is not None:
        y = y * weight + bias
    return y.movedim(-1, 1).to(x.dtype), mean.detach(), variance.detach(), num.detach()


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's BatchNorm, of all ranks' crops."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any will do."""

    def forward(self, x: Tensor) -> Tensor:
        """x (C, D, ...)."""
        if not self.training:
            return super().forward(x)
        y, mean, variance, num = batch_norm(x, self.weight, self.bias, self.eps)
        if self.running_mean is not None and self.running_var is not None:
            assert self.momentum is not None and self.num_batches_tracked is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * num / (num - 1), self.momentum)
            self.num_batches_tracked += 1
        return y


def check_norms(method: Method, num_images: int, batch_size: int) -> None:
    """Refuse a last batch whose passes may be of one crop, which torch's BatchNorm cannot do."""
    last = num_images % batch_size or min(batch_size, num_images)
    fewest = last * min(group.count for group in method.views)
    if fewest == 1 and any(isinstance(m, PLAIN) for m in method.backbone.modules()):
        raise UsageError(
            "an epoch's last batch has 1 image, too few for the BatchNorm of this backbone: choose "
            f"a --batch-size other than {batch_size}."
        )


def share_norms(backbone: nn.Module, num_images: int, batch_size: int, cutmix_groups: int) -> None:
    """Have a backbone's BatchNorms see what all ranks see, where there are several."""
    if world().size == 1:
        return
    last = num_images % batch_size or min(batch_size, num_images)
    for parent in list(backbone.modules()):
        for name, norm in list(parent.named_children()):
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            if type(norm) not in PLAIN or norm.momentum is None:
                raise UsageError(
                    f"{type(norm).__name__} of this backbone cannot be shared among ranks: train "
                    "it by one, or choose another --backbone."
                )
            if 0 in shares_of(last, world().size, cutmix_groups):
                raise UsageError(
                    f"an epoch's last batch has {last} images, too few for the BatchNorm of "
                    f"{world().size} ranks: choose another --batch-size, or fewer ranks."
                )
            shared = SharedBatchNorm(
                norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
            )
            shared.load_state_dict(norm.state_dict())
            setattr(parent, name, shared)
