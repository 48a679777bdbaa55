"""Adapters of the soak: ten kinds that people train, and what somebody hostile would upload."""

import json
import os
import struct
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file

BASE = "qwen2"  # its projections have biases
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SECRET = "the-secret-of-another-customer"
KINDS = {  # options of tiny.add_lora, and "file_dtype"
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 32}},
    "saved": {"modules_to_save": ["lm_head"]},
    "others": {"target_modules": ["down_proj", "o_proj"]},
    "bfloat16": {"file_dtype": torch.bfloat16},
    "float16": {"file_dtype": torch.float16},
    "rank": {"r": 6, "exclude_modules": ["v_proj"]},
    "gaussian": {"init_lora_weights": "gaussian", "target_modules": r".*\.(q_proj|v_proj)"},
}
_ENDLESS = "(?:[^X]|[^Y])" * 28 + "Z"
_APPARENT = 4 << 40


def make_base(folder):
    """The base, and one adapter of each kind in ``templates``."""
    tiny.save_model(tiny.build(BASE), folder / "base")
    for kind, options in KINDS.items():
        options = dict(options)
        dtype = options.pop("file_dtype", None)
        model = tiny.add_lora(tiny.build(BASE), dtype=dtype, **options)
        tiny.save_adapter(model, folder / "templates" / kind)
    for bias in ("all", "lora_only"):
        model = tiny.add_lora(tiny.build(BASE), bias=bias)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.add_(1.0)
        tiny.save_adapter(model, folder / "templates" / f"bias_{bias}")
    other = folder / "others" / "adapter"
    make(folder, "plain", 10**6, other)
    (other / "notes.txt").write_text(SECRET)


def make(root, kind, seed, folder):
    """An adapter of a kind with values of its own."""
    template = root / "templates" / kind
    folder.mkdir(parents=True)
    (folder / CONFIG).write_bytes((template / CONFIG).read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (tensor.float() * (0.5 + torch.rand(tensor.shape, generator=generator))).to(
            tensor.dtype
        )
        for name, tensor in load_file(template / WEIGHTS).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def _config(**changes):
    def change(folder):
        tiny.edit_json(folder / CONFIG, lambda config: config.update(changes))

    return change


def _tensors(change):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def _sparse(name):
    def make_file(folder):
        (folder / name).write_text("{}")
        os.truncate(folder / name, _APPARENT)

    return make_file


def _sparse_tensor(folder):
    """A tensor of 3 GB that nobody needs, of which the disk holds nothing."""
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, start = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    size = 3 << 30
    header["base_model.model.extra.weight"] = {
        "dtype": "F32",
        "shape": [size // 4],
        "data_offsets": [start, start + size],
    }
    text = json.dumps(header).encode()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data[8 + length :])
        file.truncate(8 + len(text) + start + size)


def _link(name, target):
    def link(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(os.path.relpath(folder.parent.parent / target, folder))

    return link


def _manifest(files):
    def write(folder):
        entry = {"bytes": 1, "sha256": "0" * 64}
        contents = {
            "tool": "antidote-fast",
            "schema_version": 1,
            "files": {name.format(root=folder.parent.parent): entry for name in files},
        }
        (folder / "COMPLETE.json").write_text(json.dumps(contents))

    return write


def _pickle(beside):
    def write(folder):
        (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
        if not beside:
            (folder / WEIGHTS).unlink()

    return write


def _token_names(folder):
    for name in (".netrc", "hf_token.txt", "my_secrets.json", "token", "api-key.json"):
        (folder / name).write_text(json.dumps(SECRET))


def _remove(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


HOSTILE = {  # what is done to the folder of a plain adapter, or the kind that it is made of
    "pissa": _config(init_lora_weights="pissa"),
    "pissa_niter": _config(init_lora_weights="pissa_niter_4"),
    "pissa_forever": _config(init_lora_weights="pissa_niter_1000000000"),
    "olora": _config(init_lora_weights="olora"),
    "bias_all": "bias_all",
    "bias_lora_only": "bias_lora_only",
    "endless_rank_pattern": _config(rank_pattern={_ENDLESS: 4}),
    "endless_alpha_pattern": _config(alpha_pattern={_ENDLESS: 4}),
    "endless_targets": _config(target_modules=_ENDLESS),
    "endless_exclude": _config(exclude_modules=_ENDLESS),
    "looks_ahead": _config(target_modules="^(?!.*visual).*(?:[qkv]_proj).*"),  # not hostile at all
    "sparse_file": _sparse("tokenizer.json"),
    "sparse_unknown_file": _sparse("backup.tar"),
    "sparse_tensor": _sparse_tensor,
    "link_to_weights": _link(WEIGHTS, f"others/adapter/{WEIGHTS}"),
    "link_to_notes": _link("notes.txt", "others/adapter/notes.txt"),
    "manifest_elsewhere": _manifest(["{root}/others/adapter/notes.txt", "../../others"]),
    "manifest_of_nothing": _manifest([]),
    "truncated": lambda folder: tiny.truncate(folder / WEIGHTS),
    "nan": _tensors(lambda t: t | {min(t): t[min(t)] * torch.nan}),
    "shapes": _tensors(lambda t: {name: v[:, :-1].contiguous() for name, v in t.items()}),
    "lacking": _tensors(lambda t: {name: t[name] for name in sorted(t)[1:]}),
    "huge_rank": _config(r=10**9),
    "token_names": _token_names,
    "pickle": _pickle(False),
    "pickle_beside": _pickle(True),
    "deep_json": lambda folder: (folder / CONFIG).write_text("[" * 100_000),
    "no_json": lambda folder: (folder / CONFIG).write_bytes(b"\xff{not json"),
    "missing": _remove,
}
"""Every one of them is set aside, or pruned as it is alone; it never touches another one."""


def make_hostile(root, name, seed, folder):
    """A hostile adapter."""
    how = HOSTILE[name]
    make(root, how if isinstance(how, str) else "plain", seed, folder)
    if callable(how):
        how(folder)


def fingerprint(root):
    """{path: what it holds} of all inputs, so that a change shows; of giants size and time."""
    found = {}
    for top in ("base", "adapters", "others"):
        for path in sorted((root / top).rglob("*")):
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                stat = path.stat()
                small = stat.st_size < 1 << 24
                found[str(path)] = path.read_bytes() if small else (stat.st_size, stat.st_mtime_ns)
    return found


def holds_secret(folder):
    """The files below a folder in which another customer's text is found."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return [str(path) for path in files if SECRET.encode() in path.read_bytes()]
