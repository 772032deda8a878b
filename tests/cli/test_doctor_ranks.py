"""``prfl-fast doctor`` on two ranks: rank 0 reports all of them, with the rates measured here."""

import contextlib
import io
import json

import torch
from ranks import run_ranks

from prfl_fast.cli.doctor_ranks import BYTES, print_ranks, report_ranks


def test_two_ranks_are_reported_with_their_rates(monkeypatch):
    monkeypatch.setitem(BYTES, "cpu", 2**16)

    def on_rank():
        found = report_ranks(torch.device("cpu"))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            print_ranks(found)
        return json.loads(json.dumps(found)), out.getvalue()

    for found, text in run_ranks(2, on_rank):
        assert [each["device"] for each in found["ranks"]] == ["cpu", "cpu"]
        assert found["nccl"] is None and "gloo" in found["backend"]
        assert found["received_bytes"] == 2**15 and found["wrong_results"] == []
        assert all(rate > 0 for rate in found["bytes_per_second"].values())
        assert "process group: 2 ranks" in text
        assert text.count("GB/s measured here") == text.count("right result") == 2


def test_a_wrong_collective_is_reported(monkeypatch):
    def gather(whole, part):
        whole.zero_()

    def on_rank():
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "all_gather_into_tensor", gather)
            return report_ranks(torch.device("cpu"))["wrong_results"]

    assert run_ranks(2, on_rank) == [["all_gather"]] * 2
