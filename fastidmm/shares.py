"""Which crops of a step each rank makes: the plan is one, whoever carries it out."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fastidmm.plan import Crops, GroupPlan, Plan


def shares_of(num_rows: int, ranks: int, cutmix_groups: int) -> tuple[int, ...]:
    """How many images of a batch each rank makes the crops of; some may have none.

    Whole parts of CutMix where these can be dealt out, so that all partners are a rank's own.
    """
    parts = cutmix_groups if cutmix_groups % ranks == 0 else ranks
    small, larger = divmod(num_rows, parts)
    each = [small + (part < larger) for part in range(parts)]
    dealt = parts // ranks
    return tuple(sum(each[rank * dealt :][:dealt]) for rank in range(ranks))


def share(plan: Plan, part: tuple[int, int], cutmix_groups: int) -> Plan:
    """What one rank carries out of a whole plan; `part` is (rank, ranks)."""
    rank, ranks = part
    if ranks == 1:
        return plan
    batch = plan.rows.numel()
    shares = shares_of(batch, ranks, cutmix_groups)
    first, num = sum(shares[:rank]), shares[rank]
    within = cutmix_groups % ranks == 0
    groups = tuple(_group_share(group, batch, first, num, within) for group in plan.groups)
    return replace(plan, rows=plan.rows[first : first + num], groups=groups, shares=shares)


def _group_share(plan: GroupPlan, batch: int, first: int, num: int, within: bool) -> GroupPlan:
    """The crops of `num` images of a batch, from its `first` on."""
    device = plan.place.device
    images = torch.arange(first, first + num, device=device)
    views = torch.arange(plan.total // batch, device=device)
    wanted = (views[:, None] * batch + images).flatten()
    partner = plan.partner[wanted]
    if within or plan.mix == "none":
        chosen = wanted
        partner = partner // batch * num + partner % batch - first
    else:
        # Another rank's partners are rendered here, too; of what is mixed, the first half is used.
        chosen = torch.cat((wanted, partner))
        partner = torch.arange(len(chosen), device=device).roll(len(wanted))
    return replace(only(plan, chosen, partner), place=wanted)


def only(plan: GroupPlan, crops: Tensor, partner: Tensor) -> GroupPlan:
    """The plan of some of a group's crops, (P,) int64, and who is mixed in among these."""

    def cut(part: GroupPlan | Crops) -> dict[str, Any]:
        values = {field.name: getattr(part, field.name) for field in fields(part)}
        return {key: v[crops] for key, v in values.items() if isinstance(v, Tensor)}

    chosen = replace(plan.crops, **cut(plan.crops))
    return replace(plan, **{**cut(plan), "crops": chosen, "partner": partner})
