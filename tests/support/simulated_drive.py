"""Step lists executed against a drive that serves one read after another, on a clock that costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipo.base.clock import VirtualClock
from pipo.planner.residency import Step, StepKind, UnitId


class SimulatedDrive:
    """Seconds per unit read and per stage computed. `finished_s` is when the last stage so far was computed."""

    def __init__(self, read_s: Mapping[UnitId, float], compute_s: Mapping[int, float]) -> None:
        self.finished_s = 0.0
        self._clock = VirtualClock()
        self._read_s = read_s
        self._compute_s = compute_s
        self._free_s = 0.0
        self._arrival_s: dict[UnitId, float] = {}

    def run(self, steps: Sequence[Step], unit_of_stage: Mapping[int, UnitId]) -> None:
        for step in steps:
            if step.kind is StepKind.READ:
                self._free_s = max(self._clock.now(), self._free_s) + self._read_s[step.unit_id]
                self._arrival_s[step.unit_id] = self._free_s
            elif step.kind is StepKind.COMPUTE:
                if step.stage_idx in unit_of_stage:
                    self._wait_for(unit_of_stage[step.stage_idx])
                self._clock.sleep(self._compute_s[step.stage_idx])
                self.finished_s = self._clock.now()
            elif step.kind is StepKind.RELEASE:
                self._wait_for(step.unit_id)
                del self._arrival_s[step.unit_id]
            else:
                for unit in self._arrival_s:
                    self._wait_for(unit)

    def _wait_for(self, unit: UnitId) -> None:
        self._clock.sleep(self._arrival_s[unit] - self._clock.now())
