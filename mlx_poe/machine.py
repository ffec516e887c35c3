"""Moved to `mlx_poe.loading.machine_costs` in 0.3; this path stays."""

from mlx_poe.loading.machine_costs import known_costs as known_costs
