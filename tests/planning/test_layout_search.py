"""LayoutSearch of several GPUs: which are tried, and which one the planner takes."""

from dataclasses import replace

import pytest
from plans import SMALL

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.parallel import ParallelConfig
from prfl_fast.planning import plan_memory
from prfl_fast.planning import search as plan_search
from prfl_fast.planning.gpu_specs import find_gpu
from prfl_fast.planning.layout_search import LayoutSearch, layouts
from prfl_fast.planning.search import CHOSEN, CONTEXT, Candidate, Found, Search, Tier
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.units import GIB

HEADS = {**SMALL, "num_attention_heads": 12, "attention_head_dim": 16}
SIZE = {"frames": 9, "height": 128, "width": 128, "text_tokens": 32, "reward_blocks": 2}
WORK = Workload(HEADS, **SIZE, sft=False, num_inference_steps=6, ranks=16)
TIERS = [Tier("bf16"), Tier("fp8")]


def sizes(**changes):
    return [(each.shard, each.sequence) for each in layouts(replace(WORK, **changes))]


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (ParallelConfig(), [(s, n) for n in (1, 2, 4) for s in (1, 8, 16)]),  # 12 heads
        (ParallelConfig(shard=16), [(16, 1), (16, 2), (16, 4)]),
        (ParallelConfig(sequence=4), [(1, 4), (8, 4), (16, 4)]),
        (ParallelConfig(8, 4), [(8, 4)]),
    ],
)
def test_layouts_divide_ranks_and_heads(parallel, expected):
    assert sizes(parallel=parallel) == expected


def test_layouts_are_those_that_the_model_takes():
    assert sizes(ranks=4) == [(1, 1), (4, 1), (1, 2), (4, 2), (1, 4), (4, 4)]
    assert sizes(ranks=6)[-1] == (6, 6)  # 6 parts of 12 heads
    own = [(s, n) for n in (1, 2) for s in (1, 2, 16)]  # of machines of 2 GPUs
    assert sizes(gpus_per_machine=2) == own
    assert {n for _, n in sizes(ranks=24)} == {1, 2, 4}  # 3 would reach into a second machine
    assert {n for _, n in sizes(ranks=12, gpus_per_machine=6)} == {1, 2, 3, 6}
    assert sizes(patched=False) == [(1, 1), (8, 1), (16, 1)]
    few = {"frames": 1, "height": 32, "width": 48}  # 6 tokens: the fourth of 4 ranks has none
    assert {n for _, n in sizes(**few)} == {1, 2}
    assert {n for _, n in sizes(model="hunyuan-video")} == {1}
    assert [each.shard for each in layouts(replace(WORK, ranks=1))] == ["auto"]


class Searched:
    """Stand for the search of a layout, whose result is known."""

    def __init__(self, workload, results, ran):
        self.workload, self.results, self.ran = workload, results, ran
        self.key = (workload.shard, workload.sequence)

    def run(self, tiers):
        self.ran.append((*self.key, *(tier.weight_dtype for tier in tiers)))
        dtype, seconds = self.results.get(self.key, (None, 9.0))
        fits = dtype in [tier.weight_dtype for tier in tiers]
        memory = MemoryConfig(dtype or "nf4")
        chosen = Candidate(memory, memory, 1, 0, seconds, CHOSEN if fits else "over")
        return Found(chosen, None, 0, fits, [chosen], [])

    def leanest_fits(self, tier):
        return tier.weight_dtype == self.results.get(self.key, (None,))[0]

    def keep_gathered(self, found):
        return None

    def fewest_seconds(self, tier):
        return 1.0


def chosen(results):
    ran = []
    searches = LayoutSearch(lambda workload: Searched(workload, results, ran))
    search, found = searches.best(replace(WORK, ranks=4), TIERS)
    assert [tier.weight_dtype for tier in found.unused] == (
        ["fp8"] if ran[-1][2:] == ("bf16",) else []
    )
    return search.key, ran, searches.notes


ALL = [(1, 1), (4, 1), (1, 2), (4, 2), (1, 4), (4, 4)]


def test_no_layout_is_searched_after_one_as_fast_as_without_recomputation():
    key, ran, notes = chosen({(1, 1): ("bf16", 1.02), (4, 1): ("bf16", 1.0)})
    assert key == (1, 1) and ran == [(1, 1, "bf16")]
    assert notes == ["shard 1, sequence 1: 1.0 s per step with bf16, adamw"]


def test_the_fewest_seconds_per_video_win_and_ties_communicate_less():
    # In a step, the ranks of (4, 2) have two videos and those of (4, 4) one.
    results = {(4, 1): ("bf16", 3.0), (4, 2): ("bf16", 1.4), (4, 4): ("bf16", 0.69)}
    key, ran, notes = chosen(results | {(1, 4): ("bf16", 0.8)})
    assert key == (4, 2) and ran == [(*each, "bf16") for each in ALL if each not in ALL[::2][:2]]
    assert len(notes) == 6 and notes[0] == "shard 1, sequence 1: does not fit with bf16, adamw"


def test_bf16_weights_come_before_time():
    key, ran, _ = chosen({(1, 1): ("fp8", 1.0), (4, 2): ("bf16", 4.0)})
    assert key == (4, 2) and ran == [(4, 2, "bf16")]
    assert chosen({(1, 1): ("fp8", 1.0)})[0] == (1, 1)


def test_a_layout_with_the_smallest_parts_is_shown_if_none_fits():
    key, ran, notes = chosen({})
    assert key == (4, 4) and ran == [(4, 4, "bf16", "fp8")]
    assert len(notes) == 7 and notes[-1].startswith("no layout fits")


@pytest.mark.parametrize(
    ("train", "shard", "optimizer", "waits"),
    [
        ("lora", 1, "adamw", True),
        ("lora", 16, "adamw", False),  # a sharded block cannot wait in host memory
        ("full", 1, "adamw", False),
        ("full", 1, "adamw-cpu", True),
    ],
)
def test_weights_alone_decide_where_they_can_wait(train, shard, optimizer, waits):
    work, tier = (
        replace(WORK, train=train, parallel=ParallelConfig(shard, 1)),
        Tier("bf16", optimizer),
    )

    def holds(device, host):
        search = Search(work, find_gpu("h200"), budget=CONTEXT + device, host_budget=host)
        return search.holds(tier)

    counted = Search(work, find_gpu("h200"), budget=GIB, host_budget=None)._weights_of(tier)
    blocks, states = counted.blocks + counted.reward_blocks, counted.host_states
    least = counted.rest + counted.states
    assert holds(least + blocks, states) and not holds(least + blocks - 1, states)
    assert holds(least, blocks + states) == waits and not holds(least - 1, None)
    assert not states or not holds(GIB, states - 1)


def test_weights_that_fit_are_kept_whole_and_others_sharded(monkeypatch):
    monkeypatch.setattr(plan_search, "MODES", plan_search.MODES[:1])
    work = replace(WORK, ranks=4)
    plan = plan_memory(work, budget="24GiB")
    assert (plan.workload.shard, plan.workload.sequence) == (1, 1)
    assert plan.notes[0].startswith("shard 1, sequence 1: ")
