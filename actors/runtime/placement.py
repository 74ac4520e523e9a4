"""The placement group of a layout, reserved on Ray."""

from __future__ import annotations

import ray
from ray.util.placement_group import PlacementGroup, placement_group

from actors.runtime.actor_group import RoleError
from actors.runtime.layout import Layout


def reserve(plan: Layout, *, deadline_s: float) -> PlacementGroup:
    """A placement group for the layout; names what is missing if the cluster has no room in time."""
    group = placement_group(list(plan.bundles), strategy="PACK")
    if not group.wait(timeout_seconds=deadline_s):
        ray.util.remove_placement_group(group)
        want = {k: sum(b.get(k, 0.0) for b in plan.bundles) for k in ("CPU", "GPU")}
        have, free = ray.cluster_resources(), ray.available_resources()
        raise RoleError(
            role="cluster",
            rank=0,
            phase="place",
            kind="NoRoom",
            message="; ".join(
                f"{k}: needs {want[k]:g}, the cluster has {have.get(k, 0):g}, free now {free.get(k, 0):g}"
                for k in want
                if want[k]
            ),
        )
    return group
