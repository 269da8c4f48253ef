"""The families of Hugging Face models, and the fields of config.json that only some of them have.

Source: the configuration classes of transformers, for fields, defaults and what a value means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt

from pipo.base.errors import UnsupportedModel
from pipo.base.manifest import RopeScaling
from pipo.formats.hf_fields import HfFields
from pipo.formats.hf_model import LAYER_KINDS, SLIDING, Family, HfModel
from pipo.formats.hf_names import GEMMA, OPT, PHI3, with_biases
from pipo.formats.hf_rope import RopeDefaults

MAX_EXPERTS = 4096


def _llama(config: HfFields, model: HfModel) -> HfModel:
    attention, mlp = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    names = with_biases(model.names, "attn_q", "attn_k", "attn_v", "attn_output") if attention else model.names
    names = with_biases(names, "ffn_gate", "ffn_up", "ffn_down") if mlp else names
    return replace(model, names=names)


def _mistral(config: HfFields, model: HfModel) -> HfModel:
    """All layers slide unless the window is null; a field that is not there is one of 4096."""
    return _sliding(model, config.size_or_off("sliding_window", 4096), (True,) * model.hyper.num_layers)


def _phi3(config: HfFields, model: HfModel) -> HfModel:
    return _sliding(model, config.size_or_off("sliding_window", 0), (True,) * model.hyper.num_layers)


def _qwen2(config: HfFields, model: HfModel) -> HfModel:
    model = _qwen_windows(config, model)
    return replace(model, names=with_biases(model.names, "attn_q", "attn_k", "attn_v"))


def _qwen3(config: HfFields, model: HfModel) -> HfModel:
    return _llama(config, _qwen_windows(config, model))


def _qwen_windows(config: HfFields, model: HfModel) -> HfModel:
    """Layers from `max_window_layers` on slide, where that is switched on."""
    num_layers, first = model.hyper.num_layers, config.size("max_window_layers", 28, least=0)
    window = config.size_or_off("sliding_window", 4096) if config.flag("use_sliding_window", False) else 0
    config.ignore("sliding_window")
    kinds = config.texts("layer_types", num_layers, LAYER_KINDS)
    slides = tuple(kind == SLIDING for kind in kinds) if kinds else tuple(i >= first for i in range(num_layers))
    return _sliding(model, window, slides)


def _smollm3(config: HfFields, model: HfModel) -> HfModel:
    """A layer without rotary embedding has a 0 in `no_rope_layers`."""
    num_layers, interval = model.hyper.num_layers, config.size("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers")
    if rotated is None:
        rotated = [int((i + 1) % interval != 0) for i in range(num_layers)]
    if not isinstance(rotated, list) or len(rotated) != num_layers or any(r not in (0, 1) for r in rotated):
        raise config.wrong("no_rope_layers", rotated, f"{num_layers} of 0 and 1")
    config.expect("use_sliding_window", False)
    config.ignore("sliding_window", "max_window_layers", "layer_types")  # nothing slides without it
    unrotated = tuple(not each for each in rotated)
    return _llama(config, replace(model, hyper=replace(model.hyper, unrotated_layers=unrotated)))


def _mixtral(config: HfFields, model: HfModel) -> HfModel:
    window = config.size_or_off("sliding_window", 0)
    return _experts(config, _sliding(model, window, (True,) * model.hyper.num_layers))


def _olmoe(config: HfFields, model: HfModel) -> HfModel:
    config.expect("clip_qkv", None)
    config.expect("norm_topk_prob", False)
    return _experts(config, _llama(config, model))


def _qwen2_moe(config: HfFields, model: HfModel) -> HfModel:
    config.expect("norm_topk_prob", False)
    model = _sparse_everywhere(config, _experts(config, model))
    hyper = replace(model.hyper, shared_expert_size=config.size("shared_expert_intermediate_size"))
    biases = ("attn_q", "attn_k", "attn_v") if config.flag("qkv_bias", True) else ()
    return replace(model, hyper=hyper, names=with_biases(model.names, *biases))


def _qwen3_moe(config: HfFields, model: HfModel) -> HfModel:
    if not config.flag("norm_topk_prob", False):
        raise UnsupportedModel(f"{config.path}: field 'norm_topk_prob' is False, pipo implements True only")
    return _sparse_everywhere(config, _experts(config, _llama(config, model)))


def _sparse_everywhere(config: HfFields, model: HfModel) -> HfModel:
    """Experts in every layer, no window."""
    config.expect("decoder_sparse_step", 1)
    config.expect("mlp_only_layers", [])
    config.expect("use_sliding_window", False)
    config.ignore("sliding_window", "max_window_layers")
    kinds = config.texts("layer_types", model.hyper.num_layers, LAYER_KINDS)
    if kinds and SLIDING in kinds:
        raise UnsupportedModel(f"{config.path}: layers of this family that slide are not implemented")
    size = config.size("moe_intermediate_size")
    return replace(model, hyper=replace(model.hyper, expert_size=size))


def _experts(config: HfFields, model: HfModel) -> HfModel:
    """`num_local_experts` or `num_experts`: transformers takes either for the other."""
    num = config.size("num_local_experts" if "num_local_experts" in config else "num_experts", most=MAX_EXPERTS)
    config.expect("num_experts", num)
    used = config.size("num_experts_per_tok", most=num)
    return replace(model, hyper=replace(model.hyper, num_experts=num, num_experts_per_tok=used))


def _sliding(model: HfModel, window: int, slides: tuple[bool, ...]) -> HfModel:
    """A window as long as the context hides nothing."""
    if not window or window >= model.hyper.context_tokens or not any(slides):
        return model
    return replace(model, hyper=replace(model.hyper, sliding_window=window, sliding_layers=slides))


def _gemma2(config: HfFields, model: HfModel) -> HfModel:
    return _gemma(config, model, pattern=2, softcaps=(50.0, 30.0))


def _gemma3(config: HfFields, model: HfModel) -> HfModel:
    pattern = config.size("sliding_window_pattern", 6)
    config.ignore("_sliding_window_pattern")
    model = _gemma(config, model, pattern, softcaps=(0.0, 0.0))
    base = config.number("rope_local_base_freq", 10_000.0, least=1.0, most=1e12)
    table = config.table("rope_parameters")
    table = table.table(SLIDING) if table is not None else None
    if table is not None:
        base = table.number("rope_theta", base, least=1.0, most=1e12)
        table.expect("rope_type", "default")
        table.refuse_left_over()
    rope = model.hyper.rope
    local = replace(
        rope,
        base=base,
        scaling=RopeScaling.NONE,
        factor=1.0,
        attn_factor=1.0,
        ext_factor=0.0,
        original_context_tokens=model.hyper.context_tokens,
    )
    return replace(model, hyper=replace(model.hyper, local_rope=local))


def _gemma(config: HfFields, model: HfModel, pattern: int, softcaps: tuple[float, float]) -> HfModel:
    """Every layer but each `pattern`th slides; scores and logits may be capped."""
    h = model.hyper
    config.expect("use_bidirectional_attention", False)
    config.ignore("hidden_act", "sliding_window_size")  # Gemma's classes read hidden_activation, sliding_window
    kinds = config.texts("layer_types", h.num_layers, LAYER_KINDS)
    slides = tuple(k == SLIDING for k in kinds) if kinds else tuple((i + 1) % pattern != 0 for i in range(h.num_layers))
    attention, final = "attn_logit_softcapping", "final_logit_softcapping"
    hyper = replace(
        h,
        attention_scale=config.number("query_pre_attn_scalar", 256.0, least=1e-6, most=1e9) ** -0.5,
        attention_softcap=config.number_or_off(attention, softcaps[0], most=1e6),
        final_softcap=config.number_or_off(final, softcaps[1], most=1e6),
        embedding_scale=sqrt(h.hidden_size),
    )
    window = config.size_or_off("sliding_window", 4096)
    return _llama(config, _sliding(replace(model, hyper=hyper), window, slides))


def _opt_checks(config: HfFields, model: HfModel) -> HfModel:
    """The variants of the 350M model (norms behind, a narrow embedding) are not implemented."""
    config.expect("do_layer_norm_before", True)
    config.expect("word_embed_proj_dim", model.hyper.hidden_size)
    config.expect("enable_bias", True)
    config.expect("layer_norm_elementwise_affine", True)
    config.expect("_remove_final_layer_norm", False)
    config.ignore("output_projection")
    return model


_GELU = ("hidden_activation", "gelu_pytorch_tanh")
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", _llama),
    "mistral": Family("llama", "MistralForCausalLM", _mistral),
    "mixtral": Family("llama", "MixtralForCausalLM", _mixtral, rope=RopeDefaults(1e6)),
    "olmoe": Family("olmoe", "OlmoeForCausalLM", _olmoe),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _qwen2),
    "qwen2_moe": Family("qwen2moe", "Qwen2MoeForCausalLM", _qwen2_moe),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _qwen3, head_dim_required=True),
    "qwen3_moe": Family("qwen3moe", "Qwen3MoeForCausalLM", _qwen3_moe),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", _smollm3, rope=RopeDefaults(2e6), is_tied=True),
    "gemma2": Family(
        "gemma2", "Gemma2ForCausalLM", _gemma2, GEMMA, is_tied=True, head_dim_required=True, activation=_GELU
    ),
    "gemma3_text": Family(
        "gemma3",
        "Gemma3ForCausalLM",
        _gemma3,
        GEMMA,
        RopeDefaults(1e6),
        is_tied=True,
        head_dim_required=True,
        has_local_rope=True,
        activation=_GELU,
    ),
    "phi3": Family("phi3", "Phi3ForCausalLM", _phi3, PHI3, RopeDefaults(is_partial=True, original_tokens=4096)),
    "opt": Family("opt", "OPTForCausalLM", _opt_checks, OPT, is_tied=True, activation=("activation_function", "relu")),
}
