"""A config.json of a small Llama with any of its fields changed, read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipo.base.manifest import HyperParameters
from pipo.formats.hf_config import read_config
from pipo.formats.hf_families import FAMILIES
from pipo.formats.hf_model import HfModel
from tests.support.hf_bytes import CONFIG


def read_changed(folder: Path, **changes: Any) -> HfModel:
    """`changes` of a small Llama; a field that is `...` is taken away."""
    fields = {name: value for name, value in (CONFIG | changes).items() if value is not ...}
    if "model_type" in changes and "architectures" not in changes:
        fields["architectures"] = (
            [FAMILIES[changes["model_type"]].class_name] if changes["model_type"] in FAMILIES else []
        )
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return read_config(path, lambda file, name: None)


def changed_hyper(folder: Path, **changes: Any) -> HyperParameters:
    return read_changed(folder, **changes).hyper
