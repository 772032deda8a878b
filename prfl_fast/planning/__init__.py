"""Choice of the memory policies that fit a GPU, by simulation."""

from prfl_fast.planning.plan import Plan
from prfl_fast.planning.planner import plan_memory
from prfl_fast.planning.report import apply_to_yaml, table, timeline_figure
from prfl_fast.planning.workload import Workload

__all__ = ["Plan", "Workload", "apply_to_yaml", "plan_memory", "table", "timeline_figure"]
