"""Known data sets of the hub, loaded through `datasets`."""

from dataclasses import dataclass

from antidote_fast.data.records import BEAVERTAILS_ROLES, role_needed
from antidote_fast.errors import DataError, UsageError, first_line

# The paper tests on 122 of AlpacaEval's 805 prompts; the rest may be trained on.
NUM_ALPACA_EVAL_TEST = 122


@dataclass(frozen=True)
class HubSource:
    """How one data set of the hub is loaded: its arguments and the hub split of each of ours."""

    path: str
    train: str
    test: str | None
    config: str | None = None
    data_files: str | None = None
    roles: tuple[str, ...] = ("train", "test")


_BEAVERTAILS_SOURCE = HubSource(
    "PKU-Alignment/BeaverTails", "30k_train", "30k_test", roles=BEAVERTAILS_ROLES
)
# Its loading script is no longer run by `datasets`; the file that it read is.
_ALPACA_EVAL_SOURCE = HubSource(
    "tatsu-lab/alpaca_eval",
    f"train[:-{NUM_ALPACA_EVAL_TEST}]",
    f"train[-{NUM_ALPACA_EVAL_TEST}:]",
    data_files="alpaca_eval.json",
)
HUB_SOURCES = {
    "PKU-Alignment/BeaverTails": _BEAVERTAILS_SOURCE,
    "stanfordnlp/sst2": HubSource("stanfordnlp/sst2", "train", "validation"),
    "glue/sst2": HubSource("nyu-mll/glue", "train", "validation", config="sst2"),
    "fancyzhang/ag_news": HubSource("fancyzhang/ag_news", "train", "test"),
    "openai/gsm8k": HubSource("openai/gsm8k", "train", "test", config="main"),
    "tatsu-lab/alpaca": HubSource("tatsu-lab/alpaca", "train", None),
    "tatsu-lab/alpaca_eval": _ALPACA_EVAL_SOURCE,
}
_WITHOUT_OWNER = ("stanfordnlp/sst2", "fancyzhang/ag_news", "openai/gsm8k")  # known by both names
HUB_SOURCES |= {name.split("/")[1]: HUB_SOURCES[name] for name in _WITHOUT_OWNER}


def find_source(name: str) -> HubSource | None:
    """The known source of a name, however it is capitalised; the hub does not mind either."""
    return next((s for key, s in HUB_SOURCES.items() if key.casefold() == name.casefold()), None)


def _probe_hub(path: str) -> None:
    """Fail within seconds where the hub cannot be reached; `datasets` would retry for 25 s."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return  # then `datasets` reads its cache and asks nobody
    try:
        HfApi().dataset_info(path, timeout=10)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        what = f"the hub answered with HTTP {status}; try again later"
        if status in (401, 403, 404):
            what = f"no such file, and no such data set on the hub that may be read (HTTP {status})"
        raise DataError(f"{path}: {what}") from None
    except Exception as error:
        # The hub client changed its HTTP library, and so these types, from release to release.
        raise DataError(
            f"{path}: no such file, and the hub cannot be reached ({type(error).__name__}); give a "
            "local JSON or JSONL file, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        ) from None


def load_hub_rows(name: str, source: HubSource, hub_split: str) -> list[tuple[str, dict]]:
    """Load one split of a hub data set through `datasets`.

    Raises:
        DataError: the hub cannot be reached (known within seconds), or refuses the data set.
    """
    _probe_hub(source.path)
    import datasets

    try:
        if source.data_files:
            files = f"hf://datasets/{source.path}/{source.data_files}"
            dataset = datasets.load_dataset("json", data_files=files, split=hub_split)
        else:
            dataset = datasets.load_dataset(source.path, source.config, split=hub_split)
    except Exception as error:
        # `datasets` raises a dozen types, its own, pyarrow's and the HTTP client's among them.
        why = f"{type(error).__name__}: {first_line(error):.200}"
        raise DataError(
            f"{name}: split {hub_split!r} cannot be loaded from the hub: {why}"
        ) from error
    return [(f"{name}: {hub_split} row {i}", row) for i, row in enumerate(dataset)]


def resolve_hub(name: str, role: str | None, split: str) -> tuple[HubSource, str, str | None]:
    """The source, hub split and role that a name, an explicit role and a split ask for.

    Raises:
        UsageError: a role that the data set does not have.
        DataError: a data set without a test split asked for it; BeaverTails without a role.
    """
    source = find_source(name) or HubSource(name, "train", "test")
    if role is not None and role not in source.roles:
        raise UsageError(f"dataset={name}:{role}: role must be one of {', '.join(source.roles)}")
    if source is _BEAVERTAILS_SOURCE:
        role = role or ("eval" if split == "test" else None)
        if role is None:
            raise role_needed(name)
        return source, source.test if role == "eval" else source.train, role
    wanted = role or split
    hub_split = source.train if wanted == "train" else source.test
    if hub_split is None:
        raise DataError(f"{name}: has no test split; {name}:train takes its training data")
    return source, hub_split, None
