"""The command line with a Hugging Face folder: what it shows, how it answers, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipo.formats.gguf import open_gguf
from tests.support.command_line import CommandLine
from tests.support.hf_bytes import HIDDEN, SHAPES, arrays_of, write_config, write_folder, write_sharded
from tests.support.hf_folders import edit_json, save_folder
from tests.support.tiny_models import SPECS, make_model, write_gguf
from tests.support.tokenizer_files import smollm2_json

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ASKED = ("a b c", "--raw", "--temp", "0", "-n", "12", "--ignore-eos", "--json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture in shards, with a chat template."""
    path = tmp_path_factory.mktemp("folder") / "tiny-moe"
    save_folder(make_model(SPECS["qwen3moe"]), path, max_shard_size="100KB")
    edit_json(path / "tokenizer_config.json", chat_template=TEMPLATE)
    return path


def test_show(pipo: CommandLine, folder: Path) -> None:
    shown = pipo("show", str(folder))
    assert shown.code == 0, shown.err
    assert "tiny-moe · qwen3moe · F32" in shown.out and "tokenizer.json (BPE), 320 tokens" in shown.out
    assert shown.out.count(".safetensors") > 3 and "has a template" in shown.out
    whole = pipo("show", str(folder), "--json").json
    parts = whole["parts"]
    assert sum(p["bytes"] for p in parts.values() if not p["shares"]) == whole["bytes"]
    assert parts["experts"]["bytes"] == 2 * 16 * 3 * 64 * 32 * 4


def test_the_answer_of_the_same_model_as_gguf(pipo: CommandLine, folder: Path, tmp_path: Path) -> None:
    write_gguf(make_model(SPECS["qwen3moe"]), tmp_path / "same.gguf", tokenizer="gpt2")
    ours, theirs = pipo("run", str(folder), *ASKED), pipo("run", str(tmp_path / "same.gguf"), *ASKED)
    assert ours.code == theirs.code == 0, ours.err + theirs.err
    assert ours.json["text"] == theirs.json["text"] and ours.json["usage"] == theirs.json["usage"]


def test_the_smallest_budget_gives_the_same_answer(pipo: CommandLine, folder: Path) -> None:
    roomy = pipo("run", str(folder), *ASKED)
    refused = pipo("run", str(folder), *ASKED, "--ram", "1MB")
    assert refused.code == 2 and "Traceback" not in refused.err
    smallest = refused.err.split("smallest --ram that works is ")[1].split()[0]
    tight = pipo("run", str(folder / "model.safetensors.index.json"), *ASKED, "--ram", smallest)
    assert tight.code == 0, tight.err
    assert tight.json["text"] == roomy.json["text"]
    assert tight.json["cost"]["peak_anonymous_bytes"] <= tight.json["plan"]["limit_bytes"]


def test_a_tokenizer_of_49k_tokens_is_part_of_the_budget(pipo: CommandLine, smollm2_path: Path, tmp_path: Path) -> None:
    vocab = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (49152, HIDDEN))
    folder = write_folder(tmp_path / "model", arrays_of(SHAPES | vocab), vocab_size=49152)
    (folder / "tokenizer.json").write_text(smollm2_json(open_gguf(smollm2_path).metadata))
    asked = ("run", str(folder), "The tide rises because", "--raw", "-n", "24", "--ignore-eos", "--json")
    refused = pipo(*asked, "--ram", "20MB")
    assert refused.code == 2, refused.err
    tight = pipo(*asked, "--ram", refused.err.split("smallest --ram that works is ")[1].split()[0])
    assert tight.code == 0, tight.err
    assert 20 << 20 < tight.json["cost"]["peak_anonymous_bytes"] <= tight.json["plan"]["limit_bytes"]


def test_chat_in_the_models_template(pipo: CommandLine, folder: Path) -> None:
    said = pipo("chat", str(folder), "-n", "4", stdin="hello\nand again\n")
    assert said.code == 0, said.err


def test_plan_from_headers_alone(pipo: CommandLine, folder: Path, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "begun")
    weights = path / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(4096)
    planned = pipo("plan", str(path), "--machine", "rtx3060-laptop", "--ram", "150MB", "--json")
    assert planned.code == 0, planned.err
    ran = pipo("run", str(path), "a", "--raw")
    assert ran.code == 1 and "ends at byte 4096" in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize("verb", ["run", "show", "plan", "chat", "doctor"])
def test_what_is_wrong_is_one_clear_error(verb: str, pipo: CommandLine, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model")
    (folder / "model-00002-of-00003.safetensors").unlink()
    ended = pipo(verb, str(folder), *(["a"] if verb == "run" else []))
    assert ended.code == 1 and ended.err.startswith("error: ") and "Traceback" not in ended.err
    assert "1 of its 3 shards are missing: model-00002-of-00003.safetensors" in " ".join(ended.err.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "the weights are quantised by AWQ"),
        ({"model_type": "mamba"}, "model type 'mamba' is not implemented"),
        ({"mystery": 3}, "field 'mystery' = 3 asks for something pipo does not know"),
    ],
)
def test_what_is_not_run_is_named(changes: dict[str, object], message: str, pipo: CommandLine, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    write_config(folder, **changes)
    ended = pipo("run", str(folder), "a")
    assert ended.code == 1 and message in " ".join(ended.err.split()) and "Traceback" not in ended.err


def test_a_probe_of_its_types(pipo: CommandLine, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    ended = pipo("doctor", str(folder), "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)
