"""The tuner: finds the launch settings that are fastest on the GPU at hand.

A candidate is measured in turns with the settings that count at present, so that a drift of the
clocks meets both, on each real case that launches with them, in the first mode that does. Its score
is the geometric mean over the cases of the median ratio of its time to theirs. All candidates are
measured briefly, those nearest to the present settings first; the best third again, three times as
long; and so on until one is left. This one is measured anew, for in the search it may have been
lucky, and it replaces the present settings if it beats them by more than the spread: if its p80 is
less than their p20, in the geometric mean over the cases.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dlops_triton import _dispatch, _settings

from . import candidates, machine, rows, timing
from .bench import DTYPES, Bench
from .candidates import Task, Values, words
from .rows import Row

_FEW = 4  # samples of each candidate in the first round
_KEPT = 3  # of so many candidates one goes on to the next round
_LAST = (10, 60)  # samples in the last round, at least and at most
_SEARCH = 0.7  # of the time of one task; the rest is for the last round


def run(
    benches: Sequence[Bench],
    device: torch.device,
    budget_s: float,
    out: Path | None = None,
    commit: str | None = None,
) -> int:
    """Tune the launch settings of some ops for a GPU, and write down each decision as it is made.

    Args:
        budget_s: seconds for all settings together.
        out: folder for the table and its evidence, instead of ``dlops_triton/tuned``, where the
            launchers look, and ``perf/results``.
        commit: what to record as the commit, in a copy without git.

    Returns:
        The exit status of a command.
    """
    where = machine.gpu(device)
    common = {"kind": "tuned", "provider": "ours"} | where | rows.provenance(commit)
    slug = rows.slug(where["gpu"])
    table = (out or _settings.TUNED) / f"{slug}.json"
    evidence = (out or rows.RESULTS) / f"tune-{slug}.jsonl"
    todo = candidates.tasks(benches)
    end = time.monotonic() + budget_s
    with _in_force(table.parent), tqdm(todo, unit="setting", disable=None) as bar:
        try:
            for number, task in enumerate(bar):
                left_s = end - time.monotonic()
                if left_s <= 0:
                    bar.write(f"The budget is spent: {len(todo) - number} settings were not tuned.")
                    break
                decision = _decide(task, device, left_s / (len(todo) - number), bar)
                bar.write(f"{task}: {decision.why}")
                if decision.values is not None:
                    rows.append(evidence, [row | common for row in decision.evidence])
                    _write(table, task, decision.values, common)
                    _settings.reload()
        except KeyboardInterrupt:
            bar.write("Interrupted; what was decided before stands.")
    print(f"Table: {table}", f"Evidence: {evidence}", sep="\n")
    return 0


@dataclass(frozen=True)
class Decision:
    """The settings to have, which may be the present ones; None where nothing was measured."""

    values: Values | None
    why: str
    evidence: Sequence[Row] = ()


def _decide(task: Task, device: torch.device, share_s: float, bar: Any) -> Decision:
    try:
        search = Search(task, device, share_s, bar)
        values, why = search.decide()
        return Decision(values, why, list(search.rows(values)))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass
class Arena:
    """A case on which candidates are measured, and the present settings at work on it."""

    problem: timing.Problem
    present: timing.Contender


@dataclass
class Trial:
    """A candidate and how it fared: in its latest round, its times and those of its opponent."""

    values: Values
    times: list[tuple[list[float], list[float]]] = field(default_factory=list)  # by arena
    refused: str = ""

    @property
    def score(self) -> float:
        """Below 1: faster than the present settings."""
        return _mean([float(np.median(np.divide(own, other))) for own, other in self.times])

    @property
    def worst(self) -> float:
        """Below 1: faster by more than the spread."""
        quantiles = [(np.quantile(own, 0.8), np.quantile(other, 0.2)) for own, other in self.times]
        return _mean([float(high / low) for high, low in quantiles])


class Search:
    """The search for the best settings of one task, within ``share_s`` seconds."""

    def __init__(self, task: Task, device: torch.device, share_s: float, bar: Any):
        self._until = time.monotonic() + share_s
        self._search_until = self._until - (1 - _SEARCH) * share_s
        self._task = task
        self._bar = bar
        self._present = task.present(*_dispatch.gpu(device))
        self._arenas = list(self._make_arenas(device))
        self._trials = [Trial(values) for values in task.others(self._present)]
        self._defence = Trial(self._present)

    def _make_arenas(self, device: torch.device) -> Iterator[Arena]:
        task, bench = self._task, self._task.bench
        pairs = [(case, dtype) for case in bench.cases for dtype in case.dtypes]
        for case, dtype in ((c, d) for c, d in pairs if DTYPES[d].itemsize == task.size):
            for mode in case.modes:
                self._say(f"preparing {case.name} {dtype} {mode}")
                try:
                    problem = timing.Problem(bench, case, dtype, mode, device)
                    with self._with(self._present) as used:
                        present = problem.contender("ours")
                except Exception as e:  # too large for this GPU, for example
                    self._bar.write(f"{task}: {case.name} {dtype} left out: {_reason(e)}")
                    break
                if used.launches:
                    yield Arena(problem, present)
                    break

    def decide(self) -> tuple[Values | None, str]:
        """The settings to have, or None, and why."""
        if not self._arenas:
            return None, "not tuned: no case could be measured that launches with them"
        trials, samples = self._trials, _FEW
        while True:
            for number, trial in enumerate(trials, 1):
                if self._late():
                    break
                self._say(f"{number} of {len(trials)}: {words(trial.values)}")
                self._measure(trial, (samples, samples))
            trials = sorted((t for t in trials if t.times and not t.refused), key=lambda t: t.score)
            trials = trials[: 1 if self._late() else max(1, len(trials) // _KEPT)]
            samples *= _KEPT
            if len(trials) <= 1:
                break
        untried = [trial for trial in self._trials if not (trial.times or trial.refused)]
        for trial in untried:
            trial.refused = "not tried: the time was up"
        if untried == self._trials:
            return None, "not tuned: there was no time to try other settings"
        note = f" ({len(untried)} were not tried)" if untried else ""
        values, why = self._last_round(trials)
        return values, f"{words(values)}, {why}{note}"

    def _last_round(self, left: list[Trial]) -> tuple[Values, str]:
        if not left:
            return self._present, "kept: no others work"
        (best,) = left
        self._say(f"last round: {words(best.values)}")
        self._measure(best, _LAST)
        if best.refused:
            return self._present, f"kept: the best others, {words(best.values)}, failed at last"
        self._defence.times = [(other, other) for _, other in best.times]
        ratio = f"{best.score:.3f} times as long, {best.worst:.3f} times at worst"
        if best.worst < 1:
            return best.values, f"instead of {words(self._present)}: {ratio}"
        return self._present, f"kept: the best others, {words(best.values)}, take {ratio}"

    def _measure(self, trial: Trial, samples: tuple[int, int]) -> None:
        """Measure a candidate and the present settings in turns, or refuse the candidate."""
        trial.times = []
        try:
            for arena in self._arenas:
                with self._with(trial.values):
                    contender = arena.problem.contender("ours")
                trial.times.append(self._take_turns(trial.values, contender, arena, samples))
        except Exception as e:  # it does not compile, asks for too much, or is wrong
            trial.refused = _reason(e)
            # If a fault has taken the GPU with it, this raises: nothing else could be measured.
            self._sample(self._present, self._arenas[0].present)

    def _take_turns(
        self, values: Values, contender: timing.Contender, arena: Arena, samples: tuple[int, int]
    ) -> tuple[list[float], list[float]]:
        least, most = samples
        own: list[float] = []
        other: list[float] = []
        while len(own) < least or (len(own) < most and time.monotonic() < self._until):
            own.append(self._sample(values, contender))
            other.append(self._sample(self._present, arena.present))
        return own, other

    def _sample(self, values: Values, contender: timing.Contender) -> float:
        # A call that is not captured in a graph asks for its settings each time.
        with self._with(values):
            return contender.samplers[_clock(contender)]()

    def _with(self, values: Values) -> contextlib.AbstractContextManager[_settings.Override]:
        return _settings.override(self._task.setting, **values)

    def _late(self) -> bool:
        return time.monotonic() >= self._search_until

    def _say(self, what: str) -> None:
        self._bar.set_description(f"{self._task}: {what}")

    def rows(self, chosen: Values | None) -> Iterator[Row]:
        """The evidence: the present settings and each candidate, on each case."""
        for trial in (self._defence, *self._trials):
            for number, arena in enumerate(self._arenas):
                own, other = trial.times[number] if number < len(trial.times) else ([], [])
                quantiles = np.quantile(own, (0.2, 0.5, 0.8)) if own else (None,) * 3
                yield {
                    "op": self._task.bench.name,
                    "setting": self._task.setting,
                    "dtype": arena.problem.dtype,
                    "case": arena.problem.case.name,
                    "mode": arena.problem.mode,
                    "candidate": trial.values,
                    "clock": _clock(arena.present),
                    **{
                        f"{name}_us": None if s is None else round(1e6 * float(s), 3)
                        for name, s in zip(("p20", "p50", "p80"), quantiles, strict=True)
                    },
                    "samples": len(own),
                    "ratio": round(float(np.median(np.divide(own, other))), 4) if own else None,
                    "refused": trial.refused or None,
                    "chosen": trial.values == chosen,
                    "default": trial is self._defence,
                }


def _clock(contender: timing.Contender) -> str:
    """The device's with a cold L2; without a GPU there is only the caller's."""
    return "device" if "device" in contender.samplers else "eager"


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:200]}"


@contextlib.contextmanager
def _in_force(folder: Path) -> Iterator[None]:
    """Let the launchers heed the tables of a folder, before all others."""
    before = _settings.folders[:]
    _settings.folders[:] = [folder, *(f for f in before if f != folder)]
    _settings.reload()
    try:
        yield
    finally:
        _settings.folders[:] = before
        _settings.reload()


def _write(file: Path, task: Task, values: Values, common: Row) -> None:
    """Put one decision into a table, beside those that are in it."""
    settings = json.loads(file.read_text())["settings"] if file.exists() else {}
    settings.setdefault(task.setting, {})[str(task.size)] = values
    keys = ("gpu", "target", "commit", "date", "torch", "triton")
    content = {key: common[key] for key in keys} | {"settings": settings}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(file)
