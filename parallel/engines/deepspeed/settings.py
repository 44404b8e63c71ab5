from __future__ import annotations
class Offload: pass
def make_config(engine, precision):
    elements = int(engine.bucket_mb * 2**20 / 4)
    elements -= elements % 2
    zero = {"stage": engine.zero_stage, "reduce_bucket_size": elements, "allgather_bucket_size": elements, "overlap_comm": engine.overlap, "contiguous_gradients": True,
      "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }
    if precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config
