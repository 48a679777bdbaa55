"""Names and folders to live models and tokenizers, each failure in one line.

A folder is checked (:func:`antidote_fast.files.checkpoint.open_checkpoint`) before transformers
sees it, so that neither a pickle nor a shard that is cut short nor remote code ever reaches a
loader.
"""

import contextlib
import copy
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from antidote_fast.errors import (
    AntidoteError,
    DataError,
    UsageError,
    first_line,
    printable,
    readable,
)
from antidote_fast.files.bounds import bounded, check_counts
from antidote_fast.files.checkpoint import Checkpoint, check_inside, open_checkpoint, read_json
from antidote_fast.files.manifest import check_input
from antidote_fast.models.kinds import Model, Tokenizer

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*"]
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_DTYPES = {"auto": "auto"} | {n: getattr(torch, n) for n in ("bfloat16", "float16", "float32")}


@readable()
def resolve_folder(name_or_path: str | Path, argument: str = "model_name_or_path") -> Path:
    """A local folder as it is; a hub name as the folder of its downloaded files.

    Raises:
        DataError: neither a folder nor on the hub, or the hub cannot be reached.
    """
    text = os.fspath(name_or_path)
    folder = Path(os.path.expanduser(text))
    shown = f"{argument}={text!r}"
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"{shown}: is a file; give the folder it is in")
    if not _HUB_NAME.fullmatch(text):
        raise DataError(f"{shown}: no such folder")
    from huggingface_hub import errors, snapshot_download

    options = {"allow_patterns": _HUB_FILES, "ignore_patterns": ["*/*"], "etag_timeout": 10}
    try:
        return Path(snapshot_download(text, **options))
    except errors.GatedRepoError:
        why = "on the hub it needs access rights"
    except errors.RepositoryNotFoundError:
        why = "on the hub it is not there"
    except (errors.HFValidationError, errors.EntryNotFoundError, OSError, RuntimeError):
        why = "it is neither in the local cache nor can the hub be reached"
    raise DataError(f"{shown}: no such folder, and {why}")


@contextlib.contextmanager
def foreign(where: str | Path, fails: str, memory: str | None = None) -> Iterator[None]:
    """Inside the block, whatever a foreign file makes a library raise is a DataError of one line.

    Args:
        where, fails: the folder, and what cannot be done with it.
        memory: how a message of too little memory ends, which is no fault of the file then but an
            AntidoteError.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if memory is not None and isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise AntidoteError(f"{where}: not enough memory to load it{memory}") from error
        raise DataError(f"{where}: {fails}: {printable(first_line(error)):.300}") from error


def open_model(config: Any, argument: str = "model_name_or_path") -> Checkpoint:
    """The checkpoint that a field of a stage's config names, checked by its headers.

    Args:
        config: the stage's frozen dataclass.
        argument: the field: one that ends in ``adapter`` for a PEFT adapter, any other for a whole
            model.

    Raises:
        DataError: no such folder, one that cannot be used, or one of the other kind.
    """
    name = getattr(config, argument)
    folder = resolve_folder(name, argument)
    checkpoint = open_checkpoint(folder, trust_remote_code=config.trust_remote_code)
    wants_adapter = argument.endswith("adapter")
    if checkpoint.is_adapter and not wants_adapter:
        goes_on_it = argument == "model_name_or_path" and hasattr(config, "adapter")
        other = "its base model, and this folder as adapter" if goes_on_it else "a whole model"
        raise DataError(f"{argument}={name!r}: is a PEFT adapter; give {other}")
    if wants_adapter and not checkpoint.is_adapter:
        other = f"give it as model_name_or_path, without {argument}"
        raise DataError(f"{argument}={name!r}: is a whole model, not an adapter; {other}")
    return checkpoint


def load_model(
    model_name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: str | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    auto_class: str = "AutoModelForCausalLM",
) -> Model:
    """Load a model in eval mode from a safetensors folder or the hub.

    Args:
        model_name_or_path: a folder or a hub name.
        dtype: auto (the checkpoint's), bfloat16, float16 or float32, or a torch dtype.
        device: as :func:`pick_device` takes it.
        device_map: ``"auto"``, or a map of modules, by which accelerate spreads the model over all
            GPUs, and over the CPU where those are full; ``device`` must be auto then.
        trust_remote_code: allow code that the checkpoint ships to run.
        auto_class: which transformers class loads it.

    Raises:
        DataError: no such model; a pickle; a file that is missing, cut short or malformed; a
            tensor that the model needs and the file lacks (transformers would fill it at random);
            a configuration that transformers does not know; remote code that is not trusted.
        UsageError: unknown dtype or device, or a device together with device_map.
        AntidoteError: not enough memory.
    """
    if device_map is not None and device != "auto":
        raise UsageError(f"device={device!r}: must be auto where device_map is given")
    folder = resolve_folder(model_name_or_path)
    checkpoint = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    if checkpoint.is_adapter:
        named = f"model_name_or_path={os.fspath(model_name_or_path)!r}: is a PEFT adapter"
        raise DataError(f"{named}; give its base model, and this folder as adapter")
    check_input(folder)
    device = pick_device(device)
    options = {"dtype": pick_dtype(dtype), "use_safetensors": True, "local_files_only": True}
    options |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    if device_map is not None:
        options["device_map"] = device_map
    elif "quantization_config" in checkpoint.config or device.type == "meta":
        # Packed weights do not move afterwards; those on meta are checked and never read.
        options["device_map"] = {"": str(device)}
    transformers = import_transformers()
    place = device if device_map is None else f"device_map={device_map!r}"
    with foreign(folder, "cannot be loaded", f" on {place}"), bounded(checkpoint):
        model, info = getattr(transformers, auto_class).from_pretrained(str(folder), **options)
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        count = f"{len(missing)} tensors that the model needs"
        raise DataError(f"{folder}: lacks {count}, {missing[0]!r} first")
    if "device_map" not in options:
        model.to(device)
    return model.eval()


@readable()
def load_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load a tokenizer as it is saved; one without a pad token stays without.

    It gets an attribute ``num_embeddings``, how many token ids the model beside it has embeddings
    for (None where none is there), by which ids beyond are refused before weights are loaded.

    Raises:
        DataError: no such folder, no tokenizer in it, or one that cannot be read.
    """
    folder = resolve_folder(name_or_path, "tokenizer")
    if not any([check_inside(folder, name) for name in _TOKENIZER_FILES]):
        raise DataError(f"{folder}: holds no tokenizer ({_TOKENIZER_FILES[0]})")
    if (folder / "tokenizer_config.json").exists():
        config = read_json(folder, "tokenizer_config.json")
        if config.get("auto_map") and not trust_remote_code:
            what = "its tokenizer asks to run code of its own (auto_map)"
            raise DataError(f"{folder}: {what}; pass trust_remote_code if you trust it")
    if (folder / "config.json").exists():  # which transformers reads too
        check_counts(folder, read_json(folder, "config.json"))
    transformers = import_transformers()
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    with foreign(folder, "its tokenizer cannot be read"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), **options)
        tokenizer.num_embeddings = int(config.get_text_config().vocab_size)
    except Exception:  # a tokenizer alone, or what a foreign config makes transformers raise
        tokenizer.num_embeddings = None
    return tokenizer


