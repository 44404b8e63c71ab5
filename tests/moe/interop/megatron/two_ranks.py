"""Load a checkpoint into a GPTModel that two ranks share, and save it again, in layouts one after another.

    python two_ranks.py FIELDS LOADED SAVED LAYOUT…

FIELDS is JSON as in transformer_config.json; for each LAYOUT, such as expert_model_parallel_size, SAVED/LAYOUT gets the
checkpoint. A process of its own, since gloo does not survive a fork.
"""

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

spec = importlib.util.spec_from_file_location("conftest_of_megatron", Path(__file__).with_name("conftest.py"))
tools = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)


def run(rank, fields, loaded, saved, layouts):
    for layout in layouts:
        store = dist.FileStore(str(saved / f"{layout}.store"), 2)
        with tools.ranks(store, rank, 2, **{layout: 2}) as megatron:
            model = megatron.build(fields, seed=rank + 1, moe_token_dispatcher_type="alltoall", **{layout: 2})
            megatron.save(megatron.load(model, loaded), saved / layout, {"non_homogeneous_layers": True})


def main(fields, loaded, saved, *layouts):
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")
    tools.patch_for_cpu(pytest.MonkeyPatch())
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run(rank, json.loads(fields), Path(loaded), Path(saved), layouts)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return max(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
