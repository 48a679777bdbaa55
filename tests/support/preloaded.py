"""What the fork server of the tests imports once (``forked.py``)."""

import importlib
import importlib.util
import os

# As ``entry_point`` does, before anything reads them.
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import interpreting
import torch

# Many of these are imported late, by functions.
for name in (
    *("accelerate", "datasets", "filelock", "huggingface_hub", "jsonargparse", "peft", "rich"),
    *("attrs", "docstring_parser", "yaml", "torch.distributed.tensor", "transformers"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"),
    *("antidote_fast.backends.cpu", "antidote_fast.backends.cuda", "antidote_fast.cli.entry"),
    *("antidote_fast.config.flags", "antidote_fast.fleet.fleet"),
    *(f"antidote_fast.stages.{stage}" for stage in ("align", "calibrate", "evaluate", "finetune")),
    *("antidote_fast.stages.prune", "antidote_fast.streaming.job", "tiny"),
):
    importlib.import_module(name)

if importlib.util.find_spec("triton"):
    interpreting.interpret_faster()
    importlib.import_module("antidote_fast.backends.triton")
torch.set_num_threads(1)
