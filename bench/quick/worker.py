"""Run the cases of the stages in one process and record each."""

import contextlib
import gc
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from harness import Context, Preset, UnavailableError

from prfl_fast import kernels
from quick.journal import Journal, number
from quick.supervisor import RESTART, STAGES


class Late(BaseException):  # noqa: N818 - not an error: it ends a stage
    """Signal that the time of a stage is over; no case catches it."""


class Worker:
    """Run the cases of the stages and record each.

    Attributes:
        end: end of the current stage, in seconds of time.time().
        dtype: of activations, where a case does not choose.
    """

    def __init__(self, journal: Journal, ends: dict[str, float], device: str, dry: bool) -> None:
        self.journal, self.ends, self.dry, self.out = journal, ends, dry, journal.path.parent
        self.device, self.cuda = torch.device(device), device == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.done = {(r["stage"], r["case"]): r for r in journal.read() if r["kind"] != "begin"}
        self.stage, self.end = "", 0.0
        signal.signal(signal.SIGALRM, self._late)

    @staticmethod
    def _late(*_: Any) -> None:
        raise Late

    def context(self, preset: Preset) -> Context:
        """Return the settings of the suites' models and inputs."""
        return Context(self.device, preset)

    def left(self) -> float:
        """Return the seconds to the stage's end."""
        return self.end - time.time()

    def found(self, stage: str, case: str) -> dict[str, Any]:
        """Return the record of a case, perhaps of an earlier process; empty if there is none."""
        record = self.done.get((stage, case), {})
        return record if record.get("kind") == "result" else {}

    def run(self, functions: Mapping[str, Callable[["Worker"], None]]) -> None:
        """Run the stages in order, each until its end."""
        for stage, end in self.ends.items():
            self.stage, self.end = stage, end
            if (stage, "stage") in self.done:
                continue
            least = min(STAGES[stage][1], 1.0 if self.dry else 1e9)
            if self.left() < least:
                why = f"{self.left():.0f} s are left, it needs {least:.0f}"
                self.close("skipped", "stage", why=why)
                continue
            begin = time.time()
            gc.collect()
            gc.freeze()  # or each collection between cases walks all of torch
            try:
                functions[stage](self)
                self.close("result", "stage", seconds=time.time() - begin)
            except UnavailableError as reason:
                self.close("skipped", "stage", why=str(reason))
            except Late:
                self.close("skipped", "stage", why="its time was over")
            except Exception:
                self.close("failed", "stage", error=tail())
            signal.setitimer(signal.ITIMER_REAL, 0)

    def close(self, kind: str, case: str, **values: Any) -> dict[str, Any]:
        """Record the end of a case."""
        self.journal.write(kind, self.stage, case, **values)
        self.done[self.stage, case] = {"kind": kind, "stage": self.stage, "case": case, **values}
        if case != "stage":
            shown = {k: v for k, v in values.items() if not isinstance(v, (dict, list))}
            text = ", ".join(f"{k} {number(v)}" for k, v in shown.items())
            print(f"{self.stage}/{case}: {kind} {text[:240]}", flush=True)
        return self.done[self.stage, case]

    def case(
        self, name: str, run: Callable[[], dict[str, Any]], need: float = 0.5
    ) -> dict[str, Any]:
        """Run one case until the stage's end; skip it if less than ``need`` seconds are left."""
        if (self.stage, name) in self.done:
            return self.found(self.stage, name)
        if self.left() < (0.2 if self.dry else need):
            why = f"{self.left():.0f} s of the stage are left, it needs {need:g}"
            self.close("skipped", name, why=why)
            return {}
        self.journal.write("begin", self.stage, name)
        begin, kind, values = time.time(), "result", {}
        signal.setitimer(signal.ITIMER_REAL, max(0.1, self.left()))
        try:
            sabotage(f"{self.stage}/{name}")
            values = run()
        except UnavailableError as reason:
            kind, values = "skipped", {"why": str(reason)}
        except Late:
            kind, values = "failed", {"error": "stopped, the stage's time was over"}
        except Exception:
            kind, values = "failed", {"error": tail()}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        lost = self._clean()
        if lost and kind == "result":
            kind, values = "failed", {"error": lost}
        self.close(kind, name, **({"took_s": time.time() - begin} | values))
        if lost:
            os._exit(RESTART)
        return self.found(self.stage, name)

    def _clean(self) -> str:
        """Free memory, reset backends, and return the error if the CUDA context is lost."""
        with contextlib.suppress(Exception):
            kernels.set_backend("auto")
            kernels.set_attention_backend("auto")
        gc.collect()  # of what is younger than the stage: the rest is frozen
        if self.cuda:
            try:
                torch.cuda.synchronize()
                if torch.cuda.memory_reserved() > 50 << 30:
                    torch.cuda.empty_cache()
            except Exception:
                return tail()
        return ""


def sabotage(case: str) -> None:
    """Fail on purpose, to test this program: GPU_QUICK_TRY=raise:CASE|die:CASE|hang:CASE."""
    for wanted in os.environ.get("GPU_QUICK_TRY", "").split("|"):
        if wanted == f"raise:{case}":
            raise RuntimeError("raised on purpose")
        if wanted == f"die:{case}":
            os.kill(os.getpid(), signal.SIGSEGV)
        if wanted == f"hang:{case}":
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGALRM, signal.SIGTERM))
            time.sleep(1e4)


def tail(lines: int = 6) -> str:
    """Return the end of the current traceback."""
    return "\n".join(traceback.format_exc().strip().splitlines()[-lines:])[-1500:]
