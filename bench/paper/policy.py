"""Where weights, keys and values live, and how the batch is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from bench.paper.figures import Figures
from bench.paper.shapes import Shape
from pipo.base.machine import MachineProfile
from pipo.base.tensor_type import TensorType

F16_BYTES = 2.0


AS_FITS = -1.0  # for Policy.in_ram: as much as RAM holds, the rest on disk


class KvHome(Enum):
    DEVICE = "device"
    RAM = "RAM"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Policy:
    """`on_device` and `in_ram` are shares of every unit; the rest is on disk. A block of `num_micro_batches` of
    `micro_batch` sequences shares each load of the weights. `hidden_in_ram`: activations go there between two stages.
    """

    on_device: float
    in_ram: float
    kv: KvHome
    micro_batch: int
    num_micro_batches: int = 1
    weight_type: TensorType = TensorType.F16
    kv_type: TensorType = TensorType.F16
    cpu_attention: bool = False
    hidden_in_ram: bool = False

    @property
    def batch(self) -> int:
        return self.micro_batch * self.num_micro_batches

    @property
    def on_disk(self) -> float:
        return max(1.0 - self.on_device - self.in_ram, 0.0)


def laptop_policy(shape: Shape, is_on_disk: bool, batch: int, machine: MachineProfile, figures: Figures) -> Policy:
    """Of a cell of PIPO's table: no weight stays on the device, keys and values live as near to it as they fit.

    Where they do not fit into RAM as FP16, they are compressed as FlexGen can do it.
    """
    positions = figures.of("workload.prompt_tokens") + figures.of("workload.output_tokens")
    kv_bytes = batch * shape.kv_bytes(positions, F16_BYTES)
    ram_bytes = machine.ram_bytes - figures.of("paper.system_ram")
    if not is_on_disk:
        ram_bytes -= weight_bytes(shape, figures)
    home = KvHome.DEVICE if kv_bytes <= _free_on_device(shape, batch, machine, figures) else KvHome.RAM
    is_compressed = home is KvHome.RAM and kv_bytes > ram_bytes
    return Policy(
        on_device=0.0,
        in_ram=0.0 if is_on_disk else 1.0,
        kv=home,
        micro_batch=batch,
        weight_type=TensorType.Q4_0,
        kv_type=TensorType.Q4_0 if is_compressed else TensorType.F16,
    )


def filled(policy: Policy, shape: Shape, machine: MachineProfile, figures: Figures) -> Policy:
    """With the share of the weights that RAM holds beside the system, where the policy leaves it open."""
    if policy.in_ram != AS_FITS:
        return policy
    free = machine.ram_bytes - figures.of("paper.system_ram")
    return replace(policy, in_ram=min(free / (shape.num_weights * F16_BYTES), 1.0))


def weight_bytes(shape: Shape, figures: Figures) -> float:
    return shape.num_weights * figures.of("workload.int4_bytes")


def _free_on_device(shape: Shape, batch: int, machine: MachineProfile, figures: Figures) -> float:
    """Beside the slots, the activations of a prefill and the scores of one attention stage."""
    per_weight = figures.of("workload.int4_bytes")
    classes = shape.attention_elements + shape.mlp_elements + shape.embedding_elements
    rows = batch * figures.of("workload.prompt_tokens")
    activations = rows * (4 * shape.hidden_size + 2 * shape.intermediate_size) * F16_BYTES
    scores = rows * figures.of("workload.prompt_tokens") * shape.num_q_heads * F16_BYTES
    slots = figures.of("paper.slots_per_class") * classes * per_weight
    reserve = figures.of("paper.device_reserve")
    return machine.devices[1].memory_bytes - reserve - slots - activations - scores
