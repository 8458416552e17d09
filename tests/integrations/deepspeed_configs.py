"""Configurations of DeepSpeed that are public, by their keys and values; sources beside them."""

from __future__ import annotations

from typing import Any


def hf_zero3() -> dict[str, Any]:
    """huggingface/transformers (Apache-2.0), tests/deepspeed/ds_config_zero3.json, 61c7ec9."""
    return {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e14,
            "reduce_bucket_size": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_fp16_weights_on_model_save": True,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 500},
        },
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }


def hf_zero2() -> dict[str, Any]:
    """huggingface/transformers (Apache-2.0), tests/deepspeed/ds_config_zero2.json, 00e12e7."""
    return {
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "loss_scale_window": 1000,
            "initial_scale_power": 16,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
            },
        },
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": 2e8,
            "contiguous_gradients": True,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }


HF_ZERO2_VALUES: dict[str, Any] = {
    "fp16.enabled": False,
    "bf16.enabled": True,
    "optimizer.params.lr": 1e-3,
    "optimizer.params.betas": [0.9, 0.999],
    "optimizer.params.eps": 1e-8,
    "optimizer.params.weight_decay": 0.01,
    "scheduler.params.warmup_min_lr": 0.0,
    "scheduler.params.warmup_max_lr": 1e-3,
    "scheduler.params.warmup_num_steps": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
}


def megatron_infinity(path: str) -> dict[str, Any]:
    """microsoft/DeepSpeedExamples, Megatron-LM-v1.1.5-ZeRO3/examples/
    ds_zero_stage_infinity_config.json, 7d936b3, with its misspelt key; `path` for /nvme_data.
    """
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e8,
            "stage3_param_persitance_threshold": 1e5,
            "stage3_prefetch_bucket_size": 5e7,
            "contiguous_gradients": True,
            "overlap_comm": True,
            "reduce_bucket_size": 90000000,
            "sub_group_size": 1e8,
            "offload_optimizer": {
                "device": "nvme",
                "nvme_path": path,
                "buffer_count": 4,
                "pipeline_read": False,
                "pipeline_write": False,
                "pin_memory": True,
            },
            "offload_param": {
                "device": "nvme",
                "nvme_path": path,
                "max_in_cpu": 1,
                "pin_memory": True,
            },
        },
        "gradient_clipping": 1.0,
        "fp16": {
            "enabled": True,
            "loss_scale": 1024,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "wall_clock_breakdown": True,
        "zero_allow_untested_optimizer": False,
        "aio": {
            "block_size": 1048576,
            "queue_depth": 16,
            "single_submit": False,
            "overlap_events": True,
            "thread_count": 2,
        },
    }
