"""Sizes of tiny models, by the names that transformers' configs give them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

WIDTH, HEADS, KV_HEADS, HEAD_WIDTH, FEED_FORWARD, VOCABULARY, LAYERS = 64, 4, 2, 16, 128, 300, 2


class Each(NamedTuple):
    """A size for lists alone: `LISTS` says what they become."""

    size: int


KEEP = None
PATCH = "patch"
LISTS: dict[object, Sequence[int] | int] = {
    LAYERS: 1,
    32: 32,
    WIDTH: (16, 32, 64, 128),
    HEADS: (1, 2, 4, 8),
}  # a list of integers becomes that many of the first ones, or one integer throughout
RULES: tuple[tuple[int | Each | str | None, str], ...] = (
    (64, r".*codebook_size"),
    (VOCABULARY, r".*(^|_)vocab_size$ .*vocab_size_.* n_vocab num_embeddings unpadded_vocab_size"),
    (KEEP, r"type_vocab_size max_depth num_feature_levels n_layers_per_attn_res_block"),
    (0, r"num_kv_shared_layers num_nextn_predict_layers .*mtp.*layers.*"),
    (LAYERS, r"max_window_layers"),
    (1, r"first_k_dense_replace num_dense_layers"),
    (
        LAYERS,
        r"""
        (.*_)?n(um)?_.*layers num_layers n_layers? encoder_layers decoder_layers .*_layers layers depth .*_depth
        num_blocks num_encoder_blocks num_decoder_blocks
    """,
    ),
    (KV_HEADS, r"num_(key_value|kv)_heads .*num_key_value_heads .*num_kv_heads multi_query_group_num"),
    (
        HEADS,
        r"""
        (.*_)?num_.*attention_heads (.*_)?num_heads n_heads? (.*_)?attention_heads num_query_heads .*_n_heads
        .*_num_heads resampler_heads
    """,
    ),
    (8, r"qk_rope_head_dim"),
    (
        HEAD_WIDTH,
        r"""
        head_dim .*_head_dim dim_head d_kv d_head kv_channels attention_head_dim .*_dim_head rotary_dim .*_head_size
        head_size .*linear_.*head_dim query_pre_attn_scalar
    """,
    ),
    (48, r"(.*_)?moe_intermediate_size expert_ffn_hidden_size moe_ffn.* .*expert.*(intermediate|ffn).*"),
    (
        FEED_FORWARD,
        r"""
        (.*_)?intermediate_size .*ffn_dim .*mlp_dim d_ff d_inner n_inner dim_feedforward .*feed_?forward.*(size|dim)
        ffn_hidden_size .*intermediate_dim .*fuser_intermediate_dim intermediate_size_mlp .*ffn_size hidden_dim_ffn
    """,
    ),
    (WIDTH, r"projection_dim .*_proj_dim classifier_proj_size .*projection_size"),
    (
        WIDTH,
        r"""
        image_text_hidden_size (.*_)?hidden_size(_.*)? (.*_)?hidden_dim d_model n_embd dim (.*_)?embed_dim emb_dim
        embedding_dim embedding_size (.*_)?width attention_hidden_size out_hidden_size vision_output_dim output_dim
        projector_hidden_size d_embed word_embed_proj_dim lru_width .*pooler_output_size .*output_hidden_size
        fusion_hidden_size text_dim vision_dim hidden_dimension feature_size mask_feature_size adapter_out_dim
        .*_hidden_dims? decoder_dim encoder_dim .*latent_dim$ output_proj_dims .*_units cross_attention_dim
        .*hidden_dimension kv_dim d_latents .*proj_out_dim
    """,
    ),
    (
        128,
        r"""
        max_position_embeddings n_positions .*max_.*positions? n_ctx max_seq(uence)?_len(gth)? seq_length
        context_length max_position max_.*position_embeddings .*num_positions max_text_len max_sequence_length
        model_max_length
    """,
    ),
    (
        4,
        r"""
        num_experts num_local_experts n_routed_experts moe_num_experts .*num_experts num_routed_experts .*n_experts
    """,
    ),
    (2, r"num_experts_per_tok .*experts_per_tok.* moe_k moe_topk num_selected_experts top_k_experts router_top_k"),
    (1, r"n_group topk_group num_expert_groups? n_groups mamba_n_?groups topk_groups?"),
    (1, r"n_shared_experts num_shared_experts moe_num_shared_experts"),
    (32, r"(kv|q|o|.*)_?lora_rank .*_lora_dim .*_rank$ o_groups_rank"),
    (8, r"index_topk .*_topk$"),
    (HEAD_WIDTH, r"state_size .*d_state ssm_state_size .*state_dim mamba_.*state.*"),
    (HEADS, r"mamba_n_?heads mamba_num_heads linear_num_(key|value)_heads linear_num_heads"),
    (32, r"mamba_d_head mamba_head_dim mamba_headdim"),
    (8, r"time_step_rank mamba_dt_rank"),
    (HEAD_WIDTH, r".*chunk_size$ .*chunk_length$"),
    (8, r"sliding_window.* .*local_attention attention_window attn_window.* .*window_length attention_window_size"),
    (8, r"num_queries num_object_queries num_query_tokens .*num_latents .*n_latents num_denoising num_proposals"),
    (
        16,
        r"""
        mm_tokens_per_image image_seq_length image_seq_len video_seq_length num_image_tokens vision_soft_tokens.*
        audio_seq.*
    """,
    ),
    (16, r"num_conv_pos_embeddings"),
    (4, r"num_conv_pos_embedding_groups"),
    (Each(32), r"conv_dim"),
    (Each(32), r"tdnn_dim"),
    (
        Each(LAYERS),
        r"""
        depths num_block_repeats stage_num_blocks num_blocks_per_stage .*layers_per_(stage|block) blocks_per_stage
    """,
    ),
    (
        Each(WIDTH),
        r"""
        hidden_sizes embed_dims neck_hidden_sizes encoder_hidden_sizes widths decoder_hidden_sizes stage_dims
    """,
    ),
    (Each(HEADS), r"num_attention_heads num_heads .*_heads"),
    (32, r"(.*_)?image_size input_size crop_size resolution img_size pretrain_image_size .*image_resolution"),
    (PATCH, r"patch_size"),
    (KEEP, r"mel_bins n_mels num_mel_bins .*_mel_bins"),
    (128, r"max_source_positions max_target_positions"),
    (8, r"num_codevectors_per_group"),
    (32, r"codevector_dim proj_codevector_dim"),
    (HEAD_WIDTH, r".*_size_per_head"),
    (
        32,
        r"""
        base_channels fusion_.*channels .*output_channels auxiliary_channels conv_channels stem_channels
        .*neck_out_channels .*output_channel latent_channels .*initial_channel num_filters .*mid_channels
    """,
    ),
)  # the most that an integer may be, and patterns of names; the first that fits decides
COMPILED = [(re.compile("|".join(f"(?:{pattern})" for pattern in patterns.split())), size) for size, patterns in RULES]


def small(name: str, value: Any) -> Any:
    """Return the value of a config's entry in a tiny model."""
    for pattern, size in COMPILED:
        if not pattern.fullmatch(name):
            continue
        if isinstance(value, (list, tuple)):
            if not value or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
                return value
            items = _small_list(value, size)
            if items is not None:
                return type(value)(items)
        elif size is KEEP or not isinstance(value, int) or isinstance(value, bool):
            return value
        elif size == PATCH:
            return _small_patch(value)
        elif isinstance(size, int):
            return size if value > size or size == 0 else value
    return value


def _small_list(values: Sequence[int], size: int | Each | str | None) -> Sequence[int] | None:
    """Return what a list becomes by a rule's size, or None if the rule is none for lists."""
    if size == PATCH:
        return [_small_patch(value) for value in values]
    items = LISTS.get(size.size if isinstance(size, Each) else size)
    if items is None:
        return None
    if isinstance(items, int):
        return [LAYERS] if len(values) == 1 and items == 1 else [items] * len(values)
    return items[: len(values)] if len(values) <= len(items) else values


def _small_patch(value: int) -> int:
    return value if value <= 4 else 8
