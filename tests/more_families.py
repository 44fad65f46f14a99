"""More architectures of transformers, tiny, by the names that their configs have for sizes."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.families import WEIGHT_STD

VOCABULARY = 384
# What sizes are called in the configs of transformers; a family is given those that its config has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32),
    **dict.fromkeys(
        ("intermediate_size", "shared_intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("initializer_range", "init_std"), WEIGHT_STD),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k", "num_key_value_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim", "rotary_dim", "state_size"), 8),
    **{"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
LATENT = {"num_key_value_heads": 4}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
# model_type -> models of it, and what its config needs besides the sizes.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("Trinity", {}),
    "apertus": ("Apertus 8B", {}),
    "arcee": ("AFM 4.5B", {}),
    "aria_text": ("Aria, its text model", {}),
    "bamba": ("Bamba 9B", {**MAMBA2, "attn_layer_indices": [1]}),
    "biogpt": ("BioGPT", {}),
    "bitnet": ("BitNet b1.58 2B", {}),
    "bloom": ("BLOOM", {}),
    "codegen": ("CodeGen", {}),
    "cohere": ("Command R", {}),
    "cohere2": ("Command R7B", {}),
    "ctrl": ("CTRL", {"dff": 48}),
    "deepseek_v2": ("DeepSeek-V2-Lite", LATENT),
    "deepseek_v3": ("DeepSeek-V3, R1", LATENT),
    "diffllama": ("DiffLlama", {}),
    "doge": ("Doge", {}),
    "dots1": ("dots.llm1", {}),
    "ernie4_5": ("ERNIE 4.5 0.3B", {}),
    "ernie4_5_moe": ("ERNIE 4.5 21B-A3B", {}),
    "exaone4": ("EXAONE 4.0", {}),
    "falcon": ("Falcon 7B", {"num_kv_heads": 1}),
    "falcon_h1": ("Falcon-H1", {**MAMBA2, "mamba_d_ssm": 64}),
    "falcon_mamba": ("Falcon Mamba 7B", {}),
    "flex_olmo": ("FlexOlmo", {}),
    "gemma3n_text": ("Gemma 3n, its text model", PER_LAYER),
    "gemma4_text": ("Gemma 4, its text model", PER_LAYER | {"global_head_dim": 8}),
    "glm": ("GLM-4 9B", {}),
    "glm4": ("GLM-4 0414", {}),
    "glm4_moe": ("GLM-4.5", {}),
    "gpt_bigcode": ("StarCoder", {}),
    "gpt_neo": ("GPT-Neo", {"attention_types": [[["global", "local"], 1]]}),
    "gptj": ("GPT-J 6B", {}),
    "granitemoe": ("Granite 3 1B-A400M", {}),
    "granitemoehybrid": ("Granite 4.0", {**MAMBA2, "layer_types": ["mamba", "attention"]}),
    "granitemoeshared": ("Granite MoE with shared experts", {}),
    "helium": ("Helium 1", {}),
    "hunyuan_v1_dense": ("Hunyuan 7B", {}),
    "hunyuan_v1_moe": ("Hunyuan A13B", {}),
    "jamba": ("Jamba", {"attn_layer_offset": 1, "attn_layer_period": 2}),
    "jetmoe": ("JetMoE 8B", {}),
    "lfm2": ("LFM2", {}),
    "lfm2_moe": ("LFM2 8B-A1B", {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "llama4_text": ("Llama 4, its text model", {}),
    "longcat_flash": (
        "LongCat-Flash",
        LATENT | {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 24},
    ),
    "mamba": ("Mamba", {}),
    "mamba2": ("Mamba-2", {"num_heads": 8, "head_dim": 8}),
    "minicpm3": ("MiniCPM3 4B", LATENT),
    "minimax": ("MiniMax-Text-01", {}),
    "minimax_m2": ("MiniMax-M2", {}),
    "ministral": ("Ministral 8B", {}),
    "mpt": ("MPT 7B", {}),
    "nemotron": ("Nemotron-4, Minitron", {}),
    "nemotron_h": (
        "Nemotron-H",
        {
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
    "olmo": ("OLMo", {}),
    "olmo2": ("OLMo 2", {}),
    "olmo3": ("OLMo 3", {}),
    "olmo_hybrid": ("OLMo Hybrid", {}),
    "olmoe": ("OLMoE", {}),
    "openai-gpt": ("GPT", {}),
    "persimmon": ("Persimmon 8B", {}),
    "phi": ("Phi-1.5, Phi-2", {}),
    "phimoe": ("Phi-3.5-MoE", {}),
    "qwen2_moe": ("Qwen1.5-MoE-A2.7B", {}),
    "qwen3_5_text": ("Qwen3.5, its text model", DELTA),
    "qwen3_5_moe_text": ("Qwen3.5 MoE, its text model", DELTA),
    "qwen3_next": ("Qwen3-Next", DELTA),
    "recurrent_gemma": ("RecurrentGemma", {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16}),
    "rwkv": ("RWKV-4", {"attention_hidden_size": 32}),
    "seed_oss": ("Seed-OSS 36B", {}),
    "smollm3": ("SmolLM3", {}),
    "stablelm": ("StableLM 2", {}),
    "starcoder2": ("StarCoder2", {}),
    "vaultgemma": ("VaultGemma 1B", {}),
    "xglm": ("XGLM", {}),
    "zamba": ("Zamba", {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "hybrid"]}),
    "zamba2": ("Zamba2", {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "hybrid"]}),
}
# Family of any -> models of it.
EXAMPLES = {
    "llama": "Llama 2 and 3, TinyLlama",
    "llama_tied": "Llama 3.2 1B",
    "mistral": "Mistral 7B",
    "qwen2": "Qwen2.5 7B",
    "qwen2_tied": "Qwen2.5 0.5B",
    "qwen3": "Qwen3 8B",
    "gpt2": "GPT-2",
    "gpt_neox": "Pythia",
    "phi3": "Phi-3, Phi-4",
    "gemma": "Gemma 7B",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 1B",
    "mixtral": "Mixtral 8x7B",
    "qwen3_moe": "Qwen3 30B-A3B",
    "opt": "OPT 125M, 1.3B",
    "opt_projected": "OPT 350M",
    "granite": "Granite 3 8B",
    "gpt_oss": "gpt-oss 20B",
} | {family: models for family, (models, _) in MORE.items()}


def tiny_config(model_type: str, given: dict[str, Any]) -> PreTrainedConfig:
    """A config with `SIZES` where it has them.

    Args:
        model_type: of transformers.
        given: what it is to have instead.
    """
    kind = CONFIG_MAPPING[model_type]
    known = kind().to_dict().keys()
    named = {kind.attribute_map.get(name, name): value for name, value in SIZES.items()}
    return kind(**{name: value for name, value in named.items() if name in known} | given)
