"""config.json of a Hugging Face folder → HyperParameters, in the families' terms.

Source: the configuration classes of transformers, for fields, defaults and what a value means. A field that is neither
read nor known to change nothing is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pipo.base.errors import UnsupportedModel
from pipo.formats.hf_families import FAMILIES
from pipo.formats.hf_fields import HfFields
from pipo.formats.hf_model import Family, HfModel
from pipo.formats.json_object import read_object

MAX_CONFIG_BYTES = 1 << 20

# that change nothing of what is computed, whatever they say
_REMARKS = (
    "_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "auto_map",
    "_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "use_cache", "cache_implementation",
    "initializer_range", "init_std", "attention_dropout", "dropout", "resid_pdrop", "embd_pdrop", "layerdrop",
    "activation_dropout", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "output_attentions", "output_hidden_states", "return_dict", "torchscript", "problem_type", "id2label", "label2id",
    "task_specific_params", "tokenizer_class", "prefix", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "decoder_start_token_id", "sep_token_id", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    "is_llama_config", "num_labels", "use_return_dict", "gradient_checkpointing", "torch_compile",
)  # fmt: skip
# that some families read; in the others a bias is a tensor without a use, and an error
_BIASES = ("attention_bias", "mlp_bias")
# that change nothing as long as they say this
_DEFAULTS: Mapping[str, object] = {
    "is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False, "chunk_size_feed_forward": 0, "rope_interleaved": False, "use_mrope": False,
    "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1, "use_bfloat16": False, "pruned_heads": {},
}  # fmt: skip
_QUANTISED = {
    "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8", "finegrained_fp8": "FP8", "mxfp4": "MXFP4",
    "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "aqlm": "AQLM", "hqq": "HQQ",
    "quanto": "Quanto", "eetq": "EETQ", "torchao": "TorchAO", "bitnet": "BitNet", "exl2": "EXL2", "exl3": "EXL3",
}  # fmt: skip


def read_config(path: Path, check_architecture: Callable[[str, str], None]) -> HfModel:
    """Raises UnsupportedModel for what pipo does not run, by name; MalformedFile, ReadFailed."""
    config = HfFields(path, read_object(path, MAX_CONFIG_BYTES))
    _refuse_quantised(config)  # first: a GGUF of a model that is not implemented as a folder may be
    family = _family_of(config)
    check_architecture(str(path.parent), family.architecture)
    model = family.read(config)
    config.ignore(*_REMARKS, *_BIASES)
    for name, value in _DEFAULTS.items():
        config.expect(name, value)
    config.refuse_left_over()
    return model


def _family_of(config: HfFields) -> Family:
    kind = config.text("model_type", "")
    family = FAMILIES.get(kind)
    if family is None and "text_config" in config:
        raise UnsupportedModel(
            f"{config.path}: model type {kind!r:.80} reads more than text, which pipo does not implement",
            hint="a text-only version of the model, or a GGUF of its text part",
        )
    if family is None:
        raise UnsupportedModel(
            f"{config.path}: model type {kind!r:.80} is not implemented", hint=f"pipo runs: {', '.join(FAMILIES)}"
        )
    classes = config.get("architectures")
    if classes is not None and classes != [family.class_name]:
        raise UnsupportedModel(
            f"{config.path}: architectures {classes!r:.120}, wanted [{family.class_name!r}]",
            hint="pipo runs models that write text",
        )
    return family


def _refuse_quantised(config: HfFields) -> None:
    for name, usual in (("quantization_config", "an unnamed method"), ("quantization", "MLX")):
        table = config.table(name)
        if table is not None:
            method = table.text("quant_method", usual)
            raise UnsupportedModel(
                f"{config.path}: the weights are quantised by {_QUANTISED.get(method, method):.80} ({name})",
                hint="download the model in its original precision (BF16, F16, F32), or a GGUF of it",
            )