def import_transformers() -> ModuleType:
    """The transformers package; not one in which a config alone could make code run.

    Raises:
        AntidoteError: it is older than 5.5.
    """
    import transformers

    numbers = [int(n) for n in re.findall(r"[0-9]{1,6}", transformers.__version__)[:2]]
    if numbers < [5, 5]:
        raise AntidoteError(
            f"transformers {transformers.__version__} is installed; 5.5 or later is needed "
            "(in older ones a checkpoint's config can run code): pip install -U transformers"
        )
    return transformers


def pick_device(device: str | torch.device) -> torch.device:
    """A torch device; ``auto`` is cuda where there is one, else cpu."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        why = first_line(error)
        raise UsageError(f"device={str(device)!r}: cannot be used: {why}") from None
    return chosen


def pick_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A torch dtype, or ``"auto"``."""
    picked = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if picked not in _DTYPES.values():
        raise UsageError(f"dtype={dtype!r}: must be one of {', '.join(_DTYPES)}")
    return picked


def check_not_quantized(checkpoint: Checkpoint) -> None:
    """Refuse a quantised checkpoint where its own weights are to be pruned."""
    quantization = checkpoint.config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise DataError(
            f"{checkpoint.folder}: is quantised ({method or 'unknown method'}); its packed weights "
            "cannot be pruned one by one: prune an adapter on it, or the model before quantisation"
        )


def without_weights(base: Checkpoint, dtype: str | torch.dtype, trust_remote_code: bool) -> Model:
    """The model of a checkpoint, its weights on meta; what its own code computes is real.

    Raises:
        DataError: a configuration that transformers does not know, or that asks for far more than
            the files hold.
    """
    import transformers
    from accelerate import init_empty_weights

    dtype = pick_dtype(dtype)
    with foreign(base.folder, "cannot be loaded"):
        config = transformers.AutoConfig.from_pretrained(
            str(base.folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
        if dtype == "auto":
            saved = (entry.dtype for entry in base.tensors.values())
            floats = (d for d in saved if d is not None and d.is_floating_point)
            dtype = getattr(config, "dtype", None) or next(floats, torch.float32)
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        with torch.device("meta"), bounded(base):  # at first without memory for buffers either
            transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)
        with init_empty_weights(include_buffers=False):
            return transformers.AutoModelForCausalLM.from_config(config, **options)
