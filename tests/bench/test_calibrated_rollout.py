"""The acceptance of calibrated rollouts: five seeds of PRFL in the small world, about six minutes.

Its figures are the table "Training with a calibrated rollout" of bench/RESULTS.md.
"""

import statistics

import pytest
import torch
from experiments import calibrated_rollout, rollout_options

from prfl_fast import RolloutConfig
from prfl_fast.feedback.calibration import HEADROOM, Calibration, Measured

pytest.importorskip("diffusers")
SEEDS = range(5)


def test_the_table_has_means_of_seeds_and_ratios_to_the_exact_rollout():
    exact = Measured({}, 8e9, 6e9, None, 0.0, 1.0, 0.0)
    chosen = Measured({"stride": 4}, 4e9, 2e9, None, 0.01, 0.995, 0.1)
    found = Calibration(RolloutConfig(stride=4), chosen, (exact, chosen))

    def run(*ends):
        before = {"reward": 0.5, "motion": 0.6}
        return [[before, {"reward": end, "motion": 2 * end}] for end in ends]

    arm = calibrated_rollout.arm_of(0.02)
    runs = {"exact": run(0.70, 0.74), arm: run(0.71, 0.75)}
    settings = calibrated_rollout.Settings()
    table = calibrated_rollout.arms_table({arm: found}, runs, settings)
    _, row = table.rows
    assert row[:3] == ["drift ≤ 0.02", "2.00 GFLOP", "4.00 GFLOP"]
    assert row[3:7] == ["3.00×", "2.00×", "1.0e-02", "0.9950"]
    ends = ["0.5000 ± 0.0000", "0.7300 ± 0.0283", "0.6000 ± 0.0000", "1.4600 ± 0.0566"]
    assert row[7:] == ends and len(table.columns) == len(row)
    assert "2 seeds" in table.notes[0] and table.notes[1] == "drift ≤ 0.02: stride 4."
    figure = calibrated_rollout.arms_figure({arm: found}, runs)
    assert "33% of the FLOPs: reward 0.730 after training, 0.720" in figure.get_suptitle()


@pytest.fixture(scope="module")
def start():
    torch.set_num_threads(1)
    return calibrated_rollout.prepare(calibrated_rollout.Settings())


@pytest.fixture(scope="module")
def exact_arms(start):
    settings = calibrated_rollout.Settings()
    return [calibrated_rollout.run_arm(start, settings, None, seed) for seed in SEEDS]


@pytest.mark.slow
@pytest.mark.parametrize("drift", calibrated_rollout.DRIFTS)
def test_a_calibrated_rollout_trains_as_well_as_an_exact_one(start, exact_arms, drift):
    settings = calibrated_rollout.Settings()
    found = calibrated_rollout.calibrated(start, settings, drift)
    exact, chosen = found.measured[0], found.chosen
    if drift == 0.02:
        assert chosen.options == {"stride": rollout_options.STRIDES}  # a row of suite rollout
    assert exact.rollout_flops >= 2.5 * chosen.rollout_flops
    assert chosen.cosine >= 0.99 and chosen.drift <= HEADROOM * drift
    arms = [calibrated_rollout.run_arm(start, settings, found.config, seed) for seed in SEEDS]
    assert not any(points[-1]["exact"] for points in arms)  # within drift_limit to the end
    for figure in ("reward", "motion"):
        values = [points[-1][figure] for points in exact_arms]
        before = statistics.mean(points[0][figure] for points in exact_arms)
        mean, spread = statistics.mean(values), statistics.stdev(values)
        assert mean > before + spread  # otherwise nothing was learned that could be lost
        assert statistics.mean(points[-1][figure] for points in arms) >= mean - spread, figure


@pytest.mark.slow
def test_more_budget_buys_a_cheaper_rollout(start):
    settings = calibrated_rollout.Settings(samples=1)
    small, large = (calibrated_rollout.calibrated(start, settings, d) for d in (0.005, 0.05))
    assert small.measured[0].flops > small.chosen.flops > large.chosen.flops
