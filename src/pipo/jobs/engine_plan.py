"""What is known of a model before a job, and how many sequences its engine should have: found in a process that ends.

So the job's own process stays small: it counts against the budget while the engine runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipo.base.config import EngineConfig
from pipo.formats.checkpoint import open_checkpoint
from pipo.jobs.children import run_in_child
from pipo.models.registry import check_architecture
from pipo.planner.predict import Workload
from pipo.serving.contract import EngineClient


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`identity` tells the model from another one of the same name."""

    name: str
    trained_tokens: int
    identity: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """An engine to start: what it answers is known."""

    model: Path
    config: EngineConfig
    context_tokens: int
    workload: Workload


async def start_engine(spec: EngineSpec) -> EngineClient:
    """In a process of its own. `spec.config.ram` is that process's share. Raises what starting an engine raises."""
    from pipo.serving.client import open_engine
    from pipo.serving.wire import EngineSetup

    return await open_engine(EngineSetup(spec.model, spec.config, "job", 0, spec.context_tokens, spec.workload))


def model_facts(path: Path) -> ModelFacts:
    """Raises ModelError."""
    return run_in_child(_model_facts, path)


def best_num_sequences(spec: EngineSpec, most: int) -> int:
    """The smallest batch, up to `most`, that is predicted to give nearly all the tokens per second there are, here.

    Raises OverBudget where not even one sequence fits.
    """
    return run_in_child(plan_num_sequences, spec, most)


def _model_facts(path: Path) -> ModelFacts:
    manifest = open_checkpoint(path, check_architecture).manifest
    files = [
        [file.name, identity.num_bytes, identity.modified_ns]
        for file, identity in zip(manifest.files, manifest.identities, strict=True)
    ]
    return ModelFacts(manifest.name, manifest.hyper.context_tokens, {"name": manifest.name, "files": files})


def plan_num_sequences(spec: EngineSpec, most: int) -> int:
    """`best_num_sequences` in this process."""
    from pipo.model_file import ModelFile
    from pipo.outlook import Outlook

    with Outlook(ModelFile(spec.model), spec.config) as outlook:
        case = outlook.case_here(spec.workload, spec.context_tokens, lambda step, fraction: None)
        return min(outlook.batch_curve(case, 2 * most - 1).knee.num_sequences, most)
