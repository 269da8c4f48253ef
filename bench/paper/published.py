"""The published cells, and the policy behind each."""

from __future__ import annotations

from dataclasses import dataclass

from bench.paper.policy import AS_FITS, KvHome, Policy
from pipo.base.tensor_type import TensorType


@dataclass(frozen=True, slots=True)
class PipoCell:
    """Throughput in tokens/s. Source: PIPO (arXiv 2504.03664 v2), its bar chart. None: out of memory."""

    model: str
    is_on_disk: bool
    batch: int
    flexgen: float | None
    pipo: float

    @property
    def ratio(self) -> float | None:
        return self.pipo / self.flexgen if self.flexgen else None


PIPO_CELLS = (
    PipoCell("OPT-6.7B", False, 4, 5.97, 7.55),
    PipoCell("OPT-6.7B", False, 8, 9.98, 10.78),
    PipoCell("OPT-6.7B", True, 16, 6.67, 12.35),
    PipoCell("OPT-6.7B", True, 32, 10.60, 17.68),
    PipoCell("OPT-13B", True, 1, 0.26, 0.69),
    PipoCell("OPT-13B", True, 4, 1.02, 3.10),
    PipoCell("OPT-13B", True, 8, 1.84, 4.73),
    PipoCell("OPT-13B", True, 16, 3.14, 7.55),
    PipoCell("Llama3.1-8B", False, 4, 3.93, 5.59),
    PipoCell("Llama3.1-8B", False, 8, 9.61, 9.68),
    PipoCell("Llama3.1-8B", True, 16, 5.52, 11.64),
    PipoCell("Llama3.1-8B", True, 32, None, 14.43),
    PipoCell("OPT-30B", True, 4, 0.44, 1.14),
    PipoCell("OPT-30B", True, 24, 2.03, 3.70),
    PipoCell("OPT-66B", True, 1, 0.03, 0.04),
    PipoCell("OPT-66B", True, 4, 0.11, 0.14),
    PipoCell("Llama3.1-70B", True, 1, 0.02, 0.04),
    PipoCell("Llama3.1-70B", True, 4, 0.06, 0.14),
)
BUSY_BEFORE, BUSY_AFTER = 0.40, 0.90  # the device's utilisation: "from below 40 % to above 90 %"
BEST_RATIO = 3.1


@dataclass(frozen=True, slots=True)
class FlexgenCell:
    """Throughput in tokens/s. Source: FlexGen's benchmark/batch_size_table.md; policies: its bench_suite.py.

    The policies of accelerate and ZeRO are ours: the lowest tier and the batch are theirs. `note` says what the
    simulation leaves out.
    """

    system: str
    model: str
    tokens_per_s: float
    schedule: str
    policy: Policy
    note: str = ""


Q4 = TensorType.Q4_0
_ALL_ON_DEVICE = (1.0, 0.0, KvHome.DEVICE)
_NOT_PREFETCHED = "the real one loads one unit ahead: between sequential and layer"

FLEXGEN_CELLS = (
    FlexgenCell("accelerate", "OPT-6.7B", 25.12, "sequential", Policy(*_ALL_ON_DEVICE, 2)),
    FlexgenCell("accelerate", "OPT-30B", 0.62, "sequential", Policy(0.0, 1.0, KvHome.DEVICE, 8)),
    FlexgenCell(
        "accelerate", "OPT-175B", 0.01, "sequential", Policy(0.0, AS_FITS, KvHome.DEVICE, 2),
        "published with one digit",
    ),
    FlexgenCell("ZeRO", "OPT-6.7B", 9.28, "sequential", Policy(0.0, 1.0, KvHome.DEVICE, 16), _NOT_PREFETCHED),
    FlexgenCell("ZeRO", "OPT-30B", 0.60, "sequential", Policy(0.0, 1.0, KvHome.DEVICE, 4), _NOT_PREFETCHED),
    FlexgenCell(
        "ZeRO", "OPT-175B", 0.01, "sequential", Policy(0.0, 0.0, KvHome.DEVICE, 1),
        f"published with one digit; {_NOT_PREFETCHED}",
    ),
    FlexgenCell("FlexGen", "OPT-6.7B", 25.26, "layer", Policy(*_ALL_ON_DEVICE, 2)),
    FlexgenCell("FlexGen", "OPT-30B", 7.32, "layer", Policy(0.2, 0.8, KvHome.RAM, 48, 3, cpu_attention=True)),
    FlexgenCell(
        "FlexGen", "OPT-175B", 0.69, "layer",
        Policy(0.0, 0.5, KvHome.DISK, 32, 8, cpu_attention=True, hidden_in_ram=True),
    ),
    FlexgenCell("FlexGen 4-bit", "OPT-6.7B", 29.12, "layer", Policy(*_ALL_ON_DEVICE, 72, 1, Q4, Q4)),
    FlexgenCell("FlexGen 4-bit", "OPT-30B", 8.38, "layer", Policy(0.0, 1.0, KvHome.RAM, 64, 8, Q4, Q4)),
    FlexgenCell("FlexGen 4-bit", "OPT-175B", 1.12, "layer", Policy(0.0, 1.0, KvHome.RAM, 48, 3, Q4, Q4)),
)  # fmt: skip
