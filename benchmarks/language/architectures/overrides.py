"""Entries of tiny configs that no rule gives, by the model type of the config or of a part of it."""

from __future__ import annotations

from typing import Any

import transformers

from benchmarks.language.architectures.rules import FEED_FORWARD, HEADS, KV_HEADS, WIDTH


def resnet(*stages: str) -> Any:
    """Return the config of a tiny backbone."""
    form: dict[str, Any] = {"out_features": list(stages), **FOUR_STAGES}
    return transformers.ResNetConfig(embedding_size=16, **form)


def convnext() -> Any:
    """Return the config of a tiny backbone."""
    form: dict[str, Any] = {"out_features": STAGES, **FOUR_STAGES}
    return transformers.ConvNextConfig(**form)


def dinov2() -> Any:
    """Return the config of a tiny backbone."""
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 56}
    form: dict[str, Any] = {"out_features": STAGES, "apply_layernorm": True, "reshape_hidden_states": False}
    return transformers.Dinov2Config(patch_size=14, **sizes, **form)


FOUR_STAGES = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
ATTENTION_LAST = ["linear_attention", "full_attention"]
CONVOLUTION_FIRST = ["conv", "full_attention"]
MAMBA = {"mamba_n_heads": HEADS, "mamba_d_head": 32}
SWIN = {"embed_dim": 16, "window_size": 2, "image_size": 64, "num_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1]}
EFFICIENTNET = {"hidden_dim": 256, "width_coefficient": 0.2, "depth_coefficient": 0.2}
SAM = {
    "global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 32, "mlp_dim": FEED_FORWARD, "output_channels": 64,
}  # fmt: skip
RT_DETR = {"encoder_in_channels": [32, 64, 128], "decoder_in_channels": [WIDTH] * 3}
SERIES = {"prediction_length": 8, "context_length": 16}
DETR = {"backbone_config": lambda: resnet("stage4")}
DEPTH_ANYTHING = {
    "patch_size": 14, "backbone_config": dinov2, "neck_hidden_sizes": [16, 32, 32, 64], "reassemble_hidden_size": WIDTH,
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    # language
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "blt": {"encoder_hash_byte_group_vocab": 500, "encoder_hash_byte_group_size": [3, 4]},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": KV_HEADS, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": FEED_FORWARD, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dory": {
        "n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 1, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [48, 32]},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "gemma3n_text": {
        "intermediate_size": FEED_FORWARD, "activation_sparsity_pattern": None, "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 16, "num_kv_shared_layers": 0,
    },
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "glm5_next_text": {"index_topk": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ATTENTION_LAST, **MAMBA},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": CONVOLUTION_FIRST, "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": CONVOLUTION_FIRST, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 48},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "reformer": {
        "axial_pos_embds_dim": (32, 32), "axial_pos_shape": (8, 16), "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "num_buckets": 4, "feed_forward_size": FEED_FORWARD,
    },
    "step3p7_text": {"sliding_window": 8},
    "xlstm": {"qk_dim_factor": 1.0, "chunk_size": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    # documents
    "layoutlm": {"max_2d_position_embeddings": 128},
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10, "max_2d_position_embeddings": 128, "hidden_size": 64},
    "lilt": {
        "channel_shrink_ratio": 4, "hidden_size": 96, "num_attention_heads": 4, "max_2d_position_embeddings": 128,
    },
    # images beside text
    "align_vision_model": EFFICIENTNET,
    "chameleon": {"vocabulary_map": {"<image>": 297, "IMGIMGBZ": 200}},
    "emu3": {"vocabulary_map": {"<image>": 297, "<|visual token 000000|>": 200, "<|extra_200|>": 298}},
    "llama4_vision_model": {
        "projector_input_dim": WIDTH, "projector_output_dim": WIDTH, "intermediate_size": WIDTH,
        "vision_output_dim": WIDTH,
    },
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_vision": {"image_size": [32, 32], "num_position_embeddings": 16},
    "siglip2_vision_model": {"num_patches": 16},
    # images
    "bit": {"num_groups": 4},
    "conditional_detr": DETR,
    "cvt": {"embed_dim": (16, 32, 64), "num_heads": (1, 2, 4), "depth": (1, 1, 1)},
    "dab-detr": DETR,
    "deformable_detr": {"backbone_config": lambda: resnet("stage2", "stage3", "stage4")},
    "depth_anything": DEPTH_ANYTHING,
    "detr": DETR,
    "donut-swin": SWIN,
    "dpt": {"backbone_out_indices": [0, 1, 2, 3], "num_hidden_layers": 4, "neck_hidden_sizes": [16, 32, 32, 64]},
    "efficientnet": EFFICIENTNET,
    "maskformer-swin": SWIN,
    "prompt_depth_anything": DEPTH_ANYTHING,
    "pvt": {"sequence_reduction_ratios": (1, 1, 1, 1), "strides": (4, 2, 1, 1)},
    "rt_detr": RT_DETR,
    "rt_detr_resnet": {"hidden_sizes": [16, 32, 64, 128], "embedding_size": 16},
    "rt_detr_v2": RT_DETR,
    "sam2_hiera_det_model": {
        "hidden_size": 16, "image_size": [128, 128], "num_query_pool_stages": 3,
        "window_positional_embedding_background_size": [4, 4], "blocks_per_stage": [1, 1, 1, 1],
        "embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [4, 2, 4, 2], "global_attention_blocks": [2],
    },
    "sam2_prompt_encoder": {"image_size": 128, "patch_size": 16},
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": WIDTH,
    },
    "sam_hq_mask_decoder": {"vit_dim": 64},
    "sam_hq_vision_model": SAM,
    "sam_vision_model": SAM,
    "swin": SWIN,
    "swin2sr": {"embed_dim": 24, "num_heads": [2, 2], "depths": [1, 1], "window_size": 4, "mlp_ratio": 2.0},
    "swinv2": SWIN,
    "table-transformer": DETR,
    "textnet": {"hidden_sizes": [16, 16, 32, 32, 64]},
    "upernet": {"backbone_config": convnext, "pool_scales": (1, 2), "auxiliary_in_channels": 64},
    # sound
    "clap_audio_model": {
        "hidden_size": 128, "patch_embeds_hidden_size": 16, "spec_size": 64, "num_attention_heads": [1, 2, 2, 4],
        "window_size": 4,
    },
    "dac": {"encoder_hidden_size": 8, "decoder_hidden_size": 64},
    "encodec": {"num_filters": 8, "hidden_size": 32, "codebook_dim": 32},
    "gemma3n_audio": {"conf_num_attention_heads": HEADS},
    "mimi": {
        "codebook_dim": 32, "upsample_groups": 32, "vector_quantization_hidden_dimension": 32, "num_filters": 8,
        "num_quantizers": 4,
    },
    "moonshine": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "univnet": {"model_hidden_channels": 8},
    "wav2vec2-bert": {"vocab_size": 40},
    "wav2vec2-conformer": {"vocab_size": 40},
    "wavtokenizer": {"codebook_dim": WIDTH},
    # series
    "autoformer": SERIES,
    "informer": SERIES,
    "time_series_transformer": SERIES,
}  # fmt: skip
