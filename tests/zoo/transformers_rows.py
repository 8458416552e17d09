"""Rows of the zoo: architectures of transformers, tiny and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.oracle import Loss
from tests.zoo.row import KEY_BIAS, NORMALIZED_BIAS, Row, seeded

VOCAB = 128
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {
    **_TOKENS,
    **_LAYERS,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_ENCODER = {**_TOKENS, **_LAYERS, "intermediate_size": 64, "max_position_embeddings": 64}
_IMAGE = {**_LAYERS, "intermediate_size": 64, "image_size": 16, "patch_size": 8}
IMAGE_TOKEN = 3


def _of(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """Builds the class called `model` from the configuration class called `config`."""

    def build() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return made

    return build


def _tokens(index: int, length: int = 8) -> torch.Tensor:
    return torch.randint(5, VOCAB, (2, length), generator=seeded(index))


def _language(model: Any, index: int) -> torch.Tensor:
    """Next-token or masked loss of token numbers."""
    tokens = _tokens(index)
    torch.manual_seed(index)
    return torch.as_tensor(model(input_ids=tokens, labels=tokens).loss)


def _padded(model: Any, index: int) -> torch.Tensor:
    """The same, with the end of one sequence masked out."""
    tokens = _tokens(index)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    torch.manual_seed(index)
    return torch.as_tensor(model(input_ids=tokens, attention_mask=mask, labels=labels).loss)


def _drawn(model: Any, index: int, *shape: int) -> torch.Tensor:
    """Random input in the dtype that the model computes in."""
    parameters = getattr(model, "module", model).parameters()
    return torch.randn(shape, generator=seeded(index)).to(next(parameters).dtype)


def _whisper(model: Any, index: int) -> torch.Tensor:
    features = _drawn(model, index, 2, 8, 16)
    torch.manual_seed(index)
    return torch.as_tensor(model(input_features=features, labels=_tokens(index)).loss)


def _classified(model: Any, index: int) -> torch.Tensor:
    pixels = _drawn(model, index, 4, 3, 16, 16)
    labels = torch.randint(0, 4, (4,), generator=seeded(index))
    torch.manual_seed(index)
    return torch.as_tensor(model(pixel_values=pixels, labels=labels).loss)


def _segmented(model: Any, index: int) -> torch.Tensor:
    pixels = _drawn(model, index, 2, 3, 32, 32)
    labels = torch.randint(0, 4, (2, 32, 32), generator=seeded(index))
    torch.manual_seed(index)
    return torch.as_tensor(model(pixel_values=pixels, labels=labels).loss)


def _contrastive(model: Any, index: int) -> torch.Tensor:
    pixels = _drawn(model, index, 2, 3, 16, 16)
    torch.manual_seed(index)
    out = model(input_ids=_tokens(index), pixel_values=pixels, return_loss=True)
    return torch.as_tensor(out.loss)


def _described(model: Any, index: int) -> torch.Tensor:
    pixels = _drawn(model, index, 2, 3, 16, 16)
    tokens = _tokens(index)
    tokens[:, 1:5] = IMAGE_TOKEN  # one for each of four patches
    torch.manual_seed(index)
    return torch.as_tensor(model(input_ids=tokens, pixel_values=pixels, labels=tokens).loss)


def _llava() -> nn.Module:
    import transformers

    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_IMAGE, projection_dim=32),
        text_config=transformers.LlamaConfig(**_DECODER),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def _clip() -> nn.Module:
    import transformers

    config = transformers.CLIPConfig(
        text_config={**_ENCODER, "projection_dim": 32},
        vision_config={**_IMAGE, "projection_dim": 32},
        projection_dim=32,
    )
    return transformers.CLIPModel(config)


def _decoder(
    name: str,
    prefix: str,
    notes: str = "",
    loss: Loss = _language,
    per_step: str = "",
    **settings: Any,
) -> Row:
    build = _of(f"{prefix}ForCausalLM", f"{prefix}Config", **_DECODER, **settings)
    return Row(name, "decoder", build, loss, notes, per_step=per_step)


DECODERS = (
    _decoder("Llama", "Llama"),
    _decoder("Qwen3", "Qwen3", head_dim=8),
    _decoder("Gemma", "Gemma", "embedding tied", head_dim=8),
    _decoder("Gemma 2", "Gemma2", "embedding tied, sliding windows", head_dim=8, sliding_window=4),
    Row(
        "Gemma 3",
        "decoder",
        _of("Gemma3ForCausalLM", "Gemma3TextConfig", **_DECODER, head_dim=8, sliding_window=4),
        _language,
        "embedding tied, sliding windows",
    ),
    _decoder("Phi", "Phi", per_step=KEY_BIAS),
    _decoder("Phi-3", "Phi3"),
    Row(
        "GPT-2",
        "decoder",
        _of(
            "GPT2LMHeadModel",
            "GPT2Config",
            **_TOKENS,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
        ),
        _language,
        "embedding tied",
    ),
    _decoder("GPT-NeoX", "GPTNeoX", per_step=KEY_BIAS),
    _decoder(
        "OPT",
        "OPT",
        "embedding tied",
        per_step=KEY_BIAS,
        ffn_dim=64,
        word_embed_proj_dim=32,
    ),
    _decoder("BLOOM", "Bloom", "padded", _padded),
    _decoder("Falcon", "Falcon", "padded", _padded),
    _decoder("Mamba", "Mamba", "its loop over time, without kernels", state_size=4),
)

_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


def _experts(name: str, prefix: str, notes: str = "", **more: Any) -> Row:
    build = _of(f"{prefix}ForCausalLM", f"{prefix}Config", **(_DECODER | more))
    return Row(name, "mixture of experts", build, _language, notes)


EXPERTS = (
    _experts("Mixtral", "Mixtral", num_local_experts=4),
    _experts("Qwen3-MoE", "Qwen3Moe", **_EXPERTS, num_experts=4, head_dim=8),
    _experts(
        "DeepSeek-V3",
        "DeepseekV3",
        "latent attention; the router has a bias that is a buffer",
        **_EXPERTS,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    _experts(
        "GPT-OSS",
        "GptOss",
        "attention sinks, sliding windows",
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=4,
    ),
)

_BETWEEN = {**_TOKENS, "d_model": 32, "decoder_start_token_id": 1}
_BART = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}

ENCODERS = tuple(
    Row(
        name, "encoder", _of(f"{prefix}ForMaskedLM", f"{prefix}Config", **_ENCODER, **more), _padded
    )
    for name, prefix, more in (
        ("BERT", "Bert", {}),
        ("ModernBERT", "ModernBert", {"local_attention": 4}),
        ("DeBERTa", "Deberta", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
        ("DeBERTa-v2", "DebertaV2", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    )
)

BETWEEN = (
    Row(
        "T5",
        "encoder-decoder",
        _of(
            "T5ForConditionalGeneration",
            "T5Config",
            **_BETWEEN,
            d_ff=64,
            d_kv=8,
            num_layers=2,
            num_heads=4,
        ),
        _padded,
        "embedding shared by encoder, decoder and head",
    ),
    Row(
        "BART",
        "encoder-decoder",
        _of(
            "BartForConditionalGeneration",
            "BartConfig",
            **_BETWEEN,
            **_BART,
            max_position_embeddings=64,
        ),
        _padded,
        "embedding shared by encoder, decoder and head",
    ),
    Row(
        "Whisper",
        "encoder-decoder",
        _of(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **_BETWEEN,
            **_BART,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=16,
        ),
        _whisper,
        "audio; positions of the encoder frozen",
    ),
)

VISION = (
    Row(
        "ViT",
        "vision",
        _of("ViTForImageClassification", "ViTConfig", **_IMAGE, num_labels=4),
        _classified,
        per_step=KEY_BIAS,
    ),
    Row(
        "ConvNeXt",
        "vision",
        _of(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            patch_size=2,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1, 1, 2, 1],
            drop_path_rate=0.1,
            num_labels=4,
        ),
        _classified,
        "stochastic depth",
    ),
    Row(
        "SegFormer",
        "vision",
        _of(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 16, 24, 32],
            num_attention_heads=[1, 2, 3, 4],
            decoder_hidden_size=32,
            num_labels=4,
        ),
        _segmented,
        "batch normalization: its running statistics are compared as well",
        per_step=NORMALIZED_BIAS,
    ),
    Row("CLIP", "multimodal", _clip, _contrastive, per_step=KEY_BIAS),
    Row(
        "LLaVA",
        "multimodal",
        _llava,
        _described,
        "image tokens replaced by patches",
        per_step=KEY_BIAS,
    ),
)

TRANSFORMERS_ROWS = (*DECODERS, *EXPERTS, *ENCODERS, *BETWEEN, *VISION)
