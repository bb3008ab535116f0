"""The sizes of tiny models by the meaning of a field's name, and what names cannot tell (see tiny.py)."""

from __future__ import annotations

from typing import Any

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 128, 256, 4, 2, 32
MAMBA_HEAD_DIM = 8  # the number of these heads is part of a matrix's width: 32 of them
VOCABULARY, POSITIONS, MOST_LAYERS, ORDINARY_ID = 512, 256, 8, 200

_LAYERS = r"num_hidden_layers|n_layers?|num_layers|layers|depth|num_blocks|num_layers_per_stack|\w+_(layers|depth)"
_HEADS = r"(\w+_)?(n|num)_(\w+_)?heads?|(\w+_)?heads|num_attention_heads_per_layer|n_heads?_\w+"

# (pattern of the whole name, size): the first that matches decides. A number is the size; a negative number is the
# most that it may be (smaller values stay); None leaves the value. Values of 0, negative ones and None always stay:
# they switch something off.
RULES: list[tuple[str, int | None]] = [
    (r"post_conv_\w+_channels", HIDDEN),
    (r"\w*(kernel|stride|ratio|factor|expand|conv|dilation|merge)\w*|mamba_d_conv|conv1d_width", None),
    (r"type_vocab_size|task_type_vocab_size|in_channels|\w*num_channels|input_channels|audio_channels|channels", None),
    (r"\w*mel_bins|input_feat_per_channel|\w*patch_dim|chunk_size_feed_forward|\w*_per_tok\w*_id|context_size", None),
    (r"num_kv_shared_layers|num_dense_layers|num_residual_layers|num_lstm_layers|no_rope_layer\w*", None),
    (r"\w*feature_layers?|\w*_window_layers|num_nextn_predict_layers|num_sparse_\w+_layers|num_feat_\w+", None),
    (_LAYERS, 2),
    (r"depths", 1),
    (
        r"\w*(vocab_size|vocab_size_\w+|group_vocab|codebook_size|num_embeddings|num_embeds|ngram_vocab_size_base)",
        -VOCABULARY,
    ),
    (r"max_source_positions", 64),
    (r"original_max_position_embeddings|relative_\w+|position_bias_\w+", -POSITIONS),
    (r"\w*(max_\w*position\w*|n_positions|n_ctx|max_seq_len|seq_len|max_target_positions|context_length)", -POSITIONS),
    (r"model_max_length|max_\w*positions|position_embedding_size", -POSITIONS),
    (r"num_position_embeddings", -64),
    (r"(mamba_)?chunk_size", -32),
    (r"intermediate_multiple_size", None),
    (r"upsample_groups|upsample_initial_channel|output_channels|downsample_channels", HIDDEN),
    (r"num_filters", -8),
    (r"base_channels|latent_channels", -32),
    (r"latent_query_num|num_query_tokens", -8),
    (r"(\w+_)?(sliding_windows?|window_size|sliding_window_size|attention_window|window_len|local_attention)", -16),
    (r"attention_chunk_size|keep_window_size|attention_window_size|index_topk|index_block_size", -16),
    (r"image_size|\w*_image_size|max_img_size|crop_size|resolution", 32),
    (r"patch_size", 8),
    (r"\w*(experts_per_tok|experts_per_token|moe_topk|moe_k|moe_top_k|top_k_experts|num_selected_experts)", -2),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|zero_expert_num", -2),
    (r"\w*experts", -4),
    (r"n_group|num_expert_group", -2),
    (r"n_groups|\w*_n_?groups|num_query_groups", -2),
    (r"o_groups", -2),
    (r"index_n_heads|linear_num_value_heads|linear_num_heads|altup_num_inputs", -HEADS),
    (r"linear_num_key_heads|\w*(kv|key_value)_heads|kv_n_heads|num_kv_heads", -KV_HEADS),
    (r"mamba_n(um)?_heads", 2 * HIDDEN // MAMBA_HEAD_DIM),
    (r"mamba_d_head|mamba_head_?dim", MAMBA_HEAD_DIM),
    (_HEADS, -HEADS),
    (r"\w*(head_?dim|d_kv|d_head|head_size|kv_channels|dim_head)", HEAD_DIM),
    (r"rotary_dim|d_rel", HEAD_DIM // 2),
    (r"\w*lora_rank|hc_lowrank", 64),
    (r"\w*_rank|\w*d_state|state_size|ssm_state_size|hidden_size_per_layer_input", 32),
    (r"\w*(moe|expert)\w*(intermediate|ffn|hidden_dim|expert_dim|hidden)\w*|share_expert_dim", 64),
    (r"\w*(intermediate|ffn|feed_forward|mlp|inner|dff|d_ff|dim_ff)(\w*(size|dim))?|mamba_d_ssm", INTERMEDIATE),
    (r"\w*(hidden_sizes?|hidden_dim|hidden_size_\w+|d_model|n_embd|embed_dim|embedding_size|width)", HIDDEN),
    (r"\w*(emb_dim|embedding_dim|_dim|_in_dim|out_dim|input_size|output_size|out_channels|dim)", -HIDDEN),
]
# What no name tells: {model type of a level: {field: value}}; a dot leads into a nested level or a dictionary.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "blt": {"num_hidden_layers": 2},
    "fun_asr_nano": {"adaptor_config.intermediate_size": HIDDEN // 4},  # the class demands a quarter
    "dots3_note_text": {"head_dim": 2 * HEAD_DIM},  # that of the sliding layers: both parts of a query
    "hrm_text": {"num_layers_per_stack": None},  # set from num_hidden_layers, which counts every cycle afterwards
    "mllama": {"vision_config.vision_output_dim": 2 * HIDDEN},  # the last hidden state and one in between
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling_mm_model": {"vision_config.n_layers": 6},  # one for each prime factor of a patch: no SciPy then
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [64, 64], "axial_pos_shape": [16, 16]},
}

# One transformer shared by several layers needs two of them to share it.
_SHARED = ["linear_attention", "linear_attention", "hybrid", "hybrid"]
EXCEPTIONS["zamba"] = {"num_hidden_layers": 4, "layers_block_type": _SHARED}
EXCEPTIONS["zamba2"] = EXCEPTIONS["zamba"] | {"hybrid_layer_ids": [2, 3], "n_mamba_heads": 32, "mamba_headdim": 8}

# Left out: what a class derives from the sizes, and what speaks of a checkpoint's weights.
DROPPED = {"stage_names", "out_features", "out_indices", "quantization_config", "compression_config"}

# What a class's own defaults leave out although its model needs it: set only where it is None or absent.
MISSING: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": VOCABULARY - 12},
    "chameleon": {"vocabulary_map": {"<image>": VOCABULARY - 12, "IMGIMGBSAZ": VOCABULARY - 11}},
    "cohere_compass_text": {"rope_parameters.full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    "dots1": {"n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 500, "<|extra_200|>": 501, "<|visual token 000000|>": 502}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "1/2"},
    "hunyuan_vl_text": {"rope_parameters.mrope_section": [4, 4, 4, 4]},
    "instructblip": {"image_token_index": VOCABULARY - 12},
    "instructblipvideo": {"video_token_index": VOCABULARY - 12},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "qwen3_omni_moe": {"talker_config.spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "qwen4_exp_text": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
    },
    "step3p5": {"sliding_window": 16},
    "xmod": {"default_language": "en_XX"},
}
# The sections of rotary pairs for time, height and width are defaults in the code of these, made for larger heads.
MISSING |= {
    name: {"rope_parameters.mrope_section": [4, 6, 6]}
    for name in (
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen2_5_omni_text",
        "qwen2_5_omni_talker",
        "paddleocr_vl_text",
        "glm4v_text",
        "glm_ocr_text",
    )
}
MISSING |= {
    "glm4v_moe_text": {"rope_parameters.mrope_section": [2, 3, 3]},
    "ernie4_5_vl_moe_text": {"rope_parameters.mrope_section": [6, 6, 4]},
}
